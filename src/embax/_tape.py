"""Tape: what a loss reads of the tables that it is being differentiated for."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import get_opaque_trace_state
from jaxtyping import Array, Shaped

_ALIAS = "embax_alias"


class Lookup(NamedTuple):
    """One lookup call that a tape has seen."""

    table: int  # which of the tape's weights it reads
    ids: Any  # row numbers without padding, or their type once the run is over
    shape: tuple[int, ...]  # of the rows, (*batch, *dim)
    dtype: np.dtype  # of the weight


class Tape:
    """A record of the lookups in one run of a loss.

    The loss is given a stand-in for each weight, a tracer of the run's own trace, and a table is known by the identity
    of its stand-in: whatever is computed from one (a cast, a slice, what an inner transformation sees of it) is another
    array. Whoever made the stand-ins finds such a use in the jaxpr of the run, since a lookup on the tape reads the
    weight itself.

    Args:
      stand_ins: What the loss sees.
      weights: What a lookup reads instead.
      taps: One array for each lookup of the run, in its order: they carry the gradient of its rows. None to find out
        which lookups there are.
      whole: By the number of a weight: the array that carries the gradient of what reads all of its rows.
    """

    def __init__(
        self,
        stand_ins: Sequence[Any],
        weights: Sequence[Any],
        taps: Sequence[Any] | None = None,
        whole: Mapping[int, Any] | None = None,
    ):
        # Holding the stand-ins keeps their identities unique.
        self._known = {
            id(stand_in): (stand_in, k, weight)
            for k, (stand_in, weight) in enumerate(zip(stand_ins, weights, strict=True))
        }
        self._taps = taps
        self._whole = whole or {}
        self._trace = _present_trace()
        self.lookups: list[Lookup] = []
        self.found: set[int] = set()  # tables that were asked for in this trace
        self.read_whole: set[int] = set()  # tables of which all rows were read
        self.hidden: set[int] = set()  # tables of which a lookup in another trace was seen

    def find(self, weight: Any) -> tuple[int, Any] | None:
        """Say which weight this is the stand-in of, and what to read instead; None where it is none in this trace."""
        entry = self._known.get(id(weight))
        if entry is None:
            return None
        _, table, instead = entry
        if self._trace != _present_trace():
            self.hidden.add(table)
            return None
        self.found.add(table)
        return table, instead

    def add(self, lookup: Lookup) -> Any:
        """Record a lookup and return its tap, or None in a run without taps."""
        self.lookups.append(lookup)
        if self._taps is None:
            return None
        tap = self._taps[len(self.lookups) - 1] if len(self.lookups) <= len(self._taps) else None
        if tap is None or (tap.shape, tap.dtype) != (lookup.shape, lookup.dtype):
            raise RuntimeError(
                "A function that is differentiated must make the same lookups each time it is traced, got another one, "
                f"of shape {lookup.shape}, in its second run. Make it depend on nothing but its arguments."
            )
        return tap

    def whole(self, table: int, weight: Any) -> Any:
        """Record that all rows of a weight are read, as a head does, and return what is to be read.

        Args:
          table: Which weight.
          weight: Its values, as `find` gives them.

        Returns:
          The same values; in a run with taps, with the gradient that goes to `whole`.
        """
        self.read_whole.add(table)
        return _straight_through(weight, self._whole[table]) if table in self._whole else weight

    def replace(self, stand_in: Any, table: int, weight: Any) -> Any:
        """Make a stand-in for new values of a weight that pass the gradient of their rows straight through.

        Args:
          stand_in: The present stand-in.
          table: Which weight it stands for.
          weight: The new values.

        Returns:
          The new stand-in. In a run with taps it is the new values themselves, so that they may leave the run.
        """
        alias = jax.jit(_alias)(stand_in) if self._taps is None else weight
        self._known[id(alias)] = (alias, table, weight)
        return alias


def _alias(stand_in: Shaped[Array, "rows *dim"]) -> Shaped[Array, "rows *dim"]:
    return jax.lax.optimization_barrier(stand_in)


_alias.__name__ = _ALIAS


@jax.custom_jvp
def _straight_through(values: Array, source: Array) -> Array:
    return values


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return primals[0], tangents[1]


class _Stack(threading.local):
    def __init__(self):
        self.tapes: list[Tape] = []


_STACK = _Stack()


@contextmanager
def recording(tape: Tape) -> Iterator[Tape]:
    """Let a tape see the lookups that this thread makes inside the block."""
    _STACK.tapes.append(tape)
    try:
        yield tape
    finally:
        _STACK.tapes.pop()


def find(weight: Any) -> tuple[Tape, int, Any] | None:
    """Find the tape, of those that record, whose stand-in a weight is; see `Tape.find`."""
    for tape in reversed(_STACK.tapes):
        if (entry := tape.find(weight)) is not None:
            return tape, *entry
    return None


def other_uses(jaxpr: Any, stand_ins: Sequence[Any]) -> dict[int, str]:
    """Find the weights that a run used otherwise than by the lookups on its tape.

    Args:
      jaxpr: The `jax.extend.core.Jaxpr` of the run.
      stand_ins: Its variables that are the stand-ins, in the tape's order.

    Returns:
      For each weight that was used otherwise, by its number: the name of the first primitive that reads it.
    """
    known = {id(variable): k for k, variable in enumerate(stand_ins)}
    used: dict[int, str] = {}
    for eqn in jaxpr.eqns:
        here = {known[id(variable)] for variable in eqn.invars if id(variable) in known}
        if here and eqn.params.get("name") == _ALIAS:
            known[id(eqn.outvars[0])] = here.pop()
        for table in here:
            used.setdefault(table, eqn.primitive.name)
    return used


def _present_trace() -> Any:
    return get_opaque_trace_state(convention="embax")
