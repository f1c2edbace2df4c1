"""The engine of XLA: the same steps on every platform, on one device and on meshes.

A call of the compiled program runs the steps of a batch one after the other. A step gathers rows of both tables, takes
the gradients of its segments, and adds them to the rows; see `_steps` for its mathematics.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from .._core.table import Table, with_weight
from .._gradients.apply import apply_updates
from .._gradients.row_grad import row_grad
from .._heads.candidates import pieces
from ..sharding import shard, unshard
from ._corpus import Corpus
from ._engine import Initial, Options, fresh_vectors, kept, noise_weights
from ._parts import AXIS, Parts
from ._segments import batches, shape_of
from ._steps import Drawn, Plan, draw, plan_of, terms

# Added to curvatures, so that rows without pairs have a rate.
_FLAT = np.float32(1e-20)


class State(NamedTuple):
    """The state of training, which a step updates."""

    inputs: Table  # (rows, dim) float32, the vectors that are returned
    outputs: Table  # (rows, dim) float32, the vectors that they are multiplied with


class Batch(NamedTuple):
    """The segments for one call of the compiled program."""

    words: int
    tokens: Int32[np.ndarray, "steps segments length"]
    steps: int  # steps that are not all padding
    key: UInt32[np.ndarray, "2"]  # the data of a random key


class Xla:
    """Trains by XLA, on one device or on a mesh.

    Args:
      corpora: The parts of this process.
      parts: All parts.
      options: The options of the run.
    """

    name = "xla"

    def __init__(self, corpora: Sequence[Corpus], parts: Parts, options: Options):
        self._corpora, self._parts, self._options = corpora, parts, options
        counts = corpora[0].counts
        self._rows, self._kept = len(counts), kept(counts, options.sample)
        self._noise = parts.everywhere(jnp.asarray(pieces(noise_weights(counts))))
        self._plan = plan_of(options.model, options.window, options.negative)
        self._shape = shape_of(self._plan.length, float(counts @ self._kept), parts.number)

    def start(self, initial: Initial | None) -> State:
        """Make both tables; on a mesh, each device holds a part of the rows."""
        vectors = fresh_vectors(self._rows, self._options) if initial is None else initial
        return State(*(self._table(rows) for rows in vectors))

    def _table(self, rows: np.ndarray) -> Table:
        # Padding reads zeros.
        if self._parts.mesh is None:
            return Table(jnp.asarray(rows), out_of_range="zero")
        # Rows are sorted by frequency: with blocks of rows, the first device would have most of the work.
        return shard(rows, self._parts.mesh, AXIS, "rows-cyclic", out_of_range="zero")

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Cut an epoch into segments."""
        seed = self._options.seed
        found = batches(self._corpora, self._parts, self._kept, self._shape, seed, epoch)

        def keyed() -> Iterator[Batch]:
            for number, (words, tokens, steps) in enumerate(found):
                key = np.random.SeedSequence((seed, epoch, number)).generate_state(2)
                yield Batch(words, tokens, steps, key)

        return keyed()

    def run(self, state: State, batch: Batch, rates: tuple[float, float]) -> tuple[State, Float32[Array, "2"]]:
        """Run the compiled program."""
        tokens = self._parts.split(batch.tokens)
        return train(
            state, self._noise, tokens, np.int32(batch.steps), batch.key, np.asarray(rates, np.float32), self._plan
        )

    def vectors(self, state: State) -> Initial:
        """Copy the vectors; on a mesh, from all devices to this process."""
        inputs, outputs = (np.asarray(unshard(table).weight) for table in state)
        return inputs, outputs


