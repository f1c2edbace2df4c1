"""embedding_bag under every transformation, and its gradient by rows: of one bag, of several, of bags and lookups."""

import functools
import itertools

import closeness
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from bag_cases import MODES, cut, dense, ids_of, in_capacity
from cases import ROWS, WEIGHT
from closeness import FLOAT32
from jax.sharding import NamedSharding, PartitionSpec
from meshes import mesh_of, usual_and_rest

import embax
from embax import Ragged, Table, embedding_bag, lookup

SMOOTH = MODES[:3]  # those that take weights
exhaustive = pytest.mark.exhaustive

# Padding, duplicates, empty bags; and three batches of one capacity.
LISTS = [[2, 0, 2, 6], [], [1, 2, 2], [2], [-1, 3, 4]]
BATCHES = [LISTS, [[5, 5], [5], [], [], [2, 0]], [[], [], [1, 1, 1, 3, 1], [2, 2, 2, 2, 2, 2], [6]]]
CAPACITY = 13
FACTORS = np.random.default_rng(2).uniform(0.5, 2, size=CAPACITY).astype(np.float32)
COTANGENTS = np.random.default_rng(1).normal(size=(5, 3)).astype(np.float32)
CLIPPED = {"padding_idx": 2, "max_norm": 1.5}
RULES = {**CLIPPED, "scale_grad_by_freq": True}


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


assert_close = functools.partial(closeness.assert_close, **FLOAT32)


# ---- Gradients by rows.

