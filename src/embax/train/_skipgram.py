"""Skip-gram with negative sampling: learn word vectors from a corpus, by a jitted step over two tables.

For the sequence "the king holds the crown", the centre "holds" with one word on either side gives the pairs (king,
holds) and (the, holds). With five noise words, shared by both pairs, the step raises the product of each pair's two
vectors, and lowers the products of "king" and "the" with the noise words.

A step sums the gradients of up to 1,024 centres, all at the same weights. A frequent word would move too far: if "the"
occurs in 300 pairs of a step, at a rate of 0.025 it would move by 300 x 0.025 = 7.5 times its mean gradient. So a row
moves at most 0.8 times its mean gradient, which limits words in more than 32 pairs of a step.
"""

import functools
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, DTypeLike, Float32, Int32, Int64, Key, Shaped, UInt32

from .._base import check as _check
from .._base import distinct as _dedupe
from .._core.lookup import lookup
from .._core.table import Table
from .._gradients.apply import apply_updates
from .._gradients.row_grad import RowGrad, row_grad
from .._gradients.value_and_grad import value_and_grad
from .._heads.candidates import draw_pieces, pieces
from ..sharding import unshard
from ..vectors import Vectors
from ._corpus import encode
from ._parts import AXIS, WHOLE, Parts, parts_of
from ._resume import Checkpoints, fingerprint
from ._windows import STEPS_A_CALL, batches

# The most that a row moves in a step, in units of its mean gradient. The logistic loss has a curvature of at most
# |row|^2 / 4, and rows stay shorter than about 3, so 0.8 is below the limit of stability, 2 / curvature = 0.89.
_LARGEST_MOVE = 0.8
# The learning rate falls to this fraction of itself, as in word2vec.c.
_LAST_RATE = 1e-4


class Progress(NamedTuple):
    """The progress of training."""

    epoch: int  # the current epoch, from 1
    epochs: int
    words: int  # words so far in all epochs, before subsampling
    total_words: int  # words of all epochs
    loss: Array  # () float32, in nats for each pair; reading it waits for the device
    seconds: float  # since the first step began, compilation included
    words_before: int = 0  # words of the earlier run that this one resumes

    @property
    def words_per_second(self) -> float:
        """The mean speed so far, in words a second."""
        return (self.words - self.words_before) / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """The remaining time, at the mean speed so far."""
        return (self.total_words - self.words) / max(self.words_per_second, 1e-9)


class State(NamedTuple):
    """The state of training, which a step updates."""

    inputs: Table  # (rows, dim) float32, the vectors that are returned
    outputs: Table  # (rows, dim) float32, the vectors that they are multiplied with
    key: Key[Array, ""]  # draws the negatives
    slots: tuple[_dedupe.Slots, _dedupe.Slots]  # int32 (rows,), scratch for summing gradients of a row, or None


