"""Tokens that do not count, label smoothing, the z-loss and reductions of both losses, against float64 NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from cases import ROWS, WEIGHT
from head_cases import COTANGENT, FLOAT32, KEY, X, assert_equal_trees, expected_loss, in_one_program
from jax.experimental import checkify
from meshes import usual_and_rest

import embax
from embax import RowGrad, Table, attend, sampled_softmax, softmax_cross_entropy

LABELS = np.array([[2, -100, 6], [1, 2, -100]])
SAMPLED = functools.partial(sampled_softmax, key=KEY, samples=6)


def gradients(loss, table, x, labels, cotangent, **options):
    value, pull = jax.vjp(lambda table, x: loss(table, x, labels, **options), table, x)
    of_table, of_x = pull(jnp.asarray(cotangent, value.dtype))
    return value, of_table.weight, of_x


# ---- Values and gradients.

ALL = {"label_smoothing": 0.3, "z_loss": 0.1}
PADDED = {"padding_idx": (0, 2)}
# Options, rules of the table.
OPTIONS = {
    "ignored": ({}, {}),
    "nothing ignored": ({"ignore_index": None}, {}),
    "smoothed": ({"label_smoothing": 0.1}, PADDED),
    "wholly smoothed": ({"label_smoothing": 1}, {}),
    "z-loss": ({"z_loss": 0.02}, {"max_norm": 1.5}),
    "both": (ALL, {}),
    "both, masked": (ALL | {"mask_padding": True}, PADDED),
    "masked": ({"mask_padding": True}, PADDED),
    "another ignored": (ALL | {"mask_padding": True, "ignore_index": 6}, PADDED),
    "both, clip": (ALL, {"out_of_range": "clip"}),
    "both, zero": (ALL | {"mask_padding": True, "ignore_index": None}, PADDED | {"out_of_range": "zero"}),
}


def left_out(options, rules):
    return reference.padding_rows(rules.get("padding_idx"), ROWS) if options.get("mask_padding") else ()


REDUCTIONS = ("none", "mean", "sum")
# A reduction for each of the options, and all of them for the options that have most terms.
USUAL = {name: (REDUCTIONS[k % 3],) for k, name in enumerate(OPTIONS)} | {"both, masked": REDUCTIONS}


@pytest.mark.parametrize(
    ("reductions", "chunk"),
    [
        pytest.param(USUAL, 2, id="2"),
        pytest.param(dict.fromkeys(OPTIONS, REDUCTIONS), 2, marks=pytest.mark.exhaustive, id="2-all"),
        pytest.param(dict.fromkeys(OPTIONS, REDUCTIONS), None, marks=pytest.mark.exhaustive, id="all"),
    ],
)
def test_values_and_gradients(reductions, chunk):
    calls, expected = {}, {}
    for name, (options, rules) in OPTIONS.items():
        for reduction in reductions[name]:
            g = COTANGENT if reduction == "none" else np.float32(0.7)
            loss = functools.partial(gradients, softmax_cross_entropy, chunk=chunk, reduction=reduction, **options)
            calls[name, reduction] = loss, Table(WEIGHT, **rules), X, LABELS, g
            losses, _ = reference.cross_entropy(WEIGHT, X, LABELS, **options, **rules)
            reduced = functools.partial(
                reference.reduce,
                labels=LABELS,
                reduction=reduction,
                ignore_index=options.get("ignore_index", -100),
                left_out=left_out(options, rules),
            )
            of_losses = np.broadcast_to(g, X.shape[:2])
            if reduction == "mean":
                of_losses = of_losses * reduced(np.ones(LABELS.shape)) / LABELS.size
            of_args = reference.cross_entropy_gradient(WEIGHT, X, LABELS, of_losses, **options, **rules)
            expected[name, reduction] = reduced(losses), *of_args
    for case, actual in in_one_program(calls).items():
        assert_equal_trees(actual, expected[case], str(case), **FLOAT32)


# Reduction, z-loss, policy, the label that is ignored: each value meets each other one.
SAMPLED_CASES = [
    ("none", 0.0, "error", -100),
    ("none", 0.1, "clip", 6),
    ("none", 0.1, "zero", -100),
    ("mean", 0.1, "error", 6),
    ("mean", 0.0, "clip", -100),
    ("mean", 0.1, "zero", 6),
    ("sum", 0.1, "error", -100),
    ("sum", 0.1, "clip", -100),
    ("sum", 0.0, "zero", 6),
]


def test_values_of_the_sampled_loss():
    calls, expected = {}, {}
    for case in SAMPLED_CASES:
        reduction, z_loss, policy, ignored = case
        labels = np.where(LABELS == -100, ignored, LABELS)
        rules = {"padding_idx": 2, "max_norm": 1.5, "out_of_range": policy}
        options = {"z_loss": z_loss, "ignore_index": ignored}
        loss = functools.partial(SAMPLED, reduction=reduction, **options)
        calls[case] = lambda t, x, y, loss=loss: loss(t, x, y), Table(WEIGHT, **rules), X, labels
        losses = expected_loss(WEIGHT, X, labels, "log_uniform", 6, **options, **rules)
        expected[case] = reference.reduce(losses, labels, reduction, ignored, (2,))
    for case, actual in in_one_program(calls).items():
        np.testing.assert_allclose(actual, expected[case], err_msg=str(case), **FLOAT32)


def test_the_sampled_z_loss_comes_to_that_of_the_whole_softmax():
    options = {"z_loss": 0.1, "reduction": "mean"}

    def sampled(table, x):
        return sampled_softmax(table, x, LABELS, KEY, samples=4000, candidates="uniform", **options)

    def whole(table, x):
        return softmax_cross_entropy(table, x, LABELS, mask_padding=True, **options)

    calls = {f.__name__: (jax.value_and_grad(f, (0, 1)), Table(WEIGHT, padding_idx=2), X) for f in (sampled, whole)}
    actual = in_one_program(calls)
    assert_equal_trees(actual["sampled"], actual["whole"], **FLOAT32)


# ---- What is ignored.

IGNORED = {
    "as a list": ([2, -100, 6], -100),
    "a row": (np.array([2, 3, 6]), 3),
    "the first row": (np.array([2, 0, 6], np.uint8), 0),
    "small": (np.array([2, -100, 6], np.int8), -100),
    "unsigned": (np.array([2, 255, 6], np.uint8), 255),
    "minus one": (np.array([2, -1, 6], np.int16), -1),
    "wide": (np.array([2, 2**40, 6]), 2**40),
    "below the rows": (np.array([2, -8, 6]), -8),  # to which others are cut
}


def test_any_number_may_be_ignored():
    calls, x = {}, X[0]
    for name, (labels, number) in IGNORED.items():
        for head, function in ("whole", softmax_cross_entropy), ("sampled", SAMPLED):
            # Labels are concrete, as in a call without jit.
            loss = functools.partial(function, labels=labels, ignore_index=number)
            calls[name, head] = lambda t, x, loss=loss: loss(t, x), Table(WEIGHT), x
    for (name, head), losses in in_one_program(calls).items():
        labels, number = IGNORED[name]
        of_whole, _ = reference.cross_entropy(WEIGHT, x, labels, ignore_index=number)
        of_sampled = expected_loss(WEIGHT, x, labels, "log_uniform", 6, ignore_index=number)
        expected = of_whole if head == "whole" else of_sampled
        np.testing.assert_allclose(losses, expected, err_msg=name, **FLOAT32)
        assert losses[1] == 0, name


NOT_IGNORED = {
    "wraps to it": (np.array([2, 156, 6], np.uint8), -100, 156),
    "wraps to it in 32 bits": (np.array([2, 2**32 - 100, 6]), -100, 2**32 - 100),
    "cut to the rows": (np.array([2, -100, 6]), -8, -100),
    "from the end": (np.array([2, -1, 6]), -100, -1),
    "nothing is": (np.array([2, -100, 6]), None, -100),
}


@pytest.mark.parametrize("head", [softmax_cross_entropy, SAMPLED])
def test_other_labels_without_a_row_are_an_error(head):
    for labels, number, seen in NOT_IGNORED.values():
        allowed = "" if number is None else f" or ignore_index={number}"
        match = re.escape(
            f"labels=...)` must be in [0, 7){allowed}, the table having 7 rows, got {seen} at position (1,)"
        )
        with pytest.raises(IndexError, match=match):
            head(Table(WEIGHT), X[0], labels, ignore_index=number)


def test_traced_negative_labels_have_no_row():
    labels = np.array([-1, -7, -8], np.int32)
    losses = in_one_program(
        {
            (name, policy): (head, Table(WEIGHT, out_of_range=policy), X[0], labels)
            for name, head in (("whole", softmax_cross_entropy), ("sampled", lambda *args: SAMPLED(*args)))
            for policy in ("error", "nan", "clip", "zero")
        }
    )
    for (name, policy), loss in losses.items():
        given = np.zeros(3, int) if policy == "clip" else labels
        expected = (
            reference.cross_entropy(WEIGHT, X[0], given, out_of_range=policy)[0]
            if name == "whole"
            else expected_loss(WEIGHT, X[0], given, "log_uniform", 6, out_of_range=policy)
        )
        np.testing.assert_allclose(loss, expected, err_msg=f"{name} {policy}", **FLOAT32)
        assert np.isnan(loss).all() == (policy in ("error", "nan")), (name, policy)


HEADS = {
    "whole": functools.partial(softmax_cross_entropy, chunk=3),
    "whole, all": functools.partial(softmax_cross_entropy, chunk=3, **ALL),
    "sampled": SAMPLED,
    "sampled, z-loss": functools.partial(SAMPLED, z_loss=0.1),
}


POLICIES = ("error", "clip", "zero")
MOST = ("whole, all", "sampled, z-loss")
# Policies, the heads under them and their reductions.
MET = [("error", ("whole", MOST[1]), ("mean",)), ("clip", MOST[:1], ("sum",)), ("zero", MOST[1:], ("sum",))]
EACH = [(policy, tuple(HEADS), ("mean", "sum")) for policy in POLICIES]


@pytest.mark.parametrize(("policy", "heads", "reductions"), usual_and_rest(MET, EACH))
def test_nothing_of_an_ignored_token_reaches_anything(policy, heads, reductions):
    """Not even NaN in its vector, or in its cotangent; second derivatives are those without it, too."""
    counts = LABELS != -100
    bad = np.where(counts[..., None], X, np.array([np.nan, np.inf, -np.inf], np.float32))
    g = np.where(counts, COTANGENT, np.nan).astype(np.float32)

    def second(head, table, x, labels, tangent):
        def energy(table, x):
            return jnp.sum(jnp.sin(head(table, x, labels)))

        along = jax.tree.map(jnp.cos, table), tangent
        return jax.jvp(jax.grad(energy, (0, 1)), (table, x), along)

    calls, table = {}, Table(WEIGHT, padding_idx=1, out_of_range=policy)
    for name in heads:
        head = HEADS[name]
        calls[name, "with"] = functools.partial(gradients, head), table, bad, LABELS, g
        calls[name, "without"] = functools.partial(gradients, head), table, X[counts], LABELS[counts], COTANGENT[counts]
        calls[name, "second, with"] = functools.partial(second, head), table, bad, LABELS, np.cos(X)
        calls[name, "second, without"] = (
            functools.partial(second, head), table, X[counts], LABELS[counts], np.cos(X)[counts],
        )  # fmt: skip
        for reduction in reductions:
            loss = functools.partial(head, reduction=reduction)
            calls[name, reduction, "with"] = functools.partial(gradients, loss), table, bad, LABELS, np.float32(1)
            calls[name, reduction, "without"] = (
                functools.partial(gradients, loss), table, X[counts], LABELS[counts], np.float32(1),
            )  # fmt: skip
    actual = in_one_program(calls)
    for *case, which in calls:
        if "without" in which:
            continue
        of_all = actual[*case, which]
        of_some = actual[*case, which + "out"]
        for one, other in zip(jax.tree.leaves(of_all), jax.tree.leaves(of_some), strict=True):
            if one.shape[:2] == counts.shape:  # of the tokens
                np.testing.assert_array_equal(one[~counts], 0, f"{case} {which}")
                one = one[counts]
            np.testing.assert_allclose(one, other, err_msg=f"{case} {which}", **FLOAT32)


def test_the_mean_of_no_token_is_zero_without_a_gradient():
    ignored, padding = np.full((2, 3), -100), np.full((2, 3), 2)
    nan = np.full_like(X, np.nan)
    calls = {}
    for name in MOST:
        head = HEADS[name]
        masked = {} if name.startswith("sampled") else {"mask_padding": True}
        head = functools.partial(gradients, functools.partial(head, reduction="mean", **masked))
        for what, labels in ("ignored", ignored), ("padding", padding):
            calls[name, what] = head, Table(WEIGHT, padding_idx=2), nan, labels, np.float32(1)
        calls[name, "no tokens"] = head, Table(WEIGHT), X[:0], ignored[:0], np.float32(1)
        calls[name, "no rows"] = head, Table(WEIGHT[:0]), nan, ignored, np.float32(1)
    for case, leaves in in_one_program(calls).items():
        for leaf in leaves:
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape), str(case))


# ---- Transformations and dtypes.


def plain(table, x, labels, label_smoothing=0.3, z_loss=0.1):
    """The mean by optax, of the logits of `attend`."""
    logits = attend(table, x).astype(jnp.float32)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, table.rows), label_smoothing)
    losses = optax.softmax_cross_entropy(logits, targets) + z_loss * jax.nn.logsumexp(logits, -1) ** 2
    counts = labels != -100
    return jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(jnp.sum(counts), 1).astype(jnp.float32)


def ours(table, x, labels):
    return softmax_cross_entropy(table, x, labels, chunk=3, reduction="mean", **ALL)


def under_transformations(loss, table, x, labels):
    gradient = jax.grad(loss, (0, 1))

    def scanned(table, x):
        step = jax.checkpoint(lambda sum_, batch: (sum_ + loss(table, *batch), None))
        return jax.lax.scan(step, jnp.float32(0), (x, labels))[0]

    return {
        "value": loss(table, x, labels),
        "gradient": gradient(table, x, labels),
        "vmap over tokens": jax.vmap(gradient, (None, 0, 0))(table, x, labels),
        "vmap over labels": jax.vmap(gradient, (None, None, 0))(table, x[0], labels),
        "scan": jax.grad(scanned, (0, 1))(table, x),
        "hessian of x": jax.hessian(loss, 1)(table, x[0], labels[0]),
        "hessian of the table": jax.hessian(loss)(table, x[0], labels[0]),
    }


def test_transformations_and_dtypes_as_optax():
    given = {}
    for dtype in jnp.float32, jnp.bfloat16:
        # All lanes but the last have another number of tokens that count, and this one none.
        labels = np.array([[2, -100, 6], [1, 2, 3], [-100, -100, -100]])
        x = np.concatenate([X, X[:1]])
        given[dtype] = Table(jnp.asarray(WEIGHT, dtype), padding_idx=2), jnp.asarray(x, dtype), jnp.asarray(labels)
    calls = {
        f"{loss.__name__} {dtype.__name__}": (functools.partial(under_transformations, loss), *args)
        for loss in (plain, ours)
        for dtype, args in given.items()
    }
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        actual = in_one_program(calls)
    for dtype in given:
        tolerance = FLOAT32 if dtype == jnp.float32 else {"rtol": 0.03, "atol": 0.03}
        for name, mine in actual[f"ours {dtype.__name__}"].items():
            mine, other = (
                jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), tree)
                for tree in (mine, actual[f"plain {dtype.__name__}"][name])
            )
            assert_equal_trees(mine, other, f"{name}, {dtype.__name__}", **tolerance)
        assert actual[f"ours {dtype.__name__}"]["value"].dtype == jnp.float32


def test_float64():
    options = {"reduction": "mean", **ALL, "z_loss": 0.01}
    with jax.enable_x64(True):
        args = Table(WEIGHT.astype(np.float64)), X.astype(np.float64), LABELS
        whole = jax.jit(functools.partial(softmax_cross_entropy, **options))(*args)
        sampled = jax.jit(lambda *args: SAMPLED(*args, reduction="mean", z_loss=0.01))(*args)
    assert whole.dtype == sampled.dtype == np.float64
    losses, _ = reference.cross_entropy(WEIGHT, X, LABELS, **ALL | {"z_loss": 0.01})
    np.testing.assert_allclose(whole, reference.reduce(losses, LABELS, "mean"), rtol=1e-13)


def test_large_logits_keep_their_digits():
    weight = np.array([[3e4, 0], [-3e4, 0], [0, 3e4], [3e4, 1]], np.float32)
    x, labels = np.eye(2, dtype=np.float32), np.array([0, 3])
    losses = jax.jit(functools.partial(softmax_cross_entropy, chunk=2, label_smoothing=0.1))(Table(weight), x, labels)
    np.testing.assert_allclose(losses, reference.cross_entropy(weight, x, labels, label_smoothing=0.1)[0], rtol=1e-6)


# ---- The tape, checkify.


def test_ignored_tokens_name_no_row_in_the_gradient():
    tables = {policy: Table(WEIGHT, padding_idx=1, out_of_range=policy) for policy in ("error", "clip", "zero")}
    tables["frequency"] = Table(WEIGHT, padding_idx=1, scale_grad_by_freq=True, out_of_range="clip")
    sampled = in_one_program(
        {
            name: (embax.grad(lambda table: SAMPLED(table, X, LABELS, reduction="mean")), table)
            for name, table in tables.items()
        }
    )
    for name, gradient in sampled.items():
        assert isinstance(gradient, RowGrad)
        of_labels = np.asarray(gradient.ids)[: LABELS.size]
        np.testing.assert_array_equal(of_labels, [2, ROWS, 6, ROWS, 2, ROWS], name)  # the padding row 1, too
    np.testing.assert_allclose(sampled["clip"].to_dense(), sampled["error"].to_dense(), **FLOAT32)


def test_checkify_finds_no_error_in_ignored_tokens():
    def loss(table, x, labels):
        return ours(table, x, labels) + SAMPLED(table, x, labels, reduction="mean", z_loss=0.1)

    checked = jax.jit(checkify.checkify(jax.grad(loss, (0, 1)), errors=checkify.all_checks))
    error, _ = checked(Table(WEIGHT, padding_idx=2, max_norm=1.5), X, LABELS)
    error.throw()
    checked = jax.jit(checkify.checkify(loss, errors=checkify.index_checks))
    error, _ = checked(Table(WEIGHT), X, np.where(LABELS == -100, -1, LABELS))
    with pytest.raises(checkify.JaxRuntimeError, match="out-of-bounds"):
        error.throw()


# ---- Errors.

WRONG = {
    "ignore_index": [(1.5, TypeError, "a whole number, got 1.5"), (True, TypeError, "a whole number, got True")],
    "label_smoothing": [
        (1.01, ValueError, "a number from 0 to 1, got 1.01"),
        (-0.1, ValueError, "a number from 0 to 1, got -0.1"),
        (np.nan, ValueError, "a number from 0 to 1, got nan"),
        ("0.1", TypeError, "a number from 0 to 1, got '0.1'"),
        (True, TypeError, "a number from 0 to 1, got True"),
    ],
    "z_loss": [
        (-1.0, ValueError, "a finite number, 0 or more, got -1.0"),
        (np.inf, ValueError, "a finite number, 0 or more, got inf"),
        (None, TypeError, "a finite number, 0 or more, got None"),
    ],
    "reduction": [
        ("average", ValueError, "one of 'none', 'mean', 'sum', got 'average'"),
        (None, ValueError, "one of 'none', 'mean', 'sum', got None"),
    ],
}


@pytest.mark.parametrize("argument", WRONG)
def test_errors(argument):
    calls = {"softmax_cross_entropy": softmax_cross_entropy, "sampled_softmax": SAMPLED}
    for name, call in calls.items():
        if (name, argument) == ("sampled_softmax", "label_smoothing"):
            with pytest.raises(TypeError, match="label_smoothing"):
                call(Table(WEIGHT), X, LABELS, label_smoothing=0.1)
            continue
        for value, error, rule in WRONG[argument]:
            with pytest.raises(error, match=re.escape(f"`embax.{name}({argument}=...)` must be {rule}")):
                call(Table(WEIGHT), X, LABELS, **{argument: value})


def test_a_traced_weight_of_a_term_is_an_error():
    with pytest.raises(TypeError, match=r"z_loss=...\)` must be a finite number, 0 or more, got .*Pass a float"):
        jax.jit(lambda z: softmax_cross_entropy(Table(WEIGHT), X, LABELS, z_loss=z))(0.1)
