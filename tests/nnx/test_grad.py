"""value_and_grad of NNX modules: as `nnx.value_and_grad`, but that an Embedding has the gradient of its rows."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closeness import assert_close
from flax import nnx
from leaks import checking_leaks

import embax
from embax import RowGrad, Table
from embax.nnx import Embedding

WEIGHT = np.linspace(-1.0, 2.0, 12, dtype=np.float32).reshape(6, 2)
IDS = jnp.array([0, 2, 2, -1])


def layer(rows=6, dim=2, **options):
    weight = jnp.asarray(np.resize(WEIGHT, (rows, dim)))
    return Embedding.from_pretrained(weight, **{"freeze": False, **options})


class Norm(nnx.Module):
    """As BatchNorm, but of few operations."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones((1, 3)))
        self.mean = nnx.BatchStat(jnp.zeros(3))

    def __call__(self, x):
        mean = x.mean(0)
        self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean
        return (x - mean) * self.scale[...]


class Model(nnx.Module):
    """A model with all that a call may change."""

    def __init__(self, **rules):
        self.embedding = layer(**rules)
        kernel = lambda key, shape, dtype: jnp.asarray(np.linspace(-1, 1, 6).reshape(shape), dtype)  # noqa: E731
        self.linear = nnx.Linear(2, 3, kernel_init=kernel, rngs=nnx.Rngs(1))
        self.norm = Norm()
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(3))
        self.count = nnx.Variable(jnp.array(0))

    def __call__(self, ids):
        self.count[...] += 1
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return (self.dropout(self.norm(self.linear(self.embedding(ids)))) ** 2).sum()


def dense(tree):
    """Arrays in place of the gradients of tables."""
    kinds = RowGrad, Table
    value = lambda x: x.to_dense() if isinstance(x, RowGrad) else x.weight if isinstance(x, Table) else x  # noqa: E731
    return jax.tree.map(value, nnx.as_pure(tree), is_leaf=lambda x: isinstance(x, kinds))


def assert_same(ours, theirs):
    def numbers(tree):
        # The states of a list of modules are numbered in one state, or stand in a list.
        leaves = map(jnp.asarray, jax.tree.leaves(dense(tree)))
        return [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in leaves]

    assert_close(numbers(ours), numbers(theirs), atol=1e-5)


def both(make, fun, *args, compile_=lambda call: call, on_dense="error", **options):
    """What a gradient is by embax, and by NNX; the modules must be the same after it, too."""
    out, after = [], []
    for transform in functools.partial(embax.nnx.value_and_grad, on_dense=on_dense), nnx.value_and_grad:
        model = make()
        out.append(compile_(transform(fun, **options))(model, *args))
        after.append(nnx.state(model))
    assert_same(*after)
    assert jax.tree.structure(dense(after[0])) == jax.tree.structure(dense(after[1]))
    return out


COMPILE = {"eager": lambda call: call, "jit": nnx.jit}


ALL = {"padding_idx": 2, "max_norm": 1.0, "scale_grad_by_freq": True}


@pytest.mark.parametrize(
    ("rules", "compile_"),
    [
        (ALL, "jit"),
        # Outside of jit, each operation is a program of its own; the next tests take fewer.
        *(pytest.param(*x, marks=pytest.mark.exhaustive) for x in [({}, "eager"), ({}, "jit"), (ALL, "eager")]),
    ],
    ids=str,
)
def test_value_gradient_and_state_changes_equal_nnx(rules, compile_):
    ours, theirs = both(lambda: Model(**rules), Model.__call__, IDS, compile_=COMPILE[compile_])
    assert_same(ours, theirs)
    assert type(ours[1]) is nnx.State
    gradient = ours[1]["embedding"]["embedding"]
    assert isinstance(gradient, nnx.Param)
    assert isinstance(gradient.get_value(), RowGrad)
    np.testing.assert_array_equal(gradient.get_value().ids, [0, 6, 6, 5] if rules else [0, 2, 2, 5])


