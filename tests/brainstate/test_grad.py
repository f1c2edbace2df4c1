"""Gradients of brainstate states: as brainstate's own, but rows where an Embedding read them."""

import functools
import itertools
import warnings

import brainstate
import brainunit
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from leaks import checking_leaks

import embax

IDS = jnp.array([[0, 2], [-1, 2]])
WEIGHT = np.linspace(-1.0, 2.0, 12, dtype=np.float32).reshape(6, 2)


class Model(brainstate.nn.Module):
    """A weight by rows, a plain one and a counter."""

    def __init__(self, **rules):
        super().__init__()
        self.embedding = embax.Embedding.from_pretrained(WEIGHT, **{"freeze": False, **rules})
        self.scale = brainstate.ParamState(jnp.array([[[2.0, 3.0]]]))
        self.count = brainstate.ShortTermState(jnp.zeros((), jnp.int32))

    def update(self, ids, factor=1.0, shift=0.0):
        self.count.value += 1
        return (jnp.sin(self.embedding(ids) * self.scale.value) * factor + shift).sum()


class Noisy(Model):
    """With random noise."""

    def update(self, ids, factor=1.0, shift=0.0):
        return super().update(ids, factor, shift) * (1 + 0.1 * brainstate.random.rand())


def dense(gradient):
    """The same with an array for each RowGrad."""
    is_rows = lambda node: isinstance(node, embax.RowGrad)  # noqa: E731
    return jax.tree.map(lambda node: node.to_dense() if is_rows(node) else node, gradient, is_leaf=is_rows)


def assert_same(ours, theirs):
    ours = dense(ours)
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert_close(ours, theirs, atol=1e-6)


def both(make, *args, compile_=lambda fun: fun, on_dense="warn", **options):
    """What embax and brainstate make of `make() -> (fun, grad_states)`, from the same random numbers."""
    out = []
    for grad in functools.partial(embax.brainstate.grad, on_dense=on_dense), brainstate.transform.grad:
        brainstate.random.seed(3)
        fun, states = make()
        out.append(compile_(grad(fun, states, **options))(*args))
    return out


@pytest.fixture(autouse=True)
def _no_dense_gradient_passes_unnoticed():
    with warnings.catch_warnings():
        warnings.simplefilter("error", embax.DenseGradientWarning)
        yield


COMPILE = {
    "eager": lambda fun: fun,
    "brainstate": brainstate.transform.jit,
    "embax": embax.brainstate.jit,
}
# The jit of brainstate traces a function as the one of embax does.
rest = {way: pytest.param(way, marks=pytest.mark.exhaustive) for way in COMPILE}
main_ways = pytest.mark.parametrize("compile_", ["eager", "embax", rest["brainstate"]])
once = pytest.mark.parametrize("compile_", ["embax", rest["eager"], rest["brainstate"]])


ALL_THAT_IS_RETURNED = [
    *itertools.product([False, True], [False, True], [None, 1, (1,), [1, 2]], ["eager"]),
    *itertools.product([True], [False, True], [None, [1, 2]], ["brainstate", "embax"]),
]
# Each pair of an option with another one that it meets in the result.
IN_SHORT = [
    *itertools.product([False, True], [False, True], [None], ["eager"]),
    (False, False, 1, "eager"),
    (False, True, (1,), "eager"),
    (True, False, [1, 2], "eager"),
    (True, True, [1, 2], "brainstate"),
    (True, True, [1, 2], "embax"),
]