# Modes, and whether there are weights; each with a layout and rules of a table. The others are exhaustive.
KINDS = [*itertools.product(SMOOTH, [False, True]), ("max", False)]
MAIN_KINDS = {
    ("2d", "none"): [("sum", False)],
    ("2d", "all"): [("sqrtn", True), ("max", False)],
    ("2d", "freeze"): [],
    ("ragged", "none"): [("sum", True), ("max", False)],
    ("ragged", "all"): [("mean", False)],
    ("ragged", "freeze"): [("mean", True)],
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
def test_gradient_by_rows_equals_the_reference(layout, rules, kinds):
    rules = {"none": {}, "all": RULES, "freeze": {"freeze": True}}[rules]
    matrix = np.array([[2, 0, 2], [1, 2, 2], [2, 2, 2], [-1, 3, 4], [0, 0, 2]])
    lists, bags = (matrix.tolist(), matrix) if layout == "2d" else (LISTS, ragged(LISTS))
    ids = bags if layout == "2d" else bags.values

    @jax.jit
    def run(params):
        def of_kind(mode, weighted):
            def of(params):
                return loss(params["table"], bags, params.get("weights"), mode)

            return embax.value_and_grad(of)(params if weighted else {"table": params["table"]})

        return {kind: of_kind(*kind) for kind in kinds}

    params = {"table": Table(WEIGHT, **rules), "weights": np.resize(FACTORS, ids.shape)}
    for (mode, weighted), (value, gradient) in run(params).items():
        case = f"{mode}, {'weighted' if weighted else 'plain'}"
        factors = cut(np.ravel(params["weights"]), lists) if weighted else None
        pooled = reference.embedding_bag(WEIGHT, lists, factors, mode, **rules)
        assert_close(value, (np.sin(pooled) * COTANGENTS).sum(), case)
        expected, of_factors = expected_gradients(lists, factors, mode, **rules)
        rows = gradient["table"]
        assert_close(dense(rows), expected, case)
        assert rows.values.shape[:1] == ((0,) if rules.get("freeze") else (ids.size,)), case
        if layout == "ragged" and not rules.get("freeze"):
            # Neither padding nor what is in no bag names a row.
            padding = rules.get("padding_idx")
            named = [ROWS if id_ == padding else id_ % ROWS for id_ in itertools.chain(*LISTS)]
            assert ids_of(rows).tolist() == named + [ROWS] * (CAPACITY - len(named)), case
        assert ("weights" in gradient) == weighted
        if weighted:
            assert_close(np.ravel(gradient["weights"]), in_capacity(of_factors, ids.size), case)


def test_bags_and_lookups_of_one_table_in_one_loss():
    ids, factors = [[1, 2], [3, 1]], cut(FACTORS, BATCHES[1])

    def of(params, batches):
        one, other = params["table"], params["other"]
        total = loss(one, batches[1], params["weights"], "mean") + loss(other, batches[2])
        total += loss(one, batches[0], mode="max")
        return total + (lookup(one, ids) ** 2).sum()

    params = {"table": Table(WEIGHT, padding_idx=0), "other": Table(-WEIGHT), "weights": FACTORS}
    gradient = jax.jit(embax.grad(of, on_dense="error"))(params, [*map(ragged, BATCHES)])
    assert gradient["table"].values.shape == (2 * CAPACITY + 4, 3)
    assert gradient["other"].values.shape == (CAPACITY, 3)
    of_mean, of_factors = expected_gradients(BATCHES[1], factors, "mean", padding_idx=0)
    of_max, _ = expected_gradients(BATCHES[0], None, "max", padding_idx=0)
    of_lookup = reference.gradient(WEIGHT, ids, 2 * WEIGHT[np.array(ids)], padding_idx=0)
    assert_close(dense(gradient["table"]), of_mean + of_max + of_lookup)
    assert_close(dense(gradient["other"]), expected_gradients(BATCHES[2], weight=-WEIGHT)[0])
    assert_close(gradient["weights"], in_capacity(of_factors, CAPACITY))


LOW = usual_and_rest(
    [("bfloat16", "2d"), ("float16", "ragged")], itertools.product(["bfloat16", "float16"], ["2d", "ragged"])
)


@pytest.mark.parametrize(("dtype", "layout"), LOW)
def test_gradient_by_rows_sums_in_float32(dtype, layout):
    bags = np.ones((1, 4096), int) if layout == "2d" else Ragged(np.ones(4096, int), [0, 4096])

    def rows(table):
        of = functools.partial(embedding_bag, bags=bags, mode="sum")
        return embax.grad(lambda table: of(table).astype(jnp.float32).sum())(table).to_dense()[1]

    row = jax.jit(rows)(Table(np.ones((3, 2), dtype)))
    np.testing.assert_array_equal(row, np.full(2, 4096, jnp.dtype(dtype)))


@pytest.mark.parametrize("mode", ["mean", pytest.param("max", marks=exhaustive)])
def test_bags_inside_of_an_inner_transformation_give_rows(mode):
    lanes = jax.vmap(jax.checkpoint(functools.partial(loss, mode=mode)), (None, 0))
    of = embax.grad(lambda table, batches: lanes(table, batches).sum(), on_dense="error")
    gradient = jax.jit(of)(Table(WEIGHT, **RULES), stacked())
    assert gradient.values.shape == (len(BATCHES) * CAPACITY, 3)
    assert_close(dense(gradient), sum(expected_gradients(lists, mode=mode, **RULES)[0] for lists in BATCHES))


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
        params = {"table": Table(WEIGHT, padding_idx=2), "weights": FACTORS}
        trained = jax.jit(lambda params: {way: (params, tx.init(params)) for way, (tx, _) in ways.items()})(params)
        for lists in BATCHES * 2:
            trained = step(trained, ragged(lists))
    results = [trained[way][0] for way in ways]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), *results)  # float32, six steps
    weight = np.asarray(results[0]["table"].weight)
    np.testing.assert_array_equal(weight[2], WEIGHT[2])
    assert not np.allclose(weight[5], WEIGHT[5])


# ---- Transformations.


THROUGH = [[(jax.jit, "max"), (jax.checkpoint, "sqrtn")], [(jax.jit, "mean"), (jax.checkpoint, "max")]]


