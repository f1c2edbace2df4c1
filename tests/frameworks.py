"""One interface to the layers of all frameworks, each by its own calls, and the one table of cases that all run."""

from typing import Any, NamedTuple

import brainstate
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from cases import IDS, RULES, WEIGHT, cotangent
from flax import nnx

import embax
import embax.equinox
import embax.nnx
from embax import Table


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

    def gradient(self, layer, loss):
        """The gradient by the framework's own derivative."""
        return self.table(self.grad(loss)(layer)).weight

    def row_gradient(self, layer, loss, on_dense="error"):
        """The gradient by embax's derivative for the framework."""
        return self.table(embax.value_and_grad(loss, on_dense=on_dense)(layer)[1])

    def train(self, layer, tx, loss, batches, by_rows):
        """Update the layer once a batch by its gradient, held as rows or dense; return its weight."""
        grad = embax.grad if by_rows else self.grad

        def step(layer, ids, state):
            layer = self.renormalized(layer, ids)  # other layers do so as they are called
            updates, state = tx.update(grad(loss)(layer, ids), state, self.params(layer))
            return embax.apply_updates(layer, updates), state

        state = tx.init(self.params(layer))
        step = self.jit(step)
        for ids in batches:
            layer, state = step(layer, ids, state)
        return self.table(layer).weight

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
        return layer.weight.value

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
        return layer.embedding.get_value()

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


class Case(NamedTuple):
    """Ids to be read from a weight by rules."""

    ids: Any = IDS["matrix"]
    rules: dict[str, Any] = {}  # noqa: RUF012 (nobody writes to it)
    weight: Any = WEIGHT
    cotangent: Any = None  # of the rows that are read; drawn where there is none
    traced: bool = False  # whether the ids are unknown when the layer is called

    @property
    def cotangents(self):
        """The cotangent in the dtype of the weight."""
        values = cotangent(self.ids, self.weight) if self.cotangent is None else self.cotangent
        return values.astype(self.weight.dtype)

    def run(self, framework, fun, *arrays):
        """Call a function of a layer, ids and arrays; return the layer, too, as the call leaves it."""
        layer = framework.make(self.weight, **self.rules)
        return layer, (framework.jit(fun) if self.traced else fun)(layer, self.ids, *arrays)


POLICIES = "error", "clip", "nan", "zero"
# Few shapes, so that one compiled program serves many cases.
TALL = np.random.default_rng(3).normal(size=(200, 3)).astype(np.float32)
SIGNED, UNSIGNED = np.array([127, -1, -128]), np.array([199, 0, 128])
BAD_IDS = np.array([[0, 7, -8, 6], [7, 2**31 - 1, -(2**31), -7]])
FEW_BAD_IDS = np.array([0, -1, 1, -2])


def _not_finite(bad):
    """A cotangent that is bad where IDS["negative"] names the last row."""
    is_last = np.isin(IDS["negative"], [-1, 6])[:, None]
    return np.where(is_last, bad, np.ones((6, 3))).astype(np.float32)


CASES = {
    **{f"rules_{name}": Case(rules=rules) for name, rules in RULES.items()},
    **{f"ids_{name}": Case(IDS[name], RULES["all"]) for name in ("scalar", "negative", "empty", "empty_matrix")},
    "int": Case(-2, RULES["all"]),
    "numpy_scalar": Case(np.int16(-2), RULES["all"]),
    "list": Case(IDS["matrix"].tolist(), RULES["all"]),
    "list_of_nothing": Case([], RULES["all"]),
    "list_of_lists_of_nothing": Case([[], []], RULES["all"]),
    "jax": Case(jnp.asarray(IDS["matrix"]), RULES["all"]),
    "jax_scalar": Case(jnp.asarray(2), RULES["all"]),
    "jax_empty": Case(jnp.zeros((2, 0), jnp.int32), RULES["all"]),
    **{dtype: Case(SIGNED.astype(dtype), weight=TALL) for dtype in ("int8", "int16", "int64")},
    **{dtype: Case(UNSIGNED.astype(dtype), weight=TALL) for dtype in ("uint8", "uint16", "uint32", "uint64")},
    "int8_jax": Case(jnp.asarray(SIGNED, jnp.int8), weight=TALL),
    "uint8_jax": Case(jnp.asarray(UNSIGNED, jnp.uint8), weight=TALL),
    "int8_traced": Case(SIGNED.astype("int8"), weight=TALL, traced=True),
    "uint8_traced": Case(UNSIGNED.astype("uint8"), weight=TALL, traced=True),
    **{f"bad_{policy}": Case(BAD_IDS, {"out_of_range": policy}) for policy in POLICIES[1:]},
    **{f"bad_{policy}_all": Case(BAD_IDS, {**RULES["all"], "out_of_range": policy}) for policy in POLICIES[1:]},
    **{f"bad_{policy}_traced": Case(BAD_IDS, {"out_of_range": policy}, traced=True) for policy in POLICIES},
    "bad_all_traced": Case(BAD_IDS, RULES["all"], traced=True),
    "bad_nan_cotangent": Case(BAD_IDS[0, 1], {"out_of_range": "nan"}, cotangent=np.full(3, np.nan, np.float32)),
    **{f"one_row_{policy}": Case(FEW_BAD_IDS, {"out_of_range": policy}, WEIGHT[:1]) for policy in POLICIES[1:]},
    "one_row_traced": Case(FEW_BAD_IDS, {}, WEIGHT[:1], traced=True),
    **{f"no_rows_{policy}": Case(FEW_BAD_IDS, {"out_of_range": policy}, WEIGHT[:0]) for policy in ("nan", "zero")},
    "no_rows_traced": Case(FEW_BAD_IDS, {}, WEIGHT[:0], traced=True),
    "no_rows_no_ids": Case([], {"max_norm": 1.0, "scale_grad_by_freq": True, "out_of_range": "clip"}, WEIGHT[:0]),
    "no_width": Case(rules=RULES["all"], weight=WEIGHT[:, :0]),
    "more_axes": Case(rules=RULES["all"], weight=WEIGHT.reshape(7, 3, 1)),
    "padding_nan": Case(IDS["negative"], {"padding_idx": -1}, cotangent=_not_finite(np.nan)),
    "padding_inf": Case(IDS["negative"], {"padding_idx": -1}, cotangent=_not_finite(np.inf)),
    "padding_nan_all": Case(IDS["negative"], {**RULES["all"], "padding_idx": 6}, cotangent=_not_finite(np.nan)),
    "freeze_nan": Case(rules=RULES["freeze"], cotangent=np.full((2, 4, 3), np.nan, np.float32)),
    "bfloat16": Case(rules=RULES["all"], weight=jnp.asarray(WEIGHT, jnp.bfloat16)),
    "float16": Case(rules=RULES["all"], weight=jnp.asarray(WEIGHT, jnp.float16)),
}
INTEGERS = np.arange(21).reshape(7, 3)
INTEGER_CASES = {
    "integers": Case(rules={"padding_idx": 2}, weight=INTEGERS),
    **{f"integers_{policy}": Case(BAD_IDS, {"out_of_range": policy}, INTEGERS, traced=True) for policy in POLICIES},
}
