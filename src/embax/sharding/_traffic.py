"""What a step of one table sends, how much of it is useful, and what it needs.

`_collectives` counts the collectives of the traced programs; the expected useful part, and how often ids crowd, follow
from how often rows are read. For instance, if 1,024 ids of a device are expected to name 600 distinct rows, 450 of them
on other devices, 450 of the 1,296 ids that it sends are useful.
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


class Useful(NamedTuple):
    """What a device sends to others in a collective that is no filling."""

    what: str
    collective: Collective
    entries: float  # the expected number
    numbers: int = 1  # of an entry


@dataclasses.dataclass(frozen=True)
class TableStep:
    """A step of one table, as seen from a device."""

    table: Table  # as it is to be placed; its weight is a shape
    law: Law
    ids: tuple[int, ...]
    bag_length: int | None  # None where they are not pooled
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
        """Where the rows are to be."""
        placement: Any = self.table.placement
        return placement

    @property
    def dtype(self) -> np.dtype:
        """That of the rows."""
        return np.dtype(self.table.dtype)

    @property
    def part(self) -> int:
        """How many numbers of a row a device has."""
        return math.prod(self.table.dim) // self.placement.column_shards

    @property
    def lookups(self) -> tuple[int, ...]:
        """The ids of the lookups that read anything."""
        return tuple(number for number in self.ids if number and self.placement.rows and self.part)

    @property
    def index(self) -> int:
        """The bytes of an id: see `embax._core.ids.index_dtype`."""
        return 4 if self.placement.rows <= np.iinfo(np.int32).max else 8

    @property
    def adds(self) -> bool:
        """Whether the optimizer only scales gradients, so that they are added to the rows as they come."""
        return self.optimizer == "sgd" and accumulator(self.dtype) == self.dtype

    @property
    def state_of_row(self) -> int:
        """The bytes of a row's state on a device."""
        row, of_row = self.part * self.dtype.itemsize, accumulator(self.dtype).itemsize if self.optimizer else 0
        sizes = {"adagrad": row, "rowwise_adagrad": of_row, "adam": 2 * row, "rowwise_adam": row + of_row}
        return sizes.get(self.optimizer or "sgd", 0)

    @property
    def _group(self) -> int:
        """How many ids of all lookups a device has, with columns those of its group: `embax._mesh.sharded.joined`."""
        return sum(map(self.placement.ids_of_device, self.lookups))

    def real(self, ids: int) -> float:
        """How many ids a device sees to, without those that fill them up; with columns, those of its group."""
        return ids / self.placement.devices * self.placement.column_shards

    @property
    def _step(self) -> Step:
        weight = jax.ShapeDtypeStruct((self.placement.stored_rows, *self.table.dim), self.dtype)
        update = None if self.optimizer is None else "add" if self.optimizer == "sgd" else "sum"
        # The counts of `scale_grad_by_freq` are not planned.
        table = with_weight(self.table, weight, scale_grad_by_freq=False)
        return collectives_of_step(table, self.lookups, self.bag_length, update)

    def _transfers(self, phase: Phase, sent: Sequence[Sent], useful: Sequence[Useful]) -> list[Transfer]:
        """Put the collectives of a program, in their order, beside what is useful of them."""
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
        """What is useful of the collectives of a lookup: see `embax._mesh.sharded.take`."""
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
        """What is useful of the collectives of bags that are pooled where rows are: see `embax._mesh.bags`."""
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
        """What is useful of the collectives of an optimizer's step, and the probability that rows crowd.

        See `embax._mesh.sharded.put`, by which SGD adds gradients to rows, and `embax._mesh.sharded.combine`,
        which sums them for the other optimizers.
        """
        placement, part = self.placement, self.part
        columns, shards, copies = placement.column_shards, placement.shards, placement.copies
        group = self._group
        capacity, own = placement.capacity(group), self.real(sum(self.lookups)) / columns
        # To add, each device sums what it has, and nobody looks at what is alike in a group.
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
            arriving *= (shards - 1) / shards  # its own rows have been added
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
        if self._is_pooled(ids):  # duplicates and its own ids, too
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
        """About what XLA takes for the rows of a step, counted in the arrays that were seen alive at once on a CPU."""
        placement, group = self.placement, self._group
        sent = placement.shards * placement.capacity(group) if placement.shards > 1 else 0
        held = (sent or group) * placement.copies
        dtype = accumulator(self.dtype) if self.optimizer else self.dtype
        entry = self.part * dtype.itemsize + 2 * self.index  # an id, and a place in some order
        if not self.optimizer:
            return entry * (group + 2 * sent)
        own = group * (3 if sent else 1)  # gradients; in the order of their rows; summed
        if self.adds:
            return entry * (own + max(2 * sent, held))
        # What was sent, what came in; in order, summed, the update; and rows of the state.
        states = {"adagrad": 1, "adam": 2, "rowwise_adam": 1}.get(self.optimizer, 0)
        return entry * (own + 2 * sent + (3 + states) * held)


def _balance(loads: Float64[np.ndarray, " shards"]) -> float:
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


def _any_above(
    means: Float64[np.ndarray, " shards"], variances: Float64[np.ndarray, " shards"], capacity: int, askers: int
) -> float:
    """The probability that any of some devices asks any owner for more rows than the capacity says.

    Each number of rows is taken for binomial, of the given mean and variance, and independent of the others.
    """
    from scipy import special

    chance = np.clip(1 - variances / np.maximum(means, 1e-300), 0, 1)
    number = means / np.maximum(chance, 1e-300)
    poisson = (chance < 1e-6) | (number > 1e12)  # where the other one loses its digits
    above = np.where(means > capacity, 1.0, 0.0)  # of a number without variance
    some = ~poisson & (number > capacity) & (chance < 1)
    above[some] = special.betainc(capacity + 1, (number - capacity)[some], chance[some])
    above[some | poisson] = np.where(poisson, special.gammainc(capacity + 1, means), above)[some | poisson]
    return abs(float(np.expm1(askers * np.log1p(-np.minimum(above, 1 - 1e-16)).sum())))
