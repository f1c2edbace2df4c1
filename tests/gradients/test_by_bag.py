"""The gradients of bags: one value for each bag inside of a RowGrad, whatever is done with it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import embax
from embax import Ragged, RowGrad, Table, embedding_bag
from embax._base.by_bag import ByBag

ROWS, DIM = 40, 3
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.normal(size=(ROWS, DIM)).astype(np.float32)
IDS = np.array([[1, 2, 1], [2, 2, 2], [8, -1, 5], [3, 3, 0]], np.int32)
FACTORS = RANDOM.normal(size=IDS.shape).astype(np.float32)
RAGGED = Ragged(jnp.ravel(IDS), jnp.array([0, 5, 5, 6, 10], jnp.int32))  # the last two ids are not used
BAGS = {
    "fixed": (IDS, None),
    "weighted": (IDS, FACTORS),
    "ragged": (RAGGED, None),
    "ragged, weighted": (RAGGED, FACTORS.ravel()),
}
TABLE = Table(jnp.asarray(WEIGHT), padding_idx=2)


def loss(table, bags, weights=None, mode="mean", pool=embedding_bag):
    return jnp.sin(pool(table, bags, weights, mode=mode)).sum()


def by_rows(table, bags, weights=None, mode="mean"):
    """`embedding_bag` of TABLE's rules, by rows of the weight."""
    ragged = isinstance(bags, Ragged)
    ids = jnp.ravel(bags.values if ragged else bags)
    places, number = jnp.arange(ids.size), bags.bags if ragged else bags.shape[0]
    bag_of = jnp.searchsorted(bags.offsets, places, side="right") - 1 if ragged else places // bags.shape[1]
    counted = (ids != 2) & (places < bags.offsets[-1] if ragged else True)
    factors = jnp.where(counted, 1.0 if weights is None else jnp.ravel(weights), 0.0)

    def summed(values):
        return jnp.zeros((number, *values.shape[1:])).at[bag_of].add(values, mode="drop")

    if mode == "sum":
        divisor = jnp.ones(number)
    else:
        divisor = summed(factors) if mode == "mean" else jnp.sqrt(summed(factors**2))
        divisor = jnp.where(summed(counted.astype(jnp.float32)) > 0, divisor, 1)
    return summed(table.weight[ids] * factors[:, None]) / divisor[:, None]


def of(function):
    """The gradient of a function of the table, as rows and by JAX."""

    @jax.jit
    def both(table):
        rows = embax.grad(lambda table: function(table, embedding_bag))(table)
        return inside(rows), jax.grad(lambda table: function(table, by_rows))(table).weight

    return both(TABLE)


def inside(gradient):
    """What is in a gradient that does not leave the program."""
    return gradient.to_dense(), gradient.values, gradient.ids, as_arrays(gradient.held)


def as_arrays(held):
    return (held.values, held.bag_of, held.factors) if isinstance(held, ByBag) else None


@pytest.mark.parametrize("name", BAGS)
def test_grad_holds_one_value_for_each_bag(name):
    bags, weights = BAGS[name]
    for mode in ("sum", "mean", "sqrtn"):
        (dense, values, ids, held), expected = of(lambda table, pool, mode=mode: loss(table, bags, weights, mode, pool))
        np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-6)
        of_bags, bag_of, factors = held
        assert of_bags.shape == (4, DIM)
        bag_of = np.arange(12) // 3 if bag_of is None else bag_of
        assert (held[1] is None, factors is None) == ("ragged" not in name, weights is None)
        repeated = np.asarray(of_bags)[bag_of] * (1 if factors is None else np.asarray(factors)[:, None])
        np.testing.assert_array_equal(values, np.where((ids < ROWS)[:, None], repeated, 0))


def test_values_of_padding_are_zero_beside_nan():
    @jax.jit
    def run(table):
        gradient = embax.grad(lambda table: embedding_bag(table, [[1, 2]]).sum() * jnp.nan)(table)
        assert isinstance(gradient.held, ByBag)
        return gradient.values

    values = run(TABLE)
    assert np.isnan(values[0]).all()
    np.testing.assert_array_equal(values[1], 0)


