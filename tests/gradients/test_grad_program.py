"""A gradient's program keeps its values, sums, effects, names, barriers and memory when it is run for rows."""

import functools
import gc
import logging
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import assert_same_gradient, dense
from closeness import FLOAT32
from jax.experimental import checkify
from jax.sharding import AxisType, PartitionSpec
from leaks import checking_leaks

import embax
from embax import RowGrad, Table, lookup
from embax._gradients._analysis.calls import _RUNNERS
from embax._gradients._analysis.equations import without_constants
from embax._gradients._analysis.program import evaluate

WEIGHT = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
IDS = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])
T = Table(WEIGHT, padding_idx=2)


def energy(table, ids=IDS):
    return jnp.sin(lookup(table, ids)).sum()


def step(table, number, ids):
    return jnp.tanh(number + jax.checkpoint(energy)(table, ids)), None


def scanned(table, ids=IDS):
    return jax.lax.scan(functools.partial(step, table), 0.1, ids)[0]


# ---- Values.


def test_sparse_and_dense_terms_of_one_table_are_both_kept():
    """A head and lookups of one table, in and out of transformations, among other parameters."""

    def loss(params):
        table, other = params["tied"], params["other"]
        hidden = jax.vmap(lambda ids: lookup(table, ids).sum(0) * params["scale"][0])(IDS)
        logits = jax.checkpoint(embax.attend)(table, jnp.tanh(hidden))
        return jnp.sin(logits).sum() + scanned(other) * energy(other, [3]) + (params["bias"] ** 2).sum()

    params = {
        "tied": T,
        "other": Table(WEIGHT),
        "scale": jnp.ones((1, 3)),
        "bias": jnp.arange(3.0),
        "unused": jnp.ones(2),
    }

    @jax.jit
    def both(params):
        ours, expected = embax.grad(loss, on_dense="error")(params), jax.grad(loss)(params)
        return ours, dense(ours), dense(expected)

    ours, actual, expected = both(params)
    assert_same_gradient(actual, expected, **FLOAT32)
    assert (type(ours["tied"].weight), isinstance(ours["other"], RowGrad)) == (type(expected["bias"]), True)


def test_tables_that_are_stored_together_or_taken_apart_are_followed():
    films, users = Table(WEIGHT, padding_idx=0), Table(WEIGHT + 1)
    features = [embax.Feature("film", "films", "mean"), embax.Feature("user", "users")]
    params = {
        "collection": embax.Collection({"films": films, "users": users}, features),
        "hashed": jax.jit(lambda: embax.CompositionalTable.create(jax.random.key(0), ids=300, dim=3, remainders=40))(),
    }

    def loss(transformed):
        def of_example(params, film, user):
            read = params["collection"]({"film": film, "user": user})
            return (jnp.sin(read["film"]) * read["user"] * params["hashed"](user)).sum()

        return lambda params: transformed(of_example)(params, IDS % 40, IDS[:, 0] % 40)

    def scan(of_example):
        def scanned(params, *batch):
            return jax.lax.scan(lambda sum_, x: (sum_ + jax.checkpoint(of_example)(params, *x), None), 0.0, batch)[0]

        return scanned

    ways = scan, lambda f: lambda params, *batch: jax.vmap(f, (None, 0, 0))(params, *batch).sum()

    @jax.jit
    def each(params):
        ours, theirs = ([grad(loss(way))(params) for way in ways] for grad in grads)
        return [*zip(ours, dense(ours), dense(theirs), strict=True)]

    grads = functools.partial(embax.grad, on_dense="error"), jax.grad
    for ours, actual, expected in each(params):
        assert_same_gradient(actual, expected, **FLOAT32)
        nodes = jax.tree.leaves(ours, is_leaf=lambda node: isinstance(node, RowGrad))
        assert [type(node) for node in nodes if not isinstance(node, RowGrad)] == []


def test_a_value_that_is_missing_raises():
    table = jnp.asarray(WEIGHT)
    _, pull_back = jax.vjp(lambda weight: energy(Table(weight)) * weight.sum(), table)
    jaxpr, consts = without_constants(jax.make_jaxpr(pull_back)(1.0))
    (dense, *_), _ = evaluate(jaxpr, (), [*consts, 1.0], {}, (0,), ())
    assert dense.shape == table.shape
    for k in range(len(consts) + 1):
        args = [None if n == k else x for n, x in enumerate([*consts, 1.0])]
        with pytest.raises(KeyError):
            evaluate(jaxpr, (), args, {}, (0,), ())


def test_rows_that_outgrow_the_gradient_in_a_scan_are_an_array():
    tiny, few, many = Table(WEIGHT[:7]), IDS[:, :1], IDS[:, :3] % 7
    with_warnings = functools.partial(embax.grad, on_dense="error")
    both = jax.jit(lambda: [[grad(scanned)(tiny, ids) for ids in (few, many)] for grad in (with_warnings, jax.grad)])
    (of_few, of_many), expected = both()
    assert isinstance(of_few, RowGrad)
    assert isinstance(of_many.weight, jax.Array)
    assert_same_gradient([of_few, of_many], expected, **FLOAT32)
    # Outside of a scan there is nothing to be stacked.
    assert isinstance(jax.eval_shape(embax.grad(energy), Table(WEIGHT[:7]), np.zeros(100, int)), RowGrad)


