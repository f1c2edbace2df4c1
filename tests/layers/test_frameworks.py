"""Every line of the contract of a lookup in each framework: functions, brainstate, NNX, Equinox.

The functions are compared with the float64 reference; the layers with the functions, bit for bit where rows are read or
stored, to rounding where gradients are summed.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import IDS, RULES, WEIGHT
from framework_cases import (
    CASES,
    INTEGER_CASES,
    INTEGERS,
    TOLERANCE,
    assert_close,
    assert_same,
    dense,
    kinds_in_turn,
    with_all,
    with_turns,
)
from frameworks import FUNCTIONAL, LAYERS
from jax.experimental import checkify
from meshes import usual_and_rest

import embax
from embax import RowGrad, Table

READ = {**CASES, **INTEGER_CASES}
# Kinds of ids whose rows are read as others are: their gradients are of the exhaustive run.
LIKE_OTHERS = {"list", "list_of_nothing", "jax", "jax_scalar", "jax_empty", "numpy_scalar"}
LIKE_OTHERS |= {"int16", "int64", "uint16", "uint32", "int8_jax", "uint8_jax"}

with_layers = pytest.mark.parametrize("framework", LAYERS.values(), ids=LAYERS)
with_storing = pytest.mark.parametrize("framework", [LAYERS["brainstate"], LAYERS["nnx"]], ids=["brainstate", "nnx"])


# Cases that are read by calls of their own, without a compiled program around them.
ALONE = {"rules_all", "scalar", "bad_nan", "integers"}


@functools.cache
def read_third(framework, third):
    """By one program, the rows of every third case, and the weight as it is stored afterwards."""
    names = [name for name in list(READ)[third::3] if name not in ALONE]
    layers = {name: framework.make(READ[name].weight, **READ[name].rules) for name in names}
    known = {name: READ[name].ids for name in names if not READ[name].traced}
    traced = {name: READ[name].ids for name in names if READ[name].traced}

    def rows_and_stored(layers, traced):
        ids = known | traced
        rows = {name: framework.read(layers[name], ids[name]) for name in names}
        if framework.stores:
            return rows, {}
        return rows, {name: framework.table(framework.renormalized(layers[name], ids[name])).weight for name in names}

    rows, stored = framework.jit(rows_and_stored)(layers, traced)
    stored = stored or {name: framework.table(layers[name]).weight for name in names}
    return {name: (rows[name], stored[name]) for name in names}


@functools.cache
def read_alone(framework, name):
    layer = framework.make(READ[name].weight, **READ[name].rules)
    rows = framework.read(layer, READ[name].ids)
    if not framework.stores:
        layer = framework.renormalized(layer, READ[name].ids)
    return rows, framework.table(layer).weight


def read(framework, name):
    """The rows of a case, and the weight as it is stored afterwards."""
    if name in ALONE:
        return read_alone(framework, name)
    return read_third(framework, list(READ).index(name) % 3)[name]


@functools.cache
def differentiate_third(framework, third, are_usual, turn):
    """By one program, the gradient of every third case, an array or a RowGrad, and the weight stored afterwards."""
    kinds = dict(list(kinds_in_turn(CASES, turn).items())[third::3])
    kinds = {name: kind for name, kind in kinds.items() if are_usual == (name not in LIKE_OTHERS)}
    layers = {name: framework.make(CASES[name].weight, **CASES[name].rules) for name in kinds}
    known = {name: CASES[name].ids for name in kinds if not CASES[name].traced}
    traced = {name: CASES[name].ids for name in kinds if CASES[name].traced}

    def gradients(layers, traced):
        ids = known | traced

        def gradient(name, kind):
            loss = lambda layer: (framework.read(layer, ids[name]) * CASES[name].cotangents).sum()  # noqa: E731
            return getattr(framework, kind)(layers[name], loss)

        return {name: gradient(name, kind) for name, kind in kinds.items()}

    results = framework.jit(gradients)(layers, traced)
    return {name: (results[name], framework.table(layers[name]).weight) for name in kinds}


def differentiate(framework, name, turn):
    return differentiate_third(framework, list(CASES).index(name) % 3, name not in LIKE_OTHERS, turn)[name]


@pytest.mark.parametrize("name", READ)
def test_functions_read_and_store_like_the_reference(name):
    case = READ[name]
    rows = reference.lookup(case.weight, case.ids, **case.rules)
    stored = reference.renormalize(case.weight, case.ids, **case.rules)
    rows = np.nan_to_num(rows, nan=0) if name in INTEGER_CASES else rows
    for actual, expected in zip(read(FUNCTIONAL, name), (rows, stored), strict=True):
        assert actual.dtype == jnp.asarray(case.weight).dtype
        assert actual.shape == expected.shape
        rtol = TOLERANCE[str(actual.dtype)]["rtol"]
        np.testing.assert_allclose(np.asarray(actual, float), expected, rtol=rtol)


@with_turns
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.exhaustive if name in LIKE_OTHERS else ()) for name in CASES]
)
def test_gradient_of_functions_equals_the_reference(name, turn):
    case = CASES[name]
    gradient, _ = differentiate(FUNCTIONAL, name, turn)
    expected = reference.gradient(case.weight, case.ids, case.cotangents, **case.rules)
    assert isinstance(gradient, RowGrad) == (kinds_in_turn(CASES, turn)[name] == "row_gradient")
    assert_close(dense(gradient), expected, dtype=str(case.weight.dtype))


# Each case in one layer, the layers in turn; exhaustive runs try all layers.
READ_BY_LAYER = [(list(LAYERS)[n % 3], name) for n, name in enumerate(READ)]
CASES_BY_LAYER = [(list(LAYERS)[(n + 1) % 3], name, 0) for n, name in enumerate(CASES) if name not in LIKE_OTHERS]


@pytest.mark.parametrize(("layer", "name"), usual_and_rest(READ_BY_LAYER, itertools.product(LAYERS, READ)))
def test_layer_reads_and_stores_like_functions(layer, name):
    for actual, expected in zip(read(LAYERS[layer], name), read(FUNCTIONAL, name), strict=True):
        assert_same(actual, expected)


@pytest.mark.parametrize(
    ("layer", "name", "turn"), usual_and_rest(CASES_BY_LAYER, itertools.product(LAYERS, CASES, (0, 1)))
)
def test_gradient_of_layer_equals_functions(layer, name, turn):
    actual, stored = differentiate(LAYERS[layer], name, turn)
    expected, unchanged = differentiate(FUNCTIONAL, name, turn)
    assert isinstance(actual, RowGrad) == isinstance(expected, RowGrad)
    assert_close(dense(actual), dense(expected), dtype=str(CASES[name].weight.dtype))
    assert_same(stored, read(FUNCTIONAL, name)[1] if LAYERS[layer].stores else unchanged)


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
def test_dtype_sets_the_dtype_of_rows_read(framework, stored, returned):
    weight = jnp.asarray(INTEGERS, stored)
    layer = framework.make(weight)
    rows = framework.read_as(layer, IDS["matrix"], returned)
    assert_same(rows, INTEGERS[IDS["matrix"]].astype(jnp.dtype(returned)))
    assert_same(framework.read(layer, IDS["matrix"]), weight[IDS["matrix"]])
    assert_same(framework.table(layer).weight, weight)


@with_storing
def test_write_back_false_and_raw_transformations_store_nothing(framework):
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
