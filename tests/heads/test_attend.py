"""attend against float64 NumPy, under every transformation, on meshes, and on a tape."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from bag_cases import dense
from cases import MAIN_RULES, ROWS, RULES, WEIGHT, assert_same_gradient
from closeness import assert_close
from head_cases import FLOAT32, MASKED, in_one_program
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from meshes import usual_and_rest

import embax
from embax import RowGrad, Table, attend, lookup, renormalize

RNG = np.random.default_rng(9)
X = RNG.normal(size=(2, 4, 3)).astype(np.float32)
COTANGENT = RNG.normal(size=(2, 4, ROWS)).astype(np.float32)
IDS = np.array([[2, 0, -1, 2], [1, 2, 5, 6]])


def value_and_gradients(mask_padding, table, x, cotangent):
    logits, pull = jax.vjp(lambda table, x: attend(table, x, mask_padding=mask_padding), table, x)
    of_table, of_x = pull(cotangent)
    return logits, of_table.weight, of_x


def case(weight=WEIGHT, x=X, cotangent=COTANGENT, mask_padding=False, **rules):
    return weight, x, cotangent, mask_padding, rules


def check(cases):
    """Logits and gradients of cases `{name: case(...)}` are those of the reference."""
    actual = in_one_program(
        {
            name: (functools.partial(value_and_gradients, mask_padding), Table(weight, **rules), x, cotangent)
            for name, (weight, x, cotangent, mask_padding, rules) in cases.items()
        }
    )
    for name, (weight, x, cotangent, mask_padding, rules) in cases.items():
        expected = reference.attend(weight, x, mask_padding, **rules)
        gradients = reference.attend_gradient(weight, x, cotangent, mask_padding, **rules)
        assert_close(actual[name], (expected, *gradients), name, **FLOAT32)


def test_values_and_gradients_by_every_rule():
    check({name: case(**options) for name, options in (RULES | MASKED).items()})


def test_several_padding_rows():
    several = {"padding_idx": (0, 2, -1)}
    check({"plain": case(**several), "masked": case(mask_padding=True, **several)})


def test_a_cotangent_that_is_not_a_number_does_not_reach_the_padding_row():
    cotangent = COTANGENT.copy()
    cotangent[..., 2] = np.nan
    table = Table(WEIGHT, padding_idx=2)
    actual = in_one_program(
        {
            name: (functools.partial(value_and_gradients, mask_padding), table, X, cotangent)
            for name, mask_padding in (("plain", False), ("masked", True))
        }
    )
    for name, (_, of_weight, _) in actual.items():
        np.testing.assert_array_equal(of_weight[2], 0, name)
        assert np.isfinite(of_weight).all(), name


def test_rows_of_any_axes():
    shapes = {
        "scalars": ((), (4,)),
        "zero": ((0,), (4,)),
        "axes": ((2, 3), (2, 2)),
        "one": ((3,), ()),
        "empty": ((3,), (0, 2)),
    }
    cases = {}
    for name, (dim, batch) in shapes.items():
        weight, x = (RNG.normal(size=(*shape, *dim)).astype(np.float32) for shape in ((5,), batch))
        cotangent = RNG.normal(size=(*batch, 5)).astype(np.float32)
        cases[name] = case(weight, x, cotangent, padding_idx=1, max_norm=1.0)
    check(cases)


def test_few_rows():
    check({f"{rows} rows": case(WEIGHT[:rows], X, COTANGENT[..., :rows], max_norm=1.0) for rows in (0, 1)})


def test_lists_without_jit():
    table = Table(WEIGHT, padding_idx=2, max_norm=1.5)
    expected = reference.attend(WEIGHT, X, True, padding_idx=2, max_norm=1.5)
    np.testing.assert_allclose(attend(table, X.tolist(), mask_padding=True), expected, **FLOAT32)


# ---- Dtypes.


# The dtypes of a table, of vectors, and of their logits.
DTYPES = [
    ("float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float16", "float16"),
    ("bfloat16", "float32", "float32"),
    ("float32", "float16", "float32"),
    ("float16", "bfloat16", "float32"),
]


def test_dtypes():
    plain = functools.partial(value_and_gradients, False)
    calls = {
        (stored, given, logits): (
            plain,
            Table(WEIGHT.astype(stored)),
            X.astype(given),
            COTANGENT.astype(logits),
        )
        for stored, given, logits in DTYPES
    }
    for (stored, given, logits), (out, of_weight, of_x) in in_one_program(calls).items():
        name = f"{stored} {given}"
        _, table, x, _ = calls[stored, given, logits]
        assert (out.dtype, of_weight.dtype, of_x.dtype) == (jnp.dtype(logits), table.dtype, x.dtype), name
        wide = np.asarray(table.weight, np.float64), np.asarray(x, np.float64)
        tolerance = 1e-5 if {stored, given} == {"float32"} else 2e-2
        expected = reference.attend(*wide)
        np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=tolerance, atol=tolerance, err_msg=name)
        for one, other in zip((of_weight, of_x), reference.attend_gradient(*wide, COTANGENT), strict=True):
            np.testing.assert_allclose(
                np.asarray(one, np.float64), other, rtol=tolerance, atol=4 * tolerance, err_msg=name
            )
        asked_for = jax.eval_shape(functools.partial(attend, dtype="float32"), table, x)
        assert asked_for.dtype == np.float32, name


def test_sums_of_low_precision_run_in_float32():
    """4096 products of one; in bfloat16 they would add up to 256."""
    logits = attend(Table(jnp.ones((1, 4096), jnp.bfloat16)), jnp.ones(4096, jnp.bfloat16))
    assert (logits.item(), logits.dtype) == (4096, jnp.bfloat16)


# ---- Transformations.


def energy(table, x):
    return jnp.sum(jnp.sin(attend(table, x)))


def energy_by_hand(table, x):
    """Of the weight itself, for rules that do not change what is read."""
    return jnp.sum(jnp.sin(x @ table.weight.T))


def test_jvp():
    of_weight, of_x = (RNG.normal(size=s).astype(np.float32) for s in (WEIGHT.shape, X.shape))
    calls = {}
    for name, rules in RULES.items():
        table, tangent = (Table(weight, **rules) for weight in (WEIGHT, of_weight))
        calls[name] = functools.partial(jax.jvp, attend), (table, X), (tangent, of_x)
    for name, (_, pushed) in in_one_program(calls).items():
        rules, dropped = RULES[name], np.array(of_weight, np.float64)
        dropped[sorted(reference.padding_rows(rules.get("padding_idx"), ROWS))] = 0
        dropped *= not rules.get("freeze")
        expected = np.asarray(X, np.float64) @ dropped.T + reference.attend(WEIGHT, of_x, **rules)
        np.testing.assert_allclose(pushed, expected, err_msg=name, **FLOAT32)


def test_hessian():
    x = jnp.asarray(X[0, :2])
    calls = {
        (argument, f): (jax.hessian(f, argnums=argument), Table(WEIGHT), x)
        for argument in (0, 1)
        for f in (energy, energy_by_hand)
    }
    hessians = in_one_program({f"{argument} {f.__name__}": call for (argument, f), call in calls.items()})
    for argument in 0, 1:
        ours, by_hand = (hessians[f"{argument} {f.__name__}"] for f in (energy, energy_by_hand))
        assert_close(ours, by_hand, f"argument {argument}", **FLOAT32)


def scanned_energy(table, x):
    return jax.lax.scan(lambda sum_, x: (sum_ + energy(table, x), None), jnp.float32(0), x)[0]


def mapped_energy(table, x):
    return jax.vmap(energy, (None, 0))(table, x).sum()


@pytest.mark.parametrize("names", [["all"], pytest.param([*MAIN_RULES], marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_vmap_scan_and_checkpoint(names):
    energies = {"plain": energy, "checkpoint": jax.checkpoint(energy), "scan": scanned_energy, "vmap": mapped_energy}
    for name in names:
        table = Table(WEIGHT, **RULES[name])
        actual = in_one_program({how: (jax.grad(f, argnums=(0, 1)), table, X) for how, f in energies.items()})
        for how in "checkpoint", "scan", "vmap":
            assert_close(actual[how], actual["plain"], f"{how}, {name}", **FLOAT32)


# ---- The tape.


def tied(table, renormalized=False):
    """A language model with one table for what it reads and what it predicts."""
    table = renormalize(table, IDS) if renormalized else table
    logits = attend(table, jnp.tanh(lookup(table, IDS)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(IDS[:, ::-1])).sum()


RENORMALIZED = functools.partial(tied, renormalized=True)
TIED = {name: (tied, RULES[name]) for name in ("freeze", "all")} | {
    f"{name}, renormalized": (RENORMALIZED, RULES[name]) for name in ("norm_half", "all_frozen")
}
TIED_TOO = {name: (tied, rules) for name, rules in RULES.items() if name not in TIED} | {
    f"{name}, renormalized": (RENORMALIZED, RULES[name])
    for name in ("none", "padding_first", "norm_2", "frequency", "all")
}


def assert_gradient_of_a_tied_table(table, ours, expected, name):
    (value, gradient), (expected_value, expected_gradient) = ours, expected
    assert isinstance(gradient, RowGrad if table.freeze else Table), name
    np.testing.assert_allclose(value, expected_value, err_msg=name, **FLOAT32)
    whole = dense(gradient) if table.freeze else gradient.weight
    assert_same_gradient(whole, expected_gradient.weight, err_msg=name, **FLOAT32)


@pytest.mark.parametrize("cases", [TIED, pytest.param(TIED_TOO, marks=pytest.mark.exhaustive)], ids=["", "too"])
def test_gradient_of_a_tied_table_is_dense_without_a_warning(cases):
    tables = {name: Table(WEIGHT, **rules) for name, (_, rules) in cases.items()}
    with jax.numpy_rank_promotion("allow"):
        calls = {(name, "ours"): (embax.value_and_grad(f), tables[name]) for name, (f, _) in cases.items()}
        calls |= {(name, "dense"): (jax.value_and_grad(f), tables[name]) for name, (f, _) in cases.items()}
        actual = in_one_program(calls)
    for name, table in tables.items():
        assert_gradient_of_a_tied_table(table, actual[name, "ours"], actual[name, "dense"], name)


def test_gradient_of_a_tied_table_without_jit():
    def loss(table):
        return jnp.vdot(attend(table, lookup(table, IDS)), COTANGENT)

    table = Table(WEIGHT, **RULES["padding_last"])
    ours, expected = embax.value_and_grad(loss)(table), jax.jit(jax.value_and_grad(loss))(table)
    assert_gradient_of_a_tied_table(table, ours, expected, "without jit")


def test_a_head_alone_and_beside_a_table_that_is_looked_up():
    tables = {"read": Table(WEIGHT), "head": Table(2 * WEIGHT, padding_idx=1)}

    def loss(tables):
        return jnp.sum(jnp.sin(attend(tables["head"], jnp.tanh(lookup(tables["read"], IDS)), mask_padding=False)))

    actual = in_one_program({"ours": (embax.grad(loss), tables), "dense": (jax.grad(loss), tables)})
    assert isinstance(actual["ours"]["read"], RowGrad)
    assert isinstance(actual["ours"]["head"], Table)
    assert_same_gradient(actual["ours"], actual["dense"], **FLOAT32)


@pytest.mark.parametrize("where", ["jit", "scan"])
def test_a_head_inside_of_another_transformation_is_expected(where):
    def in_jit(table):
        return jax.jit(energy)(table, X) + lookup(table, IDS).sum()

    def in_scan(table):
        return jax.lax.scan(lambda sum_, x: (sum_ + energy(table, x), None), lookup(table, IDS).sum(), X)[0]

    loss = {"jit": in_jit, "scan": in_scan}[where]
    table = Table(WEIGHT, padding_idx=2)
    actual = in_one_program({"ours": (embax.grad(loss, on_dense="error"), table), "dense": (jax.grad(loss), table)})
    assert_same_gradient(actual["ours"], actual["dense"], **FLOAT32)


# ---- Meshes.


@pytest.mark.parametrize(
    ("axis_type", "set_mesh"),
    usual_and_rest(
        [(AxisType.Auto, False), (AxisType.Explicit, True)],
        itertools.product([AxisType.Auto, AxisType.Explicit], [True, False]),
    ),
    ids=str,
)
def test_on_a_mesh(axis_type, set_mesh):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    tokens = NamedSharding(mesh, PartitionSpec("x", "y"))
    rules = {"padding_idx": 2, "max_norm": 1.5}
    table = Table(jax.device_put(WEIGHT, NamedSharding(mesh, PartitionSpec())), **rules)

    @jax.jit
    def run(table, x):
        def total(table, x):
            logits = attend(table, x)
            return jnp.sum(jnp.sin(logits)), logits

        return jax.grad(total, argnums=(0, 1), has_aux=True)(table, x)

    if set_mesh:
        with jax.set_mesh(mesh):
            (of_table, of_x), logits = run(table, jax.device_put(X, tokens))
    else:
        (of_table, of_x), logits = run(table, jax.device_put(X, tokens))
    expected = reference.attend(WEIGHT, X, **rules)
    gradients = reference.attend_gradient(WEIGHT, X, np.cos(expected), **rules)
    for one, other in zip((logits, of_table.weight, of_x), (expected, *gradients), strict=True):
        np.testing.assert_allclose(one, other, **FLOAT32)
    assert logits.sharding.is_equivalent_to(tokens, 3)


# ---- Errors.


def test_errors():
    table, name = Table(WEIGHT), re.escape("`embax.attend(")
    with pytest.raises(TypeError, match=name + r"table=...\)` must be of a float dtype, got int32. Cast its weight"):
        attend(Table(jnp.ones((ROWS, 3), jnp.int32)), X)
    with pytest.raises(TypeError, match=name + r"x=...\)` must be of a float dtype, got int"):
        attend(table, IDS)
    with pytest.raises(
        ValueError, match=name + r"x=...\)` must be of the shape \(\*batch, \*\(3,\)\).*, got \(2, 4, 2\)"
    ):
        attend(table, X[..., :2])
    with pytest.raises(ValueError, match=name + r"x=...\)` must be of the shape \(\*batch, \*\(3,\)\).*, got \(\)"):
        attend(table, 1.0)
