"""Models of Flax NNX, Equinox and brainstate that read arrays as tables: by layers of their own, and by indexing."""

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import keystr

import embax
import embax.equinox
import embax.nnx

ROWS, DIM = 20_000, 4
NAMES = ("words", "indexed", "taken")  # read by a layer of the framework, by weight[ids] and by jnp.take
WEIGHT = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)


def tables(path, leaf):
    return any(name in keystr(path) for name in NAMES)


def kernel(shape, *_):
    """Numbers that no random generator has to be compiled for."""
    return jnp.asarray(np.cos(np.arange(np.prod(shape))).reshape(shape).astype(np.float32))


def loss_of(words, indexed, taken, ours, head):
    return (head(jnp.sin(words + 2 * indexed + 3 * taken + ours)) ** 2).sum()


class NnxModel(nnx.Module):
    def __init__(self, rows=ROWS):
        weight = jnp.asarray(WEIGHT[:rows])
        self.words = nnx.Embed(rows, DIM, embedding_init=lambda *_: weight, rngs=nnx.Rngs(0))
        self.indexed, self.taken = nnx.Param(weight.copy()), nnx.Param(weight.copy())
        self.ours = embax.nnx.Embedding.from_pretrained(weight.copy(), freeze=False, padding_idx=1)
        self.head = nnx.Linear(DIM, 1, kernel_init=lambda _, *shape: kernel(*shape), rngs=nnx.Rngs(0))

    def __call__(self, ids):
        taken = jnp.take(self.taken[...], ids, axis=0)
        return loss_of(self.words(ids), self.indexed[ids], taken, self.ours(ids), self.head)


class EquinoxModel(eqx.Module):
    words: eqx.nn.Embedding
    indexed: jax.Array
    taken: jax.Array
    ours: embax.equinox.Embedding
    head: eqx.nn.Linear
    activation: object = jax.nn.tanh  # no array

    def __call__(self, ids):
        head = jax.vmap(jax.vmap(lambda x: self.activation(self.head(x))))
        words = jax.vmap(jax.vmap(self.words))(ids)
        return loss_of(words, self.indexed[ids], jnp.take(self.taken, ids, axis=0), self.ours(ids), head)


class BrainstateModel(brainstate.nn.Module):
    def __init__(self, rows=ROWS):
        super().__init__()
        weight = jnp.asarray(WEIGHT[:rows])
        self.words = brainstate.nn.Embedding(rows, DIM, embedding_init=weight.copy())
        self.indexed = brainstate.ParamState(weight.copy())
        self.tree = brainstate.ParamState({"taken": weight.copy(), "bias": jnp.ones(DIM)})
        self.ours = embax.Embedding.from_pretrained(weight.copy(), freeze=False, padding_idx=1)
        self.head = brainstate.nn.Linear(DIM, 1, w_init=kernel)

    def update(self, ids):
        taken = jnp.take(self.tree.value["taken"], ids, axis=0) + self.tree.value["bias"]
        return loss_of(self.words(ids), self.indexed.value[ids], taken, self.ours(ids), self.head)
