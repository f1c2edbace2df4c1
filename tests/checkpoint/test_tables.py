"""Checkpoints of optimizers' states: which tables they were made for, and training that goes on with others."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import mesh_of

import embax
from embax import Collection, Feature, RowGrad, Table, checkpoint
from embax.optim import carry_over, clip_by_global_norm, lift, rowwise_adagrad

WEIGHT = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
TX = optax.chain(
    clip_by_global_norm(1.0),
    optax.multi_transform({"a": rowwise_adagrad(0.1), "b": lift(optax.adam(0.1))}, {"words": "a", "rows": "b"}),
)

pytestmark = pytest.mark.usefixtures("standard_promotion")


def params_of(rows=4, **rules):
    tables = {"film": Table(jnp.asarray(WEIGHT[:rows])), "user": Table(jnp.asarray(WEIGHT[:2]), padding_idx=0)}
    return {
        "words": Table(jnp.asarray(WEIGHT[:rows]), **{"padding_idx": (0, 2), **rules}),
        "rows": Collection(tables, [Feature("film", "film")]),
    }


def gradient_of(params):
    return jax.tree.map(
        lambda x: RowGrad([1, 3], WEIGHT[:2], rows=x.rows), params, is_leaf=lambda node: isinstance(node, Table)
    )


@jax.jit
def update(params, state):
    return TX.update(gradient_of(params), state, params)


def trained(params):
    return update(params, TX.init(params))[1]


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)


def test_restored_state_keeps_the_description_of_its_tables(tmp_path):
    params = params_of()
    state = trained(params)
    checkpoint.save(tmp_path, {"state": state, "params": params})
    back = checkpoint.restore(tmp_path, {"state": TX.init(params), "params": params})
    assert jax.tree.structure(back["state"]) == jax.tree.structure(state)
    update(params, back["state"])
    # Into what would be its state under other rules.
    other = params_of(padding_idx=1)
    back = checkpoint.restore(tmp_path, {"state": TX.init(other)}, partial=True)["state"]
    with pytest.raises(ValueError, match=r"params\['words'\] had padding_idx=\(0, 2\), and has 1 now"):
        jax.eval_shape(update, other, back)
    jax.eval_shape(update, other, carry_over(back, params, other, TX))


def without_scratch(state):
    def has_scratch(node):
        return hasattr(node, "slots")

    return jax.tree.map(lambda node: node._replace(slots=()) if has_scratch(node) else node, state, is_leaf=has_scratch)


def test_restore_moves_a_state_to_another_layout(tmp_path):
    params, mesh = params_of(), mesh_of({"x": 4})
    both = {"params": params, "state": without_scratch(trained(params))}
    before, after = embax.shard(both, mesh, "x"), embax.shard(both, mesh, "x", "rows-cyclic")
    checkpoint.save(tmp_path, before["state"])
    back = checkpoint.restore(tmp_path, without_scratch(TX.init(after["params"])))
    assert_same(back, after["state"])
    with pytest.raises(ValueError, match=r"params\['words'\] was laid out as .*'rows-cyclic' .* is .*'rows' over 4"):
        jax.eval_shape(update, before["params"], back)


def test_a_vocabulary_grows_after_a_checkpoint(tmp_path):
    params, grown = params_of(), params_of(6)
    state = trained(params)
    checkpoint.save(tmp_path, {"state": state, "params": params})
    with pytest.raises(ValueError, match=r"Restore this shape; to change its rows afterwards, use embax.resize and"):
        checkpoint.restore(tmp_path, {"state": TX.init(grown), "params": grown})
    back = checkpoint.restore(tmp_path, {"state": TX.init(params), "params": params})
    carried = carry_over(back["state"], back["params"], grown, TX)
    assert_same(carried, carry_over(state, params, grown, TX))
    jax.eval_shape(update, grown, carried)


def test_restore_of_a_checkpoint_without_descriptions_of_tables(tmp_path):
    params = params_of()
    state = trained(params)
    checkpoint.save(tmp_path, state)
    (about,) = (path for path in pathlib.Path(tmp_path).rglob("metadata") if path.parent.name == "embax")
    content = json.loads(about.read_text())
    assert len(content.pop("made_for")) == 3
    about.write_text(json.dumps(content))
    back = checkpoint.restore(tmp_path, TX.init(params))
    with pytest.raises(ValueError, match=r"must say which tables it was made for, .* an older checkpoint"):
        jax.eval_shape(update, params, back)
    assert_same(carry_over(back, params, params, TX), carry_over(state, params, params, TX))
