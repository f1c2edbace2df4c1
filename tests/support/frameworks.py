"""One interface to the layers of all frameworks, each by its own calls."""

import brainstate
import equinox as eqx
import jax
from flax import nnx

import embax
import embax.equinox
import embax.nnx
from embax import Table


def rows_of(table):
    """The rows of a table in the order of their ids."""
    return table.storage.to_rows(table.weight)


class Functional:
    """Tables and functions, with which the layers have to agree; a layer is a Table here."""

    stores = False  # whether a call stores the rows that `max_norm` has clipped

    def make(self, weight, **rules):
        return Table(weight, **rules)

    def make_bag(self, weight, mode, **rules):
        return self.make(weight, **rules)

    def fresh(self, rows, dim, **rules):
        return Table.create(jax.random.key(0), rows, dim, **rules)

    def table(self, layer):
        return layer

    def read(self, layer, ids):
        return embax.lookup(layer, ids)

    def read_as(self, layer, ids, dtype):
        return embax.lookup(layer, ids, dtype)

    def read_bags(self, layer, mode, bags, weights=None):
        return embax.embedding_bag(layer, bags, weights, mode)

    def attend(self, layer, x, **options):
        return embax.attend(layer, x, **options)

    def renormalized(self, layer, ids):
        """The layer with these rows stored clipped."""
        return embax.renormalize(layer, ids)

    def call_each(self, functions, layers):
        """The result of each function for the layer of its name, all by one compiled program."""
        return self.jit(lambda layers: {name: fun(layers[name]) for name, fun in functions.items()})(layers)

    def gradient(self, layer, loss):
        """The gradient by the framework's own derivative."""
        return self.table(self.grad(loss)(layer)).weight

    def row_gradient(self, layer, loss, on_dense="error"):
        """The gradient by embax's derivative for the framework."""
        return self.table(embax.value_and_grad(loss, on_dense=on_dense)(layer)[1])

    def train(self, layer, tx, loss, batches, by_rows):
        """Update the layer once a batch by its gradient, held as rows or dense; return its rows."""
        grad = embax.grad if by_rows else self.grad

        def step(layer, ids, state):
            layer = self.renormalized(layer, ids)  # other layers do so as they are called
            updates, state = tx.update(grad(loss)(layer, ids), state, self.params(layer))
            return embax.apply_updates(layer, updates), state

        state = tx.init(self.params(layer))
        step = self.jit(step)
        for ids in batches:
            layer, state = step(layer, ids, state)
        return rows_of(self.table(layer))

    # What `train` and the derivatives differ in.
    def grad(self, loss):
        return jax.grad(loss)

    def params(self, layer):
        return layer

    # The framework's transformations, of a function of a layer and ids.
    def jit(self, fun):
        return jax.jit(fun)

    def vmap(self, fun):
        return jax.vmap(fun, (None, 0))

    def remat(self, fun):
        return jax.checkpoint(fun)

    def scan(self, fun):
        def step(layer, ids):
            return self.renormalized(layer, ids), fun(layer, ids)

        return lambda layer, ids: jax.lax.scan(step, layer, ids)[1]

    def jvp(self, layer, ids, tangent):
        tangents = jax.tree.map(lambda _: tangent, layer)
        return jax.jvp(lambda layer: self.read(layer, ids), (layer,), (tangents,))

    def jacfwd(self, layer, ids):
        return jax.jacfwd(lambda layer: self.read(layer, ids))(layer).weight


class Layer(Functional):
    """What the layers have in common."""

    def make(self, weight, **rules):
        return self.Embedding.from_table(Table(weight, **rules))

    def make_bag(self, weight, mode, **rules):
        return self.EmbeddingBag.from_table(Table(weight, **rules), mode=mode)

    def table(self, layer):
        return layer.table

    def read(self, layer, ids):
        return layer(ids)

    def read_as(self, layer, ids, dtype):
        return self.Embedding.from_table(layer.table, dtype=dtype)(ids)

    def read_bags(self, layer, mode, bags, weights=None):
        return layer(bags, per_sample_weights=weights)

    def attend(self, layer, x, **options):
        return layer.attend(x, **options)