@pytest.mark.parametrize(
    ("has_aux", "return_value", "argnums", "compile_"),
    [
        options if options in IN_SHORT else pytest.param(*options, marks=pytest.mark.exhaustive)
        for options in ALL_THAT_IS_RETURNED
    ],
)
def test_grad_returns_the_same_tuple_as_brainstate(has_aux, return_value, argnums, compile_):
    def make():
        model = Noisy()
        fun = (lambda *args: (model(*args), {"count": model.count.value})) if has_aux else lambda *args: model(*args)
        return fun, {"table": model.embedding.weight, "scale": model.scale}

    options = {"has_aux": has_aux, "return_value": return_value, "argnums": argnums}
    ours, theirs = both(make, IDS, 1.5, 0.5, compile_=COMPILE[compile_], **options)
    of_states = ours[0] if has_aux or return_value else ours
    of_states = of_states if argnums is None else of_states[0]
    assert isinstance(of_states["table"], embax.RowGrad)
    np.testing.assert_array_equal(of_states["table"].ids, [0, 2, 5, 2])
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    "choose",
    [
        lambda model: model.embedding.weight,
        lambda model: [model.scale, model.embedding.weight],
        lambda model: (model.embedding.weight, model.embedding.weight),
        lambda model: {"a": {"b": model.embedding.weight}, "c": [model.scale]},
        lambda model: model.states(brainstate.ParamState),
    ],
    ids=["state", "list", "twice", "nested", "states()"],
)
def test_gradients_have_the_structure_of_the_states(choose):
    def make():
        model = Model()
        return model, choose(model)

    ours, theirs = both(make, IDS)
    assert any(isinstance(x, embax.RowGrad) for x in jax.tree.leaves(ours, is_leaf=lambda x: hasattr(x, "to_dense")))
    assert_same(ours, theirs)


def test_grad_works_as_a_decorator():
    model = Model()

    @embax.brainstate.grad(grad_states=model.embedding.weight, return_value=True, on_dense="error")
    def gradient(ids):
        """Its own."""
        return model(ids)

    assert gradient.__doc__ == "Its own."
    rows, value = gradient(IDS)
    assert isinstance(rows, embax.RowGrad)
    assert value.shape == ()


def test_grad_without_an_embedding_equals_brainstate():
    assert embax.brainstate.grad(lambda x: x**2)(3.0) == 6
    state = brainstate.ParamState(jnp.array(3.0))
    gradient, value = embax.brainstate.grad(lambda: state.value**2, state, return_value=True)()
    assert (gradient, value) == (6, 9)


RULES = [
    {"padding_idx": 2},
    {"scale_grad_by_freq": True},
    {"max_norm": 1.0},
    {"max_norm": 1.0, "write_back": False},
    {"max_norm": 0.5, "padding_idx": 5, "scale_grad_by_freq": True, "norm_type": 1.0},
    {"out_of_range": "clip"},
    {"out_of_range": "zero"},
]


@pytest.mark.parametrize(
    ("compile_", "all_rules"),
    [
        ("embax", RULES),
        ("eager", RULES[2:3]),
        *(pytest.param(way, RULES, marks=pytest.mark.exhaustive) for way in ("eager", "brainstate")),
    ],
    ids=["embax", "eager", "all eager", "brainstate"],
)
def test_rules_of_the_layer(compile_, all_rules):
    made = []

    def make():
        models = [Model(**rules) for rules in all_rules]
        made.append(models)
        outside = jnp.array([[0, 2, 2], [-1, 7, -8]])
        fun = lambda: sum(model(outside if model.embedding.out_of_range != "error" else IDS) for model in models)  # noqa: E731
        states = [model.states(brainstate.ParamState) for model in models]
        return fun, dict(zip(map(str, all_rules), states, strict=True))

    ours, theirs = both(make, compile_=COMPILE[compile_])
    assert_same(ours, theirs)
    for rules, *models in zip(all_rules, *made, strict=True):
        assert isinstance(ours[str(rules)]["embedding", "weight"], embax.RowGrad), rules
        stored = [model.embedding.weight.value for model in models]
        assert isinstance(stored[0], jax.Array), rules
        np.testing.assert_array_equal(*stored, err_msg=str(rules))
        assert (np.asarray(stored[0]) != WEIGHT).any() == ("max_norm" in rules and rules.get("write_back", True)), rules