def test_arithmetic_keeps_one_value_for_each_bag():
    @jax.jit
    def run(table):
        gradients = {name: embax.grad(loss)(table, *bags) for name, bags in BAGS.items()}
        gradients["long"] = embax.grad(loss)(table, jnp.ravel(IDS)[None])
        gradients["rows"] = embax.grad(lambda table: embax.lookup(table, IDS[0]).sum())(table)
        gradients["none"] = gradients["rows"] - gradients["rows"]
        fixed = gradients["fixed"]
        made = {
            "half": (0.5 * fixed, 0.5 * fixed.to_dense()),
            "quotient": (fixed / 3, fixed.to_dense() / 3),
            "negative": (-fixed, -fixed.to_dense()),
            "twice": (fixed + fixed, 2 * fixed.to_dense()),
            "all": (sum(gradients.values()), sum(x.to_dense() for x in gradients.values())),
        }
        assert all(isinstance(gradient.held, ByBag) for gradient, _ in made.values())
        assert made["twice"][0].held.bag_of is None
        assert made["all"][0].held.values.shape == (4 * 4 + 1 + 3 + 6, DIM)
        return {name: (gradient.to_dense(), dense) for name, (gradient, dense) in made.items()}

    for found, expected in run(TABLE).values():
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def features(table, pool):
    """Several bags and a lookup of one table."""
    others = 2 * loss(table, IDS[:2], FACTORS[:2], pool=pool) + embax.lookup(table, IDS[0]).sum()
    return loss(table, IDS, pool=pool) + others


def of_ragged(table, pool, offsets):
    return loss(table, Ragged(RAGGED.values, offsets), pool=pool)


OFFSETS = jnp.stack([RAGGED.offsets, jnp.array([0, 1, 2, 3, 12])])
WEIGHTED = IDS[:, None], FACTORS[:, None]
IN_A_LOSS = {
    "several": features,
    "jit": lambda table, pool: jax.jit(lambda table: loss(table, IDS, pool=pool))(table),
    "checkpoint": lambda table, pool: jax.checkpoint(lambda table: loss(table, IDS, pool=pool))(table),
    "scaled and negated": lambda table, pool: -3 * loss(table, IDS, pool=pool) / 7,
    "vmap": lambda table, pool: jax.vmap(lambda *bags: loss(table, *bags, pool=pool))(*WEIGHTED).sum(),
    "vmap of ragged": lambda table, pool: jax.vmap(functools.partial(of_ragged, table, pool))(OFFSETS).sum(),
    "scan": lambda table, pool: jax.lax.scan(
        lambda total, ids: (total + loss(table, ids, pool=pool), None), 0.0, IDS[:, None]
    )[0],
    "map of weighted": lambda table, pool: jax.lax.map(lambda bags: loss(table, *bags, pool=pool), WEIGHTED).sum(),
    "map of ragged": lambda table, pool: jax.lax.map(functools.partial(of_ragged, table, pool), OFFSETS).sum(),
}
OF_EACH_ID = {
    "cond": lambda table, pool: jax.lax.cond(table.weight[0, 0] > 9, lambda: 0.0, lambda: loss(table, IDS, pool=pool)),
    "bags of one": lambda table, pool: loss(table, IDS[:, :1], pool=pool),
    "a part of the weight": lambda table, pool: loss(Table(table.weight[1:], padding_idx=2), IDS % 30, pool=pool),
}


@pytest.mark.parametrize(("function", "by_bag"), [
    *((function, True) for function in IN_A_LOSS.values()), *((function, False) for function in OF_EACH_ID.values())
], ids=[*IN_A_LOSS, *OF_EACH_ID])  # fmt: skip
def test_grad_of_transformed_bags(function, by_bag):
    (dense, _, _, held), expected = of(function)
    assert (held is not None) == by_bag
    np.testing.assert_allclose(dense, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("rules", "dtype", "weighted"),
    [({"scale_grad_by_freq": True}, "float32", False), ({}, "bfloat16", True), ({}, "float16", True)],
)
def test_grad_that_depends_on_more_than_the_bag_has_a_value_for_each_id(rules, dtype, weighted):
    """A frequency differs within a bag, and a narrow value is weighted before it is rounded."""
    table = Table(jnp.asarray(WEIGHT, dtype), **rules)

    @jax.jit
    def run(table):
        gradient = embax.grad(loss)(table, IDS, FACTORS if weighted else None)
        assert not isinstance(gradient.held, ByBag)
        return gradient.to_dense()

    expected = jax.jit(jax.grad(loss))(table, IDS, FACTORS if weighted else None).weight
    np.testing.assert_allclose(run(table).astype(np.float32), expected.astype(np.float32), rtol=1e-2, atol=1e-2)


