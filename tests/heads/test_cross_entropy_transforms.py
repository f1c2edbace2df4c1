"""softmax_cross_entropy under every transformation, on a tape and on meshes, against optax on the logits of attend."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from bag_cases import dense
from cases import MAIN_RULES, RULES, WEIGHT
from closeness import assert_close
from head_cases import (
    FLOAT32,
    LABELS,
    X,
    in_one_program,
    losses_and_gradients,
    of_optax,
)
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import embax
from embax import RowGrad, Table, lookup, renormalize, softmax_cross_entropy


def loss_and_gradients_of_reference(weight, x, labels, **rules):
    """The sum of the losses, and its gradients."""
    losses, _ = reference.cross_entropy(weight, x, labels, **rules)
    return losses.sum(), *reference.cross_entropy_gradient(weight, x, labels, np.ones(labels.shape), **rules)


def energy(table, x, chunk=2):
    return jnp.sum(jnp.sin(softmax_cross_entropy(table, x, LABELS, chunk=chunk)))


def energy_of_logits(table, x):
    return jnp.sum(jnp.sin(of_optax(table, x, LABELS)))


# A table's rules and dtype. How often an id occurs has no say here, the other main rules are part of "all", and the
# Hessian below is by these, too.
SECOND = [("all", "bfloat16")]
SECOND_TOO = [(name, dtype) for dtype in ("float32", "bfloat16") for name in MAIN_RULES if (name, dtype) not in SECOND]


@pytest.mark.parametrize("cases", [SECOND, pytest.param(SECOND_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_the_second_derivative_forward_over_reverse(cases):
    def second(f, *args):
        return jax.jvp(jax.grad(f, argnums=(0, 1)), *args)

    def tangent_of(leaf):
        return jnp.asarray(np.cos(np.arange(leaf.size)).reshape(leaf.shape)).astype(leaf.dtype)

    calls = {}
    for name, dtype in cases:
        args = Table(jnp.asarray(WEIGHT).astype(dtype), **RULES[name]), jnp.asarray(X)
        for f in energy, energy_of_logits:
            calls[name, dtype, f.__name__] = functools.partial(second, f), args, jax.tree.map(tangent_of, args)
    actual = in_one_program(calls)
    for name, dtype in cases:
        tolerance = FLOAT32 if dtype == "float32" else {"rtol": 0.03, "atol": 0.1}
        one, other = (
            jax.tree.map(lambda a: np.asarray(a, np.float32), actual[name, dtype, f.__name__])
            for f in (energy, energy_of_logits)
        )
        assert_close(one, other, f"{name} {dtype}", **tolerance)


@pytest.mark.exhaustive  # of fewer terms than that with ignored tokens
def test_hessian():
    arguments = Table(WEIGHT, padding_idx=2, max_norm=1.5), jnp.asarray(X)
    functions = {"ours": energy, "optax": energy_of_logits}
    hessians = in_one_program({name: (jax.hessian(f, argnums=(0, 1)), *arguments) for name, f in functions.items()})
    assert_close(hessians["ours"], hessians["optax"], **FLOAT32)


def test_forward_mode_alone_is_refused():
    with pytest.raises(TypeError, match="forward-mode autodiff"):
        jax.jvp(lambda x: softmax_cross_entropy(Table(WEIGHT), x, LABELS), (X,), (X,))


AXES = {"tokens": (None, 0, 0), "tables": (0, None, None)}


@pytest.mark.parametrize(
    "axes", [AXES, pytest.param({"both": (0, 0, 0)}, marks=pytest.mark.exhaustive)], ids=["", "too"]
)
def test_vmap_over_tokens_over_tables_and_over_both(axes):
    def gradients(table, x, labels):
        return jax.value_and_grad(lambda *args: softmax_cross_entropy(*args, labels, chunk=3).sum(), (0, 1))(table, x)

    tables = Table(np.stack([WEIGHT, 2 * WEIGHT]), max_norm=1.5)
    calls = {}
    for name, mapped in axes.items():
        args = (
            arg if axis == 0 else jax.tree.map(lambda leaf: leaf[0], arg)
            for arg, axis in zip((tables, X, LABELS), mapped, strict=True)
        )
        calls[name] = (jax.vmap(gradients, mapped), *args)
    actual = in_one_program(calls)
    for name, mapped in axes.items():
        for lane in range(2):
            of_lane = [lane if axis == 0 else 0 for axis in mapped]
            args = tables.weight[of_lane[0]], X[of_lane[1]], LABELS[of_lane[2]]
            expected = loss_and_gradients_of_reference(*args, max_norm=1.5)
            in_lane = jax.tree.map(lambda leaf: leaf[lane], actual[name])  # noqa: B023
            assert_close(in_lane, expected, f"{name}, lane {lane}", **FLOAT32)


def test_in_scan_and_under_checkpoint():
    def scanned(table, x):
        def step(sum_, batch):
            return sum_ + softmax_cross_entropy(table, *batch, chunk=3).sum(), None

        return jax.lax.scan(jax.checkpoint(step), jnp.float32(0), (x, jnp.asarray(LABELS)))[0]

    def plain(table, x):
        return softmax_cross_entropy(table, x, LABELS).sum()

    functions = {"scanned": scanned, "plain": plain}
    actual = in_one_program(
        {name: (jax.value_and_grad(f, argnums=(0, 1)), Table(WEIGHT), X) for name, f in functions.items()}
    )
    assert_close(actual["scanned"], actual["plain"], **FLOAT32)


@pytest.mark.exhaustive  # of fewer terms than that with ignored tokens
def test_checkify_finds_no_error():
    checked = checkify.checkify(jax.grad(energy, argnums=(0, 1)), errors=checkify.all_checks)
    error, _ = jax.jit(checked)(Table(WEIGHT, padding_idx=2, max_norm=1.5), X)
    error.throw()


# ---- The tape.


def tied(table, head, renormalized=False):
    """A language model with one table for what it reads and what it predicts."""
    table = renormalize(table, LABELS) if renormalized else table
    return head(table, jnp.tanh(lookup(table, LABELS[:, ::-1])), LABELS).sum()


TIED = {"freeze": (False, RULES["freeze"])}
TIED["renormalized"] = True, {"max_norm": 1.0, "padding_idx": 1}
TIED_TOO = {name: (False, rules) for name, rules in MAIN_RULES.items() if name not in TIED}


@pytest.mark.parametrize("cases", [TIED, pytest.param(TIED_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_gradient_of_a_tied_table_is_dense_without_a_warning(cases):
    calls = {}
    for name, (renormalized, rules) in cases.items():
        ours, theirs = (
            functools.partial(tied, head=head, renormalized=renormalized) for head in (softmax_cross_entropy, of_optax)
        )
        calls[f"{name}, ours"] = embax.value_and_grad(ours), Table(WEIGHT, **rules)
        calls[f"{name}, dense"] = jax.value_and_grad(theirs), Table(WEIGHT, **rules)
    actual = in_one_program(calls)
    for name, (_, rules) in cases.items():
        (value, gradient), (expected_value, expected) = actual[f"{name}, ours"], actual[f"{name}, dense"]
        np.testing.assert_allclose(value, expected_value, err_msg=name, **FLOAT32)
        assert isinstance(gradient, RowGrad if rules.get("freeze") else Table), name
        gradient = dense(gradient) if rules.get("freeze") else gradient.weight
        np.testing.assert_allclose(gradient, expected.weight, err_msg=name, **FLOAT32)


# ---- Meshes.


def placements():
    """The types of axes, the axes of the table, whether the mesh is set; pairs of these by default."""
    auto, explicit = AxisType.Auto, AxisType.Explicit
    pairs = [(auto, ("x",), False), (explicit, (), False)]
    others = [case for case in itertools.product((auto, explicit), ((), ("x",)), (True, False)) if case not in pairs]
    return [*pairs, *(pytest.param(*other, marks=pytest.mark.exhaustive) for other in others)]


@pytest.mark.parametrize(("axis_type", "weight_spec", "set_mesh"), placements(), ids=str)
def test_on_a_mesh(axis_type, weight_spec, set_mesh):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(5)
    weight, x = (rng.normal(size=shape).astype(np.float32) for shape in ((8, 4), (4, 2, 4)))
    labels, cotangent = rng.integers(0, 8, (4, 2)), rng.normal(size=(4, 2)).astype(np.float32)
    tokens = NamedSharding(mesh, PartitionSpec("x", "y"))
    put = [jax.device_put(array, tokens) for array in (x, labels, cotangent)]
    table = Table(jax.device_put(weight, NamedSharding(mesh, PartitionSpec(*weight_spec))), padding_idx=2, max_norm=1.5)
    run = jax.jit(
        functools.partial(losses_and_gradients, functools.partial(softmax_cross_entropy, chunk=3, mask_padding=True))
    )
    if set_mesh:
        with jax.set_mesh(mesh):
            loss, of_weight, of_x = run(table, *put)
    else:
        loss, of_weight, of_x = run(table, *put)
    rules = {"padding_idx": 2, "max_norm": 1.5}
    gradients = reference.cross_entropy_gradient(weight, x, labels, cotangent, True, **rules)
    np.testing.assert_allclose(loss, reference.cross_entropy(weight, x, labels, True, **rules)[0], **FLOAT32)
    for one, other in zip((of_weight, of_x), gradients, strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)
    assert loss.sharding.is_equivalent_to(tokens, 2)
    assert of_x.sharding.is_equivalent_to(tokens, 3)


def test_in_shard_map():
    """Over tokens in shards, the gradient of the replicated table is the sum of the shards'."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("x")

    def of_shard(table, x, labels):
        return softmax_cross_entropy(table, x, labels, chunk=3)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(loss, table, x, labels):
        return jax.value_and_grad(lambda table, x: jnp.sum(loss(table, x, labels)), (0, 1))(table, x)

    arguments = Table(WEIGHT, padding_idx=2), X, LABELS
    expected = loss_and_gradients_of_reference(WEIGHT, X, LABELS, padding_idx=2)
    for check_vma in True, False:
        sharded = jax.shard_map(
            of_shard, mesh=mesh, in_specs=(PartitionSpec(), spec, spec), out_specs=spec, check_vma=check_vma
        )
        assert_close(gradients(sharded, *arguments), expected, f"check_vma={check_vma}", **FLOAT32)
