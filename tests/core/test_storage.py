"""The contract of a storage: whatever it is, a table computes as a dense one, seen in the order of its rows."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from meshes import usual_and_rest
from reversed_rows import Reversed
from storages import OTHERS, STORAGES, by_rows

import embax
from embax import Table, checkpoint
from embax._core.dense import DENSE

RULES = {"padding_idx": (0, 7), "max_norm": 2.5, "scale_grad_by_freq": True, "out_of_range": "zero"}
WEIGHT = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
TABLE = Table(WEIGHT, **RULES)
IDS = np.array([[3, 0, 10, 3], [7, 2, -1, 11], [5, 5, 5, 1]])
FACTORS = np.random.default_rng(2).uniform(0.5, 2, IDS.shape).astype(np.float32)
LABELS = np.array([2, 10, -100])
X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
# Every mode, of bags of one length and of several, and both with factors and without.
FIXED = {"sum": FACTORS, "mean": None, "sqrtn": FACTORS, "max": None}
RAGGED = {"sum": None, "mean": FACTORS.reshape(-1), "sqrtn": None, "max": None}
# Modes of a sum differ in what it is divided by, so that one derivative shows as much as three.
DIFFERENTIATED = {"fixed": ("sqrtn", "max"), "ragged": ("mean", "max")}
OPTIMIZERS = {
    "adamw": embax.optim.lift(optax.adamw(0.1)),
    "rowwise_adagrad": embax.optim.rowwise_adagrad(0.1),
}


pytestmark = pytest.mark.usefixtures("standard_promotion_of_module")


def pooled(table, modes):
    ragged = embax.Ragged(IDS.reshape(-1), np.array([0, 2, 2, 9, 12]))
    of_one_length = [embax.embedding_bag(table, IDS, FIXED[mode], mode) for mode in modes["fixed"]]
    return of_one_length, [embax.embedding_bag(table, ragged, RAGGED[mode], mode) for mode in modes["ragged"]]


@jax.jit
def everything(table):
    """What is computed with a table, as one program: arrays, and tables by their rows."""

    def loss(table):
        read = embax.lookup(table, IDS), pooled(table, DIFFERENTIATED)
        return sum(jnp.sin(x).sum() for x in jax.tree.leaves(read)), read

    def head(table):
        losses = embax.softmax_cross_entropy(table, X, LABELS, label_smoothing=0.1)
        logits = embax.attend(table, X, mask_padding=True)
        return losses.sum() + jnp.sin(jnp.where(jnp.isfinite(logits), logits, 0)).sum(), (losses, logits)

    (_, read), gradient = embax.value_and_grad(loss, has_aux=True, on_dense="error")(table)
    (_, heads), of_head = embax.value_and_grad(head, has_aux=True, on_dense="allow")(table)
    steps = {}
    for name, tx in OPTIMIZERS.items():
        updates, state = tx.update(gradient, tx.init(table), table)
        steps[name] = embax.apply_updates(table, updates), state.inner
    return {
        "rows and bags": read,
        "other bags": pooled(table, {"fixed": ("sum", "mean"), "ragged": ("sum", "sqrtn")}),
        "gradient": gradient.to_dense(),
        "losses and logits": heads,
        "gradient of the heads": of_head,
        "renormalized": embax.renormalize(table, IDS),
        "steps": steps,
    }


@pytest.fixture(scope="module")
def expected():
    return by_rows(everything(TABLE))


@pytest.mark.parametrize("name", OTHERS)
def test_every_storage_computes_like_the_dense_one(name, expected):
    ours = by_rows(everything(STORAGES[name](TABLE)))
    for name, value in expected.items():
        for one, other in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(value), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", OTHERS)
def test_every_storage_keeps_rows_when_tables_change(name):
    table = STORAGES[name](Table(WEIGHT))
    assert (table.rows, table.dim, hash(table.storage)) == (11, (4,), hash(STORAGES[name](TABLE).storage))
    np.testing.assert_array_equal(embax.to_state_dict(table)["weight"], WEIGHT)
    grown = embax.resize(table, 14, jax.random.key(0))
    np.testing.assert_array_equal(embax.to_state_dict(grown)["weight"][:11], WEIGHT)
    cut = embax.resize(grown, 5)
    np.testing.assert_array_equal(embax.to_state_dict(cut)["weight"], WEIGHT[:5])
    collection = embax.Collection({"a": table, "b": cut}, [embax.Feature("a", "a"), embax.Feature("b", "b")])
    assert len(collection.stacks) == 1
    for key, rows in (("a", 11), ("b", 5)):
        np.testing.assert_array_equal(embax.to_state_dict(collection[key])["weight"], WEIGHT[:rows])
    out = collection({"a": [10, 2], "b": [4]})
    np.testing.assert_array_equal(out["a"], WEIGHT[[10, 2]])
    np.testing.assert_array_equal(out["b"], WEIGHT[[4]])
    tx = OPTIMIZERS["rowwise_adagrad"]
    carried = embax.optim.carry_over(tx.init(table), table, grown, tx)
    assert by_rows(carried.inner[0].sum_of_squares).shape == (14,)


@pytest.mark.parametrize(
    ("saved", "loaded"),
    usual_and_rest(
        [("dense", "reversed"), ("reversed", "rows"), ("rows", "columns"), ("columns", "dense")],
        itertools.product(STORAGES, STORAGES),
    ),
)
def test_checkpoints_of_one_storage_load_into_every_other(saved, loaded, tmp_path):
    before, zeros = STORAGES[saved](TABLE), STORAGES[loaded](Table(WEIGHT * 0, **RULES))
    checkpoint.save(tmp_path, before)
    for table in (
        checkpoint.restore(tmp_path, zeros),
        serialization.from_bytes(zeros, serialization.to_bytes(before)),
        serialization.from_state_dict(zeros, serialization.to_state_dict(before)),
    ):
        assert table.storage == zeros.storage
        np.testing.assert_array_equal(by_rows(table), WEIGHT)
        assert table.weight.sharding == zeros.weight.sharding


def test_a_storage_is_part_of_the_type():
    reversed_ = STORAGES["reversed"](TABLE)
    assert jax.tree.structure(TABLE) != jax.tree.structure(reversed_)
    assert jax.tree.structure(reversed_) == jax.tree.structure(STORAGES["reversed"](TABLE))
    assert reversed_.storage == Reversed()
    assert TABLE.storage == DENSE
    assert dataclasses.replace(TABLE, freeze=True).placement is None
