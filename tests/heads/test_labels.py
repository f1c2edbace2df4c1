"""Tokens that do not count, label smoothing, the z-loss and reductions of both losses, against float64 NumPy."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import ROWS, WEIGHT
from closeness import assert_close
from head_cases import (
    COTANGENT,
    FLOAT32,
    IGNORING,
    SAMPLED,
    TERMS,
    X,
    expected_loss,
    in_one_program,
)
from meshes import usual_and_rest

from embax import Table, softmax_cross_entropy

LABELS = IGNORING


def gradients(loss, table, x, labels, cotangent, **options):
    value, pull = jax.vjp(lambda table, x: loss(table, x, labels, **options), table, x)
    of_table, of_x = pull(jnp.asarray(cotangent, value.dtype))
    return value, of_table.weight, of_x


# ---- Values and gradients.

PADDED = {"padding_idx": (0, 2)}
# Options, rules of the table.
OPTIONS = {
    "ignored": ({}, {}),
    "nothing ignored": ({"ignore_index": None}, {}),
    "smoothed": ({"label_smoothing": 0.1}, PADDED),
    "wholly smoothed": ({"label_smoothing": 1}, {}),
    "z-loss": ({"z_loss": 0.02}, {"max_norm": 1.5}),
    "both": (TERMS, {}),
    "both, masked": (TERMS | {"mask_padding": True}, PADDED),
    "masked": ({"mask_padding": True}, PADDED),
    "another ignored": (TERMS | {"mask_padding": True, "ignore_index": 6}, PADDED),
    "both, clip": (TERMS, {"out_of_range": "clip"}),
    "both, zero": (TERMS | {"mask_padding": True, "ignore_index": None}, PADDED | {"out_of_range": "zero"}),
}


def left_out(options, rules):
    return reference.padding_rows(rules.get("padding_idx"), ROWS) if options.get("mask_padding") else ()


REDUCTIONS = ("none", "mean", "sum")
# Options, reduction, rows of a block.
USUAL = [
    ("nothing ignored", "none", None),
    ("wholly smoothed", "mean", 2),
    ("z-loss", "sum", None),
    ("both, masked", "none", 2),
    ("another ignored", "sum", 2),
    ("both, clip", "mean", None),
    ("both, zero", "mean", 2),
]


@pytest.mark.parametrize(
    "cases",
    [
        pytest.param(USUAL, id=""),
        *(
            pytest.param(
                [*itertools.product(OPTIONS, REDUCTIONS, [chunk])], marks=pytest.mark.exhaustive, id=f"{chunk}"
            )
            for chunk in (2, None)
        ),
    ],
)
def test_values_and_gradients(cases):
    calls, expected = {}, {}
    for name, reduction, chunk in cases:
        options, rules = OPTIONS[name]
        g = COTANGENT if reduction == "none" else np.float32(0.7)
        loss = functools.partial(gradients, softmax_cross_entropy, chunk=chunk, reduction=reduction, **options)
        calls[name, reduction, chunk] = loss, Table(WEIGHT, **rules), X, LABELS, g
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
        expected[name, reduction, chunk] = reduced(losses), *of_args
    for case, actual in in_one_program(calls).items():
        assert_close(actual, expected[case], str(case), **FLOAT32)


# Reduction, z-loss, policy, the label that is ignored. In an exhaustive run, each value meets each other one.
SAMPLED_CASES = [
    ("none", 0.0, "error", -100),
    ("mean", 0.1, "zero", 6),
    ("sum", 0.1, "clip", -100),
]
SAMPLED_TOO = [
    ("none", 0.1, "clip", 6),
    ("none", 0.1, "zero", -100),
    ("mean", 0.1, "error", 6),
    ("mean", 0.0, "clip", -100),
    ("sum", 0.1, "error", -100),
    ("sum", 0.0, "zero", 6),
]


@pytest.mark.parametrize(
    "cases", [SAMPLED_CASES, pytest.param(SAMPLED_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"]
)
def test_values_of_the_sampled_loss(cases):
    calls, expected = {}, {}
    for case in cases:
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


IGNORED_BY = [(name, ("whole", "sampled")[i % 2]) for i, name in enumerate(IGNORED)]
IGNORED_TOO = [(name, ("sampled", "whole")[i % 2]) for i, name in enumerate(IGNORED)]


@pytest.mark.parametrize(
    "cases", [IGNORED_BY, pytest.param(IGNORED_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"]
)
def test_any_number_may_be_ignored(cases):
    calls, x = {}, X[0]
    for name, head in cases:
        labels, number = IGNORED[name]
        function = softmax_cross_entropy if head == "whole" else SAMPLED
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


HEADS = {
    "whole": functools.partial(softmax_cross_entropy, chunk=3),
    "whole, all": functools.partial(softmax_cross_entropy, chunk=3, **TERMS),
    "sampled": SAMPLED,
    "sampled, z-loss": functools.partial(SAMPLED, z_loss=0.1),
}

TRACED = [("whole", "error"), ("whole", "clip"), ("sampled", "nan"), ("sampled", "zero")]
TRACED_TOO = [("whole", "nan"), ("whole", "zero"), ("sampled", "error"), ("sampled", "clip")]


@pytest.mark.parametrize("cases", [TRACED, pytest.param(TRACED_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_traced_negative_labels_have_no_row(cases):
    labels = np.array([-1, -7, -8], np.int32)
    losses = in_one_program(
        {(name, policy): (HEADS[name], Table(WEIGHT, out_of_range=policy), X[0], labels) for name, policy in cases}
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


POLICIES = ("error", "clip", "zero")
MOST = ("whole, all", "sampled, z-loss")
# Policies, the heads under them, their reductions, and whether second derivatives are taken.
MET = [
    ("error", MOST[1:], ("none",), True),
    ("clip", ("whole",), ("none", "mean"), False),
]
EACH = [(policy, tuple(HEADS), REDUCTIONS, True) for policy in POLICIES]


@pytest.mark.parametrize(("policy", "heads", "reductions", "twice"), usual_and_rest(MET, EACH))
def test_nothing_of_an_ignored_token_reaches_anything(policy, heads, reductions, twice):
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

    def add(case, function, of_all, of_some):
        calls[*case, "with"] = function, table, bad, LABELS, of_all
        calls[*case, "without"] = function, table, X[counts], LABELS[counts], of_some

    for name in heads:
        for reduction in reductions:
            given = (g, COTANGENT[counts]) if reduction == "none" else [np.float32(1)] * 2
            head = functools.partial(HEADS[name], reduction=reduction)
            add((name, reduction), functools.partial(gradients, head), *given)
        if twice:
            add((name, "second"), functools.partial(second, HEADS[name]), np.cos(X), np.cos(X)[counts])
    actual = in_one_program(calls)
    for *case, which in calls:
        if which == "without":
            continue
        of_all, of_some = actual[*case, "with"], actual[*case, "without"]
        for one, other in zip(jax.tree.leaves(of_all), jax.tree.leaves(of_some), strict=True):
            if one.shape[:2] == counts.shape:  # of the tokens
                np.testing.assert_array_equal(one[~counts], 0, str(case))
                one = one[counts]
            np.testing.assert_allclose(one, other, err_msg=str(case), **FLOAT32)


NO_TOKEN = [
    *((MOST[0], what) for what in ("padding", "no rows")),
    *((MOST[1], what) for what in ("ignored", "no tokens")),
]
NO_TOKEN_TOO = [(head, what) for head in MOST for what in ("ignored", "padding", "no tokens", "no rows")]


@pytest.mark.parametrize("cases", [NO_TOKEN, pytest.param(NO_TOKEN_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_the_mean_of_no_token_is_zero_without_a_gradient(cases):
    ignored, nan = np.full((2, 3), -100), np.full_like(X, np.nan)
    given = {
        "ignored": (Table(WEIGHT, padding_idx=2), nan, ignored),
        "padding": (Table(WEIGHT, padding_idx=2), nan, np.full((2, 3), 2)),
        "no tokens": (Table(WEIGHT), X[:0], ignored[:0]),
        "no rows": (Table(WEIGHT[:0]), nan, ignored),
    }
    calls = {}
    for name, what in cases:
        masked = {} if name.startswith("sampled") else {"mask_padding": True}
        head = functools.partial(HEADS[name], reduction="mean", **masked)
        calls[name, what] = functools.partial(gradients, head), *given[what], np.float32(1)
    for case, leaves in in_one_program(calls).items():
        for leaf in leaves:
            np.testing.assert_array_equal(leaf, np.zeros(leaf.shape), str(case))


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
