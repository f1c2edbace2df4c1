"""embedding_bag under every transformation, and its gradient by rows: of one bag, of several, of bags and lookups."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import ROWS, WEIGHT, assert_same_gradient
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import embax
from embax import Ragged, Table, embedding_bag, lookup

TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32
MODES = ["sum", "mean", "sqrtn", "max"]
with_modes = pytest.mark.parametrize("mode", MODES)
SMOOTH = MODES[:3]  # those that take weights

# Padding, duplicates, empty bags; and three batches of one capacity.
LISTS = [[2, 0, 2, 6], [], [1, 2, 2], [2], [-1, 3, 4]]
BATCHES = [LISTS, [[5, 5], [5], [], [], [2, 0]], [[], [], [1, 1, 1, 3, 1], [2, 2, 2, 2, 2, 2], [6]]]
CAPACITY = 13
FACTORS = np.random.default_rng(2).uniform(0.5, 2, size=CAPACITY).astype(np.float32)
COTANGENTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
RULES = {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True}

# Quickly made machine code need not be fast.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def ragged(lists):
    return Ragged.from_lists(lists).pad_to(CAPACITY)


def stacked():
    return jax.tree.map(lambda *x: jnp.stack(x), *map(ragged, BATCHES))


def factors_of(lists, factors=FACTORS):
    ends = [0, *itertools.accumulate(map(len, lists))]
    return [factors[start:end] for start, end in itertools.pairwise(ends)]


def loss(table, bags, weights=None, mode="sum"):
    """A loss whose every derivative depends on the rows that are read."""
    return (jnp.sin(embedding_bag(table, bags, weights, mode)) * COTANGENTS).sum()


def expected_gradients(lists, factors=None, mode="sum", weight=WEIGHT, **rules):
    cotangents = np.cos(reference.embedding_bag(weight, lists, factors, mode, **rules)) * COTANGENTS
    return reference.embedding_bag_gradient(weight, lists, cotangents, factors, mode, **rules)


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, **TOLERANCE)


# ---- Gradients by rows.


@pytest.mark.parametrize("layout", ["2d", "ragged"])
@pytest.mark.parametrize("rules", [{}, RULES, {"freeze": True}], ids=["none", "all", "freeze"])
@pytest.mark.parametrize(("mode", "weighted"), [*itertools.product(SMOOTH, [False, True]), ("max", False)])
def test_gradient_by_rows_is_that_of_jax(mode, weighted, rules, layout):
    bags = np.array([[2, 0, 2], [1, 2, 2], [2, 2, 2], [-1, 3, 4], [0, 0, 2]]) if layout == "2d" else ragged(LISTS)
    ids = bags if layout == "2d" else bags.values
    params = {"table": Table(WEIGHT, **rules)}
    if weighted:
        params["weights"] = jnp.reshape(jnp.resize(FACTORS, ids.size), ids.shape)

    def of(params):
        return loss(params["table"], bags, params.get("weights"), mode)

    (value, gradient), expected = quick_jit(lambda p: (embax.value_and_grad(of)(p), jax.value_and_grad(of)(p)))(params)
    assert_close(value, expected[0])
    assert_same_gradient(gradient, expected[1], **TOLERANCE)
    rows = gradient["table"]
    assert rows.ids.shape == ((0,) if rules.get("freeze") else (ids.size,))
    if layout == "ragged" and not rules.get("freeze"):
        # Neither padding nor what is in no bag names a row.
        padding = rules.get("padding_idx")
        named = [ROWS if id_ == padding else id_ % ROWS for id_ in itertools.chain(*LISTS)]
        assert rows.ids.tolist() == named + [ROWS] * (CAPACITY - len(named))
    if weighted:
        assert not isinstance(gradient["weights"], embax.RowGrad)


def test_bags_and_lookups_of_one_table_in_one_loss():
    def of(params, batches):
        one, other = params["table"], params["other"]
        total = loss(one, batches[0]) + loss(one, batches[1], params["weights"], "mean") + loss(other, batches[2])
        total += loss(one, batches[2], mode="max")
        return total + (lookup(one, [[1, 2], [3, 1]]) ** 2).sum()

    params = {"table": Table(WEIGHT, padding_idx=0), "other": Table(-WEIGHT), "weights": jnp.asarray(FACTORS)}
    batches = [*map(ragged, BATCHES)]
    both = quick_jit(lambda *args: (embax.grad(of, on_dense="error")(*args), jax.grad(of)(*args)))
    gradient, expected = both(params, batches)
    assert_same_gradient(gradient, expected, **TOLERANCE)
    assert gradient["table"].ids.shape == (3 * CAPACITY + 4,)
    assert gradient["other"].ids.shape == (CAPACITY,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_by_rows_sums_in_float32(dtype):
    table = Table(jnp.ones((3, 2), dtype))
    for bags in np.ones((1, 4096), int), Ragged(np.ones(4096, int), [0, 4096]):
        of = embax.grad(lambda table, bags=bags: embedding_bag(table, bags).astype(jnp.float32).sum())
        rows = quick_jit(of)(table)
        np.testing.assert_array_equal(rows.to_dense()[1], np.full(2, 4096, jnp.dtype(dtype)))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_bag_inside_of_an_inner_transformation_is_a_dense_use(mode):
    table, batches = Table(WEIGHT, **RULES), stacked()

    def of(table):
        return jax.vmap(lambda bags: loss(table, bags, mode=mode))(batches).sum()

    with pytest.warns(embax.DenseGradientWarning, match="inside an inner transformation"):
        gradient = quick_jit(embax.grad(of))(table)
    assert isinstance(gradient, Table)
    assert_close(gradient.weight, sum(expected_gradients(lists, mode=mode, **RULES)[0] for lists in BATCHES))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_training_by_rows_equals_dense_training(mode):
    target = jnp.asarray(COTANGENTS)

    def of(params, bags):
        pooled = embedding_bag(params["table"], bags, params["weights"], mode)
        return jnp.square(pooled - target).mean()

    @functools.partial(quick_jit, static_argnames="by_rows")
    def step(params, state, bags, *, by_rows):
        tx, grad = (embax.optim.lift(dense), embax.grad) if by_rows else (dense, jax.grad)
        updates, state = tx.update(grad(of)(params, bags), state, params)
        return embax.apply_updates(params, updates), state

    dense = optax.adagrad(0.3)
    results = []
    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        for by_rows in True, False:
            params = {"table": Table(WEIGHT, padding_idx=2), "weights": jnp.asarray(FACTORS)}
            state = (embax.optim.lift(dense) if by_rows else dense).init(params)
            for lists in BATCHES * 2:
                params, state = step(params, state, ragged(lists), by_rows=by_rows)
            results.append(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *results)  # float32, six steps
    np.testing.assert_array_equal(results[0]["table"].weight[2], WEIGHT[2])
    assert not np.allclose(results[0]["table"].weight[5], WEIGHT[5])


# ---- Transformations.


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint], ids=["jit", "remat"])
@with_modes
def test_grad(mode, wrap):
    factors = None if mode == "max" else factors_of(LISTS)
    weights = None if mode == "max" else FACTORS
    of_table, of_weights = quick_jit(jax.grad(wrap(functools.partial(loss, mode=mode)), (0, 2)))(
        Table(WEIGHT, **RULES), ragged(LISTS), weights
    )
    expected, expected_of_weights = expected_gradients(LISTS, factors, mode, **RULES)
    assert_close(of_table.weight, expected)
    if weights is not None:
        assert_close(of_weights, np.concatenate([*expected_of_weights, np.zeros(2)]))


@pytest.mark.parametrize("mode", SMOOTH)
def test_jvp_and_jacfwd(mode):
    table, bags = Table(WEIGHT, **RULES), ragged(LISTS)

    def pool(weight, weights):
        return embedding_bag(Table(weight, **RULES), bags, weights, mode)

    forward = quick_jit(jax.jacfwd(pool, (0, 1)))(table.weight, FACTORS)
    for j, (of_table, of_weights) in enumerate(zip(*(np.reshape(x, (15, -1)) for x in forward), strict=True)):
        cotangents = np.zeros(15)
        cotangents[j] = 1
        expected, expected_of_weights = reference.embedding_bag_gradient(
            WEIGHT, LISTS, cotangents.reshape(5, 3), factors_of(LISTS), mode, **RULES
        )
        assert_close(of_table, expected.ravel())
        assert_close(of_weights, np.concatenate([*expected_of_weights, np.zeros(2)]))
    tangents = np.sin(WEIGHT), np.cos(FACTORS)
    _, pushed = quick_jit(lambda *args: jax.jvp(pool, args, tangents))(WEIGHT, FACTORS)
    assert_close(pushed, np.tensordot(forward[0], tangents[0], 2) + forward[1] @ tangents[1])


@pytest.mark.parametrize(("mode", "layout"), [("sum", "2d"), ("mean", "ragged"), ("sqrtn", "2d")])
def test_second_derivatives_are_those_of_differences(mode, layout):
    bags = np.array([[2, 0, 2], [1, 2, 5], [-1, 3, 4]]) if layout == "2d" else ragged(LISTS)
    weights = FACTORS[:9].reshape(3, 3) if layout == "2d" else FACTORS

    def of(weight, weights):
        return jnp.sin(embedding_bag(Table(weight, padding_idx=2), bags, weights, mode)).sum()

    # Without clipping, whose gradient is not that of its value; the padding row has none either.
    weight = np.where(np.arange(ROWS)[:, None] == 2, 0, WEIGHT)
    with jax.enable_x64(True):
        args = jnp.asarray(weight, jnp.float64), jnp.asarray(weights, jnp.float64)
        check_grads(jax.jit(of), args, order=2)


def test_largest_is_checked_by_differences():
    bags = ragged(LISTS)
    with jax.enable_x64(True):
        weight = jnp.asarray(WEIGHT, jnp.float64)
        check_grads(jax.jit(lambda w: jnp.sin(embedding_bag(Table(w), bags, mode="max")).sum()), (weight,), order=2)


@with_modes
def test_vmap_over_bags_and_over_tables(mode):
    weights = np.stack([WEIGHT, -2 * WEIGHT, WEIGHT[::-1]])
    tables = jax.tree.map(lambda _: weights, Table(WEIGHT, **RULES))
    for tables_axis, bags_axis in [(None, 0), (0, None), (0, 0)]:
        table = Table(WEIGHT, **RULES) if tables_axis is None else tables
        bags = ragged(LISTS) if bags_axis is None else stacked()
        lanes = jax.vmap(jax.value_and_grad(functools.partial(loss, mode=mode)), (tables_axis, bags_axis))
        values, gradients = quick_jit(lanes)(table, bags)
        for lane in range(3):
            weight = WEIGHT if tables_axis is None else weights[lane]
            lists = LISTS if bags_axis is None else BATCHES[lane]
            pooled = reference.embedding_bag(weight, lists, None, mode, **RULES)
            assert_close(values[lane], (np.sin(pooled) * COTANGENTS).sum())
            assert_close(gradients.weight[lane], expected_gradients(lists, None, mode, weight, **RULES)[0])


@pytest.mark.parametrize("mode", SMOOTH)
def test_vmap_over_weights(mode):
    factors = np.stack([FACTORS, FACTORS[::-1], FACTORS**2])
    table, bags = Table(WEIGHT, **RULES), ragged(LISTS)
    lanes = jax.vmap(jax.grad(functools.partial(loss, mode=mode), (0, 2)), (None, None, 0))
    of_table, of_weights = quick_jit(lanes)(table, bags, factors)
    for lane in range(3):
        expected = expected_gradients(LISTS, factors_of(LISTS, factors[lane]), mode, **RULES)
        assert_close(of_table.weight[lane], expected[0])
        assert_close(of_weights[lane], np.concatenate([*expected[1], np.zeros(2)]))


@pytest.mark.parametrize("remat", [False, True], ids=["plain", "remat"])
@with_modes
def test_grad_of_scan_counts_a_step(mode, remat):
    of_step = functools.partial(loss, mode=mode)
    of_step = jax.checkpoint(of_step) if remat else of_step

    def total(table):
        return jax.lax.scan(lambda sum_, bags: (sum_ + of_step(table, bags), None), 0.0, stacked())[0]

    gradient = quick_jit(jax.grad(total))(Table(WEIGHT, **RULES))
    assert_close(gradient.weight, sum(expected_gradients(lists, None, mode, **RULES)[0] for lists in BATCHES))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@with_modes
def test_matrix_over_a_mesh(mode, axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    ids = np.array([[2, 0, 2], [1, 2, 2], [2, 2, 2], [-1, 3, 4]])
    bags = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("x")))
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec())), **RULES)
    cotangents = COTANGENTS[:4]

    def pull(table, bags, cotangents):
        out, pull = jax.vjp(lambda table: embedding_bag(table, bags, mode=mode), table)
        return out, pull(cotangents)[0].weight

    out, gradient = jax.jit(pull)(table, bags, jax.device_put(cotangents, bags.sharding))
    assert_close(out, reference.embedding_bag(WEIGHT, ids.tolist(), None, mode, **RULES))
    expected, _ = reference.embedding_bag_gradient(WEIGHT, ids.tolist(), cotangents, None, mode, **RULES)
    assert_close(gradient, expected)


def test_eval_shape_needs_no_values():
    table = Table(jax.ShapeDtypeStruct((5, 2, 3), jnp.bfloat16), max_norm=1.0, padding_idx=(0, -1))
    bags = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Ragged(jnp.arange(5), [0, 2, 3, 5]))
    for mode in MODES:
        out = jax.eval_shape(functools.partial(embedding_bag, mode=mode), table, bags)
        assert (out.shape, out.dtype) == ((3, 2, 3), jnp.bfloat16)
