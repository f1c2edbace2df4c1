"""Programs with layers of each framework: several reads, heads, transformations, bags, training."""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optim_reference
import pytest
import reference
from cases import IDS, RULES, WEIGHT, cotangent
from framework_cases import assert_close, assert_same, dense, share, with_all, with_shares
from frameworks import ALL, FUNCTIONAL
from meshes import usual_and_rest

import embax
from embax import Ragged, RowGrad, Table

REDUCED = {name: RULES[name] for name in ("none", "all")}

PAIRS = [(ids, cotangent(ids)) for ids in (IDS["matrix"], IDS["negative"])]
HEAD_IDS, HEAD_COTANGENTS = IDS["negative"], np.random.default_rng(5).normal(size=(6, 7)).astype(np.float32)


def several_reads(framework, layer):
    return sum((framework.read(layer, ids) * cotangents).sum() for ids, cotangents in PAIRS)


def many_reads(framework, layer):
    return framework.read(layer, np.ones(4096, np.int32)).astype(jnp.float32).sum()


def attend(framework, layer):
    """A head that is tied to the layer that reads its input; so is the next one."""
    return (framework.attend(layer, framework.read(layer, HEAD_IDS)) * HEAD_COTANGENTS).sum()


def softmax(framework, layer):
    return embax.softmax_cross_entropy(framework.table(layer), framework.read(layer, HEAD_IDS), HEAD_IDS % 7).sum()


def gradient_of_head(loss, rules):
    ids, every, cotangents = HEAD_IDS, np.arange(7), HEAD_COTANGENTS
    rows, heads = (reference.lookup(WEIGHT, numbers, **rules) for numbers in (ids, every))
    if loss is softmax:
        exponentials = np.exp(rows @ heads.T)
        cotangents = exponentials / exponentials.sum(axis=1, keepdims=True) - (ids[:, None] % 7 == every)
    of_rows = reference.gradient(WEIGHT, ids, cotangents @ heads, **rules)
    return of_rows + reference.gradient(WEIGHT, every, cotangents.T @ rows, **rules)


class Loss(NamedTuple):
    """A loss of a layer, with its gradient as the reference has it, and how far from that it may be."""

    fun: Any
    expected: Any
    rules: dict[str, Any]
    weight: Any = WEIGHT
    scale: float = 1.0


LOSSES = {
    **{
        f"several_reads-{name}": Loss(
            several_reads, sum(reference.gradient(WEIGHT, *pair, **rules) for pair in PAIRS), rules
        )
        for name, rules in REDUCED.items()
    },
    **{
        f"many_reads-{dtype}": Loss(many_reads, [[0, 0], [4096, 4096], [0, 0]], {}, jnp.ones((3, 2), dtype), scale=0)
        for dtype in ("bfloat16", "float16")
    },
    **{
        f"{fun.__name__}-{name}": Loss(fun, gradient_of_head(fun, RULES[name]), RULES[name], scale=5)
        for fun in (attend, softmax)
        for name in ("none", "all", "freeze")
    },
}


@functools.cache
def differentiate_losses(framework, turn):
    """By one program, the gradient of each loss of a share, and the kind of it."""
    kinds = share(framework, LOSSES, turn)

    def gradient(kind, loss):
        return lambda layer: getattr(framework, kind)(layer, functools.partial(loss.fun, framework))

    functions = {name: gradient(kind, LOSSES[name]) for name, kind in kinds.items()}
    layers = {name: framework.make(LOSSES[name].weight, **LOSSES[name].rules) for name in kinds}
    gradients = framework.call_each(functions, layers)
    return {name: (kind, gradients[name]) for name, kind in kinds.items()}


@with_shares(LOSSES)
def test_gradient_of_loss_equals_the_reference(framework, name, turn):
    loss = LOSSES[name]
    kind, gradient = differentiate_losses(framework, turn)[name]
    is_sparse = loss.fun in (several_reads, many_reads) or "freeze" in loss.rules  # a head reads every row
    assert isinstance(gradient, RowGrad) == (kind == "row_gradient" and is_sparse)
    assert_close(dense(gradient), loss.expected, loss.scale, dtype=str(loss.weight.dtype))
    if isinstance(gradient, RowGrad):
        assert_same(gradient.to_dense(), dense(gradient))