def skipgram(
    sequences: Iterable[Iterable[str]],
    *,
    dim: int = 100,
    window: int = 5,
    negative: int = 5,
    epochs: int = 5,
    min_count: int = 5,
    sample: float = 1e-3,
    learning_rate: float = 0.025,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10_000,
) -> Vectors:
    """Learn word vectors by skip-gram with negative sampling.

    `loss = -sum_(centre, context) [log s(v_context . u_centre) + sum_k log s(-v_context . u_noise_k)]`, where `s` is
    the logistic function and `v` are the vectors that are returned.

    The words of a window share the noise words of their centre (Ji et al.). A step descends the summed gradient of up
    to 1024 centres. This would diverge for rows that occur in hundreds of them, so no row moves by more than 0.8 times
    its mean gradient. The same seed gives the same vectors on the same machine.

    On a mesh, each device holds its part of both tables, and learns from its part of the corpus: every `n`-th sequence.
    With several processes, each of them calls this function with the same arguments and iterates over all sequences,
    but reads and keeps only the sequences of its own devices; all processes return the same vectors. The vectors depend
    on the number of devices, not on the number of processes. `embax.train.paragraphs` yields sequences that take no
    work until they are read.

    Args:
      sequences: The words of each sequence, such as from `embax.train.tokenize`; iterated once. A window never reaches
        into another sequence.
      dim: The size of a vector.
      window: The most words on either side of a centre that are its context; each centre draws its own width up to it.
      negative: The number of noise words for each centre, drawn by the 0.75th power of their frequency.
      epochs: The number of passes over the corpus.
      min_count: Words that occur less often are removed.
      sample: Words whose share of the text is larger are dropped at random, more often the more frequent they are; in
        [0, 1], and 0 keeps all.
      learning_rate: The initial learning rate, as in word2vec: the factor of the gradient of one pair. It falls
        linearly to a ten-thousandth of itself. In (0, 1].
      seed: The seed of all random numbers, 0 or more.
      progress: Called after every few steps. It need not read `Progress.loss` each time.
      mesh: A mesh of all devices to use. Default: none, only the default device.
      checkpoint: A directory that all processes can access, in which the run is saved at intervals. If it holds a
        checkpoint of the same run, with the same arguments and number of devices, the run is resumed, with the same
        result as without the interruption. Default: none.
      checkpoint_every: The number of steps between checkpoints, rounded up to a multiple of 16. An epoch has about 512
        steps; a corpus of more than 512 x 1024 words has one step for each 1024 words.

    Returns:
      The vectors, by falling count and then by spelling.

    Raises:
      CorpusError: If no word occurs `min_count` times; a ValueError.
      CheckpointError: If the directory holds checkpoints of another run, or damaged ones; a ValueError.
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is outside its range.
      ImportError: With `checkpoint`, if Orbax is not installed.

    Example:
      >>> import embax.train
      >>> text = "the king holds the crown. the queen wears the crown. the dog eats the bone. " * 20
      >>> embax.train.skipgram(embax.train.tokenize([text]), dim=8, epochs=1)
      Vectors(9 tokens, dim=8)

    References:
      Mikolov et al., Distributed representations of words and phrases and their compositionality, 2013,
      https://arxiv.org/abs/1310.4546, equations 4 and 5.
      Ji et al., Parallelizing word2vec in shared and distributed memory, 2016, https://arxiv.org/abs/1604.04661.
    """
    call = "embax.train.skipgram"
    sizes = {"dim": dim, "window": window, "negative": negative, "epochs": epochs, "min_count": min_count}
    sizes |= {"checkpoint_every": checkpoint_every}
    dim, window, negative, epochs, min_count, checkpoint_every = (
        _at_least_one(f"{call}({name}=...)", value) for name, value in sizes.items()
    )
    learning_rate = _at_most_one(f"{call}(learning_rate=...)", learning_rate)
    # 0 means no subsampling: no frequency is above infinity.
    sample = _at_most_one(f"{call}(sample=...)", sample) if sample != 0 else math.inf
    seed = _check.size(f"{call}(seed=...)", seed)
    parts = parts_of(call, mesh)
    corpora = encode(sequences, min_count, parts)
    tokens, counts = corpora[0].tokens, corpora[0].counts

    rng = np.random.default_rng(seed)
    state = _start(jax.random.key(int(rng.integers(2**31))), len(tokens), dim, parts)
    noise = parts.everywhere(_noise(counts))
    streams = [rng] if mesh is None else rng.spawn(parts.number)
    rngs = [streams[i] for i in parts.own]
    total = epochs * int(counts.sum())
    saved, calls = None, 0
    if checkpoint is not None:
        options = sizes | {"learning_rate": learning_rate, "sample": sample, "seed": seed, "mesh": mesh is not None}
        del options["checkpoint_every"]
        every = -(-checkpoint_every // STEPS_A_CALL)
        saved = Checkpoints(checkpoint, every, fingerprint(corpora, parts, options), parts)
        kept, calls = saved.restore(_without_scratch(state))
        state = kept._replace(key=parts.everywhere(kept.key), slots=state.slots)
    began, words_before, loss_before = time.monotonic(), None, None
    for windows in batches(corpora, parts, window, epochs, sample, rngs, skip=calls):
        words_before = windows.words_before if words_before is None else words_before
        rate = np.float32(learning_rate * max(_LAST_RATE, 1 - windows.words_before / total))
        centres, contexts = parts.split(windows.centres), parts.split(windows.contexts)
        state, loss = _train(state, noise, centres, contexts, rate, negative)
        calls += 1
        # Prepare only one call while the one before it runs: more would pile up in memory.
        jax.block_until_ready(loss_before)
        loss_before = loss
        if saved is not None:
            saved.save(_without_scratch(state), calls)
        if progress is not None:
            seconds = time.monotonic() - began
            progress(Progress(windows.epoch, epochs, windows.words, total, loss, seconds, words_before))
    return Vectors(tokens, np.asarray(unshard(state.inputs).weight), counts)


@functools.partial(jax.jit, static_argnames="negative", donate_argnames="state")
def _train(
    state: State,
    noise: UInt32[Array, " rows"],
    centres: Int32[Array, "steps batch"],
    contexts: Int32[Array, "steps batch slots"],
    rate: Float32[Array, ""],
    negative: int,
) -> tuple[State, Float32[Array, ""]]:
    """Run the steps of one call; returns the state and their mean loss."""

    def step(state: State, batch: tuple[Array, Array]) -> tuple[State, tuple[Array, Array]]:
        key, key_now = jax.random.split(state.key)
        targets = _targets(key_now, noise, batch[0], negative)
        loss, gradient = value_and_grad(_loss)((state.inputs, state.outputs), targets, batch[1])
        words = _exists(batch[1], state.inputs)
        pairs = jnp.sum(words, axis=1)
        uses = words, jnp.broadcast_to(pairs[:, None], targets.shape)
        inputs, slots = _descend(state.inputs, gradient[0], uses[0], rate, state.slots[0])
        outputs, more_slots = _descend(state.outputs, gradient[1], uses[1], rate, state.slots[1])
        return State(inputs, outputs, key, (slots, more_slots)), (loss, jnp.sum(pairs))

    state, (losses, pairs) = jax.lax.scan(step, state, (centres, contexts))
    return state, jnp.sum(losses) / jnp.maximum(jnp.sum(pairs), 1).astype(jnp.float32)


def _loss(
    tables: tuple[Table, Table], targets: Int32[Array, "batch targets"], contexts: Int32[Array, "batch slots"]
) -> Float32[Array, ""]:
    """Sum `-log s(v . u)` over pairs with the centre, the first target, and `-log s(-v . u)` over pairs with noise."""
    inputs, outputs = tables
    logits = jnp.einsum("bsd,btd->bst", lookup(inputs, contexts), lookup(outputs, targets))
    # 1 for the centre, -1 for noise.
    sign = jnp.where(jnp.arange(targets.shape[1]) == 0, jnp.float32(1), jnp.float32(-1))
    terms = -jax.nn.log_sigmoid(sign[None, None, :] * logits)
    real = _exists(contexts, inputs)[:, :, None] & _exists(targets, outputs)[:, None, :]
    return jnp.sum(jnp.where(real, terms, jnp.float32(0)))


def _targets(
    key: Key[Array, ""], noise: UInt32[Array, " rows"], centres: Int32[Array, " batch"], negative: int
) -> Int32[Array, "batch targets"]:
    """Append noise words to each centre; a noise word that equals the centre becomes the sentinel."""
    rows = noise.shape[0]
    words = draw_pieces(key, noise, (centres.shape[0], negative))
    words = jnp.where((words == centres[:, None]) | (centres[:, None] == rows), jnp.int32(rows), words)
    return jnp.concatenate([centres[:, None], words], axis=1)


def _descend(
    table: Table,
    gradient: RowGrad,
    uses: Shaped[Array, "batch slots"],
    rate: Float32[Array, ""],
    slots: _dedupe.Slots,
) -> tuple[Table, _dedupe.Slots]:
    """Take a step down the gradient, limited for rows that were used often."""
    storage, uses = table.storage, jnp.ravel(uses).astype(jnp.float32)
    values = gradient.values, storage.joined([uses], 0)  # laid out like the gradient's ids
    slots, distinct, _ = storage.combine(slots, gradient.ids, values, table.rows, table.dim)
    summed, total = distinct.values
    rates = jnp.minimum(rate, _LARGEST_MOVE / jnp.maximum(total, 1))
    update = row_grad(distinct.ids, -rates[:, None] * summed, table.rows, at_owners=storage.owners_add)
    return apply_updates(table, update), slots


def _exists(ids: Int32[Array, "*batch"], table: Table) -> Bool[Array, "*batch"]:
    """Which ids are rows, not the sentinel."""
    return ids < table.rows


def _start(key: Key[Array, ""], rows: int, dim: int, parts: Parts = WHOLE) -> State:
    """The initial state, as in word2vec: small random inputs, outputs of zero."""
    key_inputs, key = jax.random.split(key)

    def small(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        return jax.random.uniform(key, shape, dtype, -0.5 / dim, 0.5 / dim)

    # The sentinel reads zero and has no gradient, so only the loss has to mask it.
    rules: dict[str, Any] = {"out_of_range": "zero"}
    if parts.mesh is None:
        inputs = Table.create(key_inputs, rows, dim, init=small, **rules)
        outputs = Table(jnp.zeros((rows, dim), jnp.float32), **rules)
        return State(inputs, outputs, key, (_dedupe.scratch(rows), _dedupe.scratch(rows)))
    # Rows are sorted by frequency: with blocks of rows, the first device would have most of the work.
    rules |= {"mesh": parts.mesh, "axis": AXIS, "layout": "rows-cyclic"}
    inputs = Table.create(key_inputs, rows, dim, init=small, **rules)
    outputs = Table.create(key_inputs, rows, dim, init=jax.nn.initializers.zeros, **rules)
    return State(inputs, outputs, parts.everywhere(key), (None, None))


def _without_scratch(state: State) -> State:
    return state._replace(slots=(None, None))


def _noise(counts: Int64[np.ndarray, " rows"]) -> UInt32[Array, " rows"]:
    """The distribution of noise words, proportional to the 0.75th power of their counts."""
    return jnp.asarray(pieces(counts**0.75))


def _at_least_one(argument: str, value: object) -> int:
    number = _check.integer(argument, value)
    if not 1 <= number < 2**31:
        raise ValueError(f"`{argument}` must be at least 1 and below 2**31, got {number}. Pass a number between them.")
    return number


def _at_most_one(argument: str, value: object) -> float:
    number = _check.positive(argument, value)
    if number > 1:
        raise ValueError(f"`{argument}` must be at most 1, got {number}. Pass a number in (0, 1].")
    return number
