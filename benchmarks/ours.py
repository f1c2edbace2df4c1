"""Ways to do the works of the benchmarks by embax, and by JAX alone; run by processes.py, with and without kernels.

A step looks up rows, and updates the table with a given gradient of the rows. It returns the rows, because a model
would use them, and its loss depends on them, as in a model.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from serve import Way, serve, timed
from workload import (
    LEARNING_RATE,
    LENGTH,
    Case,
    Tables,
    batches_of,
    batches_of_tables,
    gradient_of,
    gradient_of_tables,
)

import embax

# No step of a benchmark takes so many seconds, unless it moves a table to large pages; and how often it may.
MOVING, MOVES = 0.19, 100

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "SGD": lambda: embax.optim.sgd(LEARNING_RATE),
    "Adagrad": lambda: embax.optim.adagrad(LEARNING_RATE, 0.0, 1e-10),
    "Adam": lambda: embax.optim.adam(LEARNING_RATE),
    "row-wise Adagrad": lambda: embax.optim.rowwise_adagrad(LEARNING_RATE),
    "row-wise Adam": lambda: embax.optim.rowwise_adam(LEARNING_RATE),
}


@jax.custom_vjp
def first_number(rows: jax.Array, gradient: jax.Array) -> jax.Array:
    """A loss that depends on rows and costs nothing; the gradient of the rows is the one that is given."""
    return jnp.ravel(rows)[0]


first_number.defvjp(lambda rows, gradient: (jnp.ravel(rows)[0], gradient), lambda gradient, _: (gradient, None))


def _bag(table: embax.Table, ids: jax.Array) -> jax.Array:
    return embax.embedding_bag(table, jnp.reshape(ids, (-1, LENGTH)), mode="sum")


def _ragged(table: embax.Table, ids: jax.Array) -> jax.Array:
    offsets = jnp.arange(0, ids.size + 1, LENGTH, dtype=jnp.int32)
    return embax.embedding_bag(table, embax.Ragged(ids, offsets), mode="sum")


READS: dict[str, Callable[[embax.Table, jax.Array], jax.Array]] = {
    "lookup": embax.lookup,
    "bag": _bag,
    "ragged bag": _ragged,
    "weight[ids]": lambda table, ids: table.weight[ids],
    "weight[ids].sum(1)": lambda table, ids: table.weight[jnp.reshape(ids, (-1, LENGTH))].sum(1),
}


def build(work: str, case: Case | Tables) -> Way:
    """Make a way to do a work: one of READS, "eager " and one of them, or an optimizer's step.

    Steps are "Adam", "Adam, bags", "Adam, dense", and of many tables "Collection" or "one by one".
    """
    if isinstance(case, Tables):
        return _step_of_tables(case, stacked=work == "Collection")
    table = _table(case.rows, case.dim)
    ids = [jnp.asarray(batch) for batch in batches_of(case)]
    kind, _, read = work.rpartition("eager ")
    if read in READS:
        function = READS[read] if kind or work.startswith("eager") else jax.jit(READS[read])
        return _over(ids, functools.partial(function, table))
    optimizer, _, kind = work.partition(", ")
    bags = kind == "bags"
    function = READS["bag" if bags else "lookup"]

    def loss(table: embax.Table, ids: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = function(table, ids)
        return first_number(out, gradient), out

    gradient = jnp.asarray(gradient_of(case, LENGTH if bags else 1))
    if kind == "dense":
        return _training(optax.adam(LEARNING_RATE), table, loss, ids, gradient, jax.value_and_grad, _dense)
    return _training(OPTIMIZERS[optimizer](), table, loss, ids, gradient, embax.value_and_grad, embax.optim.step)


def _step_of_tables(case: Tables, stacked: bool) -> Way:
    """A step of row-wise Adagrad on tables that are stored as one, or one by one."""
    names = [f"table{i}" for i in range(case.tables)]
    tables = {name: _table(case.rows, case.dim) for name in names}

    def by_name(arrays: np.ndarray) -> dict[str, jax.Array]:
        return {name: jnp.asarray(array) for name, array in zip(names, arrays, strict=True)}

    def loss(params: Any, ids: dict[str, jax.Array], gradient: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
        if stacked:
            out = params(ids)
        else:
            out = {name: embax.embedding_bag(params[name], ids[name], mode="sum") for name in names}
        return jnp.asarray(sum(first_number(out[name], gradient[name]) for name in names)), out

    batch = [by_name(arrays[..., None]) for arrays in batches_of_tables(case)]
    tx, gradient = embax.optim.rowwise_adagrad(LEARNING_RATE), by_name(gradient_of_tables(case))
    if stacked:
        features = [embax.Feature(name, name, "sum") for name in names]
        collection = embax.Collection(tables, features)
        return _training(tx, collection, loss, batch, gradient, embax.value_and_grad, embax.optim.step)

    def of_each(
        _: Any, gradient: Any, state: Any, params: Any
    ) -> tuple[Any, Any]:  # one for all takes minutes to trace
        stepped = {name: embax.optim.step(tx, gradient[name], state[name], params[name]) for name in names}
        return {name: new for name, (new, _) in stepped.items()}, {name: after for name, (_, after) in stepped.items()}

    each = optax.GradientTransformation(lambda params: {name: tx.init(params[name]) for name in names}, tx.update)
    return _training(each, tables, loss, batch, gradient, embax.value_and_grad, of_each)


def _dense(tx: optax.GradientTransformation, gradient: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """The step of JAX and optax."""
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def _training(
    tx: optax.GradientTransformation,
    params: Any,
    loss: Callable[..., Any],
    batch: Sequence[Any],
    gradient: Any,
    value_and_grad: Callable[..., Any],
    step_of: Callable[..., tuple[Any, Any]],
) -> Way:
    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, ids: Any, gradient: Any) -> tuple[Any, Any, Any]:
        (_, out), of_params = value_and_grad(loss, has_aux=True)(params, ids, gradient)
        return *step_of(tx, of_params, state, params), out

    held = [params, jax.jit(tx.init)(params)]

    def run(ids: Any) -> Any:
        held[0], held[1], out = step(held[0], held[1], ids, gradient)
        return held, out

    return _over(batch, run)


def _table(rows: int, dim: int) -> embax.Table:
    return embax.Table(jnp.full((rows, dim), 0.01, jnp.float32))


def _over(batch: Sequence[Any], function: Callable[[Any], Any]) -> Way:
    """Run a function on one batch after the other: at first, once to compile, and until large tables are moved.

    A native call moves for 200 ms what there is left to move of a table to large pages.
    """
    run = timed(batch, lambda ids: jax.block_until_ready(function(ids)))
    tries = MOVES if embax.kernels.report().in_use else 0
    while tries and run() > MOVING:
        tries -= 1
    return run


class Programs:
    """Counts what XLA compiles."""

    def __init__(self):
        self.number = 0
        jax.monitoring.register_event_duration_secs_listener(self._count)

    def _count(self, event: str, *_: Any, **__: Any) -> None:
        self.number += event == "/jax/core/compile/backend_compile_duration"


def about() -> dict[str, Any]:
    """Versions, and the kernels."""
    kernels = embax.kernels.report()
    if kernels.in_use != (os.environ.get("EMBAX_KERNELS") != "0") and kernels.version:
        raise RuntimeError("EMBAX_KERNELS must decide about kernels.")
    return {"jax": jax.__version__, "embax": embax.__version__, "kernels": kernels.instruction_set}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    programs = Programs()
    serve(about(), build, lambda: programs.number)
