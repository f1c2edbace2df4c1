"""sampled_softmax given what was drawn, against float64 NumPy; what is drawn, against its distribution."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import ROWS, RULES, WEIGHT
from jax import test_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import embax
from embax import RowGrad, Table, Unigram, _candidates, sampled_softmax, softmax_cross_entropy

FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
RNG = np.random.default_rng(11)
X = RNG.normal(size=(2, 3, 3)).astype(np.float32)
LABELS = np.array([[2, 0, -1], [1, 2, 5]])
BAD = np.array([[2, 7, -8], [1, 100, 0]])
KEY = jax.random.key(3)
COUNTS = np.array([100, 0, 9, 50, 1, 3, 20])
UNIGRAM = Unigram.from_counts(COUNTS)

with_candidates = pytest.mark.parametrize(
    "candidates", ["log_uniform", "uniform", UNIGRAM], ids=["log_uniform", "uniform", "unigram"]
)


def probabilities_of(candidates, rows=ROWS):
    """By the formulas, in float64."""
    if candidates == "uniform":
        return np.full(rows, 1 / rows)
    if candidates == "log_uniform":
        return np.log((np.arange(rows) + 2) / (np.arange(rows) + 1)) / np.log(rows + 1)
    weights = np.where(COUNTS > 0, COUNTS**0.75, 0)
    return weights / weights.sum()


@with_candidates
@pytest.mark.parametrize("remove", [True, False], ids=["removed", "kept"])
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_values_given_what_was_drawn(candidates, remove, samples, rules):
    drawn = _candidates.draw(KEY, candidates, samples, ROWS)
    loss = sampled_softmax(
        Table(WEIGHT, **rules), X, LABELS, KEY, samples=samples, candidates=candidates, remove_accidental_hits=remove
    )
    expected = reference.sampled_softmax(WEIGHT, X, LABELS, drawn, probabilities_of(candidates), remove, **rules)
    np.testing.assert_allclose(loss, expected, **FLOAT32)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("policy", ["error", "clip", "nan", "zero"])
def test_traced_labels_without_a_row(policy):
    table = Table(WEIGHT, out_of_range=policy, padding_idx=1)
    x = np.where((BAD == 7)[..., None] & (policy in ("error", "nan")), np.nan, X)

    @jax.jit
    def run(table, x, labels):
        def total(table, x):
            loss = sampled_softmax(table, x, labels, KEY, samples=5)
            return jnp.sum(jnp.where(jnp.isnan(loss), 3 * loss, loss)), loss

        return jax.grad(total, argnums=(0, 1), has_aux=True)(table, x)

    (of_table, of_x), loss = run(table, x, BAD)
    drawn = _candidates.draw(KEY, "log_uniform", 5, ROWS)
    rules = {"out_of_range": policy, "padding_idx": 1}
    expected = reference.sampled_softmax(WEIGHT, X, BAD, drawn, probabilities_of("log_uniform"), **rules)
    np.testing.assert_allclose(loss, expected, **FLOAT32)
    assert np.isfinite(of_table.weight).all()
    np.testing.assert_array_equal(of_table.weight[1], 0)
    assert np.isfinite(of_x).all()
    np.testing.assert_array_equal(of_x[1, 0], 0)  # its label is padding
    if policy in ("error", "nan"):
        np.testing.assert_array_equal(np.asarray(of_x)[np.isnan(expected)], 0)


@with_candidates
def test_many_samples_come_to_the_whole_softmax(candidates):
    """Of 7 rows, 4000 draws hold all that can be drawn, so that it is the same but for rows with the probability 0."""
    table = Table(WEIGHT, padding_idx=1, max_norm=1.5)  # the row that has no count, too

    def sampled(table, x):
        return sampled_softmax(table, x, LABELS, KEY, samples=4000, candidates=candidates).sum()

    def whole(table, x):
        return softmax_cross_entropy(table, x, LABELS, mask_padding=True).sum()

    one, other = (jax.value_and_grad(f, argnums=(0, 1))(table, X) for f in (sampled, whole))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, **FLOAT32)


@with_candidates
def test_the_sum_over_the_candidates_is_unbiased(candidates):
    """The mean over many draws of what estimates the normaliser without the label, and that the loss comes nearer."""
    rows, dim, tokens = 200, 4, 3
    rng = np.random.default_rng(1)
    weight, x = (rng.normal(size=(n, dim)).astype(np.float32) for n in (rows, tokens))
    labels, table = np.array([3, 0, 60]), Table(weight)
    if isinstance(candidates, Unigram):
        candidates = Unigram.from_counts(1 + np.arange(rows)[::-1])
    chance = np.asarray(_candidates.probability(candidates, jnp.asarray(labels), rows), np.float64)
    logits = reference.attend(weight, x)
    of_label = logits[np.arange(tokens), labels]
    others = np.exp(logits).sum(1) - np.exp(of_label)
    gaps = []
    for samples, draws in (10, 3000), (640, 3000), (20_000, 100):
        losses = jax.jit(
            jax.vmap(lambda key, n=samples: sampled_softmax(table, x, labels, key, samples=n, candidates=candidates))
        )(jax.random.split(KEY, draws))
        corrected = of_label - np.log(1 - (1 - chance) ** samples)
        estimates = np.exp(corrected) * np.expm1(np.asarray(losses, np.float64))
        error = estimates.std(0) / np.sqrt(draws)
        assert (np.abs(estimates.mean(0) - others) < 4 * error + 1e-3 * others).all()
        gaps.append(np.abs(np.asarray(losses).mean(0) - reference.cross_entropy(weight, x, labels)[0]).max())
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[2] < 0.02


# ---- What is drawn.


@with_candidates
def test_probabilities(candidates):
    actual = _candidates.probability(candidates, jnp.arange(-1, ROWS + 1), ROWS)
    np.testing.assert_allclose(actual, [0, *probabilities_of(candidates), 0], rtol=1e-6, atol=1e-9)


@with_candidates
def test_rows_are_drawn_by_their_probability(candidates):
    number = 200_000
    drawn = np.asarray(_candidates.draw(KEY, candidates, number, ROWS))
    assert drawn.dtype == np.int32
    expected = probabilities_of(candidates) * number
    counts = np.bincount(drawn, minlength=ROWS)
    assert len(counts) == ROWS
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("rows", [10**8, 2**31 - 1])
def test_log_uniform_reaches_every_row_of_a_large_table(rows):
    """Among the last rows, as many distinct ones as if each was drawn by itself; no row is out of range."""
    number = 2_000_000
    drawn = np.asarray(jax.jit(_candidates.draw, static_argnums=(1, 2, 3))(KEY, "log_uniform", number, rows))
    assert 0 <= drawn.min() < drawn.max() < rows
    last = drawn[drawn >= rows // 2]
    expected = number * math.log(2) / math.log(rows + 1)
    assert abs(len(last) - expected) < 5 * math.sqrt(expected)
    # Were only multiples of 2**23 reached, or of float32's spacing, most would be there more than once.
    assert len(np.unique(last)) > 0.999 * len(last)
    assert np.abs(np.bincount(last % 8, minlength=8) - len(last) / 8).max() < 5 * math.sqrt(len(last) / 8)
    # Near the end of the float32 range of the exponent the steps are widest: no gaps between them.
    places = np.sort(last[: 10**6].astype(np.float64))
    assert np.diff(places).max() < 40 * rows / len(places)


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
def test_log_uniform_of_few_rows(rows):
    number = 100_000
    counts = np.bincount(np.asarray(_candidates.draw(KEY, "log_uniform", number, rows)), minlength=rows)
    expected = probabilities_of("log_uniform", rows) * number
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected)).all()


def test_log_uniform_of_more_rows_than_int32_has():
    with jax.enable_x64(True):
        drawn = np.asarray(_candidates.draw(KEY, "log_uniform", 10_000, 2**40))
        assert drawn.dtype == np.int64
        assert 0 <= drawn.min() < 2**39 < drawn.max() < 2**40


def test_unigram():
    assert repr(UNIGRAM) == "Unigram(7 rows)"
    assert repr(jax.tree.map(lambda _: None, UNIGRAM)) == "Unigram(None)"
    assert len(jax.tree.leaves(UNIGRAM)) == 1
    one = Unigram.from_counts([5])
    np.testing.assert_array_equal(_candidates.probability(one, jnp.zeros(2, int), 1), 1)
    alike = Unigram.from_counts([5, 0, 1], power=0)
    np.testing.assert_allclose(_candidates.probability(alike, jnp.arange(3), 3), [0.5, 0, 0.5], atol=1e-9)
    last = Unigram.from_counts([1.0, 0.0], power=1)  # that of 0 has nothing but the one number that rounding leaves
    np.testing.assert_allclose(_candidates.probability(last, jnp.arange(2), 2), [1, 0], atol=1e-9)


@with_candidates
def test_one_row_has_no_loss(candidates):
    candidates = Unigram.from_counts([3]) if isinstance(candidates, Unigram) else candidates
    loss = sampled_softmax(Table(WEIGHT[:1]), X[0], [0, 0, 0], KEY, samples=4, candidates=candidates)
    np.testing.assert_array_equal(loss, 0)


@pytest.mark.parametrize("tokens", [0, 2])
def test_no_rows(tokens):
    table = Table(np.zeros((0, 3), np.float32))
    loss = jax.jit(lambda labels: sampled_softmax(table, np.ones((tokens, 3), np.float32), labels, KEY, samples=4))(
        np.zeros(tokens, int)
    )
    assert loss.shape == (tokens,)
    assert np.isnan(loss).all()


@pytest.mark.parametrize(("dim", "batch"), [((), (4,)), ((2, 3), (2, 2)), ((3,), ()), ((3,), (0, 2))], ids=str)
def test_rows_of_any_axes(dim, batch):
    rng = np.random.default_rng(0)
    weight, x = (rng.normal(size=(*shape, *dim)).astype(np.float32) for shape in ((ROWS,), batch))
    labels = rng.integers(0, ROWS, batch)
    loss = sampled_softmax(Table(weight, max_norm=1.0), x, labels, KEY, samples=5)
    drawn = _candidates.draw(KEY, "log_uniform", 5, ROWS)
    expected = reference.sampled_softmax(weight, x, labels, drawn, probabilities_of("log_uniform"), max_norm=1.0)
    np.testing.assert_allclose(loss, expected, **FLOAT32)


@pytest.mark.parametrize(
    ("stored", "given"), [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "bfloat16")]
)
def test_low_precision(stored, given):
    weight, x = jnp.asarray(WEIGHT).astype(stored), jnp.asarray(X).astype(given)
    loss, (of_table, of_x) = jax.value_and_grad(
        lambda table, x: sampled_softmax(table, x, LABELS, KEY, samples=5).sum(), argnums=(0, 1)
    )(Table(weight), x)
    drawn = _candidates.draw(KEY, "log_uniform", 5, ROWS)
    wide = np.asarray(weight, np.float64), np.asarray(x, np.float64)
    expected = reference.sampled_softmax(*wide, LABELS, drawn, probabilities_of("log_uniform")).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert (loss.dtype, of_table.dtype, of_x.dtype) == (jnp.float32, weight.dtype, x.dtype)


# ---- Transformations, the tape, memory.


def energy(table, x, **options):
    return jnp.sum(jnp.sin(sampled_softmax(table, x, LABELS, KEY, samples=6, **options)))


@pytest.mark.parametrize("rules", [{}, RULES["all"]], ids=["none", "all"])
def test_derivatives_agree_with_differences(rules):
    """Of the unclipped table; the clipping passes gradients straight through."""
    rules = {**rules, "max_norm": None}
    with jax.enable_x64(True):
        table, x = Table(WEIGHT.astype(np.float64), **rules), X.astype(np.float64)
        test_util.check_grads(lambda x: energy(table, x), (x,), 2, rtol=1e-4)
        if not rules.get("scale_grad_by_freq"):
            test_util.check_grads(lambda w: energy(Table(w), x), (table.weight,), 2, rtol=1e-4)


def test_under_transformations():
    table = Table(WEIGHT, padding_idx=1)
    plain = jax.grad(energy, argnums=(0, 1))(table, X)
    for other in (
        jax.jit(jax.grad(energy, argnums=(0, 1)))(table, X),
        jax.grad(jax.checkpoint(energy), argnums=(0, 1))(table, X),
        jax.tree.map(
            lambda leaf: leaf[1],
            jax.vmap(jax.grad(energy, argnums=(0, 1)), (None, 0))(table, jnp.stack([2 * X, X])),
        ),
    ):
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, **FLOAT32)


@with_candidates
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_gradient_holds_the_rows_of_labels_and_candidates(candidates, rules):
    table = Table(WEIGHT, **rules)
    gradient = embax.grad(energy)(table, X, candidates=candidates)
    assert isinstance(gradient, RowGrad)
    assert len(gradient.ids) == (0 if table.freeze else LABELS.size + 6)
    np.testing.assert_allclose(gradient.to_dense(), jax.grad(energy)(table, X, candidates=candidates).weight, **FLOAT32)


@pytest.mark.parametrize("named", ["log_uniform", "uniform", "unigram"])
def test_memory_follows_tokens_and_samples(named):
    def step(table, x, labels, key, candidates):
        def loss(table, x):
            return sampled_softmax(table, x, labels, key, samples=64, candidates=candidates).sum()

        return embax.value_and_grad(loss, argnums=(0, 1))(table, x)

    def compiled(rows):
        table = Table(jax.ShapeDtypeStruct((rows, 32), jnp.float32), padding_idx=0, max_norm=1.0)
        x, labels = jax.ShapeDtypeStruct((128, 32), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32)
        if named != "unigram":
            return jax.jit(lambda *args: step(*args, named)).lower(table, x, labels, KEY).compile()
        return jax.jit(step).lower(table, x, labels, KEY, Unigram(jax.ShapeDtypeStruct((rows,), jnp.uint32))).compile()

    few, many = compiled(10**4), compiled(10**6)
    # Up to a few constants.
    assert abs(few.memory_analysis().temp_size_in_bytes - many.memory_analysis().temp_size_in_bytes) < 1024
    assert many.memory_analysis().temp_size_in_bytes < 2**17
    assert few.memory_analysis().output_size_in_bytes == many.memory_analysis().output_size_in_bytes
    entry = many.as_text()[many.as_text().index("\nENTRY ") :]
    assert not re.findall(r"\[1000000[^ ]* (?!parameter|slice)[\w-]+\(", entry)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh(axis_type):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    x, labels = RNG.normal(size=(4, 2, 3)).astype(np.float32), RNG.integers(0, ROWS, (4, 2))
    tokens = NamedSharding(mesh, PartitionSpec("x", "y"))
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec())), padding_idx=2)

    @jax.jit
    def run(table, x, labels):
        def total(table, x):
            loss = sampled_softmax(table, x, labels, KEY, samples=5)
            return loss.sum(), loss

        return jax.grad(total, argnums=(0, 1), has_aux=True)(table, x)

    with jax.set_mesh(mesh):
        sharded = run(table, jax.device_put(x, tokens), jax.device_put(labels, tokens))
    for a, b in zip(
        jax.tree.leaves(sharded), jax.tree.leaves(run(Table(WEIGHT, padding_idx=2), x, labels)), strict=True
    ):
        np.testing.assert_allclose(a, b, **FLOAT32)
    assert sharded[1].sharding.is_equivalent_to(tokens, 2)


# ---- Errors.


def test_errors():
    table, name = Table(WEIGHT), re.escape("`embax.sampled_softmax(")
    with pytest.raises(IndexError, match=name + r"labels=...\)` must be in \[-7, 7\).* got 7 at position \(0, 1\)"):
        sampled_softmax(table, X, BAD, KEY, samples=3)
    with pytest.raises(TypeError, match=name + r"labels=...\)` must be of an integer dtype, got bool"):
        sampled_softmax(table, X, LABELS > 0, KEY, samples=3)
    with pytest.raises(
        ValueError, match=name + r"labels=...\)` must be one a vector, of the shape \(2, 3\), got \(3,\)"
    ):
        sampled_softmax(table, X, [0, 1, 2], KEY, samples=3)
    with pytest.raises(ValueError, match=name + r"x=...\)` must be of the shape"):
        sampled_softmax(table, X[..., :2], LABELS, KEY, samples=3)
    with pytest.raises(TypeError, match=name + r"x=...\)` must be of a float dtype, got int"):
        sampled_softmax(table, LABELS, LABELS, KEY, samples=3)
    with pytest.raises(ValueError, match=name + r"samples=...\)` must be at least 1, got 0"):
        sampled_softmax(table, X, LABELS, KEY, samples=0)
    with pytest.raises(TypeError, match=name + r"samples=...\)` must be a whole number, got 1.5"):
        sampled_softmax(table, X, LABELS, KEY, samples=1.5)
    with pytest.raises(
        ValueError, match=name + r"candidates=...\)` must be one of 'log_uniform', 'uniform', got 'zipf'"
    ):
        sampled_softmax(table, X, LABELS, KEY, samples=3, candidates="zipf")
    with pytest.raises(TypeError, match=name + r"candidates=...\)` must be one of .* or an embax.Unigram, got ndarray"):
        sampled_softmax(table, X, LABELS, KEY, samples=3, candidates=COUNTS)
    with pytest.raises(
        ValueError, match=name + r"candidates=...\)` must be of the table's 7 rows, got Unigram\(2 rows"
    ):
        sampled_softmax(table, X, LABELS, KEY, samples=3, candidates=Unigram.from_counts([1, 2]))
    with pytest.raises(TypeError, match=name + r"remove_accidental_hits=...\)` must be a bool, got None"):
        sampled_softmax(table, X, LABELS, KEY, samples=3, remove_accidental_hits=None)


@pytest.mark.parametrize(
    ("counts", "power", "error", "message"),
    [
        (["a", "b"], 1, TypeError, r"counts=...\)` must be of real numbers, got <U1"),
        ([[1, 2]], 1, ValueError, r"counts=...\)` must be one number a row, \(rows,\), got the shape \(1, 2\)"),
        ([1, -1], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0, got \[1.0, -1.0\]"),
        ([1, np.nan], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0"),
        ([0, 0], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0"),
        ([], 1, ValueError, r"counts=...\)` must be finite, not negative and not all 0"),
        ([1, 2], -1, ValueError, r"power=...\)` must be positive, got -1"),
        ([1, 2], "1", TypeError, r"power=...\)` must be a positive number, got '1'"),
        ([1, 2], math.inf, ValueError, r"power=...\)` must be finite, got inf"),
    ],
)
def test_errors_of_unigram(counts, power, error, message):
    with pytest.raises(error, match=re.escape("`embax.Unigram.from_counts(") + message):
        Unigram.from_counts(counts, power)