def test_padding_row_is_not_among_the_rows():
    model = Model(padding_idx=2)
    gradient = embax.brainstate.grad(model, model.embedding.weight)(IDS)
    np.testing.assert_array_equal(gradient.ids, [0, 6, 5, 6])


@once
def test_two_calls_of_a_layer(compile_):
    def make():
        layers = {str(norm): embax.Embedding(6, 2, embedding_init=WEIGHT, max_norm=norm) for norm in (None, 1.0)}
        fun = lambda: sum((layer([0, 1]) * layer([0, 2]) ** 2).sum() for layer in layers.values())  # noqa: E731
        return fun, {norm: layer.weight for norm, layer in layers.items()}

    ours, theirs = both(make, compile_=COMPILE[compile_])
    for norm, gradient in ours.items():
        np.testing.assert_array_equal(gradient.ids, [0, 1, 0, 2], err_msg=norm)
    assert_same(ours, theirs)


# The rules of two layers that share a weight, and the ids of its gradient.
SHARED = [
    ({}, {}, [0, 1, 0, 2]),
    ({"padding_idx": 0}, {"padding_idx": 0}, [6, 1, 6, 2]),
    ({"padding_idx": 0}, {}, [6, 1, 0, 2]),
    ({"freeze": True}, {}, [0, 2]),
    ({"freeze": True}, {"freeze": True}, []),
]


def test_layers_that_share_a_weight():
    def layers(first, second):
        a = embax.Embedding(6, 2, embedding_init=WEIGHT, **first)
        b = embax.Embedding(6, 2, embedding_init=WEIGHT + 1, **second)
        b.weight = a.weight
        return a, b

    def make():
        pairs = {f"{first}, {second}": layers(first, second) for first, second, _ in SHARED}
        fun = lambda: sum((a([0, 1]) ** 2 + b([0, 2]) ** 3).sum() for a, b in pairs.values())  # noqa: E731
        return fun, {name: a.weight for name, (a, _) in pairs.items()}

    ours, theirs = both(make, compile_=embax.brainstate.jit)
    for first, second, ids in SHARED:
        np.testing.assert_array_equal(ours[f"{first}, {second}"].ids, ids, err_msg=f"{first}, {second}")
    assert_same(ours, theirs)


@main_ways
def test_frozen_weight_has_no_rows(compile_):
    def make():
        model = Model(freeze=True)
        return model, model.states(brainstate.ParamState)

    ours, theirs = both(make, IDS, compile_=COMPILE[compile_])
    assert ours["embedding", "weight"].ids.shape == (0,)
    assert_same(ours, theirs)


def test_a_frozen_weight_alone_still_runs_the_function():
    model = Model(freeze=True)
    gradient, of_argument = embax.brainstate.grad(model, model.embedding.weight, argnums=1)(IDS, 1.0)
    assert gradient.ids.shape == (0,)
    assert of_argument.shape == ()
    gradient, value = embax.brainstate.grad(model, model.embedding.weight, return_value=True)(IDS)
    assert gradient.ids.shape == (0,)
    assert model.count.value == 2
    assert np.isfinite(value)


def test_rules_may_change_between_calls():
    model = Model()
    gradient = embax.brainstate.grad(model, model.embedding.weight)
    model.embedding.padding_idx = 2
    np.testing.assert_array_equal(gradient(IDS).ids, [0, 6, 5, 6])
    model.embedding.freeze = True
    assert gradient(IDS).ids.shape == (0,)


def test_a_state_that_is_not_read():
    model, other = Model(), embax.Embedding(1_000, 2)
    states = {"read": model.scale, "unread": other.weight}
    with pytest.raises(ValueError, match="not found in the state trace"):
        embax.brainstate.grad(model, states)(IDS)
    with pytest.raises(ValueError, match="not found in the state trace"):
        embax.brainstate.grad(model, other.weight)(IDS)
    gradient = embax.brainstate.grad(model, states, check_states=False)(IDS)
    assert gradient["unread"].ids.shape == (0,)
    assert gradient["unread"].to_dense().shape == (1_000, 2)
    gradient = embax.brainstate.grad(lambda: jnp.asarray(other.weight.value.shape[0] * 1.0), other.weight)()
    assert gradient.ids.shape == (0,)