def test_ids_in_a_branch_are_as_wide_as_the_table():
    rows = 2**31 + 5
    table = Table(jax.ShapeDtypeStruct((rows, 2), jnp.float32))

    def loss(table, ids):
        return jax.lax.cond(ids[0] > 0, lambda: energy(table, ids), lambda: energy(table, ids[:1]))

    with jax.enable_x64(True):
        gradient = jax.eval_shape(embax.grad(loss), table, jax.ShapeDtypeStruct((4,), jnp.int64))
        assert jax.eval_shape(lambda gradient: gradient.ids, gradient).dtype == jnp.int64
    assert gradient.values.shape == (4, 2)


# ---- Sums over devices.


def on_two_devices(function, check_vma):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (PartitionSpec(), PartitionSpec("x")), "out_specs": PartitionSpec()}
    return jax.shard_map(function, mesh=mesh, check_vma=check_vma, **specs)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_users_own_sum_over_devices_is_kept(check_vma):
    def of_device(table, ids):
        # Twice the weight, since two devices have it.
        both = jax.tree.map(lambda w: jax.lax.psum(jax.lax.pcast(w, "x", to="varying") if check_vma else w, "x"), table)
        return jax.lax.psum(energy(both, ids) * energy(table, ids[:, :1]), "x")

    def unsharded(table):
        doubled = jax.tree.map(lambda w: 2 * w, table)
        return sum(energy(doubled, ids) * energy(table, ids[:1]) for ids in IDS[:2])

    loss = on_two_devices(of_device, check_vma)
    gradient = jax.jit(embax.grad(lambda t: loss(t, IDS[:2]), on_dense="allow"))(T)
    assert_same_gradient(gradient, jax.jit(jax.grad(unsharded))(T), **FLOAT32)


def test_rows_of_each_device_are_not_added_to_rows_of_all():
    """Inside of a `shard_map`, ids that all devices share give rows that are no device's own."""

    def of_device(table, ids):
        return embax.grad(lambda t: energy(t, ids) * energy(t, [1, 3]), on_dense="allow")(table)

    of_devices = on_two_devices(of_device, True)
    gradient = jax.jit(lambda table: dense(of_devices(table, IDS[:2])))(T)
    unsharded = jax.jit(jax.grad(lambda t: sum(energy(t, ids) * energy(t, [1, 3]) for ids in IDS[:2])))(T)
    assert_same_gradient(gradient, unsharded.weight, **FLOAT32)


# ---- Nothing is kept alive.


def test_cached_functions_are_freed_with_their_programs():
    before = set(map(id, _RUNNERS))
    gc.freeze()  # what is there already is not to be walked over
    kept = jax.jit(lambda table: scanned(table))
    for _ in range(2):
        jax.eval_shape(embax.grad(kept), T)
    programs = [weakref.ref(program) for program in _RUNNERS if id(program) not in before]
    assert 1 <= len(programs) <= 5  # not more with each call
    del kept
    jax.clear_caches()
    gc.collect()
    gc.unfreeze()
    assert [program() for program in programs] == [None] * len(programs)


@pytest.mark.parametrize(
    "loss",
    [
        scanned,
        lambda t: jax.jit(lambda ids: energy(t, ids))(IDS),
        lambda t: jax.lax.cond(jnp.asarray(IDS)[0, 0] > 0, lambda: energy(t), lambda: energy(t, IDS[0])),
    ],
    ids=["scan", "jit_closure", "cond_closure"],
)
def test_no_tracer_leaks(loss):
    # Which only tracing can do; checked eagerly, every operation would be compiled anew.
    with checking_leaks():
        jax.eval_shape(embax.value_and_grad(loss, on_dense="error"), T)


# ---- What can be observed.


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_effects_happen_as_often_as_under_jax(wrap):
    seen = {embax.grad: [], jax.grad: []}

    def loss(grad, table):
        def step(number, ids):
            jax.debug.callback(lambda k: seen[grad].append(("step", int(k))), ids[0], ordered=True)
            return jnp.tanh(number + jax.checkpoint(of_step)(table, ids)), None

        def of_step(table, ids):
            jax.debug.callback(lambda k: seen[grad].append(("remat", int(k))), ids[0])
            return energy(table, ids)

        return jax.lax.scan(step, 0.1, IDS)[0]

    gradients = [wrap(grad(functools.partial(loss, grad)))(T) for grad in seen]
    jax.effects_barrier()
    ours, theirs = (sorted(x) for x in seen.values())
    assert ours == theirs
    assert len([k for kind, k in ours if kind == "step"]) == 3
    assert_same_gradient(*gradients, **FLOAT32)


