"""The traffic and memory of a step of one sharded table.

`_collectives` counts the bytes of the collectives in the traced programs. This module computes how many of them are
expected to be useful, and how likely ids exceed the capacity, from how often rows are read. For instance, if 1,024 ids
of a device are expected to have 600 distinct rows, 450 of them on other devices, then 450 of the 1,296 ids that it
sends are useful.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float64

from .._base.distinct import accumulator
from .._core.table import Table, with_weight
from .._mesh.bags import is_pooled_where_stored
from .._mesh.placement import Placement
from ._collectives import Sent, Step, collectives_of_step
from ._frequencies import Law
from ._results import Collective, Optimizer, Phase, TablePlan, Transfer

# Further rounds that are rarer than this are not counted.
_NEVER = 1e-12

# The state of a row: how many copies of its shape and dtype, and how many numbers in the dtype of sums. Written down
# here, since `optim` is beside this package and a plan must not run an optimizer; the tests compare both with the
# states that the optimizers make.
_STATES: dict[Optimizer, tuple[int, int]] = {
    "sgd": (0, 0),
    "adagrad": (1, 0),
    "rowwise_adagrad": (0, 1),
    "adam": (2, 0),
    "rowwise_adam": (1, 1),
}


class Useful(NamedTuple):
    """The part of a collective that a device sends to others and that is no padding."""

    what: str
    collective: Collective
    entries: float  # the expected number
    numbers: int = 1  # of an entry


@dataclasses.dataclass(frozen=True)
class TableStep:
    """A step of one table, from the view of one device."""

    table: Table  # with its future placement; its weight is a shape
    law: Law
    ids: tuple[int, ...]
    bag_length: int | None  # None if ids are not pooled
    optimizer: Optimizer | None

    def planned(self, name: str) -> TablePlan:
        """The plan of the table."""
        placement, law = self.placement, self.law
        rounds = [self._rounds(number) for number in self.lookups]
        step, (backward, crowded) = self._step, self._backward() if self.optimizer and self.lookups else ([], 0.0)
        asked = sum((law.distinct(self.real(number))[0] for number in self.lookups), np.zeros(placement.shards))
        return TablePlan(
            name=name,
            shape=(placement.rows, *self.table.dim),
            dtype=self.dtype,
            placement=placement,
            ids=self.ids,
            transfers=(
                *(
                    x
                    for sent, ids in zip(step.forward, self.lookups, strict=True)
                    for x in self._transfers("forward", sent, self._forward(ids))
                ),
                *self._transfers("backward", step.backward, backward),
            ),
            weight_bytes=placement.block * self.part * self.dtype.itemsize,
            state_bytes=placement.block * self.state_of_row,
            buffer_bytes=self._buffers(),
            distinct=float(law.distinct(sum(self.lookups))[0].sum()),
            asked=float(asked.sum()),
            ids_balance=_balance(law.by_owner(law.probability)),
            rows_balance=_balance(asked),
            rounds=max((expected for expected, _ in rounds), default=1.0),
            further=1 - math.prod(1 - further for _, further in rounds),
            crowded=crowded,
        )

    @property
    def placement(self) -> Placement:
        """Where the rows will be."""
        placement: Any = self.table.placement
        return placement

    @property
    def dtype(self) -> np.dtype:
        """The dtype of rows."""
        return np.dtype(self.table.dtype)

    @property
    def part(self) -> int:
        """The number of entries of a row that a device has."""
        return math.prod(self.table.dim) // self.placement.column_shards

    @property
    def lookups(self) -> tuple[int, ...]:
        """The numbers of ids of lookups that read anything."""
        return tuple(number for number in self.ids if number and self.placement.rows and self.part)

    @property
    def index(self) -> int:
        """The bytes of an id: see `embax._core.ids.index_dtype`."""
        return 4 if self.placement.rows <= np.iinfo(np.int32).max else 8

    @property
    def adds(self) -> bool:
        """Whether the optimizer only scales gradients, so that they are added to rows without being summed first."""
        return self.optimizer == "sgd" and accumulator(self.dtype) == self.dtype

    @property
    def state_of_row(self) -> int:
        """The bytes of a row's state on a device."""
        if self.optimizer is None:  # a table of integers has no dtype of sums
            return 0
        copies, numbers = _STATES[self.optimizer]
        return copies * self.part * self.dtype.itemsize + numbers * accumulator(self.dtype).itemsize

    @property
    def _group(self) -> int:
        """The ids of all lookups on a device or, with columns, in its group: `embax._mesh.sharded.joined`."""
        return sum(map(self.placement.ids_of_device, self.lookups))

    def real(self, ids: int) -> float:
        """The number of ids of a device or, with columns, of its group, without padding."""
        return ids / self.placement.devices * self.placement.column_shards

    @property
    def _step(self) -> Step:
        weight = jax.ShapeDtypeStruct((self.placement.stored_rows, *self.table.dim), self.dtype)
        update = None if self.optimizer is None else "add" if self.optimizer == "sgd" else "sum"
        # The counts of `scale_grad_by_freq` are not planned.
        table = with_weight(self.table, weight, scale_grad_by_freq=False)
        return collectives_of_step(table, self.lookups, self.bag_length, update)

    def _transfers(self, phase: Phase, sent: Sequence[Sent], useful: Sequence[Useful]) -> list[Transfer]:
        """Join the collectives of a program, in their order, with their useful parts."""
        found = []
        for x, (what, collective, entries, numbers) in zip(sent, useful, strict=True):
            assert x.collective == collective
            size = x.dtype.itemsize
            found.append(
                Transfer(phase, what, collective, x.devices, x.numbers * size, float(entries * numbers * size))
            )
        return found

    def _is_pooled(self, ids: int) -> bool:
        length = self.bag_length
        return length is not None and is_pooled_where_stored(self.table, (ids // length,), length, weighted=False)

    def _forward(self, ids: int) -> list[Useful]:
        """The useful part of the collectives of a lookup: see `embax._mesh.sharded.take`."""
        if self._is_pooled(ids):
            return self._forward_of_bags(ids)
        columns, shards = self.placement.column_shards, self.placement.shards
        of_others = self.real(ids) * (columns - 1) / columns
        capacity = self.placement.capacity(self.placement.ids_of_device(ids))
        asked = np.minimum(self.law.distinct(self.real(ids))[0], capacity).sum() * (shards - 1) / shards
        return [
            *[Useful("ids of a group", "all_gather", of_others)] * (columns > 1),
            *[Useful("ids", "all_to_all", asked), Useful("rows", "all_to_all", asked, self.part)] * (shards > 1),
            *[Useful("parts of rows", "all_to_all", of_others, self.part)] * (columns > 1),
        ]

    def _forward_of_bags(self, ids: int) -> list[Useful]:
        """The useful part of the collectives of bags that owners pool: see `embax._mesh.bags`."""
        columns, shards, length = self.placement.column_shards, self.placement.shards, self.bag_length or 1
        own, share = self.real(ids), self.law.by_owner(self.law.probability)
        of_others = own * (columns - 1) / columns
        capacity = self.placement.capacity(self.placement.ids_of_device(ids // length) * length)
        asked = np.minimum(own * share, capacity).sum() * (shards - 1) / shards
        sums = own / length * (1 - (1 - share) ** length).sum() * (shards - 1) / shards
        to_owners = [
            Useful("ids", "all_to_all", asked),
            Useful("bags of ids", "all_to_all", asked),
            Useful("sums", "all_to_all", sums, self.part),
        ]
        return [
            *[Useful("ids of a group", "all_gather", of_others)] * (columns > 1),
            *to_owners * (shards > 1),
            *[Useful("parts of sums", "all_to_all", of_others / length, self.part)] * (columns > 1),
        ]

    def _backward(self) -> tuple[list[Useful], float]:
        """The useful part of the collectives of a step, and the probability that an owner is overloaded.

        SGD adds gradients to rows by `embax._mesh.sharded.put`; other optimizers sum them by
        `embax._mesh.sharded.combine`.
        """
        placement, part = self.placement, self.part
        columns, shards, copies = placement.column_shards, placement.shards, placement.copies
        group = self._group
        capacity, own = placement.capacity(group), self.real(sum(self.lookups)) / columns
        # SGD: each device sums its own duplicates only; the same id on two devices of a group is sent twice.
        draws, times = (own, columns) if self.adds else (own * columns, 1)
        means, variances = (times * x for x in self.law.distinct(draws))
        arriving = float(np.minimum(means, capacity).sum())
        useful: list[Useful] = []

        def send(collective: Collective, entries: float) -> None:
            useful.extend([Useful("ids", collective, entries), Useful("gradients", collective, entries, part)])

        if columns > 1:
            of_others = (columns - 1) * (means.sum() / columns if self.adds else own)
            useful.append(Useful("ids of a group", "all_gather", of_others))
            useful.append(Useful("parts of gradients", "all_to_all", of_others, part))
        if self.adds:
            if copies > 1:
                send("all_gather", (copies - 1) * means.sum() / shards)
            arriving *= (shards - 1) / shards  # a device adds its own rows itself
        if shards > 1:
            send("all_to_all", arriving if self.adds else arriving * (shards - 1) / shards)
        if copies > 1 and (shards > 1 or not self.adds):
            send("all_gather", (copies - 1) * arriving)
        askers = copies * (shards - 1 if self.adds else shards)
        return useful, _any_above(means, variances, capacity, askers) if capacity < group else 0.0

    def _rounds(self, ids: int) -> tuple[float, float]:
        """The expected number of rounds of a lookup, and the probability that it takes more than one."""
        placement, group = self.placement, self.placement.ids_of_device(ids)
        means, variances = self.law.distinct(self.real(ids))
        askers = placement.copies * (placement.shards - 1)
        if self._is_pooled(ids):  # duplicates and a device's own rows are sent, too
            share, askers = self.law.by_owner(self.law.probability), placement.copies * placement.shards
            means = self.real(ids) * share
            variances = means * (1 - share)
        capacity = placement.capacity(group)
        expected, further = 1.0, 0.0
        for number in range(1, -(-group // capacity)):
            more = _any_above(means, variances, number * capacity, askers)
            expected, further = expected + more, max(further, more)
            if more < _NEVER:
                break
        return expected, further

    def _buffers(self) -> int:
        """An estimate of XLA's memory for the rows of a step: the arrays that are alive at once on a CPU."""
        placement, group = self.placement, self._group
        sent = placement.shards * placement.capacity(group) if placement.shards > 1 else 0
        held = (sent or group) * placement.copies
        dtype = accumulator(self.dtype) if self.optimizer else self.dtype
        entry = self.part * dtype.itemsize + 2 * self.index  # a row, its id, and its place in a sorted order
        if not self.optimizer:
            return entry * (group + 2 * sent)
        own = group * (3 if sent else 1)  # gradients, gradients sorted by row, and their sums
        if self.adds:
            return entry * (own + max(2 * sent, held))
        # Sent and received rows; received rows sorted, their sums, the update; and rows of the state.
        copies, _ = _STATES[self.optimizer]
        return entry * (own + 2 * sent + (3 + copies) * held)


def _balance(loads: Float64[np.ndarray, " shards"]) -> float:
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _any_above(
    means: Float64[np.ndarray, " shards"], variances: Float64[np.ndarray, " shards"], capacity: int, askers: int
) -> float:
    """The probability that any device asks any owner for more rows than the capacity.

    Each number of rows is assumed to be binomial, with the given mean and variance, and independent of the others.
    """
    from scipy import special

    chance = np.clip(1 - variances / np.maximum(means, 1e-300), 0, 1)
    number = means / np.maximum(chance, 1e-300)
    poisson = (chance < 1e-6) | (number > 1e12)  # where the binomial formula loses precision
    above = np.where(means > capacity, 1.0, 0.0)  # without variance
    some = ~poisson & (number > capacity) & (chance < 1)
    above[some] = special.betainc(capacity + 1, (number - capacity)[some], chance[some])
    above[some | poisson] = np.where(poisson, special.gammainc(capacity + 1, means), above)[some | poisson]
    return abs(float(np.expm1(askers * np.log1p(-np.minimum(above, 1 - 1e-16)).sum())))
