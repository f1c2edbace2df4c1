"""The engine of XLA: the same steps on every platform, on one device and on meshes.

A call of the compiled program runs the steps of a batch one after the other. A step gathers rows of both tables, takes
the gradients of its segments, and adds them to the rows; see `_steps` for its mathematics.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from ..._core.table import Table, with_weight
from ..._gradients.apply import apply_updates
from ..._gradients.row_grad import row_grad
from ..._heads import candidates
from ...sharding import shard, unshard
from .._input.corpus import Corpus
from .._input.pool import Pooling, moved, numbers, on_device, owners, padded, pooled, scratch_of
from .._input.release import release_memory
from .._parts import AXIS, Parts
from .._subwords import Pieces
from .engine import Known, Learned, Options, aligned_zeros, fill_inputs, fill_known, kept, noise_weights
from .segments import STEPS_A_CALL, batches, shape_of
from .steps import Drawn, Plan, draw, plan_of, terms

# Gives the rate of rows from their curvatures.
Limited = Callable[[Array], Array]
# Added to curvatures, so that rows without pairs have a rate.
_FLAT = np.float32(1e-20)


class State(NamedTuple):
    """The state of training, which a step updates."""

    inputs: Table  # (rows, dim) float32, the vectors that are returned, or their pieces
    outputs: Table  # (words, dim) float32, the vectors that they are multiplied with


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
      pieces: The sub-words, or None.
    """

    name = "xla"
    steps_a_batch = float(STEPS_A_CALL)

    def __init__(self, corpora: Sequence[Corpus], parts: Parts, options: Options, pieces: Pieces | None = None):
        self._corpora, self._parts, self._options = corpora, parts, options
        counts = corpora[0].counts
        self._kept, self._pieces = kept(counts, options.sample), pieces
        self._noise = parts.everywhere(jnp.asarray(candidates.pieces(noise_weights(counts))))
        self._on_cpu = _is_on_cpu(self._noise)
        self._plan = plan_of(options.model, options.window, options.negative)
        words = float(counts @ self._kept)
        self._shape = shape_of(self._plan.length, words, parts.number)
        self._pooling = None
        if pieces is not None:
            lengths = np.diff(pieces.starts)
            # Most steps handle their pieces in one round.
            in_a_step = self._shape.segments * parts.number * self._plan.length
            occurs = 1 - (1 - counts * self._kept / words) ** in_a_step
            width = -(-int(1.1 * float(lengths @ occurs)) // 256) * 256
            self._plan = self._plan._replace(longest=int(lengths.max()), width=max(width, 256))
            self._pooling = Pooling(*map(parts.everywhere, on_device(pieces)))

    def start(self, inputs: Known | None = None, outputs: Known | None = None) -> State:
        """Make both tables; on a mesh, each device holds a part of the rows."""
        words, dim = len(self._kept), self._options.dim
        rows = words if self._pieces is None else self._pieces.rows
        if self._parts.mesh is None and self._on_cpu:
            self._compile(rows, words)
        first, second = aligned_zeros((rows, dim)), aligned_zeros((words, dim))
        fill_inputs(first, self._options, inputs)
        fill_known(second, outputs)
        return State(self._table(first), self._table(second))

    def _compile(self, rows: int, words: int) -> None:
        """Compile the program before there are tables and batches, since the compiler takes much memory, too.

        It runs no step, on zeros that were never written, which take no memory.
        """
        state = State(*(self._table(aligned_zeros((number, self._options.dim))) for number in (rows, words)))
        nothing = Batch(0, np.full(self._shape, words, np.int32), 0, np.zeros(2, np.uint32))
        jax.block_until_ready(self._called(state, nothing, (0.0, 0.0)))
        release_memory()

    def _table(self, rows: np.ndarray) -> Table:
        # Padding reads zeros.
        if self._parts.mesh is None:  # a CPU takes an aligned array as it is
            return Table(jax.device_put(rows), out_of_range="zero")
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
        return self._called(state, batch, rates)

    def _called(self, state: State, batch: Batch, rates: tuple[float, float]) -> tuple[State, Float32[Array, "2"]]:
        tokens = self._parts.split(batch.tokens)
        given = tokens, np.int32(batch.steps), batch.key, np.asarray(rates, np.float32)
        program = train if self._on_cpu else train_elsewhere
        return program(state, self._noise, self._pooling, *given, self._plan)

    def vectors(self, state: State) -> Learned:
        """Copy the vectors; on a mesh, from all devices to this process."""
        inputs, outputs = (np.asarray(unshard(table).weight) for table in state)
        return inputs, outputs

    def finish(self, state: State) -> Learned:
        """Return the vectors; on a CPU, in the memory of the tables."""
        return self.vectors(state)


def _is_on_cpu(array: Array) -> bool:
    return all(device.platform == "cpu" for device in array.devices())


def _train(
    state: State,
    noise: UInt32[Array, " words"],
    pooling: Pooling | None,
    tokens: Int32[Array, "steps segments length"],
    number: Int32[Array, ""],
    key: UInt32[Array, "2"],
    rates: Float32[Array, "2"],
    plan: Plan,
) -> tuple[State, Float32[Array, "2"]]:
    """Run some steps.

    Args:
      state: Both tables.
      noise: The ends of the words' pieces of the range of random numbers, see `candidates.pieces`.
      pooling: The sub-words, or None.
      tokens: The segments of each step.
      number: How many of the steps to run.
      key: The data of a random key.
      rates: The learning rate before the first step, and after the last one.
      plan: The options.

    Returns:
      Both tables; and the loss summed over pairs, with the number of pairs.
    """
    all_drawn = draw(plan, jax.random.wrap_key_data(key), noise, tokens)

    def step(i: Array, carry: tuple[State, Any, Array]) -> tuple[State, Any, Array]:
        state, scratch, loss = carry
        drawn = jax.tree.map(lambda x: x[i], all_drawn)
        rate = rates[0] + (rates[1] - rates[0]) * (i / jnp.maximum(number, 1)).astype(jnp.float32)

        def limited(curvature: Array) -> Array:
            return jnp.minimum(rate, 1 / (curvature + _FLAT))

        descend = _descend if scratch[1] is None else _descend_by_slots
        state, scratch, step_loss = descend(plan, pooling, state, scratch, drawn, limited)
        return state, scratch, loss + step_loss

    # One CPU device finds equal ids by slots, see `_base.distinct`. Their contents are not used after the call.
    slots: list[Any] = [table.storage.scratch(table.rows) for table in state]
    if pooling is not None:
        places = tokens.shape[1] * tokens.shape[2]
        slots[0] = scratch_of(state.inputs.rows, state.outputs.rows, places, plan.longest, plan.width)
    state, _, loss = jax.lax.fori_loop(0, number, step, (state, tuple(slots), jnp.zeros(2, jnp.float32)))
    return state, loss


train_elsewhere = jax.jit(_train, static_argnames="plan", donate_argnames="state")
# A library computes the products of a step. For all else, LLVM's last optimisations save little time, but they take
# half of the compiler's time and a fifth of its memory.
train = jax.jit(
    _train,
    static_argnames="plan",
    donate_argnames="state",
    compiler_options={"xla_backend_optimization_level": 2},
)


def _descend_by_slots(
    plan: Plan, pooling: Pooling | None, state: State, scratch: Any, drawn: Drawn, limited: Limited
) -> tuple[State, Any, Array]:
    """Descend on one device: the rate of each row goes into its pairs, so that rows are scattered once."""
    last = np.int32(state.outputs.rows - 1)
    # Padding weighs nothing, so it may have any row.
    words = jnp.minimum(drawn.tokens, last)
    targets = jnp.concatenate([words, drawn.noise], axis=1)
    weight, outputs = state.inputs.weight, state.outputs.weight
    others: Any = scratch[0]
    if pooling is None:
        x = weight.at[words].get(mode="promise_in_bounds")
    else:
        x, others = pooled(pooling, weight, others, words, plan.width)
    found = terms(plan, x, outputs.at[targets].get(mode="promise_in_bounds"), drawn)
    of_words, of_targets = found.curvatures
    slots, total = _summed_by_row(scratch[1], targets, of_targets)
    outputs = outputs.at[targets].add(found.of_outputs(limited(total)), mode="promise_in_bounds")
    if pooling is None:
        others, total = _summed_by_row(others, words, of_words)
        weight = weight.at[words].add(found.of_inputs(limited(total)), mode="promise_in_bounds")
    else:
        weight, others = moved(weight, others, words, found.of_inputs(None), of_words, limited, plan.width)
    return State(with_weight(state.inputs, weight), with_weight(state.outputs, outputs)), (others, slots), found.loss


def _summed_by_row(
    slots: Int32[Array, " rows"], ids: Int32[Array, "*batch"], values: Float32[Array, "*batch"]
) -> tuple[Int32[Array, " rows"], Float32[Array, "*batch"]]:
    """Sum values of equal ids; each position gets the sum of its id."""
    slots, owner = owners(slots, jnp.ravel(ids))
    total = jnp.zeros(ids.size, values.dtype).at[owner].add(jnp.ravel(values), mode="promise_in_bounds")
    return slots, jnp.reshape(total.at[owner].get(mode="promise_in_bounds"), ids.shape)


def _descend(
    plan: Plan, pooling: Pooling | None, state: State, scratch: Any, drawn: Drawn, limited: Limited
) -> tuple[State, Any, Array]:
    """Descend by the methods of a storage: the owner of a row sums its updates and curvatures."""
    words, targets = drawn.tokens, jnp.concatenate([drawn.tokens, drawn.noise], axis=1)
    if pooling is not None:
        words = padded(pooling, words, plan.longest, state.inputs.rows)
    x, t = (table.storage.take(table.weight, ids, 0) for table, ids in zip(state, (words, targets), strict=True))
    if pooling is not None:
        x = jnp.sum(x, axis=2) / jnp.maximum(numbers(pooling, drawn.tokens), 1).astype(jnp.float32)[..., None]
    found = terms(plan, x, t, drawn)
    moves, of_words = found.of_inputs(None), found.curvatures[0]
    if pooling is not None:
        moves = jnp.broadcast_to(moves[:, :, None], (*words.shape, moves.shape[-1]))
        of_words = jnp.broadcast_to(of_words[:, :, None], words.shape)
    inputs = _moved_by_storage(state.inputs, words, moves, of_words, limited)
    outputs = _moved_by_storage(state.outputs, targets, found.of_outputs(None), found.curvatures[1], limited)
    return State(inputs, outputs), scratch, found.loss


def _moved_by_storage(
    table: Table,
    ids: Int32[Array, "*batch"],
    moves: Float32[Array, "*batch dim"],
    curvature: Float32[Array, "*batch"],
    limited: Limited,
) -> Table:
    storage = table.storage
    values = storage.flat(moves, (ids.size, *table.dim)), storage.flat(curvature, (ids.size,))
    _, distinct, _ = storage.combine(None, storage.flat(ids, (ids.size,)), values, table.rows, table.dim)
    moves, total = distinct.values
    update = row_grad(distinct.ids, limited(total)[:, None] * moves, table.rows, at_owners=storage.owners_add)
    return apply_updates(table, update)