def test_each_call_changes_counters_statistics_and_random_numbers_once():
    model = Model(max_norm=1.0)
    fun = embax.nnx.value_and_grad(Model.__call__)
    values = [fun(model, IDS)[0] for _ in range(3)]
    stored = int(model.count[...]), int(model.dropout.rngs.count[...])
    assert stored == (3, 3)
    assert len({float(value) for value in values}) > 1
    assert np.linalg.norm(model.embedding.embedding.get_value()[jnp.array([0, 2, 5])], axis=1).max() <= 1 + 1e-6
    np.testing.assert_array_equal(model.embedding.embedding.get_value()[1], WEIGHT[1])


def test_variables_keep_their_identity():
    model = Model(max_norm=1.0)
    before = [variable for _, variable in nnx.iter_graph(model) if isinstance(variable, nnx.Variable)]
    embax.nnx.value_and_grad(Model.__call__)(model, IDS)
    after = [variable for _, variable in nnx.iter_graph(model) if isinstance(variable, nnx.Variable)]
    assert all(x is y for x, y in zip(before, after, strict=True))


def test_attributes_that_the_function_sets_or_takes_away():
    class Marked(nnx.Module):
        def __init__(self):
            self.embedding = layer()
            self.old = nnx.Variable(jnp.ones(1))

        def __call__(self):
            self.mode, self.new = "called", nnx.Variable(jnp.ones(2))
            if hasattr(self, "old"):
                del self.old
            return self.embedding(IDS).sum()

    model = Marked()
    embax.nnx.grad(Marked.__call__)(model)
    assert model.mode == "called"
    assert model.new.shape == (2,)
    assert not hasattr(model, "old")


def test_intermediates_that_are_sown():
    class Sowing(nnx.Module):
        def __init__(self):
            self.embedding = layer()

        def __call__(self, ids):
            rows = self.embedding(ids)
            self.sow(nnx.Intermediate, "rows", rows)
            return rows.sum()

    def outside(transform):
        model = Sowing()
        out, sown = nnx.capture(lambda model: transform(lambda m: m(IDS))(model), nnx.Intermediate)(model)
        return sown, out

    def inside(transform):
        (_, sown), gradient = transform(lambda m: nnx.capture(m, nnx.Intermediate)(IDS), has_aux=True)(Sowing())
        return sown, gradient

    for place in outside, inside:
        ours, theirs = place(embax.nnx.value_and_grad), place(nnx.value_and_grad)
        assert_same(ours, theirs)
        np.testing.assert_array_equal(jax.tree.leaves(ours)[0], WEIGHT[[0, 2, 2, 5]])


@pytest.mark.parametrize("compile_", COMPILE)
def test_has_aux_with_arrays(compile_):
    fun = lambda model, ids: (model(ids), {"ids": ids, "none": None, "list": [model.count[...]]})  # noqa: E731
    (ours, theirs) = both(Model, fun, IDS, has_aux=True, compile_=COMPILE[compile_])
    assert_same(ours, theirs)
    assert ours[0][1]["list"][0] == 1
    assert ours[0][1]["none"] is None


def test_has_aux_with_anything():
    (_, aux), _ = embax.nnx.value_and_grad(lambda m: (m(IDS).sum(), ("text", 3, len)), has_aux=True)(layer())
    assert aux == ("text", 3, len)


def test_has_aux_with_modules():
    model = Model()

    def loss(model):
        return model(IDS), {"same": model.embedding, "new": nnx.Linear(2, 1, rngs=nnx.Rngs(0)), "text": "t"}

    (_, aux), _ = embax.nnx.value_and_grad(loss, has_aux=True)(model)
    assert aux["same"] is model.embedding
    assert isinstance(aux["new"], nnx.Linear)
    assert isinstance(aux["new"].kernel.get_value(), jax.Array)
    assert aux["text"] == "t"
    assert isinstance(embax.nnx.grad(loss, has_aux=True)(model)[0], nnx.State)