def inner_jit(embedding):
    return brainstate.transform.jit(lambda: embedding([1, 2]).sum())()


def overwrite(embedding):
    embedding.weight.value = embedding.weight.value * 2
    return embedding([1]).sum()


# Name: what a function does with a layer besides reading two rows; and how many ids more that gives.
FOLLOWED_USES = {
    "for_loop": (lambda layer: brainstate.transform.for_loop(lambda i: layer(i).sum(), jnp.arange(3)).sum(), 3),
    "scan": (
        lambda layer: brainstate.transform.scan(lambda c, i: (c + layer(i), i), jnp.ones(2), jnp.arange(3))[0].sum(),
        3,
    ),
    "cond": (
        lambda layer: brainstate.transform.cond(jnp.array(True), lambda: layer([1, 2]).sum(), lambda: jnp.zeros(())),
        2,
    ),
    "jit": (inner_jit, 2),
    "checkpoint": (lambda layer: brainstate.transform.checkpoint(lambda: layer([1, 2]).sum())(), 2),
    "vmap": (lambda layer: brainstate.transform.vmap(layer)(jnp.arange(3)).sum(), 3),
    "vmap2": (lambda layer: brainstate.transform.vmap2(layer)(jnp.arange(3)).sum(), 3),
    "raw vmap": (lambda layer: jax.vmap(layer)(jnp.arange(3)).sum(), 3),
    "raw jit": (lambda layer: jax.jit(lambda i: layer(i))(jnp.arange(3)).sum(), 3),
    "raw checkpoint": (lambda layer: jax.checkpoint(lambda i: layer(i))(jnp.arange(3)).sum(), 3),
    "raw scan": (lambda layer: jax.lax.scan(lambda c, i: (c, layer(i)), 0, jnp.arange(3))[1].sum(), 3),
    "grad": (
        lambda layer: (
            brainstate.transform.grad(lambda: (layer([1, 2]) ** 3).sum(), layer.weight)() ** 2
        ).sum(),
        2,
    ),
    "write": (overwrite, 1),
    "index": (lambda layer: layer.weight.value[3].sum(), 1),
}  # fmt: skip

DENSE_USES = {
    "reduce_sum": lambda layer: layer.weight.value.sum(),
    "convert": lambda layer: layer.weight.value.astype(jnp.bfloat16).sum().astype(jnp.float32),
    "slice": lambda layer: layer.weight.value[1:5].sum(),
    "dot_general": lambda layer: (layer.weight.value @ jnp.ones((2, 3))).sum(),
}


# Those of which a layer is tried that renormalizes, and the others, by turns: what is found out is the same.
NORMS = dict(zip([*FOLLOWED_USES, *DENSE_USES], itertools.cycle([None, 1.5])))
LIKE_OTHERS = {"for_loop", "raw vmap", "raw jit", "raw checkpoint"}  # a scan, and those of the core


@pytest.mark.parametrize(
    "norms",
    [
        {use: norm for use, norm in NORMS.items() if use not in LIKE_OTHERS},
        *(
            pytest.param(norms, marks=pytest.mark.exhaustive)
            for norms in (dict.fromkeys(NORMS), dict.fromkeys(NORMS, 1.5))
        ),
    ],
    ids=["by turns", "without", "with"],
)
def test_transformations_are_followed_and_uses_of_all_rows_are_announced(norms):
    stored = []
    uses = {name: use for name, (use, _) in FOLLOWED_USES.items() if name in norms} | DENSE_USES

    def make():
        layers = {
            use: embax.Embedding(6, 2, embedding_init=WEIGHT, max_norm=norm, write_back=not use.startswith("raw"))
            for use, norm in norms.items()
        }
        states = {use: layer.weight for use, layer in layers.items()}
        stored.append(states)
        fun = lambda: sum((layers[use]([0, 2]) ** 2).sum() + uses[use](layers[use]) for use in layers)  # noqa: E731
        return fun, states

    with pytest.warns(embax.DenseGradientWarning) as record:
        ours, theirs = both(make, compile_=embax.brainstate.jit)
    messages = [str(warning.message) for warning in record]
    assert len(messages) == len(DENSE_USES)
    for use in uses:
        np.testing.assert_array_equal(stored[0][use].value, stored[1][use].value, err_msg=use)
        if use in FOLLOWED_USES:
            assert isinstance(ours[use], embax.RowGrad), use
            assert len(ours[use].values) == 2 + FOLLOWED_USES[use][1], use
            continue
        (message,) = (message for message in messages if f"gradient of grad_states['{use}'], " in message)
        assert "is dense" in message
        assert isinstance(ours[use], jax.Array), use
    assert_same(ours, theirs)