@pytest.mark.parametrize("cases", [THROUGH[0], pytest.param(THROUGH[1], marks=exhaustive)], ids=["", "too"])
def test_grad_through_jit_and_checkpoint(cases):
    @jax.jit
    def run(table, bags, weights):
        def gradient(wrap, mode):
            of = wrap(functools.partial(loss, mode=mode))
            return jax.grad(of, (0, 2))(table, bags, None if mode == "max" else weights)

        return {mode: gradient(wrap, mode) for wrap, mode in cases}

    for mode, (of_table, of_weights) in run(Table(WEIGHT, **CLIPPED), ragged(LISTS), FACTORS).items():
        weighted = mode != "max"
        factors = cut(FACTORS, LISTS) if weighted else None
        expected, expected_of_weights = expected_gradients(LISTS, factors, mode, **CLIPPED)
        assert_close(of_table.weight, expected, mode)
        if weighted:
            assert_close(of_weights, in_capacity(expected_of_weights, CAPACITY), mode)


def jacobian(mode):
    """The derivatives of all numbers that are pooled of `LISTS`, flat, by the weight and by the weights."""
    of_numbers = [
        reference.embedding_bag_gradient(WEIGHT, LISTS, cotangents, cut(FACTORS, LISTS), mode, **RULES)
        for cotangents in np.eye(15).reshape(15, 5, 3)
    ]
    of_weights = [in_capacity(of_factors, CAPACITY) for _, of_factors in of_numbers]
    return np.array([of_weight.ravel() for of_weight, _ in of_numbers]), np.array(of_weights)


# Modes of jacfwd, and of jvp.
FORWARD = [(["mean"], ["sqrtn"]), (["sum", "sqrtn"], ["sum", "mean"])]


@pytest.mark.parametrize(("jacfwd", "jvp"), [FORWARD[0], pytest.param(*FORWARD[1], marks=exhaustive)], ids=["", "too"])
def test_jvp_and_jacfwd(jacfwd, jvp):
    bags, tangents = ragged(LISTS), (np.sin(WEIGHT), np.cos(FACTORS))

    def pool(weight, weights, mode):
        return embedding_bag(Table(weight, **RULES), bags, weights, mode)

    @jax.jit
    def run(*args):
        of_mode = {mode: functools.partial(pool, mode=mode) for mode in SMOOTH}
        jacobians = {mode: jax.jacfwd(of_mode[mode], (0, 1))(*args) for mode in jacfwd}
        return jacobians, {mode: jax.jvp(of_mode[mode], args, tangents)[1] for mode in jvp}

    jacobians, pushed = run(WEIGHT, FACTORS)
    for mode, of_args in jacobians.items():
        for of_arg, expected in zip(of_args, jacobian(mode), strict=True):
            assert_close(np.reshape(of_arg, (15, -1)), expected, mode)
    for mode, out in pushed.items():
        of_weight, of_weights = jacobian(mode)
        assert_close(np.ravel(out), of_weight @ tangents[0].ravel() + of_weights @ tangents[1], mode)


SECOND = ["forward over forward", "forward over reverse", "reverse over reverse"]


@pytest.mark.parametrize(
    ("mode", "layout", "orders"),
    [
        ("mean", "ragged", SECOND[1:2]),
        ("sqrtn", "2d", SECOND[::2]),
        ("max", "ragged", SECOND[1:2]),
        *(
            pytest.param(*case, SECOND, marks=exhaustive)
            for case in itertools.product(["mean", "sqrtn", "max"], ["2d", "ragged"])
        ),
    ],
)
def test_second_derivatives_equal_finite_differences(mode, layout, orders):
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
            "forward over forward": along(along(of)),
            "forward over reverse": along(jax.grad(of)),
            "reverse over reverse": jax.grad(lambda args: dot(jax.grad(of)(args))),
        }
        return of(args), first, {order: second[order](args) for order in orders}

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
    for order, out in second.items():
        if order == "forward over forward":
            close(out, sum((x * y).sum() for x, y in zip(slopes, direction, strict=True)))
        else:
            for x, y in zip(out, slopes, strict=True):
                close(x, y, err_msg=order)


# The axes of the table and of the bags, the mode, and the rules.
LANES = [[((None, 0), "max", CLIPPED), ((0, None), "mean", CLIPPED), ((0, 0), "sqrtn", RULES)]]
LANES += [[((None, 0), "sum", RULES), ((0, None), "max", RULES), ((0, 0), "max", RULES)]]


