"""The contract of a storage: whatever it is, a table computes as a dense one, seen in the order of its rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from meshes import LAYOUTS, everywhere, mesh_of

import embax
from embax import Table
from embax._core.dense import DENSE, Dense


@dataclasses.dataclass(frozen=True)
class Reversed(Dense):
    """A third storage: one array, the last row first."""

    def positions(self, ids, rows):
        return rows - 1 - ids

    def ids(self, positions, rows):
        return jnp.where((positions >= 0) & (positions < rows), rows - 1 - positions, rows)

    def to_rows(self, leaf):
        return leaf[::-1]

    def from_rows(self, values):
        return jnp.asarray(values)[::-1]


RULES = {"padding_idx": (0, 7), "max_norm": 2.5, "scale_grad_by_freq": True, "out_of_range": "zero"}
WEIGHT = np.random.default_rng(0).normal(size=(11, 4)).astype(np.float32)
IDS = np.array([[3, 0, 10, 3], [7, 2, -1, 11], [5, 5, 5, 1]])
LABELS = np.array([2, 10, -100])
BAGS = embax.Ragged(IDS.reshape(-1), np.array([0, 2, 2, 9, 12]))


def dense():
    return Table(WEIGHT, **RULES)


def sharded(layout):
    sizes, how = LAYOUTS[layout]
    return embax.shard(dense(), mesh_of(sizes), **how)


def reversed_():
    return Table(Reversed().from_rows(WEIGHT), storage=Reversed(), **RULES)


# A new storage is a file and a line here.
STORAGES = {
    "dense": dense,
    "sharded": lambda: sharded("rows-cyclic"),
    "reversed": reversed_,
}


def everything(table, ids, bags, x):
    """What is computed with a table, as one program: arrays, and tables by their rows."""
    tx = embax.optim.lift(optax.adamw(0.1))

    def loss(table):
        rows, pooled = embax.lookup(table, ids), embax.embedding_bag(table, ids, mode="sqrtn")
        return jnp.sin(rows).sum() + jnp.cos(pooled).sum() + jnp.sin(embax.embedding_bag(table, bags)).sum()

    def head(table):
        return embax.softmax_cross_entropy(table, x, LABELS).sum() + jnp.sin(embax.attend(table, x)).sum()

    value, gradient = embax.value_and_grad(loss)(table)
    updates, state = tx.update(gradient, tx.init(table), table)
    of_head = embax.grad(head)(table)
    return {
        "lookup": embax.lookup(table, ids),
        "bags": [embax.embedding_bag(table, ids, mode=mode) for mode in ("sqrtn", "max")],
        "ragged": embax.embedding_bag(table, bags, mode="max"),
        "logits": embax.attend(table, x, mask_padding=True),
        "losses": embax.softmax_cross_entropy(table, x, LABELS, label_smoothing=0.1),
        "loss": value,
        "gradient": gradient.to_dense(),
        "gradient of the head": of_head,
        "renormalized": embax.renormalize(table, ids),
        "stepped": embax.apply_updates(table, updates),
        "moments": state.inner[0].mu,
    }


def by_rows(tree):
    """Every table by its rows, in their order."""

    def rows(node):
        return node.storage.to_rows(node.weight) if isinstance(node, Table) else node

    return jax.tree.map(rows, tree, is_leaf=lambda node: isinstance(node, Table))


X = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def expected():
    with jax.numpy_dtype_promotion("standard"):
        return by_rows(jax.jit(everything)(dense(), IDS, BAGS, X))


@pytest.mark.parametrize("name", [name for name in STORAGES if name != "dense"])
def test_every_storage_computes_as_the_dense_one(name, expected):
    table = STORAGES[name]()
    args = IDS, BAGS, X
    if table.placement is not None:
        args = jax.tree.map(lambda x: everywhere(table.placement.mesh, x), args)
    with jax.numpy_dtype_promotion("standard"):
        ours = by_rows(jax.jit(everything)(table, *args))
    for name, value in expected.items():
        for one, other in zip(jax.tree.leaves(ours[name]), jax.tree.leaves(value), strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("name", ["sharded", "reversed"])
def test_every_storage_keeps_rows_when_tables_change(name):
    table = dataclasses.replace(STORAGES[name](), padding_idx=None, max_norm=None)
    assert (table.rows, table.dim, hash(table.storage)) == (11, (4,), hash(STORAGES[name]().storage))
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
    tx = embax.optim.lift(optax.adagrad(0.1))
    carried = embax.optim.carry_over(tx.init(table), table, grown, tx)
    assert by_rows(carried.inner[0].sum_of_squares).shape == (14, 4)


def test_a_storage_is_part_of_the_type():
    assert jax.tree.structure(dense()) != jax.tree.structure(reversed_())
    assert jax.tree.structure(reversed_()) == jax.tree.structure(reversed_())
    assert dense().storage == DENSE
    assert dense().placement is None