def test_a_dense_gradient_outside_of_jit():
    def make():
        embedding = embax.Embedding(6, 2, embedding_init=WEIGHT)
        return (lambda: (embedding([0, 2]) ** 2).sum() + embedding.weight.value.sum()), {"emb": embedding.weight}

    with pytest.warns(embax.DenseGradientWarning, match=r"gradient of grad_states\['emb'\], .* is dense"):
        ours, theirs = both(make)
    assert isinstance(ours["emb"], jax.Array)
    assert_same(ours, theirs)


def test_on_dense():
    embedding = embax.Embedding(6, 2, embedding_init=WEIGHT)
    fun = lambda: embedding.weight.value.sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"gradient of grad_states, .* sums over all rows of its weight"):
        embax.brainstate.grad(fun, embedding.weight, on_dense="error")()
    of_lanes = lambda: jax.vmap(embedding)(jnp.arange(3)).sum()  # noqa: E731
    rows = embax.brainstate.jit(embax.brainstate.grad(of_lanes, embedding.weight, on_dense="error"))()
    assert isinstance(rows, embax.RowGrad)
    gradient = embax.brainstate.grad(fun, embedding.weight, on_dense="allow")()
    np.testing.assert_array_equal(gradient, np.ones((6, 2)))
    with pytest.raises(ValueError, match=r"on_dense=...\)` must be one of"):
        embax.brainstate.grad(fun, embedding.weight, on_dense="no")


def test_warning_points_to_the_call():
    embedding = embax.Embedding(6, 2)
    gradient = embax.brainstate.grad(lambda: embedding.weight.value.sum(), embedding.weight)
    with pytest.warns(embax.DenseGradientWarning) as caught:
        gradient()
    assert caught[0].filename == __file__


def test_one_dense_weight_leaves_the_others_sparse():
    a, b = (embax.Embedding(rows, 2, embedding_init=WEIGHT[:rows]) for rows in (6, 5))
    fun = lambda: (a([0, 1]) * b([2, 2])).sum() + a.weight.value.sum()  # noqa: E731
    ours, theirs = both(lambda: (fun, [a.weight, b.weight]), on_dense="allow", compile_=embax.brainstate.jit)
    assert isinstance(ours[0], jax.Array)
    np.testing.assert_array_equal(ours[1].ids, [2, 2])
    assert_same(ours, theirs)


@main_ways
def test_states_are_written_once_and_random_numbers_drawn_once(compile_):
    keys, models = [], []
    for grad in embax.brainstate.grad, brainstate.transform.grad:
        brainstate.random.seed(5)
        models.append(Noisy())
        step = COMPILE[compile_](grad(models[-1], models[-1].states(brainstate.ParamState), return_value=True))
        values = [step(IDS)[1] for _ in range(3)]
        keys.append((values, brainstate.random.rand(4)))
        assert models[-1].count.value == 3
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), *keys)  # float32


def test_eager_call_leaves_other_states_unchanged():
    model = Model()
    before = model.scale.value, model.embedding.weight.value
    embax.brainstate.grad(model, model.states(brainstate.ParamState))(IDS)
    assert model.scale.value is before[0]
    assert model.embedding.weight.value is before[1]