@pytest.mark.parametrize("cases", [LANES[0], pytest.param(LANES[1], marks=exhaustive)], ids=["", "too"])
def test_vmap_over_bags_and_over_tables(cases):
    weights = np.stack([WEIGHT, -2 * WEIGHT, WEIGHT[::-1]])

    @jax.jit
    def run(weights, bags, batches):
        def lanes(axes, mode, rules):
            of = jax.value_and_grad(lambda weight, bags: loss(Table(weight, **rules), bags, mode=mode))
            return jax.vmap(of, axes)(WEIGHT if axes[0] is None else weights, bags if axes[1] is None else batches)

        return [lanes(*case) for case in cases]

    results = jax.device_get(run(weights, ragged(LISTS), stacked()))
    for (axes, mode, rules), (values, gradients) in zip(cases, results, strict=True):
        for lane in range(3):
            weight = WEIGHT if axes[0] is None else weights[lane]
            lists = LISTS if axes[1] is None else BATCHES[lane]
            pooled = reference.embedding_bag(weight, lists, None, mode, **rules)
            assert_close(values[lane], (np.sin(pooled) * COTANGENTS).sum(), (axes, mode, lane))
            expected = expected_gradients(lists, None, mode, weight, **rules)[0]
            assert_close(gradients[lane], expected, (axes, mode, lane))


@pytest.mark.parametrize("mode", ["sqrtn", *(pytest.param(mode, marks=exhaustive) for mode in ("sum", "mean"))])
def test_vmap_over_weights(mode):
    factors = np.stack([FACTORS, FACTORS[::-1], FACTORS**2])
    gradients = jax.jit(jax.vmap(jax.grad(functools.partial(loss, mode=mode), (0, 2)), (None, None, 0)))
    of_table, of_weights = jax.device_get(gradients(Table(WEIGHT, **CLIPPED), ragged(LISTS), factors))
    for lane in range(3):
        expected = expected_gradients(LISTS, cut(factors[lane], LISTS), mode, **CLIPPED)
        assert_close(of_table.weight[lane], expected[0], lane)
        assert_close(of_weights[lane], in_capacity(expected[1], CAPACITY), lane)


@pytest.mark.parametrize(("wrap", "mode"), [(jax.checkpoint, "mean"), pytest.param(jax.jit, "max", marks=exhaustive)])
def test_grad_of_scan_counts_a_step(wrap, mode):
    of_step = wrap(functools.partial(loss, mode=mode))

    def total(table, batches):
        return jax.lax.scan(lambda sum_, bags: (sum_ + of_step(table, bags), None), 0.0, batches)[0]

    gradient = jax.jit(jax.grad(total))(Table(WEIGHT, **RULES), stacked())
    assert_close(gradient.weight, sum(expected_gradients(lists, None, mode, **RULES)[0] for lists in BATCHES))


MESHES = [("auto", ["mean"]), ("explicit", ["sqrtn", "max"])]
MESHES_TOO = [("auto", ["sum", "sqrtn", "max"]), ("explicit", ["sum", "mean"])]


@pytest.mark.parametrize(("axes", "modes"), [*MESHES, *(pytest.param(*too, marks=exhaustive) for too in MESHES_TOO)])
def test_matrix_over_a_mesh(axes, modes):
    mesh = mesh_of({"x": 2}, axes)
    ids = np.array([[2, 0, 2], [1, 2, 2], [2, 2, 2], [-1, 3, 4]])
    bags = jax.device_put(ids, NamedSharding(mesh, PartitionSpec("x")))
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec())), **RULES)
    cotangents = COTANGENTS[:4]

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
    bags = Ragged(np.arange(5, dtype=np.int32), [0, 2, 3, 5])
    bags = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), bags)
    for mode in MODES:
        out = jax.eval_shape(functools.partial(embedding_bag, mode=mode), table, bags)
        assert (out.shape, out.dtype) == ((3, 2, 3), jnp.bfloat16)