def test_checkify_names_the_id_inside_of_a_scan():
    def loss(table, ids):  # without remat, which checkify does not know
        return jax.lax.scan(lambda sum_, ids: (jnp.tanh(sum_ + energy(table, ids)), None), 0.1, ids)[0]

    check = checkify.checkify(jax.jit(embax.grad(loss)), errors=checkify.index_checks)
    error, gradient = check(T, jnp.asarray(IDS))
    assert error.get() is None
    assert isinstance(gradient, RowGrad)
    error, _ = check(T, jnp.asarray(IDS).at[1, 1].set(99))
    assert "99" in error.get()


def test_names_and_the_barrier_of_remat_stay():
    def loss(table):
        with jax.named_scope("my_scope"):
            return scanned(table)

    ours, theirs = (jax.jit(grad(loss)).lower(T) for grad in (embax.grad, jax.grad))
    names = [set(lowered.as_text(debug_info=True).split('"')) for lowered in (ours, theirs)]
    assert any("transpose(jvp(my_scope))" in name for name in names[0])
    barriers = [lowered.as_text().count("optimization_barrier") for lowered in (ours, theirs)]
    assert barriers[0] == barriers[1] > 0


@pytest.mark.parametrize("context", [jax.disable_jit, lambda: jax.debug_nans(True)], ids=["disable_jit", "debug_nans"])
def test_works_under_the_settings_of_jax(context):
    table = Table(WEIGHT)  # without rules, for fewer operations to be compiled one by one
    expected = jax.jit(jax.grad(scanned))(table)
    with context():
        gradient = embax.grad(scanned)(table)
    assert_same_gradient(gradient, expected, **FLOAT32)


# ---- Cost.


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(scanned, id="scan"),
        pytest.param(jax.jit(scanned), id="jit"),
        pytest.param(
            lambda table, ids: jax.lax.cond(True, energy, energy, table, ids), id="cond", marks=pytest.mark.exhaustive
        ),
    ],
)
def test_eager_calls_compile_as_often_as_jax(loss, caplog):
    def compiled(grad):
        counts = []
        for k in range(3):
            with jax.log_compiles(True), caplog.at_level(logging.WARNING):
                caplog.clear()
                grad(loss)(Table(WEIGHT + k), IDS)
                counts.append(sum("XLA compilation" in record.getMessage() for record in caplog.records))
        return counts[1:]

    theirs, ours = compiled(jax.grad), compiled(embax.grad)
    assert ours <= theirs


def recurrent(table, ids):
    def step(state, x):
        state = jnp.tanh(0.5 * state + lookup(table, x))
        return state, state

    return (jax.lax.scan(step, jnp.zeros(3), ids)[1] ** 2).sum()


def branched(table, ids):
    return jax.lax.cond(ids[0, 0] > 1, lambda: energy(table, ids), lambda: energy(table, ids[:1]))


FORMS = {
    "scan_of_remat": scanned,
    "recurrent_vmap": lambda t, ids: jax.vmap(lambda ids: recurrent(t, ids))(ids).sum(),
    "cond": branched,
    "bags": lambda t, ids: jax.vmap(lambda ids: embax.embedding_bag(t, ids[None]).sum())(ids).prod(),
}
MORE_FORMS = {
    "jit": jax.jit(energy),
    "checkpoint": jax.checkpoint(energy),
    "map": lambda t, ids: jax.lax.map(lambda ids: energy(t, ids), ids).sum(),
    "fori_loop": lambda t, ids: jax.lax.fori_loop(0, 3, lambda k, sum_: sum_ + energy(t, ids[k]), 0.0),
    "vmap_cond": lambda t, ids: jax.vmap(lambda ids: branched(t, ids[None]))(ids).sum(),
    "inner_grad": lambda t, ids: jax.grad(lambda x: energy(t, ids) * x**3)(2.0),
    "in_and_out": lambda t, ids: energy(t, ids) * scanned(t, ids),
}


@pytest.mark.parametrize(
    "loss",
    [
        *(pytest.param(loss, id=name) for name, loss in FORMS.items()),
        *(pytest.param(loss, id=name, marks=pytest.mark.exhaustive) for name, loss in MORE_FORMS.items()),
    ],
)
def test_memory_of_a_donated_step_does_not_follow_the_rows(loss):
    def step(table, ids):
        value, gradient = embax.value_and_grad(loss, on_dense="error")(table, ids)
        return embax.apply_updates(table, -0.1 * gradient), value

    rows = 10**6  # a bit for each is more than the program may use
    table = Table(jax.ShapeDtypeStruct((rows, 3), jnp.float32), padding_idx=2, max_norm=1.5)
    ids = jax.ShapeDtypeStruct((3, 16), jnp.int32)
    memory = jax.jit(step, donate_argnums=0).lower(table, ids).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10**5
    assert memory.alias_size_in_bytes == rows * 3 * 4
