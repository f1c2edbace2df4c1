"""embedding_bag under every transformation, and its gradient by rows: of one bag, of several, of bags and lookups."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from bag_cases import MODES, cut, dense, ids_of
from cases import ROWS, WEIGHT, assert_same_gradient
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import embax
from embax import Ragged, Table, embedding_bag, lookup

TOLERANCE = {"rtol": 5e-6, "atol": 5e-6}  # float32
SMOOTH = MODES[:3]  # those that take weights
exhaustive = pytest.mark.exhaustive

# Padding, duplicates, empty bags; and three batches of one capacity.
LISTS = [[2, 0, 2, 6], [], [1, 2, 2], [2], [-1, 3, 4]]
BATCHES = [LISTS, [[5, 5], [5], [], [], [2, 0]], [[], [], [1, 1, 1, 3, 1], [2, 2, 2, 2, 2, 2], [6]]]
CAPACITY = 13
FACTORS = np.random.default_rng(2).uniform(0.5, 2, size=CAPACITY).astype(np.float32)
COTANGENTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
RULES = {"padding_idx": 2, "max_norm": 1.5, "scale_grad_by_freq": True}


def ragged(lists):
    return Ragged.from_lists(lists).pad_to(CAPACITY)


def stacked():
    return jax.tree.map(lambda *x: np.stack(x), *map(ragged, BATCHES))


def loss(table, bags, weights=None, mode="sum"):
    """A loss whose every derivative depends on the rows that are read."""
    return (jnp.sin(embedding_bag(table, bags, weights, mode)) * COTANGENTS).sum()


def expected_gradients(lists, factors=None, mode="sum", weight=WEIGHT, **rules):
    cotangents = np.cos(reference.embedding_bag(weight, lists, factors, mode, **rules)) * COTANGENTS
    return reference.embedding_bag_gradient(weight, lists, cotangents, factors, mode, **rules)


def assert_close(actual, expected, case=""):
    np.testing.assert_allclose(actual, expected, **TOLERANCE, err_msg=str(case))


# ---- Gradients by rows.

# Modes, and whether there are weights. Those that are not in the table below are exhaustive.
KINDS = [*itertools.product(SMOOTH, [False, True]), ("max", False)]
MAIN_KINDS = {
    ("2d", "none"): [("sum", False), ("sqrtn", True)],
    ("2d", "all"): [("mean", True), ("sqrtn", False), ("max", False)],
    ("2d", "freeze"): [],
    ("ragged", "none"): [("sum", True), ("max", False)],
    ("ragged", "all"): [("mean", False), ("sqrtn", True), ("max", False)],
    ("ragged", "freeze"): [("mean", True), ("max", False)],
}
OTHER_KINDS = {case: [kind for kind in KINDS if kind not in kinds] for case, kinds in MAIN_KINDS.items()}


@pytest.mark.parametrize(
    ("layout", "rules", "kinds"),
    [
        *(pytest.param(*case, kinds, id="-".join(case)) for case, kinds in MAIN_KINDS.items() if kinds),
        *(
            pytest.param(*case, kinds, id="-".join([*case, "others"]), marks=exhaustive)
            for case, kinds in OTHER_KINDS.items()
        ),
    ],
)
def test_gradient_by_rows_is_that_of_jax(layout, rules, kinds):
    rules = {"none": {}, "all": RULES, "freeze": {"freeze": True}}[rules]
    bags = np.array([[2, 0, 2], [1, 2, 2], [2, 2, 2], [-1, 3, 4], [0, 0, 2]]) if layout == "2d" else ragged(LISTS)
    ids = bags if layout == "2d" else bags.values

    @jax.jit
    def run(params):
        def both(mode, weighted):
            def of(params):
                return loss(params["table"], bags, params.get("weights"), mode)

            given = params if weighted else {"table": params["table"]}
            return embax.value_and_grad(of)(given), jax.value_and_grad(of)(given)

        return {kind: both(*kind) for kind in kinds}

    params = {"table": Table(WEIGHT, **rules), "weights": np.resize(FACTORS, ids.shape)}
    for (mode, weighted), ((value, gradient), expected) in run(params).items():
        case = f"{mode}, {'weighted' if weighted else 'plain'}"
        assert_close(value, expected[0], case)
        rows = gradient["table"]
        gradient["table"] = Table(dense(rows))
        assert_same_gradient(gradient, expected[1], **TOLERANCE, err_msg=case)
        assert isinstance(rows, embax.RowGrad)
        assert rows.values.shape[:1] == ((0,) if rules.get("freeze") else (ids.size,)), case
        if layout == "ragged" and not rules.get("freeze"):
            # Neither padding nor what is in no bag names a row.
            padding = rules.get("padding_idx")
            named = [ROWS if id_ == padding else id_ % ROWS for id_ in itertools.chain(*LISTS)]
            assert ids_of(rows).tolist() == named + [ROWS] * (CAPACITY - len(named)), case
        assert ("weights" in gradient) == weighted


def test_bags_and_lookups_of_one_table_in_one_loss():
    def of(params, batches):
        one, other = params["table"], params["other"]
        total = loss(one, batches[1], params["weights"], "mean") + loss(other, batches[2])
        total += loss(one, batches[0], mode="max")
        return total + (lookup(one, [[1, 2], [3, 1]]) ** 2).sum()

    params = {"table": Table(WEIGHT, padding_idx=0), "other": Table(-WEIGHT), "weights": jnp.asarray(FACTORS)}
    batches = [*map(ragged, BATCHES)]
    both = jax.jit(lambda *args: (embax.grad(of, on_dense="error")(*args), jax.grad(of)(*args)))
    gradient, expected = both(params, batches)
    assert gradient["table"].values.shape == (2 * CAPACITY + 4, 3)
    assert gradient["other"].values.shape == (CAPACITY, 3)
    gradient |= {name: Table(dense(gradient[name])) for name in ("table", "other")}
    assert_same_gradient(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_by_rows_sums_in_float32(dtype):
    def rows(table, bags):
        pool = functools.partial(embedding_bag, bags=bags, mode="sum")
        gradient = embax.grad(lambda table: pool(table).astype(jnp.float32).sum())(table)
        return gradient.to_dense()[1]

    layouts = np.ones((1, 4096), int), Ragged(np.ones(4096, int), [0, 4096])
    for row in jax.jit(lambda table: [rows(table, bags) for bags in layouts])(Table(jnp.ones((3, 2), dtype))):
        np.testing.assert_array_equal(row, np.full(2, 4096, jnp.dtype(dtype)))


def test_bags_inside_of_an_inner_transformation_give_rows():
    table, modes = Table(WEIGHT, **RULES), ["mean", "max"]

    def gradient(batches, mode):
        lanes = jax.vmap(jax.checkpoint(functools.partial(loss, mode=mode)), (None, 0))
        return embax.grad(lambda table: lanes(table, batches).sum(), on_dense="error")(table)

    gradients = jax.jit(lambda batches: {mode: gradient(batches, mode) for mode in modes})(stacked())
    for mode in modes:
        assert gradients[mode].values.shape == (len(BATCHES) * CAPACITY, 3)
        expected = sum(expected_gradients(lists, mode=mode, **RULES)[0] for lists in BATCHES)
        assert_close(dense(gradients[mode]), expected, mode)


def test_training_by_rows_equals_dense_training():
    target, adagrad = jnp.asarray(COTANGENTS), optax.adagrad(0.3)
    ways = {"rows": (embax.optim.lift(adagrad), embax.grad), "dense": (adagrad, jax.grad)}

    def of(params, bags):
        return jnp.square(embedding_bag(params["table"], bags, params["weights"], "mean") - target).mean()

    @jax.jit
    def step(trained, bags):
        def of_way(params, state, tx, grad):
            updates, state = tx.update(grad(of)(params, bags), state, params)
            return embax.apply_updates(params, updates), state

        return {way: of_way(*trained[way], *ways[way]) for way in ways}

    with jax.numpy_dtype_promotion("standard"):  # optax needs it
        params = {"table": Table(WEIGHT, padding_idx=2), "weights": jnp.asarray(FACTORS)}
        trained = {way: (params, tx.init(params)) for way, (tx, _) in ways.items()}
        for lists in BATCHES * 2:
            trained = step(trained, ragged(lists))
    results = [trained[way][0] for way in ways]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *results)  # float32, six steps
    np.testing.assert_array_equal(results[0]["table"].weight[2], WEIGHT[2])
    assert not np.allclose(results[0]["table"].weight[5], WEIGHT[5])


# ---- Transformations.


def test_grad_through_jit_and_checkpoint():
    wraps = {"jit": jax.jit, "remat": jax.checkpoint}
    cases = [("jit", "mean"), ("jit", "max"), ("remat", "sqrtn"), ("remat", "max")]

    @jax.jit
    def run(table, bags, weights):
        def gradient(wrap, mode):
            of = wraps[wrap](functools.partial(loss, mode=mode))
            return jax.grad(of, (0, 2))(table, bags, None if mode == "max" else weights)

        return {case: gradient(*case) for case in cases}

    for case, (of_table, of_weights) in run(Table(WEIGHT, **RULES), ragged(LISTS), FACTORS).items():
        weighted = case[1] != "max"
        factors = cut(FACTORS, LISTS) if weighted else None
        expected, expected_of_weights = expected_gradients(LISTS, factors, case[1], **RULES)
        assert_close(of_table.weight, expected, case)
        if weighted:
            assert_close(of_weights, np.concatenate([*expected_of_weights, np.zeros(2)]), case)


def test_jvp_and_jacfwd():
    bags, tangents = ragged(LISTS), (np.sin(WEIGHT), np.cos(FACTORS))

    @jax.jit
    def run(weight, weights):
        def forward(mode):
            def pool(weight, weights):
                return embedding_bag(Table(weight, **RULES), bags, weights, mode)

            args = weight, weights
            return jax.jacfwd(pool, (0, 1))(*args), jax.jvp(pool, args, tangents)[1]

        return {mode: forward(mode) for mode in SMOOTH}

    for mode, (jacobian, pushed) in run(WEIGHT, FACTORS).items():
        for j, (of_table, of_weights) in enumerate(zip(*(np.reshape(x, (15, -1)) for x in jacobian), strict=True)):
            cotangents = np.zeros(15)
            cotangents[j] = 1
            expected, expected_of_weights = reference.embedding_bag_gradient(
                WEIGHT, LISTS, cotangents.reshape(5, 3), cut(FACTORS, LISTS), mode, **RULES
            )
            assert_close(of_table, expected.ravel(), (mode, j))
            assert_close(of_weights, np.concatenate([*expected_of_weights, np.zeros(2)]), (mode, j))
        of_weight, of_weights = (np.asarray(x) for x in jacobian)
        assert_close(pushed, np.tensordot(of_weight, tangents[0], 2) + of_weights @ tangents[1], mode)


@pytest.mark.parametrize(("mode", "layout"), [("mean", "ragged"), ("sqrtn", "2d"), ("max", "ragged")])
def test_second_derivatives_are_those_of_differences(mode, layout):
    bags = np.array([[2, 0, 2], [1, 2, 5], [-1, 3, 4]]) if layout == "2d" else ragged(LISTS)
    # Without clipping, whose gradient is not that of its value; the padding row has none either.
    rules = {} if mode == "max" else {"padding_idx": 2}

    def of(args):
        weight, *weights = args
        return jnp.sin(embedding_bag(Table(weight, **rules), bags, *weights, mode=mode)).sum()

    @jax.jit
    def run(args, direction):
        def along(function):
            return lambda args: jax.jvp(function, (args,), (direction,))[1]

        def dot(gradient):
            return sum((x * y).sum() for x, y in zip(gradient, direction, strict=True))

        first = {"forward": along(of)(args), "reverse": jax.grad(of)(args)}
        second = {
            "forward over forward": along(along(of))(args),
            "forward over reverse": along(jax.grad(of))(args),
            "reverse over reverse": jax.grad(lambda args: dot(jax.grad(of)(args)))(args),
        }
        return of(args), first, second

    with jax.enable_x64(True):
        random = np.random.default_rng(3)
        args = [WEIGHT.astype(float)]
        if mode != "max":
            args[0] = np.where(np.arange(ROWS)[:, None] == 2, 0, WEIGHT)
            args.append((FACTORS[:9].reshape(3, 3) if layout == "2d" else FACTORS).astype(float))
        direction = [random.normal(size=x.shape) for x in args]
        if mode != "max":
            direction[0][2] = 0
        small = 1e-5
        steps = [[x + step * y for x, y in zip(args, direction, strict=True)] for step in (0, small, -small)]
        here, forth, back = (jax.device_get(run(args, direction)) for args in steps)
    (_, first, second), (above, of_above, _), (below, of_below, _) = here, forth, back
    slope = (above - below) / (2 * small)
    slopes = [(x - y) / (2 * small) for x, y in zip(of_above["reverse"], of_below["reverse"], strict=True)]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6)
    close(first["forward"], slope)
    close(sum((x * y).sum() for x, y in zip(first["reverse"], direction, strict=True)), slope)
    close(second["forward over forward"], sum((x * y).sum() for x, y in zip(slopes, direction, strict=True)))
    for way in ("forward over reverse", "reverse over reverse"):
        for x, y in zip(second[way], slopes, strict=True):
            close(x, y, err_msg=way)


def test_vmap_over_bags_and_over_tables():
    weights = np.stack([WEIGHT, -2 * WEIGHT, WEIGHT[::-1]])
    one, tables = (jax.tree.map(lambda _, x=x: x, Table(WEIGHT, **RULES)) for x in (WEIGHT, weights))
    cases = [*itertools.product([(None, 0)], ["sum", "max"]), *itertools.product([(0, None)], ["mean", "max"])]
    cases += itertools.product([(0, 0)], ["sqrtn", "max"])

    @jax.jit
    def run(one, tables, bags, batches):
        def lanes(axes, mode):
            of = jax.vmap(jax.value_and_grad(functools.partial(loss, mode=mode)), axes)
            return of(one if axes[0] is None else tables, bags if axes[1] is None else batches)

        return [lanes(*case) for case in cases]

    for (axes, mode), (values, gradients) in zip(cases, run(one, tables, ragged(LISTS), stacked()), strict=True):
        for lane in range(3):
            weight = WEIGHT if axes[0] is None else weights[lane]
            lists = LISTS if axes[1] is None else BATCHES[lane]
            pooled = reference.embedding_bag(weight, lists, None, mode, **RULES)
            assert_close(values[lane], (np.sin(pooled) * COTANGENTS).sum(), (axes, mode, lane))
            expected = expected_gradients(lists, None, mode, weight, **RULES)[0]
            assert_close(gradients.weight[lane], expected, (axes, mode, lane))


def test_vmap_over_weights():
    factors = np.stack([FACTORS, FACTORS[::-1], FACTORS**2])

    @jax.jit
    def run(*args):
        def lanes(mode):
            return jax.vmap(jax.grad(functools.partial(loss, mode=mode), (0, 2)), (None, None, 0))(*args)

        return {mode: lanes(mode) for mode in SMOOTH}

    for mode, (of_table, of_weights) in run(Table(WEIGHT, **RULES), ragged(LISTS), factors).items():
        for lane in range(3):
            expected = expected_gradients(LISTS, cut(factors[lane], LISTS), mode, **RULES)
            assert_close(of_table.weight[lane], expected[0], (mode, lane))
            assert_close(of_weights[lane], np.concatenate([*expected[1], np.zeros(2)]), (mode, lane))


def test_grad_of_scan_counts_a_step():
    cases = [("plain", "max"), ("remat", "mean")]

    @jax.jit
    def run(table, batches):
        def gradient(how, mode):
            of_step = functools.partial(loss, mode=mode)
            of_step = jax.checkpoint(of_step) if how == "remat" else of_step

            def total(table):
                return jax.lax.scan(lambda sum_, bags: (sum_ + of_step(table, bags), None), 0.0, batches)[0]

            return jax.grad(total)(table)

        return {case: gradient(*case) for case in cases}

    for case, gradient in run(Table(WEIGHT, **RULES), stacked()).items():
        expected = sum(expected_gradients(lists, None, case[1], **RULES)[0] for lists in BATCHES)
        assert_close(gradient.weight, expected, case)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_matrix_over_a_mesh(axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    ids = np.array([[2, 0, 2], [1, 2, 2], [2, 2, 2], [-1, 3, 4]])
    bags = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("x")))
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec())), **RULES)
    cotangents, modes = COTANGENTS[:4], MODES if axis_type == AxisType.Explicit else ["mean", "max"]

    @jax.jit
    def run(table, bags, cotangents):
        def pulled(mode):
            out, pull = jax.vjp(lambda table: embedding_bag(table, bags, mode=mode), table)
            return out, pull(cotangents)[0].weight

        return {mode: pulled(mode) for mode in modes}

    results = jax.block_until_ready(run(table, bags, jax.device_put(cotangents, bags.sharding)))
    for mode, (out, gradient) in results.items():
        assert_close(out, reference.embedding_bag(WEIGHT, ids.tolist(), None, mode, **RULES), mode)
        expected, _ = reference.embedding_bag_gradient(WEIGHT, ids.tolist(), cotangents, None, mode, **RULES)
        assert_close(gradient, expected, mode)


def test_eval_shape_needs_no_values():
    table = Table(jax.ShapeDtypeStruct((5, 2, 3), jnp.bfloat16), max_norm=1.0, padding_idx=(0, -1))
    bags = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Ragged(np.arange(5), [0, 2, 3, 5]))
    for mode in MODES:
        out = jax.eval_shape(functools.partial(embedding_bag, mode=mode), table, bags)
        assert (out.shape, out.dtype) == ((3, 2, 3), jnp.bfloat16)