@functools.partial(jax.jit, static_argnames="plan", donate_argnames="state")
def train(
    state: State,
    noise: UInt32[Array, " rows"],
    tokens: Int32[Array, "steps segments length"],
    number: Int32[Array, ""],
    key: UInt32[Array, "2"],
    rates: Float32[Array, "2"],
    plan: Plan,
) -> tuple[State, Float32[Array, "2"]]:
    """Run some steps.

    Args:
      state: Both tables.
      noise: The ends of the words' pieces, see `candidates.pieces`.
      tokens: The segments of each step.
      number: How many of the steps to run.
      key: The data of a random key.
      rates: The learning rate before the first step, and after the last one.
      plan: The options.

    Returns:
      Both tables; and the loss summed over pairs, with the number of pairs.
    """
    all_drawn = draw(plan, jax.random.wrap_key_data(key), noise, tokens)
    rows = state.inputs.rows

    def step(i: Array, carry: tuple[State, Any, Array]) -> tuple[State, Any, Array]:
        state, slots, loss = carry
        drawn = jax.tree.map(lambda x: x[i], all_drawn)
        rate = rates[0] + (rates[1] - rates[0]) * (i / jnp.maximum(number, 1)).astype(jnp.float32)
        words, targets = drawn.tokens, jnp.concatenate([drawn.tokens, drawn.noise], axis=1)
        descend = _descend if slots[0] is None else _descend_by_slots
        state, slots, step_loss = descend(plan, state, slots, words, targets, drawn, rate)
        return state, slots, loss + step_loss

    # One device of a CPU finds equal ids by slots, see `_base.distinct`. They mean nothing after the call.
    slots = tuple(table.storage.scratch(rows) for table in state)
    state, _, loss = jax.lax.fori_loop(0, number, step, (state, slots, jnp.zeros(2, jnp.float32)))
    return state, loss


def _descend_by_slots(
    plan: Plan, state: State, slots: Any, words: Array, targets: Array, drawn: Drawn, rate: Array
) -> tuple[State, Any, Array]:
    """Descend on one device: the rate of each row goes into its pairs, so that rows are scattered once."""
    last = np.int32(state.inputs.rows - 1)
    ids = jnp.minimum(words, last), jnp.minimum(targets, last)  # padding weighs nothing, so it may have any row
    x, t = (table.weight.at[at].get(mode="promise_in_bounds") for table, at in zip(state, ids, strict=True))
    found = terms(plan, x, t, drawn)
    new_slots, weights = [], []
    for table, at, of, curvature, of_slots in zip(
        state, ids, (found.of_inputs, found.of_outputs), found.curvatures, slots, strict=True
    ):
        of_slots, total = _summed_by_row(of_slots, at, curvature)
        move = of(jnp.minimum(rate, 1 / (total + _FLAT)))
        new_slots.append(of_slots)
        weights.append(table.weight.at[at].add(move, mode="promise_in_bounds"))
    tables = (with_weight(table, weight) for table, weight in zip(state, weights, strict=True))
    return State(*tables), tuple(new_slots), found.loss


def _summed_by_row(
    slots: Int32[Array, " rows"], ids: Int32[Array, "*batch"], values: Float32[Array, "*batch"]
) -> tuple[Int32[Array, " rows"], Float32[Array, "*batch"]]:
    """Sum values of equal ids by slots, see `_base.distinct.scratch`; each position gets the sum of its id."""
    flat = jnp.ravel(ids)
    slots = slots.at[flat].set(jnp.arange(flat.size, dtype=jnp.int32), mode="promise_in_bounds")
    owner = slots.at[flat].get(mode="promise_in_bounds")
    total = jnp.zeros(flat.size, values.dtype).at[owner].add(jnp.ravel(values), mode="promise_in_bounds")
    return slots, jnp.reshape(total.at[owner].get(mode="promise_in_bounds"), ids.shape)


def _descend(
    plan: Plan, state: State, slots: Any, words: Array, targets: Array, drawn: Drawn, rate: Array
) -> tuple[State, Any, Array]:
    """Descend by the methods of a storage: moves and curvatures of a row are summed where the row is."""
    ids = words, targets
    x, t = (table.storage.take(table.weight, at, 0) for table, at in zip(state, ids, strict=True))
    found = terms(plan, x, t, drawn)
    tables = []
    for table, at, of, curvature in zip(state, ids, (found.of_inputs, found.of_outputs), found.curvatures, strict=True):
        storage = table.storage
        flat = storage.flat(at, (at.size,))
        values = storage.flat(of(None), (at.size, *table.dim)), storage.flat(curvature, (at.size,))
        _, distinct, _ = storage.combine(None, flat, values, table.rows, table.dim)
        moves, total = distinct.values
        moves = jnp.minimum(rate, 1 / (total + _FLAT))[:, None] * moves
        update = row_grad(distinct.ids, moves, table.rows, at_owners=storage.owners_add)
        tables.append(apply_updates(table, update))
    return State(*tables), slots, found.loss