def test_several_arguments_arrays_and_tables_among_them():
    table, scale = Table(WEIGHT + 1, padding_idx=2), jnp.array([1.0, 2.0])
    fun = lambda model, scale, table, ids: (  # noqa: E731
        (model(ids) + embax.lookup(table, ids)) * scale[None]
    ).sum()
    gradient = embax.nnx.grad(fun, argnums=(0, 1, 2))(layer(), scale, table, IDS)
    theirs = nnx.grad(fun, argnums=(0, 1, 2))(layer(), scale, table, IDS)
    assert isinstance(gradient, tuple)
    assert isinstance(gradient[2], RowGrad)
    assert_same(gradient, theirs)
    # In another order, and one by one.
    assert_same(embax.nnx.grad(fun, argnums=(2, 0))(layer(), scale, table, IDS), (theirs[2], theirs[0]))
    for number in range(3):
        assert_same(embax.nnx.grad(fun, argnums=number)(layer(), scale, table, IDS), theirs[number])


@pytest.mark.parametrize("number", [-1, -2])
def test_arguments_are_counted_from_the_end_too(number):
    fun = lambda scale, model: (model(IDS) * scale).sum()  # noqa: E731
    ours, theirs = (
        transform(fun, argnums=number)(2.0, layer()) for transform in (embax.nnx.value_and_grad, nnx.value_and_grad)
    )
    assert jax.tree.leaves(ours[1])
    assert_same(ours, theirs)


def test_diff_state_chooses_the_variables():
    kernel = nnx.DiffState(0, nnx.PathContains("kernel"))
    ours, theirs = both(Model, Model.__call__, IDS, argnums=kernel)
    assert_same(ours, theirs)
    assert list(nnx.to_flat_state(ours[1]).paths) == [("linear", "kernel")]
    tables = nnx.DiffState(1, nnx.PathContains("embedding"))
    fun = lambda ids, model: model(ids)  # noqa: E731
    (gradient,) = embax.nnx.grad(fun, argnums=(tables,))(IDS, Model())
    assert list(nnx.to_flat_state(gradient).paths) == [("embedding", "embedding")]
    counts = nnx.DiffState(0, nnx.Any(nnx.Param, nnx.BatchStat))
    assert_same(*both(Model, lambda m, ids: m(ids) + m.norm.mean[...].sum(), IDS, argnums=counts))


def test_a_table_that_is_not_asked_for_is_a_constant():
    linear = nnx.DiffState(0, nnx.PathContains("linear"))
    use = lambda model, ids: model(ids) + model.embedding.embedding.get_value().sum()  # noqa: E731
    assert_same(*both(Model, use, IDS, argnums=linear))  # without a word on a dense gradient


def test_keyword_arguments():
    other = Model()
    fun = lambda model, *, ids, other, mode: model(ids) + other(ids) * (2.0 if mode == "on" else 1.0)  # noqa: E731
    value, gradient = embax.nnx.value_and_grad(fun)(Model(), ids=IDS, other=other, mode="on")
    assert other.count[...] == 1
    assert set(gradient) == {"embedding", "linear", "norm"}
    assert value > 1


def test_modules_in_a_list_a_tuple_and_a_dict():
    for make in lambda: [layer(), Model()], lambda: (layer(), Model()), lambda: {0: layer(), 1: Model()}:
        ours, theirs = both(make, lambda ms, ids: ms[0](ids).sum() + ms[1](ids), IDS)
        assert_same(ours, theirs)
        assert isinstance(ours[1][0]["embedding"].get_value(), RowGrad)
        assert isinstance(ours[1][1]["embedding"]["embedding"].get_value(), RowGrad)


def test_arrays_and_tables_beside_modules_in_an_argument_have_their_gradient():
    make = lambda: {"model": layer(), "scale": jnp.array([1.0, 2.0]), "table": Table(WEIGHT)}  # noqa: E731
    fun = lambda d: ((d["model"](IDS) + embax.lookup(d["table"], IDS)) * d["scale"][None]).sum()  # noqa: E731
    ours, theirs = embax.nnx.grad(fun)(make()), nnx.grad(fun)(make())
    assert set(ours) == set(theirs)
    assert isinstance(ours["table"], RowGrad)
    assert_same(ours, theirs)


