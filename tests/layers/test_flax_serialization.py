"""Flax's serialization of Tables, Collections and the states of optimizers, whichever library is imported first."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import assert_same
from flax import serialization
from meshes import mesh_of

import embax
from embax import Collection, CompositionalTable, Feature, RowGrad, Table
from embax.optim import clip_by_global_norm, lift, rowwise_adagrad

WEIGHT = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
TX = optax.chain(clip_by_global_norm(1.0), lift(optax.adam(0.1)))
TXS = {"chain": TX, "rowwise": rowwise_adagrad(0.1)}

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params_of(rows=5, **rules):
    tables = {name: Table(WEIGHT[::-1][:n], padding_idx=0) for name, n in {"film": 5, "user": 2}.items()}
    return {
        "words": Table(WEIGHT[:rows], **rules),
        "frozen": Table(WEIGHT, freeze=True),
        "rows": Collection(tables, [Feature("film", "film")]),
        "ids": CompositionalTable.create(jax.random.key(0), ids=9, dim=3),
        "bias": jnp.asarray(np.ones(2, np.float32)),
    }


def gradient_of(params):
    def one(leaf):
        return RowGrad([1], WEIGHT[:1], rows=leaf.rows) if isinstance(leaf, Table) else np.ones(leaf.shape, leaf.dtype)

    return jax.tree.map(one, params, is_leaf=lambda node: isinstance(node, Table))


def after_a_step(tx, params):
    return jax.jit(lambda gradient, params: tx.update(gradient, tx.init(params), params)[1])(
        gradient_of(params), params
    )


def zeros_of(tree):
    """Zeros that are stored alike, put there by NumPy, which compiles nothing."""
    return jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), tree)


WAYS = {
    "bytes": (serialization.to_bytes, serialization.from_bytes),
    "state dict": (serialization.to_state_dict, serialization.from_state_dict),
}


@pytest.mark.parametrize("way", WAYS)
def test_from_state_dict_undoes_to_state_dict(way):
    to, back = WAYS[way]
    params = params_of(padding_idx=(0, 2))
    zeros = zeros_of(params)
    assert_same(back(zeros, to(params)), params)
    for tx in TXS.values():
        state = after_a_step(tx, params)
        restored = back(jax.jit(tx.init)(zeros), to(state))
        assert_same(restored, state)
        jax.eval_shape(tx.update, gradient_of(params), restored, params)


def test_state_dict_has_the_names_of_the_tables():
    state = serialization.to_state_dict(params_of())
    assert {name: sorted(value) for name, value in state.items() if isinstance(value, dict)} == {
        "words": ["weight"],
        "frozen": ["weight"],
        "rows": ["film", "user"],
        "ids": ["quotient", "remainder"],
    }


def test_state_keeps_the_description_of_its_tables():
    before, after = params_of(), params_of(padding_idx=1)
    for tx in TXS.values():
        restored = serialization.from_bytes(tx.init(after), serialization.to_bytes(tx.init(before)))
        jax.eval_shape(tx.update, gradient_of(before), restored, before)
        with pytest.raises(ValueError, match=r"params\['words'\] had padding_idx=None, and has 1 now"):
            jax.eval_shape(tx.update, gradient_of(after), restored, after)


def test_rows_are_saved_in_their_order_whatever_the_layout():
    mesh = mesh_of({"x": 2})
    params = {name: node for name, node in params_of().items() if name != "ids"}
    layouts = [params, embax.shard(params, mesh, "x", "rows-cyclic")]
    tx = TXS["rowwise"]
    state = after_a_step(tx, params)
    states = [embax.optim.carry_over(state, params, placed, tx) for placed in layouts]
    targets = [(zeros := zeros_of(placed), tx.init(zeros)) for placed in layouts]
    pairs = list(zip(layouts, states, targets, strict=True))
    for i, (*saved, _) in enumerate(pairs):
        data = serialization.to_bytes(tuple(saved))
        for placed, of_placed, target in (pairs[i], pairs[i - 1]):
            restored, of_restored = serialization.from_bytes(target, data)
            assert_same(restored, placed)
            assert_same(of_restored.inner, of_placed.inner)
            assert restored["words"].weight.sharding == placed["words"].weight.sharding
        jax.eval_shape(tx.update, gradient_of(placed), of_restored, placed)  # the last one, of another layout


def test_another_number_of_rows_is_refused():
    saved = serialization.to_bytes(params_of())
    message = r"`flax.serialization.from_state_dict\(target=...\)` must have tables of the shapes that were saved, got "
    with pytest.raises(ValueError, match=message + r"Table\(float32\[4,3\]\) for one of \(5, 3\)"):
        serialization.from_bytes(params_of(4), saved)
    with pytest.raises(
        ValueError, match=r"from_state_dict\(state=...\)` must have the weight of a Table for .* got \['x'"
    ):
        serialization.from_state_dict(Table(WEIGHT), {"x": WEIGHT})
    with pytest.raises(ValueError, match=r"must have the weight of a Table for .* got list"):
        serialization.from_state_dict(Table(WEIGHT), [1])


CODE = """
    {imports}
    import flax.serialization as s, jax, numpy as np, optax
    assert ("flax" in sys.modules) and "embax.nnx" not in sys.modules
    params = {{"a": embax.Table(np.float32([[0, 1], [2, 3], [4, 5]]), padding_idx=0)}}
    fresh = embax.optim.lift(optax.adam(0.1)).init(params)
    state, zeros = jax.tree.map(np.ones_like, fresh), jax.tree.map(np.zeros_like, params)
    back, of_back = s.from_bytes((zeros, fresh), s.to_bytes((params, state)))
    np.testing.assert_array_equal(back["a"].weight, params["a"].weight)
    assert back["a"].padding_idx == 0
    np.testing.assert_array_equal(of_back.inner[0].mu["a"].weight, state.inner[0].mu["a"].weight)
    assert of_back.made_for == state.made_for
    assert s.from_state_dict(zeros, s.to_state_dict(params))["a"].weight[2, 1] == 5
    assert type(s.__loader__) is type(optax.__loader__), s.__loader__
    print("same")
"""
ORDERS = {
    "embax first": "import sys, embax; embax.Table; embax.optim.lift; assert 'flax' not in sys.modules; import flax",
}
MORE = {
    "flax first": "import sys, flax.serialization, embax",
    "the module alone": "import sys, embax; embax.Table; import flax.serialization",
    "all of flax first": "import sys; from flax import nnx, linen; import embax; embax.Table",
    "a table before flax": "import sys, embax, numpy as np; table = embax.Table(np.ones((2, 2))); import flax.linen",
}


@pytest.mark.parametrize("order", [*ORDERS, *(pytest.param(order, marks=pytest.mark.exhaustive) for order in MORE)])
def test_in_any_order_of_imports(order):
    code = textwrap.dedent(CODE).format(imports={**ORDERS, **MORE}[order])
    run = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "same", run.stderr