@once
def test_grad_returns_the_weight_that_the_function_stored(compile_):
    snapshot = brainstate.ShortTermState(jnp.zeros((6, 2)))

    def make():
        embedding = embax.Embedding(6, 2, embedding_init=WEIGHT, max_norm=0.5)

        def fun():
            out = embedding([0, 5]).sum()
            snapshot.value = embedding.weight.value
            return out, [embedding.weight.value, embedding.weight.value]

        return fun, embedding.weight

    ours, theirs = both(make, has_aux=True, compile_=COMPILE[compile_])
    assert isinstance(ours[0], embax.RowGrad)
    assert_same(ours, theirs)
    assert np.abs(ours[1][0] - WEIGHT).max() > 0.1
    np.testing.assert_array_equal(snapshot.value, theirs[1][0])


def overwritten(a, b):
    out = a([1]) + b([2])
    a.weight.value = jnp.ones((6, 2))
    return out * a([1])


def swapped(a, b):
    a.weight.value, b.weight.value = b.weight.value, a.weight.value
    return a([1]) * 2 + b([2])


def only_shaped(a, b):
    return a([1]) * jax.eval_shape(lambda ids: b(ids), jax.ShapeDtypeStruct((3,), jnp.int32)).shape[0]


@once
def test_weights_that_are_written_or_not_used(compile_):
    stored = []

    def make():
        layer = lambda weight: embax.Embedding(6, 2, embedding_init=weight)  # noqa: E731
        pairs = {use: (layer(WEIGHT), layer(WEIGHT + 1)) for use in (overwritten, swapped, only_shaped)}
        states = {use.__name__: [a.weight, b.weight] for use, (a, b) in pairs.items()}
        stored.append(states)
        return (lambda: sum((use(a, b) ** 2).sum() for use, (a, b) in pairs.items())), states

    ours, theirs = both(make, compile_=COMPILE[compile_])
    assert all(isinstance(gradient, embax.RowGrad) for pair in ours.values() for gradient in pair)
    assert_same(ours, theirs)
    assert_same(*[{use: [state.value for state in pair] for use, pair in states.items()} for states in stored])


def test_lanes_with_weights_of_their_own():
    embedding = embax.Embedding(6, 2, embedding_init=WEIGHT)
    embedding.weight.value = jnp.stack([WEIGHT, WEIGHT + 1])

    def lanes(grad):
        gradient = grad(lambda ids: (embedding(ids) ** 2).sum(), embedding.weight)
        return brainstate.transform.vmap(lambda ids: dense(gradient(ids)), in_states={0: embedding.weight})

    ids = jnp.array([[0, 1], [5, 5]])
    ours = brainstate.transform.jit(lanes(functools.partial(embax.brainstate.grad, on_dense="error")))(ids)
    assert_same(ours, brainstate.transform.jit(lanes(brainstate.transform.grad))(ids))
    assert np.abs(ours[1, 5]).min() > 0


def test_inside_a_loop_over_steps():
    def make():
        model = Model(max_norm=1.5)
        return model, model.states(brainstate.ParamState)

    loop = lambda gradient: lambda: brainstate.transform.for_loop(gradient, jnp.stack([IDS, IDS + 1]))  # noqa: E731
    ours, theirs = both(make, compile_=loop)
    assert ours["embedding", "weight"].values.shape == (2, 4, 2)
    weight = jax.jit(jax.vmap(lambda gradient: gradient.to_dense()))(ours["embedding", "weight"])
    assert_same({**ours, ("embedding", "weight"): weight}, theirs)


