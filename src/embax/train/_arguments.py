"""The arguments of word2vec's models, checked before the text is read."""

import math
import os
from collections.abc import Callable
from typing import Literal, NamedTuple

from jax.sharding import Mesh

from .._base import check as _check
from ..files._formats.fasttext.model import LONGEST_NGRAM
from ..vectors import Vectors
from . import _initial
from ._engines import native as _native
from ._engines.engine import Model, Options
from ._loop import Epoch, Progress
from ._subwords import NgramOptions

EngineName = Literal["auto", "native", "xla"]
# The size of a vector, if nothing else is asked for.
_DIM = 100


class Arguments(NamedTuple):
    """The arguments that both models have."""

    dim: int | None
    window: int
    negative: int
    epochs: int
    min_count: int
    sample: float
    learning_rate: float
    seed: int
    initial: Vectors | None
    initial_second: Vectors | None
    subwords: bool
    ngram_lengths: tuple[int, int]
    buckets: int
    engine: EngineName
    threads: int
    max_vocabulary: int
    held_out: bool
    keep_second: Callable[[Vectors], object] | None
    progress: Callable[[Progress], object] | None
    after_epoch: Callable[[Epoch], object] | None
    mesh: Mesh | None
    checkpoint: str | os.PathLike[str] | None
    checkpoint_every: int


def checked(call: str, model: Model, given: Arguments) -> tuple[Arguments, Options]:
    """Check the arguments before the text is read."""
    dim = None if given.dim is None else _at_least_one(f"{call}(dim=...)", given.dim)
    dim = _initial.checked(f"{call}(initial=...)", given.initial, dim) or _DIM
    if given.initial_second is not None and given.initial is None:
        raise ValueError(
            f"`{call}(initial_second=...)` must come with `initial`, the vectors of the same run, got it alone. Pass "
            "both."
        )
    _initial.checked(f"{call}(initial_second=...)", given.initial_second, dim)
    names = "buckets", "window", "negative", "epochs", "min_count", "checkpoint_every", "threads", "max_vocabulary"
    sizes = {name: _at_least_one(f"{call}({name}=...)", getattr(given, name)) for name in names}
    given = given._replace(
        **sizes,
        dim=dim,
        learning_rate=_at_most_one(f"{call}(learning_rate=...)", given.learning_rate),
        # 0 means no subsampling: no frequency is above infinity.
        sample=_at_most_one(f"{call}(sample=...)", given.sample) if given.sample != 0 else math.inf,
        seed=_check.size(f"{call}(seed=...)", given.seed),
        subwords=_check.flag(f"{call}(subwords=...)", given.subwords),
        ngram_lengths=_lengths(f"{call}(ngram_lengths=...)", given.ngram_lengths),
        engine=_check.choice(f"{call}(engine=...)", given.engine, ("auto", "native", "xla")),
    )
    if given.initial is not None and given.subwords:
        _initial.check_subwords(call, given.initial, NgramOptions(*given.ngram_lengths, given.buckets))
    if given.engine == "native" and (reason := _native.lacking(given.mesh)):
        raise ValueError(f"`{call}(engine=...)` must be 'auto' or 'xla' here, got 'native': {reason}. Leave it out.")
    if given.threads > 1 and (given.engine == "xla" or (given.engine == "auto" and not _native.is_best(given.mesh))):
        raise ValueError(
            f"`{call}(threads=...)` must be 1 for the engine 'xla', which runs here, got {given.threads}. Only the "
            "native engine has threads of its own: leave it out."
        )
    return given, Options(dim, given.window, given.negative, model, given.sample, given.seed, given.threads)


def _lengths(argument: str, value: object) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"`{argument}` must be two lengths, got {value!r}. Pass (3, 6), for instance.")
    minimum, maximum = (_at_least_one(argument, length) for length in value)
    if not minimum <= maximum <= LONGEST_NGRAM:
        raise ValueError(
            f"`{argument}` must be two lengths, the shorter first, of at most {LONGEST_NGRAM} characters, got "
            f"{(minimum, maximum)}. Pass (3, 6), for instance."
        )
    return minimum, maximum


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