def test_grad_takes_a_variable():
    fun = lambda variable: (variable[...] ** 2).sum()  # noqa: E731
    ours, theirs = embax.nnx.grad(fun)(nnx.Param(jnp.ones(2))), nnx.grad(fun)(nnx.Param(jnp.ones(2)))
    assert isinstance(ours, nnx.Param)
    assert_same(ours, theirs)


def test_a_param_that_holds_a_table():
    class Holder(nnx.Module):
        def __init__(self):
            self.table = nnx.Param(Table(WEIGHT, padding_idx=1))

    fun = lambda model: (embax.lookup(model.table.get_value(), IDS) ** 2).sum()  # noqa: E731
    ours, theirs = both(Holder, fun)
    assert isinstance(ours[1]["table"].get_value(), RowGrad)
    assert_same(ours, theirs)


def tied():
    a, b = layer(), layer(padding_idx=0)
    b.embedding = a.embedding
    return nnx.List([a, b])


SHARED = {"module": lambda: (lambda one: nnx.List([one, one]))(layer()), "param": tied}


@pytest.mark.parametrize(
    ("make", "compile_"),
    [
        ("module", "eager"),
        ("param", "jit"),
        pytest.param("module", "jit", marks=pytest.mark.exhaustive),
        pytest.param("param", "eager", marks=pytest.mark.exhaustive),
    ],
)
def test_shared_modules_and_params_have_one_gradient(make, compile_):
    fun = lambda ms, ids: (ms[0](ids) * ms[1](ids + 1)).sum()  # noqa: E731
    ours, theirs = both(SHARED[make], fun, IDS, compile_=COMPILE[compile_])
    assert_same(ours, theirs)
    (gradient,) = jax.tree.leaves(ours[1], is_leaf=lambda x: isinstance(x, RowGrad))
    assert len(gradient.ids) == 8


def test_grad_takes_one_module_twice():
    fun = lambda a, b: (a(IDS) * b(IDS)).sum()  # noqa: E731
    one = layer()
    ours, theirs = (t(fun, argnums=(0, 1))(one, one) for t in (embax.nnx.grad, nnx.grad))
    assert_same(ours, theirs)
    assert not ours[1]


def test_a_table_that_is_tied_to_a_head_has_a_dense_gradient_without_a_warning():
    fun = lambda m, ids: (m.attend(m(ids)) ** 2).sum()  # noqa: E731
    ours, theirs = both(layer, fun, IDS, compile_=nnx.jit)
    assert_same(ours, theirs)
    assert isinstance(ours[1]["embedding"].get_value(), jax.Array)


def test_frozen_and_unread_tables_have_no_rows():
    frozen, unread = layer(freeze=True), layer()
    gradient = embax.nnx.grad(lambda ms: ms[0](IDS).sum())(nnx.List([frozen, unread]))
    for i in range(2):
        assert len(gradient[i]["embedding"].get_value().ids) == 0
    integers = Embedding.from_pretrained(np.ones((6, 2), np.int32), freeze=False)
    gradient = embax.nnx.grad(lambda m: m(IDS).sum().astype(jnp.float32))(integers)
    assert len(gradient["embedding"].get_value().ids) == 0


def test_bags_have_their_rows_too():
    bag = embax.nnx.EmbeddingBag.from_pretrained(WEIGHT, freeze=False, max_norm=1.0)
    fun = lambda m, ids: (m(ids) ** 2).sum()  # noqa: E731
    ours, theirs = both(lambda: nnx.clone(bag), fun, IDS[None], compile_=nnx.jit)
    assert isinstance(ours[1]["embedding"].get_value(), RowGrad)
    assert_same(ours, theirs)


