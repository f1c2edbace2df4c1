"""Word vectors by word2vec: skip-gram and CBOW with negative sampling."""

import functools
import math
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32

from .._base.limits import MAX_VOCABULARY
from ..vectors import Vectors
from . import _initial
from ._arguments import Arguments, EngineName, checked
from ._engines import native as _native
from ._engines.engine import Engine, Learned, Model, Options, kept, noise_weights
from ._engines.xla import Xla
from ._held_out import EVERY, HeldOut, draw_held_out
from ._input.corpus import Corpus, CorpusError, encode
from ._input.release import release_memory
from ._loop import Epoch, Progress, Run, train
from ._parts import Parts, parts_of
from ._resume import Checkpoints, fingerprint
from ._subwords import InputRows, NgramOptions, Pieces, finished, pieces_of


def skipgram(
    sequences: Iterable[Iterable[str | int]],
    *,
    dim: int | None = None,
    window: int = 5,
    negative: int = 5,
    epochs: int = 5,
    min_count: int = 5,
    sample: float = 1e-3,
    learning_rate: float = 0.025,
    seed: int = 0,
    initial: Vectors | None = None,
    initial_second: Vectors | None = None,
    subwords: bool = False,
    ngram_lengths: tuple[int, int] = (3, 6),
    buckets: int = 2_000_000,
    engine: EngineName = "auto",
    threads: int = 1,
    max_vocabulary: int = MAX_VOCABULARY,
    held_out: bool = False,
    keep_second: Callable[[Vectors], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
    after_epoch: Callable[[Epoch], object] | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10_000,
) -> Vectors:
    """Learn word vectors by skip-gram with negative sampling.

    `loss = -sum_(centre, context) [log s(v_context . u_centre) + sum_k log s(-v_context . u_noise_k)]`, where `s` is
    the logistic function and `v` are the vectors that are returned.

    The XLA engine cuts the text into segments, and draws noise words for each of them (Ji et al.). Its weights are the
    expected values of word2vec's random widths and noise. A step sums the gradients of up to 4096 words; to keep this
    stable, no row moves further than to where its loss is least, by Newton's estimate. The native engine takes one
    window after the other. The same seed gives the same vectors on the same machine, with the same engine.

    On a mesh, each device holds its part of both tables, and learns from its part of the corpus: every `n`-th sequence.
    With several processes, each of them calls this function with the same arguments and iterates over all sequences,
    but reads and keeps only the sequences of its own devices; all processes return the same vectors. The vectors depend
    on the number of devices, not on the number of processes. `embax.train.paragraphs` yields sequences that take no
    work until they are read.

    Args:
      sequences: The words of each sequence, such as from `embax.train.read_sequences`; iterated once. Integer ids stand
        for their decimal spelling. A window never reaches into another sequence.
      dim: The size of a vector. Default: that of `initial`, or 100.
      window: The most words on either side of a centre that are its context. A word at the distance `k` counts
        `(window + 1 - k) / window`, as often as word2vec's random widths reach it.
      negative: The number of noise words for each pair, drawn by the 0.75th power of their frequency.
      epochs: The number of passes over the corpus.
      min_count: Words that occur less often are removed.
      sample: Words whose share of the text is larger are dropped at random, frequent words more often; in [0, 1], and 0
        keeps all.
      learning_rate: The initial learning rate, as in word2vec: the factor of the gradient of one pair. It falls
        linearly to a ten-thousandth of itself. In (0, 1].
      seed: The seed of all random numbers, 0 or more.
      initial: Vectors to continue from, with new text. Known words begin at their vectors, also those that occur less
        than `min_count` times now; other words begin with random ones. Words that do not occur now keep their vectors,
        and counts are summed. Default: none.
      initial_second: With `initial`, the second table (the vectors `u`) of the run that made it, from `keep_second`.
        Default: the second table begins at zero, since files of vectors do not have it, and is learned anew first.
      subwords: Whether the vector of a word is the mean of a vector of its own and the vectors of its n-grams
        (Bojanowski et al.). The result then has vectors for unknown words, too; safetensors and models of fastText
        keep them. With `initial`, that must have sub-words with the same options, and n-grams begin at their vectors.
      ngram_lengths: With `subwords`, the lengths of the shortest and the longest n-grams, in characters; "<" and ">"
        around a word count.
      buckets: With `subwords`, the number of rows for n-grams, which are chosen by hashes, as in fastText. Memory
        follows the n-grams that occur, except in the file.
      engine: `"native"`, the kernel of `embax-kernels` for one process on a CPU; `"xla"`, for every platform and
        meshes; `"auto"`, the native one where it is possible. The vectors differ between engines, not their quality.
      threads: The number of threads of the native engine. More than one change the tables at the same time, and the
        vectors differ from run to run (Recht et al.).
      max_vocabulary: The most words to keep. Whenever more are counted, the least frequent quarter is dropped; on a
        mesh, each device counts the words of its part.
      held_out: Hold out every 20th sequence, which is not trained on. `Epoch.held_out` is the loss on up to 60,000
        pairs of them, each with five noise words that stay the same; for CBOW, on centres and their windows.
      keep_second: Called with the second table at the end, as Vectors, for a later run to continue from.
      progress: Called after every few steps. It need not read `Progress.loss` each time. If it returns True, training
        ends, and the vectors of this moment are returned; with `checkpoint`, the run can be resumed from there.
      after_epoch: Called after each epoch with its number and the vectors of this moment, whose weight may be
        read-only. If it returns True, training ends.
      mesh: A mesh of all devices to use. Default: none, only the default device.
      checkpoint: A directory that all processes can access, in which the run is saved at intervals. If it holds a
        checkpoint of the same run, with the same arguments, engine and number of devices, the run is resumed, with the
        same result as without the interruption. Default: none.
      checkpoint_every: The number of steps between checkpoints, with every engine. An epoch has 500 to 1000 steps; a
        corpus of which subsampling leaves more than 4 million words has one for each 4096 of them. It is rounded up to
        calls of the engine: 32 steps of the XLA engine, or up to 131,072 words of the native one.

    Returns:
      The vectors, by falling count and then by spelling. Their `metadata` name the model and the engine.

    Raises:
      CorpusError: If no word occurs `min_count` times; a ValueError.
      CheckpointError: If the directory holds checkpoints of another run, or damaged ones; a ValueError.
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is outside its range, or the engine cannot run here.
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
      Bojanowski et al., Enriching word vectors with subword information, 2017, https://arxiv.org/abs/1607.04606,
      section 3.2.
      Recht et al., Hogwild: a lock-free approach to parallelizing stochastic gradient descent, 2011,
      https://arxiv.org/abs/1106.5730.
    """
    arguments = Arguments(
        dim=dim,
        window=window,
        negative=negative,
        epochs=epochs,
        min_count=min_count,
        sample=sample,
        learning_rate=learning_rate,
        seed=seed,
        initial=initial,
        initial_second=initial_second,
        subwords=subwords,
        ngram_lengths=ngram_lengths,
        buckets=buckets,
        engine=engine,
        threads=threads,
        max_vocabulary=max_vocabulary,
        held_out=held_out,
        keep_second=keep_second,
        progress=progress,
        after_epoch=after_epoch,
        mesh=mesh,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )
    return _learned("skipgram", sequences, arguments)


def cbow(
    sequences: Iterable[Iterable[str | int]],
    *,
    dim: int | None = None,
    window: int = 5,
    negative: int = 5,
    epochs: int = 5,
    min_count: int = 5,
    sample: float = 1e-3,
    learning_rate: float = 0.025,
    seed: int = 0,
    initial: Vectors | None = None,
    initial_second: Vectors | None = None,
    subwords: bool = False,
    ngram_lengths: tuple[int, int] = (3, 6),
    buckets: int = 2_000_000,
    engine: EngineName = "auto",
    threads: int = 1,
    max_vocabulary: int = MAX_VOCABULARY,
    held_out: bool = False,
    keep_second: Callable[[Vectors], object] | None = None,
    progress: Callable[[Progress], object] | None = None,
    after_epoch: Callable[[Epoch], object] | None = None,
    mesh: Mesh | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 10_000,
) -> Vectors:
    """Learn word vectors by CBOW, the continuous bag of words, with negative sampling.

    `loss = -sum_centre [log s(mean . u_centre) + sum_k log s(-mean . u_noise_k)]`, where `mean` is the mean of the
    vectors `v` of the centre's context, whose width is drawn from 1 to `window`. Each of them gets the whole gradient
    of the mean, as in word2vec.c. CBOW is several times as fast as skip-gram with the native engine, and learns less of
    rare words.

    Args:
      sequences: See `skipgram`, as for all arguments.
      dim: The size of a vector. Default: that of `initial`, or 100.
      window: The most words on either side of a centre that are its context.
      negative: The number of noise words for each centre.
      epochs: The number of passes over the corpus.
      min_count: Words that occur less often are removed.
      sample: Words whose share of the text is larger are dropped at random.
      learning_rate: The initial learning rate.
      seed: The seed of all random numbers.
      initial: Vectors to continue from.
      initial_second: The second table of the run that made `initial`.
      subwords: Whether the vector of a word is the mean of a vector of its own and the vectors of its n-grams.
      ngram_lengths: The lengths of the shortest and the longest n-grams.
      buckets: The number of rows for n-grams.
      engine: The engine.
      threads: The number of threads of the native engine.
      max_vocabulary: The most words to keep.
      held_out: Hold out every 20th sequence.
      keep_second: Called with the second table at the end.
      progress: Called after every few steps.
      after_epoch: Called after each epoch.
      mesh: A mesh of all devices to use.
      checkpoint: A directory in which the run is saved at intervals.
      checkpoint_every: The number of steps between checkpoints.

    Returns:
      The vectors, by falling count and then by spelling. Their `metadata` name the model and the engine.

    Raises:
      CorpusError: If no word occurs `min_count` times; a ValueError.
      CheckpointError: If the directory holds checkpoints of another run, or damaged ones; a ValueError.
      TypeError: If an argument is of the wrong type.
      ValueError: If an argument is outside its range, or the engine cannot run here.
      ImportError: With `checkpoint`, if Orbax is not installed.

    Example:
      >>> import embax.train
      >>> text = "the king holds the crown. the queen wears the crown. the dog eats the bone. " * 20
      >>> embax.train.cbow(embax.train.tokenize([text]), dim=8, epochs=1)
      Vectors(9 tokens, dim=8)

    References:
      Mikolov et al., Efficient estimation of word representations in vector space, 2013,
      https://arxiv.org/abs/1301.3781, section 3.1.
    """
    arguments = Arguments(
        dim=dim,
        window=window,
        negative=negative,
        epochs=epochs,
        min_count=min_count,
        sample=sample,
        learning_rate=learning_rate,
        seed=seed,
        initial=initial,
        initial_second=initial_second,
        subwords=subwords,
        ngram_lengths=ngram_lengths,
        buckets=buckets,
        engine=engine,
        threads=threads,
        max_vocabulary=max_vocabulary,
        held_out=held_out,
        keep_second=keep_second,
        progress=progress,
        after_epoch=after_epoch,
        mesh=mesh,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )
    return _learned("cbow", sequences, arguments)


def _learned(model: Model, sequences: Iterable[Iterable[str | int]], given: Arguments) -> Vectors:
    call = f"embax.train.{model}"
    given, options = checked(call, model, given)
    parts = parts_of(call, given.mesh)
    corpora = encode(
        sequences,
        given.min_count,
        parts,
        max_vocabulary=given.max_vocabulary,
        known=() if given.initial is None else given.initial.vocabulary,
        held_out=EVERY if given.held_out else None,
        call=call,
    )
    held_out = _held_out(call, corpora.pop(), model, given) if given.held_out else None
    release_memory()
    vocabulary, counts = corpora[0].vocabulary, corpora[0].counts
    ngrams = NgramOptions(*given.ngram_lengths, given.buckets) if given.subwords else None
    pieces = None if ngrams is None else pieces_of(vocabulary, ngrams)
    engine = _engine_of(given, corpora, parts, options, pieces)
    saved = None
    if given.checkpoint is not None:
        of_run = {"epochs": given.epochs, "min_count": given.min_count, "learning_rate": given.learning_rate}
        of_run |= options._asdict() | {"mesh": given.mesh is not None, "initial": _initial.digest(given.initial)}
        of_run |= {"subwords": ngrams, "initial_second": _initial.digest(given.initial_second)}
        every = max(1, math.ceil(given.checkpoint_every / engine.steps_a_batch))
        saved = Checkpoints(given.checkpoint, every, fingerprint(corpora, parts, of_run), engine.name, parts)

    def made(inputs: Float32[np.ndarray, "rows dim"]) -> Vectors:
        metadata = {"engine": engine.name, "model": model}
        if ngrams is None or pieces is None:
            return _initial.joined(given.initial, InputRows(vocabulary, counts, inputs), metadata)
        trained = _initial.joined_pieces(given.initial, InputRows(vocabulary, counts, inputs, pieces.used))
        weight, of_ngrams = finished(trained, ngrams, options)
        return Vectors(trained.vocabulary, weight, trained.counts, of_ngrams, metadata)

    def after_epoch(call_back: Callable[[Epoch], object], number: int, learned: Learned) -> object:
        inputs = learned[0].view()
        inputs.flags.writeable = False  # those of the last epoch become the result
        of_words = made(inputs)
        loss = None
        if held_out is not None:
            weight = inputs if pieces is None else of_words.weight[of_words.vocabulary.ids(vocabulary.tokens())]
            loss = held_out.loss(weight, learned[1])
        return call_back(Epoch(number, given.epochs, of_words, loss))

    call_back = None if given.after_epoch is None else functools.partial(after_epoch, given.after_epoch)
    run = Run(given.epochs, int(counts.sum()), given.learning_rate, given.progress, call_back)
    if pieces is None:
        known = _initial.known_of(given.initial, vocabulary)
    else:
        known = _initial.known_pieces(given.initial, vocabulary, pieces)
    inputs, outputs = train(engine, run, (known, _initial.known_of(given.initial_second, vocabulary)), saved)
    if given.keep_second is not None:
        metadata = {"engine": engine.name, "model": model, "table": "second"}
        second = InputRows(vocabulary, counts, np.ascontiguousarray(outputs))
        given.keep_second(_initial.joined(given.initial_second, second, metadata))
        del second
    del outputs
    return made(inputs)


def _engine_of(
    given: Arguments, corpora: Sequence[Corpus], parts: Parts, options: Options, pieces: Pieces | None
) -> Engine:
    if given.engine == "native" or (given.engine == "auto" and _native.is_best(given.mesh)):
        return _native.Native(corpora[0], options, pieces)
    return Xla(corpora, parts, options, pieces)


def _held_out(call: str, corpus: Corpus, model: Model, given: Arguments) -> HeldOut:
    """Draw pairs of the text that is held out."""
    likely = kept(corpus.counts, given.sample), noise_weights(corpus.counts)
    held_out = draw_held_out(corpus, given.window, *likely, whole_windows=model == "cbow")
    if held_out is None:
        raise CorpusError(
            f"every {EVERY}th sequence is held out, but these have no pairs of words. Give more text.",
            call,
        )
    return held_out