# Each lane repeats ids, so that counts over all lanes would differ from counts a lane.
LANES = np.array([[2, 0, 2, -1], [1, 2, 5, 2], [6, 6, -1, 6]])
LANES_COTANGENTS = cotangent(LANES)
TRANSFORMED = {  # in such an order that every second one has each transformation and both rules
    f"{transform}-{rules}": (transform, RULES[rules])
    for pair in [("jit", "vmap"), ("scan", "remat")]
    for transform, order in zip(pair, [("none", "all"), ("all", "none")], strict=True)
    for rules in order
}


@functools.cache
def read_transformed(framework, turn):
    """By one program, the rows that each transformed read of a share gives, and the weight that it stores."""
    names = share(framework, TRANSFORMED, turn)
    layers = {name: framework.make(WEIGHT, **TRANSFORMED[name][1]) for name in names}

    def rows(transform):
        return lambda layer: getattr(framework, transform)(framework.read)(layer, LANES)

    read = framework.call_each({name: rows(TRANSFORMED[name][0]) for name in names}, layers)
    return {name: (read[name], framework.table(layers[name]).weight) for name in names}


@with_shares(TRANSFORMED)
def test_transformed_reads(framework, name, turn):
    (transform, rules), (rows, weight) = TRANSFORMED[name], read_transformed(framework, turn)[name]
    # Of a scan, each step reads what the one before has stored.
    calls = list(LANES) if transform == "scan" else [LANES]
    stored, expected = Table(WEIGHT, **rules), []
    for ids in calls:
        expected.append(embax.lookup(stored, ids))
        stored = embax.renormalize(stored, ids)
    assert_same(rows, np.concatenate(expected).reshape(LANES_COTANGENTS.shape))
    assert_same(weight, stored.weight if framework.stores else jnp.asarray(WEIGHT))


@functools.cache
def differentiate_transformed(framework, turn):
    """By one program, the gradient of each transformed read of a share."""
    kinds = share(framework, TRANSFORMED, turn)
    layers = {name: framework.make(WEIGHT, **TRANSFORMED[name][1]) for name in kinds}

    def gradient(transform, kind):
        def loss(layer):
            return (getattr(framework, transform)(framework.read)(layer, LANES) * LANES_COTANGENTS).sum()

        return lambda layer: getattr(framework, kind)(layer, loss)

    functions = {name: gradient(TRANSFORMED[name][0], kind) for name, kind in kinds.items()}
    return framework.call_each(functions, layers)


@with_shares(TRANSFORMED)
def test_gradients_of_transformed_reads(framework, name, turn):
    (transform, rules), gradient = TRANSFORMED[name], differentiate_transformed(framework, turn)[name]
    lanes = zip(LANES, LANES_COTANGENTS, strict=True)
    if transform in ("jit", "remat"):  # which see all ids at once
        lanes = [(LANES, LANES_COTANGENTS)]
    assert_close(dense(gradient), sum(reference.gradient(WEIGHT, *lane, **rules) for lane in lanes))


@with_all
def test_forward_mode(framework):
    ids, tangent = IDS["negative"], np.random.default_rng(4).normal(size=WEIGHT.shape).astype(np.float32)

    def derivatives(layer):
        return framework.jvp(layer, ids, tangent), framework.jacfwd(layer, ids)

    layers = {name: framework.make(WEIGHT, **rules) for name, rules in REDUCED.items()}
    results = framework.call_each(dict.fromkeys(layers, derivatives), layers)
    for name, rules in REDUCED.items():
        (rows, pushed), jacobian = results[name]
        expected = reference.jacobian(WEIGHT, ids, **rules)
        assert_same(rows, embax.lookup(Table(WEIGHT, **rules), ids))
        assert_close(pushed, np.tensordot(expected, tangent.astype(float), 2))
        assert_close(jacobian, expected)


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


