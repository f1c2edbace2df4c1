"""Every line of the contract of a lookup in each framework: functions, brainstate, NNX, Equinox.

The functions are compared with the float64 reference; the layers with the functions, bit for bit where rows are read or
stored, to rounding where gradients are summed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_reference
import pytest
import reference
from cases import IDS, RULES, WEIGHT, cotangent
from frameworks import ALL, CASES, FUNCTIONAL, INTEGER_CASES, INTEGERS, LAYERS
from jax.experimental import checkify

import embax
from embax import Ragged, RowGrad, Table

READ = {**CASES, **INTEGER_CASES}
KINDS = "gradient", "row_gradient"
REDUCED = {name: RULES[name] for name in ("none", "all")}

with_all = pytest.mark.parametrize("framework", ALL.values(), ids=ALL)
with_layers = pytest.mark.parametrize("framework", LAYERS.values(), ids=LAYERS)
with_storing = pytest.mark.parametrize("framework", [LAYERS["brainstate"], LAYERS["nnx"]], ids=["brainstate", "nnx"])
with_kinds = pytest.mark.parametrize("kind", KINDS)
with_rules = pytest.mark.parametrize("rules", REDUCED.values(), ids=REDUCED)

# Of gradients, by dtype: a few roundings of sums of a few numbers, in float32 before they are stored.
TOLERANCE = {
    "float32": {"rtol": 2e-6, "atol": 1e-6},
    "bfloat16": {"rtol": 2**-8, "atol": 2**-8},
    "float16": {"rtol": 2**-11, "atol": 2**-11},
    "int32": {"rtol": 0},
}


def dense(gradient):
    """A gradient as an array, whichever way it is given; rows are added up by NumPy, which compiles nothing."""
    if not isinstance(gradient, RowGrad):
        return getattr(gradient, "weight", gradient)
    out = np.zeros((gradient.rows + 1, *gradient.dim))
    np.add.at(out, np.asarray(gradient.ids), np.asarray(gradient.values, float))
    return out[:-1].astype(gradient.dtype)


def assert_same(actual, expected):
    """Bit for bit, signs of zeros included; one NaN is as good as another."""
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected, strict=True)
    np.testing.assert_array_equal(np.copysign(1, actual), np.copysign(1, expected))


def assert_close(actual, expected, scale=1.0, dtype="float32"):
    assert actual.dtype == dtype
    tolerance = {name: scale * value for name, value in TOLERANCE[dtype].items()}
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(expected, float), **tolerance)


@functools.cache
def read(framework, name):
    """The rows of a case, and the weight as it is stored afterwards."""
    case = READ[name]
    layer, rows = case.run(framework, framework.read)
    if not framework.stores:
        _, layer = case.run(framework, framework.renormalized)
    return rows, framework.table(layer).weight


@functools.cache
def differentiate(framework, name, kind):
    """The gradient of a case, an array or a RowGrad, and the weight as it is stored afterwards."""

    def gradient(layer, ids, cotangents):
        return getattr(framework, kind)(layer, lambda layer: (framework.read(layer, ids) * cotangents).sum())

    layer, result = CASES[name].run(framework, gradient, CASES[name].cotangents)
    return result, framework.table(layer).weight


@pytest.mark.parametrize("name", READ)
def test_rows_that_functions_read_and_store_are_those_of_the_reference(name):
    case = READ[name]
    rows = reference.lookup(case.weight, case.ids, **case.rules)
    stored = reference.renormalize(case.weight, case.ids, **case.rules)
    rows = np.nan_to_num(rows, nan=0) if name in INTEGER_CASES else rows
    for actual, expected in zip(read(FUNCTIONAL, name), (rows, stored), strict=True):
        assert actual.dtype == jnp.asarray(case.weight).dtype
        assert actual.shape == expected.shape
        rtol = TOLERANCE[str(actual.dtype)]["rtol"]
        np.testing.assert_allclose(np.asarray(actual, float), expected, rtol=rtol)


def halves():
    """Each case by one kind of gradient, the kinds in turn; by the other one in exhaustive runs."""
    for number, name in enumerate(CASES):
        yield pytest.param(name, KINDS[number % 2])
        yield pytest.param(name, KINDS[1 - number % 2], marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(("name", "kind"), list(halves()))
def test_gradient_of_functions_is_that_of_the_reference(name, kind):
    case = CASES[name]
    gradient, _ = differentiate(FUNCTIONAL, name, kind)
    expected = reference.gradient(case.weight, case.ids, case.cotangents, **case.rules)
    assert isinstance(gradient, RowGrad) == (kind == "row_gradient")
    assert_close(dense(gradient), expected, dtype=str(case.weight.dtype))


@pytest.mark.parametrize("name", READ)
@with_layers
def test_layer_reads_and_stores_what_functions_do(framework, name):
    for actual, expected in zip(read(framework, name), read(FUNCTIONAL, name), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize(("name", "kind"), list(halves()))
@with_layers
def test_gradient_of_layer_is_that_of_functions(framework, name, kind):
    actual, stored = differentiate(framework, name, kind)
    expected, unchanged = differentiate(FUNCTIONAL, name, kind)
    assert isinstance(actual, RowGrad) == isinstance(expected, RowGrad)
    assert_close(dense(actual), dense(expected), dtype=str(CASES[name].weight.dtype))
    assert_same(stored, read(FUNCTIONAL, name)[1] if framework.stores else unchanged)


ERRORS = {
    "bool": (np.array([True]), {}, WEIGHT, TypeError, "must be of an integer dtype, got bool"),
    "bool_list": ([True, False], {}, WEIGHT, TypeError, "must be of an integer dtype, got bool"),
    "float": (jnp.ones(2), {}, WEIGHT, TypeError, "must be of an integer dtype, got float32"),
    "float_scalar": (1.0, {}, WEIGHT, TypeError, "must be of an integer dtype, got float64"),
    "float_empty": (np.zeros(0), {}, WEIGHT, TypeError, "must be of an integer dtype, got float64"),
    "above": ([[0, 1], [2, 7]], {}, WEIGHT, IndexError, r"in \[-7, 7\), .* 7 rows, got 7 at position \(1, 1\)"),
    "below": (jnp.array([0, -8, 9]), {}, WEIGHT, IndexError, r"in \[-7, 7\), .* 7 rows, got -8 at position \(1,\)"),
    "scalar": (7, {}, WEIGHT, IndexError, r"7 rows, got 7 at position \(\)"),
    "uint32": (np.uint32([2**32 - 1]), {}, WEIGHT, IndexError, r"got 4294967295 at position \(0,\)"),
    "int64": ([2**32 + 1], {}, WEIGHT, IndexError, r"got 4294967297 at position \(0,\)"),
    "one_row": ([0, 1], {}, WEIGHT[:1], IndexError, r"in \[-1, 1\), .* 1 rows, got 1 at position \(1,\)"),
    "no_rows": ([0], {}, WEIGHT[:0], IndexError, r"in \[0, 0\), .* 0 rows, got 0 at position \(0,\)"),
    "no_rows_clip": ([0], {"out_of_range": "clip"}, WEIGHT[:0], ValueError, "table without rows, got 1 ids"),
}


@pytest.mark.parametrize(("ids", "rules", "weight", "error", "match"), ERRORS.values(), ids=ERRORS)
@with_all
def test_bad_ids_are_refused(framework, ids, rules, weight, error, match):
    layer = framework.make(weight, max_norm=0.5, **rules)
    for call in framework.read, framework.renormalized:
        with pytest.raises(error, match=match):
            call(layer, ids)
    with pytest.raises(error, match=match):
        framework.gradient(layer, lambda layer: framework.read(layer, ids).sum())
    assert_same(framework.table(layer).weight, jnp.asarray(weight))


@pytest.mark.parametrize("padding_idx", [0, 6, -1])
@with_all
def test_padding_row_starts_at_zero_or_stays(framework, padding_idx):
    if framework is LAYERS["brainstate"] and padding_idx < 0:
        with pytest.raises(ValueError, match=r"padding_idx=...\)` must be in \[0, 7\), got -1"):
            framework.fresh(7, 3, padding_idx=padding_idx)
        return
    weight = framework.table(framework.fresh(7, 3, padding_idx=padding_idx)).weight
    np.testing.assert_array_equal(~np.asarray(weight).any(axis=1), np.arange(7) == padding_idx % 7)
    if framework is not FUNCTIONAL:
        kept = framework.Embedding.from_pretrained(WEIGHT, padding_idx=padding_idx)
        assert_same(kept.table.weight, WEIGHT)


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@with_layers
def test_layers_are_made_with_the_rules_that_are_given(framework, rules):
    expected = Table(WEIGHT, **rules)
    if expected.padding_idx is not None:  # brainstate's layer takes no negative one
        rules = {**rules, "padding_idx": expected.padding_idx}
    pretrained = framework.Embedding.from_pretrained(WEIGHT, **{"freeze": False, **rules})
    for layer in framework.fresh(7, 3, **rules), framework.make(WEIGHT, **rules), pretrained:
        assert repr(layer.table) == repr(expected)
    assert framework.Embedding.from_pretrained(WEIGHT, **rules).table.freeze


@pytest.mark.parametrize(("stored", "returned"), [("float32", "bfloat16"), ("float16", "float32"), ("int8", "float32")])
@with_all
def test_dtype_is_that_of_the_rows_that_are_read(framework, stored, returned):
    weight = jnp.asarray(INTEGERS, stored)
    layer = framework.make(weight)
    rows = framework.read_as(layer, IDS["matrix"], returned)
    assert_same(rows, INTEGERS[IDS["matrix"]].astype(jnp.dtype(returned)))
    assert_same(framework.read(layer, IDS["matrix"]), weight[IDS["matrix"]])
    assert_same(framework.table(layer).weight, weight)


@with_storing
def test_what_stores_nothing(framework):
    ids = jnp.asarray(IDS["matrix"])
    without, layer = (
        framework.Embedding.from_table(Table(WEIGHT, max_norm=1.5), write_back=write_back)
        for write_back in (False, True)
    )
    for rows in without(ids), jax.jit(lambda ids: layer(ids))(ids):  # a raw transformation carries nothing out
        assert_same(rows, embax.lookup(Table(WEIGHT, max_norm=1.5), ids))
    for unchanged in without, layer:
        assert_same(unchanged.table.weight, jnp.asarray(WEIGHT))


@with_all
def test_traced_ids_are_checked_under_checkify(framework):
    layer = framework.make(WEIGHT)
    checked = checkify.checkify(jax.jit(lambda ids: framework.read(layer, ids)), errors=checkify.index_checks)
    assert checked(jnp.array([0, 6]))[0].get() is None
    assert "index 7 is out of bounds for axis 0 with size 7" in checked(jnp.array([0, 7]))[0].get()


@with_kinds
@with_rules
@with_all
def test_gradients_of_several_reads_add_up(framework, rules, kind):
    pairs = [(ids, cotangent(ids)) for ids in (IDS["matrix"], IDS["negative"])]

    def loss(layer):
        return sum((framework.read(layer, ids) * cotangents).sum() for ids, cotangents in pairs)

    gradient = getattr(framework, kind)(framework.make(WEIGHT, **rules), loss)
    assert isinstance(gradient, RowGrad) == (kind == "row_gradient")
    assert_close(dense(gradient), sum(reference.gradient(WEIGHT, *pair, **rules) for pair in pairs))


@with_kinds
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@with_all
def test_4096_gradients_of_one_sum_to_4096(framework, dtype, kind):
    layer = framework.make(jnp.ones((3, 2), dtype))
    ids = np.ones(4096, np.int32)
    gradient = getattr(framework, kind)(layer, lambda layer: framework.read(layer, ids).astype(jnp.float32).sum())
    assert isinstance(gradient, RowGrad) == (kind == "row_gradient")
    assert_same(dense(gradient), np.array([[0, 0], [4096, 4096], [0, 0]], jnp.dtype(dtype)))
    if kind == "row_gradient":
        assert_same(gradient.to_dense(), dense(gradient))


# Each lane repeats ids, so that counts over all lanes would differ from counts a lane.
LANES = jnp.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])


@with_rules
@pytest.mark.parametrize("transform", ["jit", "vmap", "scan", "remat"])
@with_all
def test_transforms(framework, transform, rules):
    layer, cotangents = framework.make(WEIGHT, **rules), cotangent(LANES)
    transformed = getattr(framework, transform)(framework.read)
    # Of a scan, each step reads what the one before has stored.
    calls = list(LANES) if transform == "scan" else [LANES]
    stored, expected = Table(WEIGHT, **rules), []
    for ids in calls:
        expected.append(embax.lookup(stored, ids))
        stored = embax.renormalize(stored, ids)
    assert_same(transformed(layer, LANES), jnp.concatenate(expected).reshape(cotangents.shape))
    assert_same(framework.table(layer).weight, stored.weight if framework.stores else jnp.asarray(WEIGHT))

    lanes = zip(LANES, cotangents, strict=True) if transform in ("vmap", "scan") else [(LANES, cotangents)]
    expected = sum(reference.gradient(WEIGHT, *lane, **rules) for lane in lanes)

    def gradients(layer, ids):
        loss = lambda layer: (transformed(layer, ids) * cotangents).sum()  # noqa: E731
        return framework.gradient(layer, loss), framework.row_gradient(layer, loss, on_dense="error")

    for gradient in framework.jit(gradients)(framework.make(WEIGHT, **rules), LANES):
        assert_close(dense(gradient), expected)


@with_rules
@with_all
def test_forward_mode(framework, rules):
    ids, tangent = IDS["negative"], np.random.default_rng(4).normal(size=WEIGHT.shape).astype(np.float32)
    expected = reference.jacobian(WEIGHT, ids, **rules)
    rows, pushed = framework.jvp(framework.make(WEIGHT, **rules), ids, jnp.asarray(tangent))
    assert_same(rows, embax.lookup(Table(WEIGHT, **rules), ids))
    assert_close(pushed, np.tensordot(expected, tangent.astype(float), 2))
    assert_close(framework.jacfwd(framework.make(WEIGHT, **rules), ids), expected)


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("rules", ["none", "padding_last", "all"])
@with_all
def test_attend(framework, rules, mask_padding):
    rules, x = RULES[rules], WEIGHT[:2, None]
    table = Table(WEIGHT, **rules)
    logits = framework.attend(framework.make(WEIGHT, **rules), x, mask_padding=mask_padding)
    assert_same(logits, embax.attend(table, x, mask_padding=mask_padding))
    expected = x.astype(float) @ reference.lookup(WEIGHT, np.arange(7), **rules).T
    if mask_padding and rules:
        expected[..., table.padding_idx] = -np.inf
    assert_close(logits, expected)


def through_head(framework, head, layer, ids, cotangents):
    """The loss of a head that is tied to the layer that reads its input."""
    rows = framework.read(layer, ids)
    if head == "attend":
        return (framework.attend(layer, rows) * cotangents).sum()
    return embax.softmax_cross_entropy(framework.table(layer), rows, ids % 7).sum()


@with_kinds
@pytest.mark.parametrize("rules", ["none", "all", "freeze"])
@pytest.mark.parametrize("head", ["attend", "softmax_cross_entropy"])
@with_all
def test_tied_head(framework, head, rules, kind):
    rules, ids, every = RULES[rules], IDS["negative"], np.arange(7)
    cotangents = np.random.default_rng(5).normal(size=(6, 7)).astype(np.float32)
    fun = lambda layer: through_head(framework, head, layer, ids, cotangents)  # noqa: E731
    gradient = dense(getattr(framework, kind)(framework.make(WEIGHT, **rules), fun))

    rows, heads = (reference.lookup(WEIGHT, numbers, **rules) for numbers in (ids, every))
    if head != "attend":
        exponentials = np.exp(rows @ heads.T)
        cotangents = exponentials / exponentials.sum(axis=1, keepdims=True) - (ids[:, None] % 7 == every)
    expected = reference.gradient(WEIGHT, ids, cotangents @ heads, **rules)
    expected += reference.gradient(WEIGHT, every, cotangents.T @ rows, **rules)
    assert_close(gradient, expected, scale=5)


BAGS = [[2, 0, 2, -1], [1, 2, 5, 2], []]
FACTORS = [[0.5, 2.0, -1.0, 1.0], [1.0, 1.5, 2.0, 3.0], []]
BAGS_OF_MODES = {
    "sum": (Ragged.from_lists(BAGS), BAGS, FACTORS),
    "mean": (Ragged.from_lists(BAGS), BAGS, FACTORS),
    "sqrtn": (BAGS[:2], BAGS[:2], None),
    "max": (BAGS[:2], BAGS[:2], None),
}


@pytest.mark.parametrize("mode", BAGS_OF_MODES)
@with_all
def test_bags(framework, mode):
    rules, (bags, lists, factors) = RULES["all"], BAGS_OF_MODES[mode]
    weights = None if factors is None else jnp.asarray(np.concatenate(factors), jnp.float32)
    table, layer = Table(WEIGHT, **rules), framework.make_bag(WEIGHT, mode, **rules)
    pooled = framework.read_bags(layer, mode, bags, weights)
    assert_same(pooled, embax.embedding_bag(table, bags, weights, mode))
    assert_close(pooled, reference.embedding_bag(WEIGHT, lists, factors, mode, **rules))
    stored = embax.renormalize(table, lists[0] + lists[1]).weight
    assert_same(framework.table(layer).weight, stored if framework.stores else table.weight)

    def gradients(layer, cotangents):
        loss = lambda layer: (framework.read_bags(layer, mode, bags, weights) * cotangents).sum()  # noqa: E731
        return [getattr(framework, kind)(layer, loss) for kind in KINDS]

    cotangents = np.random.default_rng(6).normal(size=(len(lists), 3)).astype(np.float32)
    expected, _ = reference.embedding_bag_gradient(WEIGHT, lists, cotangents, factors, mode, **rules)
    by_kind = framework.jit(gradients)(framework.make_bag(WEIGHT, mode, **rules), cotangents)
    assert [isinstance(gradient, RowGrad) for gradient in by_kind] == [False, True]
    for gradient in by_kind:
        assert_close(dense(gradient), expected)


OPTIMIZERS = {
    "adamw": (embax.optim.lift(optax.adamw(0.1, weight_decay=0.5)), optim_reference.adam(0.1, weight_decay=0.5)),
    "rowwise_adagrad": (embax.optim.rowwise_adagrad(0.1), optim_reference.rowwise_adagrad(0.1)),
}
BATCHES = [*LANES, *LANES[:2]]  # without rows 3 and 4


def trained(rule, by_rows, **rules):
    """What the reference makes of the weight, and which of its rows it leaves as they are."""
    padding = reference.padding_rows(rules.get("padding_idx"), 7)
    lazy = optim_reference.Lazy(WEIGHT, rule, *padding)
    for ids in np.asarray(BATCHES):
        lazy.weight = reference.renormalize(lazy.weight, ids, **rules)
        rows = reference.lookup(lazy.weight, ids, **rules)
        gradient = reference.gradient(lazy.weight, ids, 2 * (rows - 0.5), **rules)
        read = np.unique(ids % 7) if by_rows else np.arange(7)
        lazy.step([] if rules.get("freeze") else read, gradient[read])
    return lazy.weight, (lazy.weight == WEIGHT).all(axis=1)


@pytest.mark.parametrize(
    ("optimizer", "rules", "by_rows"),
    [
        ("adamw", "padding_last", True),
        ("adamw", "padding_last", False),
        ("adamw", "freeze", True),
        ("adamw", "freeze", False),
        ("adamw", "all", True),
        ("rowwise_adagrad", "none", True),
        ("rowwise_adagrad", "all", True),
        ("rowwise_adagrad", "all", False),
    ],
)
@with_all
def test_training(framework, optimizer, rules, by_rows):
    rules, (tx, rule) = RULES[rules], OPTIMIZERS[optimizer]
    loss = lambda layer, ids: ((framework.read(layer, ids) - 0.5) ** 2).sum()  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # which optax relies on
        weight = framework.train(framework.make(WEIGHT, **rules), tx, loss, BATCHES, by_rows)
    expected, is_untouched = trained(rule, by_rows, **rules)
    assert_close(weight, expected, scale=20)  # several steps
    np.testing.assert_array_equal((np.asarray(weight) == WEIGHT).all(axis=1), is_untouched)
