"""sampled_softmax given what was drawn, against float64 NumPy; its derivatives, the tape, memory and meshes."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from bag_cases import dense
from cases import ROWS, RULES, WEIGHT
from closeness import assert_close
from head_cases import (
    BAD,
    CANDIDATES,
    COUNTS,
    FLOAT32,
    KEY,
    LABELS,
    X,
    expected_loss,
    in_one_program,
)
from jax.sharding import NamedSharding, PartitionSpec
from meshes import mesh_of

import embax
from embax import RowGrad, Table, Unigram, sampled_softmax, softmax_cross_entropy
from embax._heads import candidates as _candidates

# The candidates, whether hits are removed, the number of samples, and the rules: all pairs of the first three, with
# padding rows both ways of removing.
GIVEN = [
    ("log_uniform", True, 6, "all"),
    ("log_uniform", False, 1, "none"),
    ("uniform", True, 1, "norm_half"),
    ("uniform", False, 6, "padding_negative"),
    ("unigram", True, 6, "frequency"),
    ("unigram", False, 1, "all_frozen"),
]
GIVEN_TOO = {
    f"{name}, {remove}": [*itertools.product([name], [remove], (1, 6), RULES)]
    for name in CANDIDATES
    for remove in (True, False)
}


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(GIVEN, id=""),
        *(pytest.param(cases, marks=pytest.mark.exhaustive, id=name) for name, cases in GIVEN_TOO.items()),
    ],
)
def test_sampled_softmax_equals_the_reference_for_drawn_candidates(cases):
    calls = {}
    for name, remove, samples, rules in cases:
        options = {"samples": samples, "candidates": CANDIDATES[name], "remove_accidental_hits": remove}
        table, function = Table(WEIGHT, **RULES[rules]), functools.partial(sampled_softmax, **options)
        calls[f"{name}, {remove}, {samples}, {rules}"] = function, table, X, LABELS, KEY
    losses = in_one_program(calls)
    for name, remove, samples, rules in cases:
        case = f"{name}, {remove}, {samples}, {rules}"
        expected = expected_loss(WEIGHT, X, LABELS, name, samples, remove, **RULES[rules])
        np.testing.assert_allclose(losses[case], expected, err_msg=case, **FLOAT32)
        assert losses[case].dtype == jnp.float32


def test_lists():
    table = Table(WEIGHT, padding_idx=1)
    loss = jax.jit(lambda: sampled_softmax(table, X.tolist(), LABELS.tolist(), KEY, samples=6))()
    np.testing.assert_allclose(loss, expected_loss(WEIGHT, X, LABELS, "log_uniform", 6, padding_idx=1), **FLOAT32)


@pytest.mark.parametrize(
    "policies", [["error", "zero"], pytest.param(["clip", "nan"], marks=pytest.mark.exhaustive)], ids=["", "too"]
)
def test_traced_labels_without_a_row(policies):
    def run(table, x, labels):
        def total(table, x):
            loss = sampled_softmax(table, x, labels, KEY, samples=5)
            return jnp.sum(jnp.where(jnp.isnan(loss), 3 * loss, loss)), loss

        return jax.grad(total, argnums=(0, 1), has_aux=True)(table, x)

    calls = {}
    for policy in policies:
        x = np.where((BAD == 7)[..., None] & (policy in ("error", "nan")), np.nan, X).astype(np.float32)
        calls[policy] = run, Table(WEIGHT, out_of_range=policy, padding_idx=1), x, BAD
    for policy, ((of_table, of_x), loss) in in_one_program(calls).items():
        expected = expected_loss(WEIGHT, X, BAD, "log_uniform", 5, out_of_range=policy, padding_idx=1)
        np.testing.assert_allclose(loss, expected, err_msg=policy, **FLOAT32)
        assert np.isfinite(of_table.weight).all(), policy
        np.testing.assert_array_equal(of_table.weight[1], 0, policy)
        assert np.isfinite(of_x).all(), policy
        np.testing.assert_array_equal(of_x[1, 0], 0, policy)  # its label is padding
        if policy in ("error", "nan"):
            np.testing.assert_array_equal(of_x[np.isnan(expected)], 0, policy)


@pytest.mark.parametrize("name", ["unigram", pytest.param("log_uniform", marks=pytest.mark.exhaustive)])
def test_many_samples_approach_the_full_softmax(name):
    """Of 7 rows, 4000 draws hold all that can be drawn, so that it is the same but for rows with the probability 0."""
    table = Table(WEIGHT, padding_idx=1, max_norm=1.5)  # the row that has no count, too

    def sampled(table, x):
        return sampled_softmax(table, x, LABELS, KEY, samples=4000, candidates=CANDIDATES[name], z_loss=0.1).sum()

    def whole(table, x):
        return softmax_cross_entropy(table, x, LABELS, mask_padding=True, z_loss=0.1).sum()

    calls = {f.__name__: (jax.value_and_grad(f, argnums=(0, 1)), table, X) for f in (sampled, whole)}
    actual = in_one_program(calls)
    assert_close(actual["sampled"], actual["whole"], **FLOAT32)


@pytest.mark.parametrize(
    "name", ["log_uniform", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("uniform", "unigram"))]
)
def test_the_sum_over_the_candidates_is_unbiased(name):
    """The mean over many draws of what estimates the normaliser without the label, and that the loss comes nearer."""
    rows, dim, tokens = 200, 4, 3
    rng = np.random.default_rng(1)
    weight, x = (rng.normal(size=(n, dim)).astype(np.float32) for n in (rows, tokens))
    labels, table = np.array([3, 0, 60]), Table(weight)
    candidates = Unigram.from_counts(1 + np.arange(rows)[::-1]) if name == "unigram" else name
    sizes = {10: 3000, 640: 500}  # how often so many samples are drawn
    if name == "log_uniform":
        sizes[10_000] = 50

    @jax.jit
    def run(key):
        chance = _candidates.probability(candidates, jnp.asarray(labels), rows)
        return chance, {
            samples: jax.vmap(
                lambda key, n=samples: sampled_softmax(table, x, labels, key, samples=n, candidates=candidates)
            )(jax.random.split(key, draws))
            for samples, draws in sizes.items()
        }

    chance, losses_of = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run(KEY))
    logits = reference.attend(weight, x)
    of_label = logits[np.arange(tokens), labels]
    others = np.exp(logits).sum(1) - np.exp(of_label)
    gaps = []
    for samples, draws in sizes.items():
        losses = losses_of[samples]
        corrected = of_label - np.log(1 - (1 - chance) ** samples)
        estimates = np.exp(corrected) * np.expm1(losses)
        error = estimates.std(0) / np.sqrt(draws)
        assert (np.abs(estimates.mean(0) - others) < 4 * error + 1e-3 * others).all(), samples
        gaps.append(np.abs(losses.mean(0) - reference.cross_entropy(weight, x, labels)[0]).max())
    assert gaps == sorted(gaps, reverse=True)
    if name == "log_uniform":
        assert gaps[-1] < 0.02


# ---- Sizes and dtypes.


def test_one_row_has_no_loss():
    calls = {}
    for name, candidates in CANDIDATES.items():
        candidates = Unigram.from_counts([3]) if name == "unigram" else candidates
        one = functools.partial(sampled_softmax, samples=4, candidates=candidates)
        calls[name] = one, Table(WEIGHT[:1]), X[0], np.zeros(3, int), KEY
    for name, loss in in_one_program(calls).items():
        np.testing.assert_array_equal(loss, 0, name)


def test_no_rows():
    call = functools.partial(sampled_softmax, Table(np.zeros((0, 3), np.float32)), samples=4)
    calls = {
        f"{tokens} tokens": (call, np.ones((tokens, 3), np.float32), np.zeros(tokens, int), KEY) for tokens in (0, 2)
    }
    for name, loss in in_one_program(calls).items():
        assert loss.shape == calls[name][2].shape
        assert np.isnan(loss).all(), name


@pytest.mark.exhaustive
def test_rows_of_any_axes():
    arrays, calls = {}, {}
    for dim, batch in ((), (4,)), ((2, 3), (2, 2)), ((3,), ()), ((3,), (0, 2)):
        rng, name = np.random.default_rng(0), f"{dim} {batch}"
        weight, x = (rng.normal(size=(*shape, *dim)).astype(np.float32) for shape in ((ROWS,), batch))
        arrays[name] = weight, x, np.asarray(rng.integers(0, ROWS, batch))
        calls[name] = functools.partial(sampled_softmax, samples=5), Table(weight, max_norm=1.0), *arrays[name][1:], KEY
    for name, loss in in_one_program(calls).items():
        expected = expected_loss(*arrays[name], "log_uniform", 5, max_norm=1.0)
        np.testing.assert_allclose(loss, expected, err_msg=name, **FLOAT32)


LOW = [("bfloat16", "bfloat16"), ("float16", "float32")]


@pytest.mark.parametrize(
    "pairs", [LOW, pytest.param([("float32", "bfloat16")], marks=pytest.mark.exhaustive)], ids=["", "too"]
)
def test_low_precision(pairs):
    def total(table, x):
        return sampled_softmax(table, x, LABELS, KEY, samples=5).sum()

    gradients, calls = jax.value_and_grad(total, argnums=(0, 1)), {}
    for stored, given in pairs:
        calls[f"{stored} {given}"] = gradients, Table(WEIGHT.astype(stored)), X.astype(given)
    for name, (loss, (of_table, of_x)) in in_one_program(calls).items():
        _, table, x = calls[name]
        wide = np.asarray(table.weight, np.float64), np.asarray(x, np.float64)
        expected = expected_loss(*wide, LABELS, "log_uniform", 5).sum()
        np.testing.assert_allclose(loss, expected, rtol=1e-5, err_msg=name)
        assert (loss.dtype, of_table.dtype, of_x.dtype) == (jnp.float32, table.dtype, x.dtype), name


# ---- Transformations, the tape, memory.


def energy(table, x, **options):
    return jnp.sum(jnp.sin(sampled_softmax(table, x, LABELS, KEY, samples=6, **options)))


def first_and_second(f, ways, at, along):
    """Directional derivatives: those of `f`, and of its gradient in some ways, each beside differences."""

    def moved(by):
        return jax.tree.map(lambda a, b: a + by * b, at, along)

    def dot(tree):
        return sum(jnp.vdot(*pair) for pair in zip(tree, along, strict=True))

    def gradient_along(at):
        return dot(jax.grad(f)(at))

    def pushed(at):
        return jax.jvp(f, (at,), (along,))[1]

    step = 1e-6
    values, slopes = jax.vmap(lambda by: (f(moved(by)), gradient_along(moved(by))))(jnp.array([step, -step]))
    of_ways = {
        "forward over reverse": lambda: jax.jvp(gradient_along, (at,), (along,))[1],
        "forward over forward": lambda: jax.jvp(pushed, (at,), (along,))[1],
        "reverse over reverse": lambda: dot(jax.grad(gradient_along)(at)),
        "reverse over forward": lambda: dot(jax.grad(pushed)(at)),
    }
    return {
        "first": [(values[0] - values[1]) / (2 * step), pushed(at), gradient_along(at)],
        "second": [(slopes[0] - slopes[1]) / (2 * step), *(of_ways[way]() for way in ways)],
    }


SECOND = [["forward over reverse", "reverse over reverse"], ["forward over forward", "reverse over forward"]]


@pytest.mark.parametrize("ways", [SECOND[0], pytest.param(SECOND[1], marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_derivatives_agree_with_differences(ways):
    """Of the unclipped table, along other rows than the padding row, whose gradient is 0 by the rules alone."""
    with jax.enable_x64(True):
        at = WEIGHT.astype(np.float64), X.astype(np.float64)
        along = tuple(np.cos(np.arange(array.size)).reshape(array.shape) for array in at)
        along[0][2] = 0
        derivatives = jax.jit(
            functools.partial(first_and_second, lambda at: energy(Table(at[0], padding_idx=2), at[1]), ways)
        )(at, along)
        for order, (by_differences, *others) in derivatives.items():
            assert abs(by_differences) > 1e-2, order
            np.testing.assert_allclose(others, [by_differences] * len(others), rtol=1e-6, err_msg=order)


def test_under_transformations():
    def mapped(table, x):
        of_lane = jax.grad(jax.checkpoint(energy), argnums=(0, 1))
        of_lanes = jax.vmap(of_lane, (None, 0))(table, jnp.stack([2 * x, x]))
        return jax.tree.map(lambda leaf: leaf[1], of_lanes)

    arguments = Table(WEIGHT, padding_idx=1), X
    actual = in_one_program(
        {
            "plain": (jax.grad(energy, argnums=(0, 1)), *arguments),
            "vmap of checkpoint": (mapped, *arguments),
        }
    )
    assert_close(actual["vmap of checkpoint"], actual["plain"], **FLOAT32)


HELD = [("uniform", "frequency"), ("unigram", "all"), ("log_uniform", "freeze")]
HELD_TOO = [case for case in itertools.product(CANDIDATES, RULES) if case not in HELD]


@pytest.mark.parametrize("cases", [HELD, pytest.param(HELD_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_gradient_holds_the_rows_of_labels_and_candidates(cases):
    calls = {}
    for name, rules in cases:
        loss, table = functools.partial(energy, candidates=CANDIDATES[name]), Table(WEIGHT, **RULES[rules])
        calls[f"{name} {rules}"] = embax.grad(loss), table, X
        calls[f"{name} {rules}, dense"] = jax.grad(loss), table, X
    actual = in_one_program(calls)
    whole = dense({name: gradient for name, gradient in actual.items() if not name.endswith("dense")})
    for name, rules in cases:
        gradient, expected = actual[f"{name} {rules}"], actual[f"{name} {rules}, dense"].weight
        assert isinstance(gradient, RowGrad)
        assert len(gradient.values) == (0 if RULES[rules].get("freeze") else LABELS.size + 6), rules
        np.testing.assert_allclose(whole[f"{name} {rules}"], expected, err_msg=f"{name} {rules}", **FLOAT32)


def test_memory_follows_tokens_and_samples():
    """Of so many rows, one byte for 2**13 of them would show."""
    rows, tokens, dim, samples = 2**30, 128, 32, 64

    def step(table, x, labels, key, candidates):
        def loss(table, x):
            return sampled_softmax(table, x, labels, key, samples=samples, candidates=candidates).sum()

        drawn = [_candidates.draw(key, name, samples, rows) for name in ("log_uniform", "uniform")]
        chances = [_candidates.probability(name, labels, rows) for name in ("log_uniform", "uniform")]
        return embax.value_and_grad(loss, argnums=(0, 1))(table, x), drawn, chances

    table = Table(jax.ShapeDtypeStruct((rows, dim), jnp.float32), padding_idx=0, max_norm=1.0)
    x, labels = jax.ShapeDtypeStruct((tokens, dim), jnp.float32), jax.ShapeDtypeStruct((tokens,), jnp.int32)
    unigram = Unigram(jax.ShapeDtypeStruct((rows,), jnp.uint32))
    compiled = jax.jit(step).lower(table, x, labels, KEY, unigram).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory.temp_size_in_bytes < 2**17
    assert memory.output_size_in_bytes < 2 * 4 * (2 * tokens + samples) * dim
    assert not re.findall(rf"\[{rows}[^ ]* (?!parameter|slice)[\w-]+\(", text[text.index("\nENTRY ") :])


@pytest.mark.exhaustive  # beside the sampled loss of tests/mesh
@pytest.mark.parametrize("axes", ["explicit", "auto"])
def test_on_a_mesh(axes):
    rng = np.random.default_rng(11)
    x, labels = rng.normal(size=(4, 2, 3)).astype(np.float32), rng.integers(0, ROWS, (4, 2))

    @jax.jit
    def run(table, x, labels):
        def total(table, x):
            loss = sampled_softmax(table, x, labels, KEY, samples=5)
            return loss.sum(), loss

        return jax.grad(total, argnums=(0, 1), has_aux=True)(table, x)

    plain = run(Table(WEIGHT, padding_idx=2), x, labels)
    mesh = mesh_of({"x": 2, "y": 2}, axes)
    tokens = NamedSharding(mesh, PartitionSpec("x", "y"))
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec())), padding_idx=2)
    with jax.set_mesh(mesh):
        sharded = run(table, jax.device_put(x, tokens), jax.device_put(labels, tokens))
    assert_close(sharded, plain, **FLOAT32)
    assert sharded[1].sharding.is_equivalent_to(tokens, 2)


# ---- Errors.


def test_errors():
    table, name = Table(WEIGHT), re.escape("`embax.sampled_softmax(")
    with pytest.raises(
        IndexError, match=name + r"labels=...\)` must be in \[0, 7\) or ignore_index=-100, .* got 7 at position"
    ):
        sampled_softmax(table, X, BAD, KEY, samples=3)
    with pytest.raises(TypeError, match=name + r"labels=...\)` must be of an integer dtype, got bool"):
        sampled_softmax(table, X, LABELS > 0, KEY, samples=3)
    with pytest.raises(
        ValueError, match=name + r"labels=...\)` must be one for each vector, of the shape \(2, 3\), got \(3,\)"
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