class Brainstate(Layer):
    """A layer whose weight is a state, which functions see without being given it."""

    stores = True
    Embedding = embax.Embedding
    EmbeddingBag = embax.EmbeddingBag

    def fresh(self, rows, dim, **rules):
        return embax.Embedding(rows, dim, **rules)

    def renormalized(self, layer, ids):
        layer(ids)
        return layer

    def gradient(self, layer, loss):
        return brainstate.transform.grad(lambda: loss(layer), layer.weight)()

    def row_gradient(self, layer, loss, on_dense="error"):
        return embax.brainstate.grad(lambda: loss(layer), layer.weight, on_dense=on_dense)()

    def train(self, layer, tx, loss, batches, by_rows):
        weights = {"weight": layer.weight}
        optimizer = embax.brainstate.Optimizer(tx).register_trainable_weights(weights)
        grad = embax.brainstate.grad if by_rows else brainstate.transform.grad

        def step(ids):
            optimizer.update(grad(lambda ids: loss(layer, ids), weights)(ids))

        step = embax.brainstate.jit(step)
        for ids in batches:
            step(ids)
        return rows_of(layer.table)

    def jit(self, fun):
        return _of_arrays(brainstate.transform.jit, fun)

    def vmap(self, fun):
        return _of_arrays(brainstate.transform.vmap, fun)

    def remat(self, fun):
        return _of_arrays(brainstate.transform.remat, fun)

    def scan(self, fun):
        return lambda layer, ids: brainstate.transform.scan(lambda carry, ids: (carry, fun(layer, ids)), 0, ids)[1]

    def jvp(self, layer, ids, tangent):
        def read(weight):
            layer.weight.value = weight
            return layer(ids)

        return brainstate.transform.jvp(read, (layer.weight.value,), (tangent,))

    def jacfwd(self, layer, ids):
        return brainstate.transform.jacfwd(lambda: layer(ids), layer.weight)()


def _of_arrays(transform, fun):
    return lambda layer, *arrays: transform(lambda *arrays: fun(layer, *arrays))(*arrays)


class NNX(Layer):
    """A layer whose weight is a Param."""

    stores = True
    Embedding = embax.nnx.Embedding
    EmbeddingBag = embax.nnx.EmbeddingBag

    def fresh(self, rows, dim, **rules):
        return embax.nnx.Embedding(rows, dim, rngs=nnx.Rngs(0), **rules)

    def renormalized(self, layer, ids):
        layer(ids)
        return layer

    def gradient(self, layer, loss):
        return nnx.grad(loss)(layer)["embedding"].get_value()

    def row_gradient(self, layer, loss, on_dense="error"):
        return embax.nnx.value_and_grad(loss, on_dense=on_dense)(layer)[1]["embedding"].get_value()

    def train(self, layer, tx, loss, batches, by_rows):
        optimizer = embax.nnx.Optimizer(layer, tx)
        grad = embax.nnx.grad if by_rows else nnx.grad

        def step(layer, optimizer, ids):
            optimizer.update(layer, grad(loss)(layer, ids))

        step = nnx.jit(step)
        for ids in batches:
            step(layer, optimizer, ids)
        return rows_of(layer.table)

    def jit(self, fun):
        return nnx.jit(fun)

    def vmap(self, fun):
        return nnx.vmap(fun, in_axes=(None, 0))

    def remat(self, fun):
        return nnx.remat(fun)

    def scan(self, fun):
        step = nnx.scan(lambda layer, ids: (layer, fun(layer, ids)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return lambda layer, ids: step(layer, ids)[1]

    def jvp(self, layer, ids, tangent):
        tangents = jax.tree.map(lambda _: tangent, layer)
        return nnx.jvp(lambda layer: layer(ids), (layer,), (tangents,), graph=False)

    def jacfwd(self, layer, ids):  # of which NNX has none
        return jax.jacfwd(lambda layer: layer(ids))(layer).embedding.get_value()


class Equinox(Layer):
    """A module that holds a Table."""

    Embedding = embax.equinox.Embedding
    EmbeddingBag = embax.equinox.EmbeddingBag

    def fresh(self, rows, dim, **rules):
        return embax.equinox.Embedding(rows, dim, key=jax.random.key(0), **rules)

    def read_as(self, layer, ids, dtype):
        return layer(ids, dtype=dtype)

    def renormalized(self, layer, ids):
        return layer.renormalized(ids)

    def grad(self, loss):
        return eqx.filter_grad(loss)

    def params(self, layer):
        return eqx.filter(layer, eqx.is_inexact_array)

    def jit(self, fun):
        return eqx.filter_jit(fun)

    def vmap(self, fun):
        return eqx.filter_vmap(fun, in_axes=(None, 0))

    def remat(self, fun):
        return eqx.filter_checkpoint(fun)

    def jvp(self, layer, ids, tangent):
        tangents = jax.tree.map(lambda _: tangent, layer)
        return eqx.filter_jvp(lambda layer: layer(ids), (layer,), (tangents,))

    def jacfwd(self, layer, ids):
        return eqx.filter_jacfwd(lambda layer: layer(ids))(layer).weight


FUNCTIONAL = Functional()
LAYERS = {"brainstate": Brainstate(), "nnx": NNX(), "equinox": Equinox()}
ALL = {"functional": FUNCTIONAL, **LAYERS}