def test_decorators():
    @embax.nnx.value_and_grad
    def plain(model):
        """Say so."""
        return model(IDS).sum()

    @embax.nnx.value_and_grad(argnums=1, has_aux=True)
    def with_options(scale, model):
        return (model(IDS) * scale).sum(), scale

    @embax.nnx.grad
    def gradient_only(model):
        return model(IDS).sum()

    @embax.nnx.grad(argnums=1, has_aux=True)
    def gradient_with_options(scale, model):
        return (model(IDS) * scale).sum(), scale

    assert (plain.__name__, plain.__doc__, gradient_only.__name__) == ("plain", "Say so.", "gradient_only")
    np.testing.assert_array_equal(plain(layer())[1]["embedding"].get_value().values, np.ones((4, 2)))
    (_, aux), gradient = with_options(2.0, layer())
    np.testing.assert_array_equal(gradient["embedding"].get_value().values, np.full((4, 2), 2))
    assert aux == 2
    np.testing.assert_array_equal(gradient_only(layer())["embedding"].get_value().values, np.ones((4, 2)))
    assert gradient_with_options(2.0, layer())[1] == 2


def inner_vmap(model):
    return nnx.vmap(lambda m, ids: m(ids), in_axes=(None, 0))(model, jnp.arange(3)).sum()


def written(model):
    model.embedding.set_value(model.embedding.get_value() * 2)
    return model([1]).sum()


def scanned(model):
    """The layer inside of an `nnx.scan` to which it is broadcast."""
    total = nnx.scan(lambda sum_, m, i: sum_ + m(i).sum() * sum_, in_axes=(nnx.Carry, None, 0), out_axes=nnx.Carry)
    return total(jnp.ones(()), model, jnp.arange(3))


# Name: what a function does with a layer besides reading two rows; and how many ids more that gives, or the warning.
USES = {
    "vmap": (inner_vmap, 3),
    "scan": (scanned, 3),
    "remat": (lambda model: nnx.remat(lambda m: m([1]).sum())(model), 1),
    "jit": (lambda model: nnx.jit(lambda m: m([1]).sum())(model), 1),
    "cond": (lambda model: nnx.cond(True, lambda m: m([1, 2]).sum(), lambda m: m([3]).sum(), model), 2),
    "write": (written, 1),
    "grad": (
        lambda model: jnp.square(nnx.grad(lambda m: (m([1, 2]) ** 3).sum())(model)["embedding"].get_value()).sum(),
        2,
    ),
    "sum": (lambda model: model.embedding.get_value().sum(), "sums over all rows of its weight"),
    "square": (lambda model: (model.embedding.get_value() ** 2).sum(), "computes with all rows of its weight"),
}


def test_transformations_are_followed_and_uses_of_all_rows_are_announced():
    make = lambda: {use: layer() for use in USES}  # noqa: E731
    fun = lambda ms: sum((ms[use]([0, 2]) ** 2).sum() + other(ms[use]) for use, (other, _) in USES.items())  # noqa: E731
    with pytest.warns(embax.DenseGradientWarning) as record:
        ours, theirs = both(make, fun, compile_=nnx.jit, on_dense="warn")
    assert_same(ours, theirs)
    messages = [str(warning.message) for warning in record]
    for use, (_, expected) in USES.items():
        found = [x for x in messages if re.search(rf"argument 0\['{use}'\]\['embedding'\].* is dense, 6 rows", x)]
        gradient = ours[1][use]["embedding"].get_value()
        if isinstance(expected, str):
            assert [expected in x for x in found] == [True], use
        else:
            assert isinstance(gradient, RowGrad), use
            assert (len(gradient.values), found) == (2 + expected, []), use


def test_on_dense():
    fun = lambda model: model.embedding.get_value().sum()  # noqa: E731
    with pytest.raises(ValueError, match=r"gradient of argument 0\['embedding'\], .* sums over all rows of its weight"):
        embax.nnx.grad(fun, on_dense="error")(layer())
    gradient = embax.nnx.grad(fun, on_dense="allow")(layer())
    np.testing.assert_array_equal(gradient["embedding"].get_value(), np.ones((6, 2)))
    with pytest.raises(ValueError, match=r"on_dense=...\)` must be one of 'error', 'warn', 'allow', got 'no'"):
        embax.nnx.grad(fun, on_dense="no")(layer())


