"""EmbeddingBag: the arguments of torch's layer, the rules of embedding_bag, and what is stored of clipped rows."""

import inspect
import itertools

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from bag_cases import dense, ids_of
from meshes import usual_and_rest

import embax
from embax import Ragged

WEIGHT = np.arange(1.0, 13.0, dtype=np.float32).reshape(6, 2)
IDS, OFFSETS = np.array([0, 2, 2, -1, 4]), np.array([0, 2, 2, 4])
LISTS = [[0, 2], [], [2, -1], [4]]
FACTORS = np.array([0.5, 2.0, 1.0, 1.5, 3.0], np.float32)
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}  # float32
MODES = ["sum", "mean", "sqrtn", "max"]


def layer(**options):
    return embax.EmbeddingBag.from_pretrained(WEIGHT, **{"freeze": False, **options})


def test_signatures_equal_torch():
    def parameters(function):
        return {name: p.default for name, p in inspect.signature(function).parameters.items() if name != "self"}

    # torch.nn.EmbeddingBag 2.13, but for sparse, device and _weight.
    init = parameters(embax.EmbeddingBag.__init__)
    names = ["num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "mode"]
    assert list(init)[:6] == names
    defaults = {"max_norm": None, "norm_type": 2.0, "scale_grad_by_freq": False, "mode": "mean"}
    defaults |= {"include_last_offset": False, "padding_idx": None, "dtype": None}
    assert {name: init[name] for name in defaults} == defaults
    pretrained = parameters(embax.EmbeddingBag.from_pretrained)
    assert list(pretrained)[:2] == ["embeddings", "freeze"]
    assert pretrained["freeze"] is True
    assert list(parameters(embax.EmbeddingBag.update)) == ["input", "offsets", "per_sample_weights"]


def test_is_a_layer_with_one_state():
    bag = embax.EmbeddingBag(6, (2, 3), 1.0, 1.0, True, "sum", padding_idx=0, name="bag")
    assert (bag.num_embeddings, bag.embedding_size, bag.out_size, bag.mode) == (6, (2, 3), (2, 3), "sum")
    assert (bag.max_norm, bag.norm_type, bag.scale_grad_by_freq, bag.name) == (1.0, 1.0, True, "bag")
    assert list(bag.states()) == [("weight",)]
    assert not bag.weight.value[0].any()
    assert jax.eval_shape(lambda: bag([[1, 2]])).shape == (1, 2, 3)
    assert isinstance(bag, embax.Embedding)
    assert embax.EmbeddingBag is embax.brainstate.EmbeddingBag
    assert embax.EmbeddingBag(6, 2).mode == "mean"
    brainstate.random.seed(1)
    first = embax.EmbeddingBag(6, 2).weight.value
    brainstate.random.seed(1)
    np.testing.assert_array_equal(embax.Embedding(6, 2).weight.value, first)


@pytest.mark.parametrize(("mode", "padding_idx"), [("sum", None), ("mean", 2), ("sqrtn", None), ("max", 2)])
def test_reads_bags_in_every_form(mode, padding_idx):
    bag = layer(mode=mode, padding_idx=padding_idx)
    with_end = layer(mode=mode, padding_idx=padding_idx, include_last_offset=True)
    of_jax = jnp.asarray(IDS), jnp.asarray(OFFSETS)

    def forms(ids, offsets, factors):
        matrix = None if factors is None else factors[:4].reshape(2, 2)
        yield "offsets", lambda: bag(IDS, OFFSETS, factors)
        yield "matrix", lambda: bag(IDS[:4].reshape(2, 2), per_sample_weights=matrix)
        if mode == "mean":
            yield "lists", lambda: bag(IDS.tolist(), offsets=OFFSETS.tolist(), per_sample_weights=factors)
            yield "arrays of JAX", lambda: bag(*of_jax, factors)
            yield "ragged", lambda: bag(Ragged.from_offsets(IDS, OFFSETS), per_sample_weights=factors)
            yield "last offset", lambda: with_end(IDS, [*OFFSETS, 5], factors)
            yield "traced", lambda: bag.update(ids, offsets, factors)

    @jax.jit
    def run(*args):
        plain, weighted = list(forms(*args[:2], None)), list(forms(*args))
        if mode == "max":
            return [{form: read() for form, read in plain}]
        # Half of the forms without weights, the other half with them.
        plain, weighted = (plain[::2], weighted[1::2]) if mode == "mean" else (plain[1::2], weighted[::2])
        return [{form: read() for form, read in of} for of in (plain, weighted)]

    for outs, factors in zip(run(IDS, OFFSETS, FACTORS), (None, FACTORS), strict=False):
        of_lists = None if factors is None else [factors[:2], [], factors[2:4], factors[4:]]
        expected = reference.embedding_bag(WEIGHT, LISTS, of_lists, mode, padding_idx=padding_idx)
        of_matrix = None if factors is None else factors[:4].reshape(2, 2)
        of_matrix = reference.embedding_bag(WEIGHT, [[0, 2], [2, -1]], of_matrix, mode, padding_idx=padding_idx)
        for form, out in outs.items():
            np.testing.assert_allclose(out, of_matrix if form == "matrix" else expected, **TOLERANCE, err_msg=form)


def test_reads_bags_in_jit_of_brainstate():
    bag = layer(mode="max", padding_idx=2)
    expected = reference.embedding_bag(WEIGHT, LISTS, None, "max", padding_idx=2)
    np.testing.assert_allclose(brainstate.transform.jit(bag)(IDS, OFFSETS), expected, **TOLERANCE)
    assert jax.eval_shape(lambda: bag(IDS.reshape(5, 1, 1))).shape == (5, 1, 2)


def test_from_pretrained_keeps_its_padding_row_and_is_frozen():
    bag = embax.EmbeddingBag.from_pretrained(WEIGHT, padding_idx=1, mode="sum")
    np.testing.assert_array_equal(bag.weight.value, WEIGHT)
    gradient_and_out = brainstate.transform.grad(
        lambda: (bag([[1, 2]]).sum(), bag([[1, 2], [1, 1]])), bag.weight, has_aux=True
    )
    gradient, out = jax.device_get(brainstate.transform.jit(gradient_and_out)())
    np.testing.assert_array_equal(out, [WEIGHT[2], [0, 0]])
    assert bag.freeze
    assert not gradient.any()
    assert not layer(padding_idx=1).freeze


with_modes = pytest.mark.parametrize("mode", ["mean", pytest.param("max", marks=pytest.mark.exhaustive)])


@with_modes
def test_gradient_by_rows_equals_brainstate(mode):
    bag = layer(mode=mode, padding_idx=4)
    cotangents = np.cos(np.arange(8.0, dtype=np.float32)).reshape(4, 2)

    def loss():
        return (bag(IDS, OFFSETS) * cotangents).sum()

    rows = embax.brainstate.jit(embax.brainstate.grad(loss, bag.weight, on_dense="error"))()
    assert isinstance(rows, embax.RowGrad)
    assert ids_of(rows).tolist() == [0, 2, 2, 5, 6]  # the padding row is none
    expected, _ = reference.embedding_bag_gradient(WEIGHT, LISTS, cotangents, None, mode, padding_idx=4)
    np.testing.assert_allclose(dense(rows), expected, **TOLERANCE)
    of_brainstate = brainstate.transform.jit(brainstate.transform.grad(loss, bag.weight))()
    np.testing.assert_allclose(of_brainstate, expected, **TOLERANCE)


# ---- What is stored.

COMPILE = {
    "eager": lambda bag: bag,
    "brainstate": brainstate.transform.jit,
    "embax": embax.brainstate.jit,
    "grad": lambda bag: brainstate.transform.jit(brainstate.transform.grad(lambda *args: bag(*args).sum(), bag.weight)),
}
# Each names the rows 0, 2 and 3; what is behind the last offset names none.
NAMED = {
    "matrix": (np.array([[0, 2], [-3, 2]]), None),
    "offsets": (np.array([0, 2, -3]), np.array([0, 2, 3])),
    "unused": (np.array([0, 2, -3, 4, 1]), np.array([0, 0, 2, 3])),
    "junk": (np.array([0, 2, -3, 99, -99]), np.array([0, 0, 2, 3])),
    "traced_junk": (jnp.array([0, 2, -3, 99, -99], jnp.int8), jnp.array([0, 0, 2, 3])),
}


@pytest.mark.parametrize(
    ("compile_", "name", "out_of_range"),
    usual_and_rest(
        [
            *[("embax", "matrix", "error"), ("embax", "offsets", "error"), ("embax", "junk", "clip")],
            *[("eager", "junk", "error"), ("brainstate", "unused", "error"), ("grad", "traced_junk", "error")],
            ("eager", "traced_junk", "clip"),
        ],
        itertools.product(["embax"], NAMED, ["error"]),
    ),
)
def test_call_stores_the_rows_that_are_in_a_bag_clipped(compile_, name, out_of_range):
    ids, offsets = NAMED[name]
    bag = layer(mode="sum", max_norm=1.0, include_last_offset=True, out_of_range=out_of_range)
    COMPILE[compile_](bag)(ids, offsets)
    expected = WEIGHT.copy()
    expected[[0, 2, 3]] /= np.linalg.norm(expected[[0, 2, 3]], axis=1, keepdims=True)
    np.testing.assert_allclose(bag.weight.value, expected, rtol=2e-7)  # float32


def test_small_integers_name_no_row_of_a_large_table():
    # 300 is 44 in eight bits.
    bag = embax.EmbeddingBag(300, 2, 1.0, embedding_init=5.0, include_last_offset=True)
    brainstate.transform.jit(bag)(np.array([1, 2, 3], np.int8), np.array([0, 2]))
    assert np.flatnonzero(np.asarray(bag.weight.value)[:, 0] < 1).tolist() == [1, 2]


@pytest.mark.parametrize("options", [{"write_back": False}, {"freeze": True}, {"padding_idx": 2}], ids=str)
def test_write_back_false_frozen_and_padding_rows_store_nothing(options):
    bag = layer(mode="sum", max_norm=1.0, **options)
    out = bag([[2, 2], [2, 2]])
    np.testing.assert_array_equal(bag.weight.value, WEIGHT)
    clipped = 2 * WEIGHT[2] / np.linalg.norm(WEIGHT[2])
    np.testing.assert_allclose(out, [[0, 0]] * 2 if "padding_idx" in options else [clipped] * 2, **TOLERANCE)


def test_raw_jit_stores_nothing():
    bag = layer(mode="max", max_norm=1.0)

    @jax.jit
    def run(ids, offsets):
        return bag.update(ids, offsets), bag(IDS, offsets), bag(IDS, OFFSETS)

    for out in run(IDS, OFFSETS):
        np.testing.assert_array_equal(bag.weight.value, WEIGHT)
        assert (np.linalg.norm(out, axis=1) <= 2.0001).all()
    bag.renormalize([1])
    np.testing.assert_allclose(np.linalg.norm(bag.weight.value[1]), 1, **TOLERANCE)


@with_modes
def test_output_has_the_unit_of_the_table(mode):
    weight = brainunit.Quantity(WEIGHT, unit=brainunit.mV)
    bag = embax.EmbeddingBag.from_pretrained(weight, freeze=False, mode=mode, max_norm=0.005 * brainunit.volt)
    out = brainstate.transform.jit(bag)(IDS, OFFSETS)
    assert brainunit.get_unit(out) == brainunit.mV
    expected = reference.embedding_bag(WEIGHT, LISTS, None, mode, max_norm=5.0)
    np.testing.assert_allclose(out.to_decimal(brainunit.mV), expected, **TOLERANCE)
    stored = bag.weight.value
    assert brainunit.get_unit(stored) == brainunit.mV
    norms = np.linalg.norm(stored.mantissa, axis=1)
    np.testing.assert_allclose(norms[[0, 2, 4, 5]], [5**0.5, 5, 5, 5], **TOLERANCE)


def test_dtype_sets_the_dtype_of_the_output():
    low, half = layer(dtype="bfloat16"), embax.EmbeddingBag.from_pretrained(WEIGHT.astype("float16"))
    of_low, of_half = jax.eval_shape(lambda: (low([[0, 1]]), half([[0, 1]])))
    assert (of_low.dtype, of_half.dtype) == (jnp.bfloat16, jnp.float16)
    ones = embax.EmbeddingBag(3, 2, mode="sum", embedding_init=jnp.ones((3, 2), jnp.bfloat16), dtype="float32")
    # Not by way of the table's dtype.
    out = jax.jit(lambda: ones(np.zeros((1, 4097), int)))()
    np.testing.assert_array_equal(out, np.full((1, 2), 4097, np.float32))


BAD = {
    "mode": (lambda: layer(mode="min"), ValueError, r"EmbeddingBag\(mode=...\)` must be one of 'sum', .* got 'min'"),
    "flag": (lambda: layer(include_last_offset=1), TypeError, r"include_last_offset=...\)` must be a bool, got 1"),
    "padding": (lambda: layer(padding_idx=6), ValueError, r"must be in \[0, 6\), got 6"),
    "option": (lambda: layer(sparse=True), TypeError, "unexpected keyword argument 'sparse'"),
    "axes": (lambda: embax.EmbeddingBag.from_pretrained([1.0]), ValueError, r"EmbeddingBag.from_pretrained\(emb"),
    "scalar": (lambda: layer()(3), ValueError, r"EmbeddingBag.update\(input=...\)` must have an axis of ids"),
    "floats": (lambda: layer()([[1.5]]), TypeError, r"update\(input=...\)` must be of an integer dtype"),
    "no_row": (lambda: layer()([[1, 6]]), IndexError, r"update\(input=...\)` must be in .* got 6 at position \(0, 1\)"),
    "no_row_of_offsets": (lambda: layer()([1, 6], [0]), IndexError, r"got 6 at position \(1,\)"),
    "first_offset": (lambda: layer()([1, 2], [1]), ValueError, "must start at 0, got 1"),
    "matrix_with_offsets": (lambda: layer()([[1, 2]], [0]), ValueError, r"must have 1 axes, got shape \(1, 2\)"),
    "ragged_with_offsets": (
        lambda: layer()(Ragged([1], [0, 1]), [0]), TypeError,
        r"update\(offsets=...\)` must be None for a Ragged, got \[0\]",
    ),
    "weights": (
        lambda: layer()([[1, 2]], per_sample_weights=[1.0]), ValueError,
        r"update\(per_sample_weights=...\)` must be one for each id, \(1, 2\), got shape \(1,\)",
    ),
    "weights_of_max": (
        lambda: layer(mode="max")([[1]], per_sample_weights=[[1.0]]), TypeError, "must be None in mode 'max'",
    ),
    "integers": (
        lambda: embax.EmbeddingBag.from_pretrained(WEIGHT.astype(int))([[1]]), TypeError,
        "EmbeddingBag.update` must have a table of a float dtype, got int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()