def test_nested_in_another_gradient():
    embedding = embax.Embedding(6, 2, embedding_init=WEIGHT)
    inner = lambda: (embedding([1, 2, 1]) ** 3).sum()  # noqa: E731

    def outer(grad, **options):
        return lambda: (dense(grad(inner, embedding.weight, **options)()) ** 2).sum()

    ours = embax.brainstate.grad(outer(embax.brainstate.grad), embedding.weight, on_dense="allow")
    theirs = brainstate.transform.grad(outer(brainstate.transform.grad), embedding.weight)
    ours, theirs = (brainstate.transform.jit(gradient)() for gradient in (ours, theirs))
    assert_same(ours, theirs)


class Half(brainstate.ParamState):
    """A state of a kind of its own that shows what it holds."""


class Computed(brainstate.ParamState):
    """A state that shows something else than it holds."""

    @property
    def value(self):
        return super().value * 2

    @value.setter
    def value(self, value):
        brainstate.ParamState.value.fset(self, value)


def test_states_of_other_kinds():
    embedding = embax.Embedding(6, 2, param_type=Half)
    assert isinstance(embax.brainstate.grad(lambda: embedding([1]).sum(), embedding.weight)(), embax.RowGrad)

    def make():  # anew, since brainstate stores what such a state shows
        embedding = embax.Embedding(6, 2, embedding_init=WEIGHT, param_type=Computed)
        return (lambda: (embedding([1, 1]) ** 2).sum()), embedding.weight

    assert_same(*both(make, on_dense="allow"))


def test_fake_state_is_a_constant():
    embedding = embax.Embedding(6, 2, embedding_init=WEIGHT, param_type=brainstate.FakeState)
    scale = brainstate.ParamState(jnp.array(2.0))
    gradient = embax.brainstate.grad(lambda: (embedding([1]) * scale.value).sum(), scale)()
    np.testing.assert_allclose(gradient, WEIGHT[1].sum(), rtol=1e-6)  # float32


def test_weight_with_a_unit_has_the_gradient_of_brainstate():
    def make():
        embedding = embax.Embedding(6, 2, embedding_init=WEIGHT * brainunit.ms)
        other = embax.Embedding(6, 2, embedding_init=WEIGHT)
        fun = lambda: (embedding([1, 1]) / brainunit.ms * other([1, 2])).sum()  # noqa: E731
        return fun, [embedding.weight, other.weight]

    ours, theirs = both(make)
    assert isinstance(ours[1], embax.RowGrad)
    assert_same(ours, theirs)


@pytest.mark.parametrize("has_aux", [False, True])
def test_unit_aware_gradients(has_aux):
    embedding = embax.Embedding(6, 2, embedding_init=WEIGHT)
    loss = lambda: embedding([1, 1]).sum()  # noqa: E731
    with_unit = (lambda: (loss() * brainunit.ms, 1.0)) if has_aux else lambda: loss() * brainunit.ms
    options = {"unit_aware": True, "has_aux": has_aux}
    ours = embax.brainstate.grad(with_unit, embedding.weight, on_dense="allow", **options)()
    assert_same(ours, brainstate.transform.grad(with_unit, embedding.weight, **options)())
    ours = embax.brainstate.grad(loss, embedding.weight, unit_aware=True)()
    assert isinstance(ours, embax.RowGrad)
    assert_same(ours, brainstate.transform.grad(loss, embedding.weight, unit_aware=True)())


def test_integer_weight_has_the_gradient_of_brainstate():
    embedding = embax.Embedding.from_pretrained(np.arange(6).reshape(3, 2), freeze=False)
    scale = brainstate.ParamState(jnp.array(2.0))
    fun = lambda: (embedding([1]).astype(jnp.float32) * scale.value).sum()  # noqa: E731
    with pytest.raises(TypeError, match="grad requires real- or complex-valued inputs"):
        embax.brainstate.grad(fun, [embedding.weight, scale])()
    ours = embax.brainstate.grad(fun, [embedding.weight, scale], allow_int=True)()
    assert ours[0].dtype == jax.dtypes.float0
    assert ours[1] == 5