def test_dense_gradient_warning_names_the_call_and_its_line():
    gradient = embax.nnx.value_and_grad(lambda model: model.embedding.get_value().sum())
    with pytest.warns(embax.DenseGradientWarning) as caught:
        gradient(layer())
    assert str(caught[0].message).startswith("`embax.nnx.value_and_grad`")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "fun", "args", "error", "match"),
    [
        ({}, lambda m: m(IDS), (layer(),), TypeError, r"scalar-output functions"),
        ({"has_aux": True}, lambda m: m(IDS).sum(), (layer(),), TypeError, r"pair|two-element tuple"),
        ({}, lambda m: m(IDS).sum(), (), TypeError, r"requires at least 1 positional arguments"),
        ({"argnums": 1}, lambda m: m(IDS).sum(), (layer(),), TypeError, r"requires at least 2 positional arguments"),
        ({"argnums": (0, 0)}, lambda m: m(IDS).sum(), (layer(),), ValueError, r"repeated"),
        ({"argnums": 1}, lambda m, ids: m(ids).sum(), (layer(), IDS), TypeError, r"real- or complex-valued inputs"),
    ],
    ids=["array", "no pair", "no argument", "too few", "repeated", "integers"],
)
def test_errors(options, fun, args, error, match):
    with pytest.raises(error, match=match):
        embax.nnx.value_and_grad(fun, **options)(*args)


def test_grad_runs_the_function_once_with_its_arguments_unchanged():
    runs = []

    def fun(model, ids, flag, *, name):
        runs.append(name)
        return model(ids if flag else [0]).sum(), {"name": name, "len": len}

    gradient, aux = embax.nnx.grad(fun, has_aux=True)(layer(), [1, 2], True, name="once")
    assert runs == ["once"]
    assert aux == {"name": "once", "len": len}
    np.testing.assert_array_equal(gradient["embedding"].get_value().ids, [1, 2])
    with pytest.raises(IndexError, match=r"got 1000000 at position \(0,\)"):
        embax.nnx.grad(fun, has_aux=True)(layer(), [10**6], True, name="bad")


def test_error_in_the_function_leaves_the_module_unchanged():
    model = Model(max_norm=0.5)

    def fun(model):
        model(IDS)
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        embax.nnx.grad(fun)(model)
    assert model.count[...] == 0
    assert isinstance(embax.nnx.grad(Model.__call__)(model, IDS), nnx.State)


def test_inside_a_scan_over_steps():
    def losses(transform):
        def step(model, ids):
            return model, transform(lambda m: (m(ids) ** 2).sum())(model)[0]

        model = layer(max_norm=1.0)
        return nnx.scan(step, in_axes=(nnx.Carry, 0))(model, jnp.stack([IDS, IDS + 1]))[1], nnx.state(model)

    assert_same(losses(embax.nnx.value_and_grad), losses(nnx.value_and_grad))


def test_allow_int_and_holomorphic():
    ids = jnp.array([1, 2])
    fun = lambda m, ids: m(ids).sum()  # noqa: E731
    ours, theirs = (t(fun, argnums=(0, 1), allow_int=True)(layer(), ids) for t in (embax.nnx.grad, nnx.grad))
    assert ours[1].dtype == theirs[1].dtype == jax.dtypes.float0
    assert_same(ours[0], theirs[0])
    make = lambda: Embedding.from_pretrained(WEIGHT * (1 + 2j), freeze=False)  # noqa: E731
    assert_same(*both(make, lambda m: (m(IDS) ** 2).sum(), compile_=nnx.jit, holomorphic=True))


def test_no_tracer_is_left_behind():
    model = Model(max_norm=1.0)
    with checking_leaks():
        nnx.jit(embax.nnx.grad(Model.__call__))(model, IDS)
    assert not [x for x in jax.tree.leaves(nnx.state(model)) if isinstance(x, jax.core.Tracer)]


def test_steps_under_jit_compile_once():
    traced = []

    @nnx.jit(donate_argnums=0)
    def step(model, ids):
        traced.append(None)
        return embax.nnx.value_and_grad(Model.__call__)(model, ids)

    model = Model(max_norm=1.0, padding_idx=0)
    for i in range(3):
        before = model.embedding.embedding.get_value()
        step(model, (IDS + i) % 6)
        assert before.is_deleted()
    assert len(traced) == 1
    assert model.count[...] == 3