def test_narrow_values_are_rounded_once_a_bag():
    table = Table(jnp.asarray(WEIGHT, "bfloat16"))

    @jax.jit
    def run(table):
        gradient = embax.grad(loss)(table, IDS)
        assert isinstance(gradient.held, ByBag)
        return gradient.values, gradient.held.values

    values, of_bags = run(table)
    assert values.dtype == of_bags.dtype == jnp.bfloat16
    np.testing.assert_array_equal(values, np.repeat(np.asarray(of_bags), 3, axis=0))


def test_derivatives_of_a_gradient():
    """By weights of ids, by the table, and forward: as of the dense gradient."""

    def square(gradient, table, weights):
        gradient = gradient(lambda table: loss(table, IDS, weights))(table)
        dense = gradient.weight if isinstance(gradient, Table) and not isinstance(gradient, RowGrad) else gradient
        dense = dense.to_dense() if isinstance(dense, RowGrad) else dense
        return (dense**2).sum()

    @functools.partial(jax.jit, static_argnums=0)
    def run(gradient, table, weights):
        of_both = jax.grad(functools.partial(square, gradient), (0, 1))(table, weights)
        forward = jax.jvp(functools.partial(square, gradient), (table, weights), (table, weights))
        return of_both[0].weight, of_both[1], forward

    for found, expected in zip(
        *(jax.tree.leaves(run(gradient, TABLE, FACTORS)) for gradient in (embax.grad, jax.grad)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_jacobians_of_bags():
    """A weight that does not count may be NaN."""
    factors = np.where(IDS == 2, np.nan, FACTORS)

    def pooled(pool, weight):
        return jnp.sin(pool(Table(weight, padding_idx=2), IDS, factors))

    @jax.jit
    def run(weight):
        functions = [functools.partial(pooled, pool) for pool in (embedding_bag, by_rows)]
        return [[jacobian(f)(weight) for jacobian in (jax.jacfwd, jax.jacrev)] for f in functions]

    for found, expected in zip(*run(TABLE.weight), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_pytree_has_one_value_for_each_id():
    """So a gradient of bags has the same leaves as any other, in branches of `cond` too."""
    gradient = embax.grad(loss)(TABLE, IDS)
    assert isinstance(gradient.held, ByBag)
    assert repr(gradient) == "RowGrad(12 ids of 40 rows, float32[12,3])"
    leaves, structure = jax.tree.flatten(gradient)
    plain = RowGrad(gradient.ids, gradient.values, ROWS)
    assert [leaf.shape for leaf in leaves] == [(12, DIM), (12,)]
    assert jax.tree.structure(gradient.weight) == jax.tree.structure(plain)
    copied = structure.unflatten(leaves)
    through_jit = jax.jit(lambda gradient: gradient)(gradient)
    chosen = jax.jit(lambda which: jax.lax.cond(which, lambda: gradient.weight, lambda: plain))(True)
    for other in (copied, through_jit, chosen):
        assert not isinstance(other.held, ByBag)
        np.testing.assert_array_equal(other.values, gradient.values)
        np.testing.assert_array_equal(other.ids, gradient.ids)
    with pytest.raises(TypeError, match="RowGrad"):
        jax.tree.map(jnp.add, gradient, gradient)


def test_values_may_be_asked_for_in_an_inner_program():
    """They must not be kept: outside, they would be a tracer that has escaped."""

    @jax.jit
    def run(table):
        gradient = embax.grad(loss)(table, IDS)
        inner = jax.jit(lambda: gradient.values)()
        return inner, gradient.values, gradient.deduplicated().to_dense(), gradient.to_dense()

    with jax.check_tracer_leaks():
        inner, outer, once, dense = run(TABLE)
    np.testing.assert_array_equal(inner, outer)
    np.testing.assert_allclose(once, dense, rtol=1e-6)


def test_lanes_and_sums_over_lanes():
    def gradient(ids, factors):
        own = embax.grad(loss)(TABLE, ids, factors)
        total = own.psum("batch")
        assert isinstance(own.held, ByBag)
        assert isinstance(total.held, ByBag)
        assert total.held.values.shape == (4, DIM)
        return own, total.to_dense()

    lanes, total = jax.jit(jax.vmap(gradient, axis_name="batch"))(IDS[:, None], FACTORS[:, None])
    expected = jax.jit(embax.grad(loss))(TABLE, IDS, FACTORS).to_dense()
    assert lanes.values.shape == (4, 3, DIM)
    for found in (lanes.sum().to_dense(), *total):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
