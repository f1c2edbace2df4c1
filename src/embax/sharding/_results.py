"""The results of `plan`: collectives, tables, and a text table of their sums."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from .._mesh.placement import Placement

Phase = Literal["forward", "backward"]
Collective = Literal["all_to_all", "all_gather"]
Optimizer = Literal["sgd", "adagrad", "rowwise_adagrad", "adam", "rowwise_adam"]


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective of a step; every device takes part in it.

    Args:
      phase: `"forward"`: in a lookup. `"backward"`: when gradients or updates are sent to owners.
      what: The data that is sent.
      collective: `"all_to_all"` or `"all_gather"`.
      devices: The number of devices that exchange with each other.
      buffer: The size of its result on each device in the compiled program, in bytes.
      useful: The expected number of bytes that a device sends to others, without padding.
    """

    phase: Phase
    what: str
    collective: Collective
    devices: int
    buffer: int
    useful: float

    @property
    def sent(self) -> int:
        """The bytes that a device sends to others, padding included; it receives as many."""
        return self.buffer * (self.devices - 1) // self.devices


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """The costs of one table, for each device and each step.

    Args:
      name: Its name.
      shape: Its shape, `(rows, *dim)`.
      dtype: Its dtype.
      placement: Where its rows will be; the placement's mesh may have no devices.
      ids: The number of ids of each lookup in a step, on all devices together.
      transfers: The collectives of a step, without the rare ones for an overloaded owner.
      weight_bytes: The size of the weight on a device.
      state_bytes: The size of the optimizer's state on a device.
      buffer_bytes: An estimate of the memory for rows in exchanges and in the optimizer.
      distinct: The expected number of distinct ids in a step.
      asked: The expected number of distinct ids that a device asks for, its own rows included, summed over lookups.
      ids_balance: The number of ids for the owner that gets the most, as a multiple of the mean.
      rows_balance: The same for the rows that are sent, where each device asks for a distinct id once.
      rounds: The expected number of rounds of the lookup that takes most.
      further: The probability that a lookup takes more than one round on any device.
      crowded: The probability that an owner is overloaded by gradients, so that `transfers` does not hold: plain SGD in
        float32 takes further rounds, other optimizers deal rows out to all devices.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    placement: Placement
    ids: tuple[int, ...]
    transfers: tuple[Transfer, ...]
    weight_bytes: int
    state_bytes: int
    buffer_bytes: int
    distinct: float
    asked: float
    ids_balance: float
    rows_balance: float
    rounds: float
    further: float
    crowded: float

    def sent(self, phase: Phase | None = None) -> int:
        """The bytes that a device sends in a phase of the step; default: in both."""
        return sum(x.sent for x in self.transfers if phase in (None, x.phase))

    def useful(self, phase: Phase | None = None) -> float:
        """The expected bytes of `sent` that are not padding."""
        return sum(x.useful for x in self.transfers if phase in (None, x.phase))

    @property
    def held(self) -> tuple[int, int, int]:
        """Weight, state and buffers of a device, in bytes."""
        return self.weight_bytes, self.state_bytes, self.buffer_bytes

    @property
    def memory(self) -> int:
        """Weight, state and buffers of a device together, in bytes."""
        return sum(self.held)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The costs of some tables, for each device and each step; `str` formats them as a table.

    Args:
      tables: The plan of each table, by name.
    """

    tables: Mapping[str, TablePlan]

    def sent(self, phase: Phase | None = None) -> int:
        """The bytes that a device sends for all tables in a phase of the step; default: in both."""
        return sum(table.sent(phase) for table in self.tables.values())

    def useful(self, phase: Phase | None = None) -> float:
        """The expected bytes of `sent` that are not padding."""
        return sum(table.useful(phase) for table in self.tables.values())

    @property
    def memory(self) -> int:
        """Weights, states and buffers of a device together, in bytes."""
        return sum(table.memory for table in self.tables.values())

    def __str__(self) -> str:
        tables = list(self.tables.values())
        lines = [["a device and step", "forward", "useful", "backward", "useful", "weights", "state", "buffers"]]
        for name, group in [*[(table.name, [table]) for table in tables], *[("in all", tables)] * (len(tables) > 1)]:
            sizes = [
                [t.sent("forward"), t.useful("forward"), t.sent("backward"), t.useful("backward"), *t.held]
                for t in group
            ]
            lines.append([name, *(_size(sum(column)) for column in zip(*sizes, strict=True))])
        more = [("", "ids", "distinct", "balance", "of ids", "rounds", "> 1 round", "crowded")]
        for t in tables:
            counts = (f"{sum(t.ids):,}", f"{t.distinct:,.0f}", f"{t.rows_balance:.2f}", f"{t.ids_balance:.2f}")
            more.append((t.name, *counts, f"{t.rounds:.2f}", f"{t.further:.2%}", f"{t.crowded:.2%}"))
        heads = dict.fromkeys(repr(t.placement) for t in tables)
        return "\n".join([*heads, *_aligned(lines), *_aligned(more)])


def _size(number: float) -> str:
    """Write a size with a unit."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(int(math.log2(number) // 10), len(units) - 1) if number >= 1024 else 0
    return f"{number / 1024**power:,.{2 if power else 0}f} {units[power]}"


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