@pytest.mark.parametrize("freeze", [False, True])
def test_holomorphic(freeze):
    def make():
        embedding = embax.Embedding.from_pretrained(WEIGHT * (1 + 2j), freeze=freeze)
        return (lambda: (embedding([1, 1, 2]) ** 2).sum()), embedding.weight

    ours, theirs = both(make, compile_=embax.brainstate.jit, holomorphic=True)
    assert isinstance(ours, embax.RowGrad)
    assert_same(ours, theirs)


def test_debug_nan_and_errors_of_brainstate_come_through():
    model = Model()
    loss = lambda ids: model.embedding(ids).sum()  # noqa: E731
    assert isinstance(embax.brainstate.grad(loss, model.embedding.weight, debug_nan=True)(IDS), embax.RowGrad)
    with pytest.raises(TypeError, match="must return a"):
        embax.brainstate.grad(model, model.embedding.weight, has_aux=True)(IDS)
    with pytest.raises(TypeError, match="scalar-output"):
        embax.brainstate.grad(model.embedding, model.embedding.weight)(IDS)
    with pytest.raises(ValueError, match="negative"):
        embax.brainstate.grad(model, model.embedding.weight, argnums=-1)
    with pytest.raises(TypeError, match="State instances"):
        embax.brainstate.grad(model, [jnp.ones(3)])


def test_grad_runs_the_function_as_often_as_brainstate():
    embedding, runs, seen = embax.Embedding(6, 2, embedding_init=WEIGHT), [], []

    def fun(ids, flag, name):
        runs.append(name)
        jax.debug.callback(lambda x: seen.append(int(x)), jnp.asarray(ids)[0])
        return embedding(ids if flag else [0]).sum(), {"name": name, "flag": flag, "rows": embedding(ids)}

    gradient, aux = embax.brainstate.grad(fun, embedding.weight, has_aux=True)([1, 2], True, "embax")
    jax.effects_barrier()
    assert (runs, seen, aux["name"]) == (["embax"], [1], "embax")
    np.testing.assert_array_equal(gradient.ids, [1, 2])
    np.testing.assert_array_equal(aux["rows"], WEIGHT[1:3])
    theirs = brainstate.transform.grad(lambda ids: embedding(ids).sum(), embedding.weight)(jnp.array([1, 2]))
    assert_same(gradient, theirs)
    with pytest.raises(IndexError, match=r"got 1000000 at position \(0,\)"):
        embax.brainstate.grad(fun, embedding.weight, has_aux=True)([10**6], True, "embax")


def test_a_layer_under_raw_jit_is_followed():
    embedding = embax.Embedding(6, 2, embedding_init=WEIGHT)
    fast = jax.jit(embedding)
    gradient = embax.brainstate.grad(lambda: (embedding([1]) * fast(jnp.arange(3))).sum(), embedding.weight)()
    np.testing.assert_array_equal(gradient.ids, [1, 0, 1, 2])


def test_weight_that_a_layer_no_longer_holds_is_an_ordinary_state():
    embedding = embax.Embedding(6, 2, embedding_init=WEIGHT)
    old, embedding.weight = embedding.weight, brainstate.ParamState(jnp.ones((6, 2)))
    fun = lambda: (old.value**2 + embedding([1])).sum()  # noqa: E731
    gradients = embax.brainstate.grad(fun, [old, embedding.weight], on_dense="error")()
    np.testing.assert_allclose(gradients[0], 2 * WEIGHT)
    assert isinstance(gradients[1], embax.RowGrad)


def test_copies_of_a_layer_have_gradients_of_their_own():
    model = brainstate.graph.treefy_merge(*brainstate.graph.treefy_split(Model(padding_idx=2)))
    gradient = embax.brainstate.grad(model, model.states(brainstate.ParamState))(IDS)
    np.testing.assert_array_equal(gradient["embedding", "weight"].ids, [0, 6, 5, 6])


def test_no_tracer_is_left_behind():
    model = Model(max_norm=1.0)
    with checking_leaks():
        step = embax.brainstate.jit(embax.brainstate.grad(model, model.states(brainstate.ParamState)))
        step(IDS)
