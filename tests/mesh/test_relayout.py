"""Tables on a mesh that grow or are cut, and the state of their training in other sizes and layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import AXES, LAYOUTS, mesh_of, usual_and_rest, waiting

import embax
from embax import Collection, Feature, RowGrad, Table
from embax.optim import carry_over, clip_by_global_norm, lift, rowwise_adagrad

KEY = jax.random.key(0)
ROWS, DIM = 11, 4
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
# On four devices where eight show nothing more.
FEW = {
    name: ({axis: min(size, 4) if len(sizes) == 1 else 2 for axis, size in sizes.items()}, options)
    for name, (sizes, options) in LAYOUTS.items()
}
TXS = {
    "adam": lift(optax.adam(0.1)),
    "rowwise": rowwise_adagrad(0.1, initial_accumulator=0.5),
    "chain": optax.chain(clip_by_global_norm(1.0), lift(optax.sgd(0.1, 0.9))),
}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def placed(tree, layout, axes="auto"):
    sizes, options = FEW[layout]
    return embax.shard(tree, mesh_of(sizes, axes), **options)


SIZES = (ROWS + 1, 23, ROWS, 7, 3)
RESIZED = [
    ("rows", "auto", (3,)),
    ("rows-cyclic", "explicit", (23,)),
    ("replicated", "explicit", (ROWS, 7)),
]


@pytest.mark.parametrize(
    ("layout", "axes", "sizes"),
    usual_and_rest(RESIZED, [(layout, axes, SIZES) for layout in FEW for axes in AXES]),
)
def test_resize_equals_that_without_a_mesh(layout, axes, sizes):
    plain = Table(jnp.asarray(WEIGHT), padding_idx=2, max_norm=3.0)
    table = placed(plain, layout, axes)
    for rows in sizes:
        ours, expected = embax.resize(table, rows, KEY), embax.resize(plain, rows, KEY)
        old = min(rows, ROWS)
        found = embax.unshard(ours).weight
        np.testing.assert_array_equal(found[:old], WEIGHT[:old])
        np.testing.assert_allclose(found[old:], expected.weight[old:], rtol=1e-6)
        assert (ours.placement.mesh, repr(ours.placement)) == (table.placement.mesh, repr(table.placement))
        assert (ours.rows, ours.padding_idx, ours.max_norm) == (rows, 2, 3.0)
        stored = placed(expected, layout, axes).weight
        assert (ours.weight.shape, ours.weight.sharding) == (stored.shape, stored.sharding)
        np.testing.assert_array_equal(np.asarray(ours.weight), np.asarray(placed(embax.unshard(ours), layout).weight))


def test_to_and_from_no_rows():
    table = placed(Table(jnp.asarray(WEIGHT)), "rows-cyclic")
    none = embax.resize(table, 0)
    assert (none.rows, none.weight.shape) == (0, (0, DIM))
    back = embax.unshard(embax.resize(none, 5, KEY)).weight
    np.testing.assert_allclose(back, embax.resize(Table(WEIGHT[:0]), 5, KEY).weight, rtol=1e-6)


def test_other_dtypes_and_initialisers():
    table = placed(Table(jnp.ones((5, DIM), jnp.bfloat16)), "rows-cyclic")
    ours = embax.unshard(embax.resize(table, 9, KEY, init=jax.nn.initializers.constant(2.0))).weight
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(ours), np.repeat([[1.0], [2.0]], [5, 4], axis=0) * np.ones((1, DIM)))


def test_resize_refuses_wrong_arguments_on_a_mesh():
    table = placed(Table(jnp.asarray(WEIGHT), padding_idx=8), "rows")
    with pytest.raises(ValueError, match=r"`embax.resize\(rows=...\)` must keep the padding row 8, got 8"):
        embax.resize(table, 8)
    with pytest.raises(TypeError, match=r"`embax.resize\(key=...\)` must be a JAX random key where the table grows"):
        embax.resize(table, 12)
    huge = np.iinfo(np.int32).max - 1
    with pytest.raises(ValueError, match=r"`embax.resize` must have rows that fit in 32 bits"):
        embax.resize(table, huge, KEY)


def params_of(rows, layout=None, **rules):
    weight = np.resize(WEIGHT, (rows, DIM))
    tables = {"a": Table(jnp.asarray(weight), **rules), "b": Table(jnp.asarray(weight[:7]))}
    params = {
        "words": Table(jnp.asarray(weight), **rules),
        "rows": Collection(tables, [Feature("a", "a")]),
    }
    return params if layout is None else placed(params, layout)


def gradient_of(params):
    return jax.tree.map(
        lambda x: RowGrad([1, 3, 1, 6], WEIGHT[:4], rows=x.rows), params, is_leaf=lambda x: isinstance(x, Table)
    )


def numbered(layout, name):
    """A state in which each row has numbers of its own, and so has a counter."""

    def fill(x):
        if x.ndim and x.dtype != np.float32:  # scratch
            return x
        numbers = np.arange(2, 2 + x.size, dtype=x.dtype).reshape(x.shape)
        return jax.device_put(numbers, x.sharding) if x.committed else jax.device_put(numbers)

    return jax.tree.map(fill, TXS[name].init(params_of(ROWS, layout)))


def numbers(state):
    """The arrays of a state off the mesh, but for scratch and counters of exchanges."""
    kinds = (embax.optim.LiftState, type(clip_by_global_norm(1.0).init({})))

    def bare(node):
        if not isinstance(node, kinds):
            return node
        return node._replace(slots=(), **({"dealt_out": 0} if hasattr(node, "dealt_out") else {}))

    tree = embax.unstack(embax.unshard(jax.tree.map(bare, state, is_leaf=lambda x: isinstance(x, kinds))))
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.flatten_with_path(tree)[0]}


CHANGES = [
    ("rows", "rows-cyclic", ROWS),
    ("rows-cyclic", "rows", 8),
    (None, "rows-cyclic", 14),
    ("rows-cyclic", "rows-cyclic", 14),
    ("rows", None, 14),
    ("columns", "rows", ROWS),
    ("rows", "rows and columns", 14),  # another mesh
]
USUAL = [(*CHANGES[2], ("rowwise",))]


@pytest.mark.parametrize(
    ("before", "after", "rows", "names"), usual_and_rest(USUAL, [(*change, tuple(TXS)) for change in CHANGES])
)
def test_a_state_is_carried_over_to_another_layout_and_size(before, after, rows, names):
    old, new = params_of(ROWS, before), params_of(rows, after)
    gradient = jax.eval_shape(gradient_of, new)
    for name in names:
        tx, state = TXS[name], numbered(before, name)
        # The state may be of another mesh, but is never of another layout without a word.
        with pytest.raises(ValueError, match=r"must belong to the tables .* params\['words'\] (had|was laid out as)"):
            jax.eval_shape(tx.update, gradient, state, new)
        carried, fresh = carry_over(state, old, new, tx), tx.init(new)
        assert jax.tree.structure(carried) == jax.tree.structure(fresh), name
        for ours, expected in zip(jax.tree.leaves(carried), jax.tree.leaves(fresh), strict=True):
            assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)
            assert ours.sharding == expected.sharding
        expected = numbers(fresh)
        for path, was in numbers(state).items():
            common = slice(0, min(was.shape[0], expected[path].shape[0])) if was.ndim else ()
            expected[path] = expected[path].copy()
            expected[path][common] = was[common]
        for path, found in numbers(carried).items():
            np.testing.assert_array_equal(found, expected[path], err_msg=f"{name} {path}")
        jax.eval_shape(tx.update, gradient, carried, new)


def test_training_continues_like_without_a_mesh():
    """A step after the table has grown on the mesh is that of a table off it."""
    tx = TXS["rowwise"]
    plain, grown = params_of(ROWS), params_of(14)
    on, grown_on = params_of(ROWS, "rows-cyclic"), params_of(14, "rows-cyclic")

    @waiting
    @jax.jit
    def updates(params, state):
        updates, _ = tx.update(gradient_of(params), state, params)
        return updates["words"].to_dense(), updates["rows"].stacks[0].to_dense()

    state = numbered(None, "rowwise")
    expected = updates(grown, carry_over(state, plain, grown, tx))
    found = updates(grown_on, carry_over(placed(state, "rows-cyclic"), on, grown_on, tx))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rows_of_one_layout_are_refused_in_another():
    for before, after in (("rows", "rows-cyclic"), ("replicated", "columns"), (None, "rows"), ("rows", None)):
        old, new = params_of(ROWS, before), params_of(ROWS, after)
        gradient = jax.eval_shape(gradient_of, new)
        for tx in TXS.values():
            state = jax.eval_shape(tx.init, old)
            message = r"params\['rows'\]\['a'\] was laid out as .*, and is .* now; params\['words'\] was laid out as "
            with pytest.raises(ValueError, match=message):
                jax.eval_shape(tx.update, gradient, state, new)


def test_capacities_do_not_matter_to_a_state():
    mesh = mesh_of({"x": 4})
    tx, table = TXS["adam"], Table(jnp.asarray(WEIGHT))
    state = tx.init(embax.shard(table, mesh, "x"))
    other = embax.shard(table, mesh, "x", skew=4.0, pool_at_owners=True)
    gradient = jax.eval_shape(lambda: RowGrad([1], WEIGHT[:1], rows=ROWS))
    updates, after = jax.eval_shape(tx.update, gradient, state, other)
    assert updates.rows == ROWS
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_state_keeps_the_layout_of_its_tables_through_shard_and_unshard():
    params, mesh = params_of(ROWS), mesh_of({"x": 4})
    gradient = jax.eval_shape(gradient_of, params)
    for name in ("rowwise", "chain"):
        tx = TXS[name]
        state = tx.init(params)
        both = embax.shard({"params": params, "state": state}, mesh, "x", "rows-cyclic")
        jax.eval_shape(tx.update, gradient, both["state"], both["params"])
        back = embax.unshard(both)
        assert jax.tree.structure(back["state"]) == jax.tree.structure(state), name
        assert all(len(x.sharding.device_set) == 1 for x in jax.tree.leaves(back["state"])), name
        jax.eval_shape(tx.update, gradient, back["state"], back["params"])
        with pytest.raises(ValueError, match="was laid out as"):
            jax.eval_shape(tx.update, gradient, both["state"], params)