BAGS = [[2, 0, 2, -1], [1, 2, 5, 2], []]
FACTORS = [[0.5, 2.0, -1.0, 1.0], [1.0, 1.5, 2.0, 3.0], []]
BAGS_OF_MODES = {
    "sum": (Ragged.from_lists(BAGS), BAGS, FACTORS),
    "mean": (Ragged.from_lists(BAGS), BAGS, FACTORS),
    "sqrtn": (BAGS[:2], BAGS[:2], None),
    "max": (BAGS[:2], BAGS[:2], None),
}
BAG_RULES, BAG_COTANGENTS = RULES["all"], np.random.default_rng(6).normal(size=(3, 3)).astype(np.float32)


def read_bags(framework, layer, mode):
    bags, _, factors = BAGS_OF_MODES[mode]
    weights = None if factors is None else np.concatenate(factors, dtype=np.float32)
    return framework.read_bags(layer, mode, bags, weights)


@with_shares(BAGS_OF_MODES)
def test_bags(framework, name, turn):
    mode, (_, lists, factors) = name, BAGS_OF_MODES[name]
    table, layer = Table(WEIGHT, **BAG_RULES), framework.make_bag(WEIGHT, mode, **BAG_RULES)
    pooled = read_bags(framework, layer, mode)
    assert_same(pooled, read_bags(FUNCTIONAL, table, mode))
    assert_close(pooled, reference.embedding_bag(WEIGHT, lists, factors, mode, **BAG_RULES))
    stored = embax.renormalize(table, BAGS[0] + BAGS[1]).weight
    assert_same(framework.table(layer).weight, stored if framework.stores else table.weight)


@functools.cache
def differentiate_bags(framework, turn):
    """By one program, the gradient of bags in each mode of a share, and the kind of it."""
    kinds = share(framework, BAGS_OF_MODES, turn)

    def gradient(mode, kind):
        cotangents = BAG_COTANGENTS[: len(BAGS_OF_MODES[mode][1])]
        loss = lambda layer: (read_bags(framework, layer, mode) * cotangents).sum()  # noqa: E731
        return lambda layer: getattr(framework, kind)(layer, loss)

    layers = {mode: framework.make_bag(WEIGHT, mode, **BAG_RULES) for mode in kinds}
    gradients = framework.call_each({mode: gradient(mode, kind) for mode, kind in kinds.items()}, layers)
    return {mode: (kind, gradients[mode]) for mode, kind in kinds.items()}


@with_shares(BAGS_OF_MODES)
def test_gradients_of_bags(framework, name, turn):
    kind, gradient = differentiate_bags(framework, turn)[name]
    _, lists, factors = BAGS_OF_MODES[name]
    cotangents = BAG_COTANGENTS[: len(lists)]
    expected, _ = reference.embedding_bag_gradient(WEIGHT, lists, cotangents, factors, name, **BAG_RULES)
    assert isinstance(gradient, RowGrad) == (kind == "row_gradient")
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


# The frameworks take the ways of training in turn; exhaustive runs try all of them.
TRAINING = [
    ("adamw", "padding_last", True),
    ("adamw", "padding_last", False),
    ("adamw", "freeze", False),
    ("adamw", "freeze", True),
    ("adamw", "all", True),
    ("rowwise_adagrad", "none", True),
    ("rowwise_adagrad", "all", False),
    ("rowwise_adagrad", "all", True),
]
USUAL_TRAINING = [(framework, way) for n, framework in enumerate(ALL) for way in TRAINING[n::4]]


@pytest.mark.parametrize(("framework", "way"), usual_and_rest(USUAL_TRAINING, itertools.product(ALL, TRAINING)))
def test_training(framework, way):
    framework, (optimizer, rules, by_rows) = ALL[framework], way
    rules, (tx, rule) = RULES[rules], OPTIMIZERS[optimizer]
    loss = lambda layer, ids: ((framework.read(layer, ids) - 0.5) ** 2).sum()  # noqa: E731
    with jax.numpy_dtype_promotion("standard"):  # which optax relies on
        weight = framework.train(framework.make(WEIGHT, **rules), tx, loss, BATCHES, by_rows)
    expected, is_untouched = trained(rule, by_rows, **rules)
    assert_close(weight, expected, scale=20)  # several steps
    np.testing.assert_array_equal((np.asarray(weight) == WEIGHT).all(axis=1), is_untouched)
