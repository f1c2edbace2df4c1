"""Exchange: move rows between their owners, the devices that store them, and the devices that use them.

All functions run on each device of a `shard_map`, and send by `all_to_all`, whose shapes are static. So they work in
rounds: in each, a device sends at most `capacity` ids or rows to each owner. One round is enough as a rule. If more ids
fall on one owner, more rounds follow, so nothing is ever dropped.

An example: 8 rows on two devices, in blocks of 4. Device 0 calls `fetch` for the positions [1, 6, 6, 2, 4]:

    own block      1 and 2 are read at once
    route          4 and 6: the distinct positions of other owners, in rising order, hence ordered by owner
    capacity 2     one round: asks device 1 for its rows [0, 2], gets two rows back
    capacity 1     two rounds, one for each row
    result         the row of position 6 goes to both ids that ask for it

`fetch` reads rows. `deliver` sends rows to their owners, which set or add them. `summed_at_owners` sums all values of
a row at its owner, for optimizers. `summed_by_owners` sums the rows of bags at their owners.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, DTypeLike, Float, Int, Int32, Shaped

from .._base import distinct as _dedupe
from .._core.storage import WriteMode
from .placement import Placement


class _Route(NamedTuple):
    """The positions of other owners that a device wants to read or write."""

    positions: Int[Array, " ids"]  # in rising order, then the sentinel `stored_rows`
    places: Int32[Array, " ids"]  # to read: for each id, its index in `positions`; to write: the value of each position
    first: Int32[Array, " shards_and_1"]  # owner `d` has `positions[first[d]:first[d + 1]]`


def fetch(
    placement: Placement, block: Shaped[Array, "block *dim"], positions: Int[Array, " ids"], *, expected: bool
) -> Shaped[Array, "ids *dim"]:
    """Read rows from their owners.

    Args:
      placement: Where the rows are.
      block: The rows of this device.
      positions: Stored positions of the rows; the sentinel `stored_rows` reads an arbitrary row.
      expected: Whether rows of other owners are usually among them. If so, the first round is unconditional.

    Returns:
      One row for each position.
    """
    local, owner, is_foreign = _owners(placement, positions)
    out = _at(block, local)
    if placement.shards == 1 or positions.shape[0] == 0:
        return out
    capacity = placement.capacity(positions.shape[0])

    def turn(route: _Route, number: int | Int[Array, ""], out: Array) -> Array:
        places, exists = _outgoing(route, number, capacity)
        asked = jnp.where(exists, route.positions[places] % placement.block, 0)
        answers = _at(block, _swapped(placement, asked))
        answers = _swapped(placement, answers)
        place = route.places - route.first[owner] - number * capacity
        here = is_foreign & (place >= 0) & (place < capacity)
        got = answers[jnp.minimum(owner, placement.shards - 1), jnp.clip(place, 0, capacity - 1)]
        return jnp.where(jnp.expand_dims(here, tuple(range(1, out.ndim))), got, out)

    plan = functools.partial(_distinct_route, placement, positions, is_foreign)
    return _in_rounds(placement, owner, is_foreign, capacity, plan, turn, out, expected)


def deliver(
    placement: Placement,
    block: Shaped[Array, "block *dim"],
    positions: Int[Array, " ids"],
    values: Shaped[Array, "ids *dim"],
    mode: WriteMode,
    *,
    expected: bool,
    copies: tuple[str, ...] = (),
) -> Shaped[Array, "block *dim"]:
    """Send rows to their owners, which set them or add them.

    Args:
      placement: Where the rows are.
      block: The rows of this device.
      positions: Stored positions of the rows; `stored_rows` is dropped. To set, values of one position must be equal.
      values: One row for each position.
      mode: Whether to set rows or to add to them.
      expected: Whether rows of other owners are usually among them. If so, the first round is unconditional.
      copies: Mesh axes of replicas, which have the same rows but different positions; each gets the rows of all.

    Returns:
      The new rows of this device.
    """

    def write(block: Array, local: Array, values: Array) -> Array:
        if copies:
            local, values = (jax.lax.all_gather(x, copies, tiled=True) for x in (local, values))
        # Negative positions would wrap, so rows of other owners get one that is out of bounds, and are dropped.
        local = jnp.where((local >= 0) & (local < placement.block), local, placement.block)
        at = block.at[local]
        values = values.astype(block.dtype)
        return at.add(values, mode="drop") if mode == "add" else at.set(values, mode="drop")

    if positions.shape[0] == 0 or placement.block == 0:
        return block
    local, owner, is_foreign = _owners(placement, positions)
    block = write(block, local, values)
    if placement.shards == 1:
        return block
    capacity = placement.capacity(positions.shape[0])

    def turn(route: _Route, number: int | Int[Array, ""], block: Array) -> Array:
        places, exists = _outgoing(route, number, capacity)
        local = jnp.where(exists, route.positions[places] % placement.block, placement.block)
        return write(block, *_sent(placement, local, jnp.where(exists, route.places[places], 0), exists, values))

    plan = functools.partial(_ordered_route, placement, positions, is_foreign)
    return _in_rounds(placement, owner, is_foreign, capacity, plan, turn, block, expected)


def summed_at_owners(
    placement: Placement, positions: Int[Array, " ids"], values: Shaped[Array, "ids *dim"], copies: tuple[str, ...]
) -> tuple[Int[Array, " held"], Shaped[Array, "held *dim"], Bool[Array, ""]]:
    """Sum all values of a row on one device: its owner, or a substitute if the owner is overloaded.

    The result has a static length. If some device has more rows for one owner than `capacity`, the distinct rows of the
    whole batch are dealt out evenly to all devices instead, and each device sums its share of them.

    Args:
      placement: Where the rows are.
      positions: Stored positions; `stored_rows` is dropped.
      values: One value for each position.
      copies: Mesh axes of replicas, which have the same rows but different positions.

    Returns:
      The positions summed on this device (each position on one device only, padded by `stored_rows`), their sums, and
      whether the rows were dealt out.
    """
    none = placement.stored_rows
    dtype = values.dtype
    # Each device first sums its own duplicates, so that it sends each row once.
    values = values.astype(_dedupe.accumulator(dtype))
    _, (positions, values, _) = _dedupe.combine(None, positions, values, none)
    length, capacity = positions.shape[0], placement.capacity(positions.shape[0])

    def gathered(x: Array) -> Array:
        return jax.lax.all_gather(x, copies, tiled=True) if copies else x

    def combined(positions: Array, values: Array) -> tuple[Array, Array]:
        _, distinct = _dedupe.combine(None, gathered(positions), gathered(values), none)
        return distinct.ids, distinct.values.astype(dtype)

    if placement.shards == 1 or length == 0:
        return *combined(positions, values), jnp.zeros((), bool)
    first = _first_of_owners(placement, positions)

    def at_owners() -> tuple[Array, Array]:
        places, exists = _outgoing(_Route(positions, jnp.zeros(0, jnp.int32), first), 0, capacity)
        return combined(*_sent(placement, jnp.where(exists, positions[places], none), places, exists, values))

    if capacity >= length:
        return *at_owners(), jnp.zeros((), bool)
    everyone_axes = (*placement.axes, *copies)
    held = capacity * jax.lax.axis_size(everyone_axes)

    def dealt_out() -> tuple[Array, Array]:
        everyone = jax.lax.all_gather(positions, everyone_axes, tiled=True)
        missing = max(held * placement.shards - everyone.shape[0], 0)
        everyone = jnp.pad(everyone, (0, missing), constant_values=none)
        _, (distinct, _, _) = _dedupe.combine(None, everyone, (), none)
        rank = jnp.searchsorted(distinct, positions).astype(positions.dtype)
        homes = dataclasses.replace(placement, rows=held * placement.shards, cyclic=False)
        rank = jnp.where(positions < none, rank, homes.stored_rows)
        sums = deliver(
            homes, jnp.zeros((held, *values.shape[1:]), values.dtype), rank, values, "add", expected=True, copies=copies
        )
        mine = jax.lax.dynamic_slice_in_dim(distinct, jax.lax.axis_index(placement.axes) * held, held)
        return mine, sums.astype(dtype)

    crowded = jnp.max(jnp.diff(first)) > capacity
    crowded = jax.lax.pmax(crowded.astype(jnp.int32), everyone_axes) > 0
    return *jax.lax.cond(crowded, dealt_out, at_owners), crowded


def summed_by_owners(
    placement: Placement,
    positions: Int[Array, " ids"],
    factors: Float[Array, " ids"] | None,
    length: int,
    terms: Callable[[Array, Array | None], Array],
) -> Float[Array, "bags *dim"]:
    """Sum the rows of bags at their owners, then the owners' sums on the device of each bag.

    Args:
      placement: Where the rows are.
      positions: The stored position of each id, bag by bag; `stored_rows` adds nothing.
      factors: A weight for each id, or None.
      length: The number of ids of a bag.
      terms: Called as `terms(local, factors)` on the owner, with positions in its block; returns the term that each
        row adds to its bag, and zero for row `block`.

    Returns:
      One sum for each bag.
    """
    capacity, bags = placement.capacity(positions.shape[0]), positions.shape[0] // length
    of_row = jax.eval_shape(terms, positions[:1], None if factors is None else factors[:1])
    sums = jnp.zeros((placement.shards, bags, *of_row.shape[1:]), of_row.dtype)
    exists = positions < placement.stored_rows

    def turn(route: _Route, number: int | Int[Array, ""], sums: Array) -> Array:
        places, exists = _outgoing(route, number, capacity)
        local = jnp.where(exists, route.positions[places] % placement.block, placement.block)
        ids = route.places[places]
        local, of = _swapped(placement, local), _swapped(placement, ids // length)
        sent = None if factors is None else _swapped(placement, factors[ids])
        return sums.at[jnp.arange(placement.shards)[:, None], of].add(terms(local, sent))

    plan = functools.partial(_ordered_route, placement, positions, exists)
    owner = positions // max(placement.block, 1)
    sums = _in_rounds(placement, owner, exists, capacity, plan, turn, sums, expected=True)
    return _swapped(placement, sums).sum(0)


def rounds_of(placement: Placement, positions: Int[Array, " ids"]) -> Int32[Array, ""]:
    """The number of rounds that `fetch` takes for some positions; the same on all devices."""
    if placement.shards == 1 or positions.shape[0] == 0:
        return jnp.ones((), jnp.int32)
    _, _, is_foreign = _owners(placement, positions)
    first = _distinct_route(placement, positions, is_foreign).first
    return jnp.maximum(_rounds(placement, jnp.diff(first), placement.capacity(positions.shape[0])), 1)


def _in_rounds(
    placement: Placement,
    owner: Int[Array, " ids"],
    is_foreign: Bool[Array, " ids"],
    capacity: int,
    plan: Callable[[], _Route],
    turn: Callable[[_Route, int | Array, Array], Array],
    carry: Array,
    expected: bool,
) -> Array:
    """Call `turn` for each round that is needed; all rounds but an expected first one are behind a condition.

    The loop is a `scan` over the largest possible number of rounds, since JAX cannot transpose a `while_loop`. A `cond`
    skips rounds that are not needed.
    """
    most = -(-owner.shape[0] // capacity)
    done = int(expected)
    route: Any = plan() if expected else None
    if expected:
        carry = turn(route, 0, carry)
        if most == 1:
            return carry
        rounds = _rounds(placement, jnp.diff(route.first), capacity)
    else:
        counts = jnp.zeros(placement.shards, jnp.int32).at[owner].add(is_foreign.astype(jnp.int32), mode="drop")
        rounds = _rounds(placement, counts, capacity)

    def further(carry: Array) -> Array:
        of_further = route if expected else plan()

        def step(carry: Array, number: Array) -> tuple[Array, None]:
            take = functools.partial(turn, of_further, number)
            return jax.lax.cond(number < rounds, take, lambda carry: carry, carry), None

        return jax.lax.scan(step, carry, jnp.arange(done, most, dtype=jnp.int32))[0]

    return jax.lax.cond(rounds > done, further, lambda carry: carry, carry)


def _rounds(placement: Placement, counts: Int[Array, " shards"], capacity: int) -> Int32[Array, ""]:
    """The number of rounds for the largest count of all devices, so that all devices take part in each round."""
    rounds = (jnp.max(counts) + (capacity - 1)) // capacity
    return jax.lax.pmax(rounds.astype(jnp.int32), placement.mesh.axis_names)


def _ordered_route(placement: Placement, positions: Int[Array, " ids"], is_foreign: Bool[Array, " ids"]) -> _Route:
    """Sort the positions of other owners, duplicates included."""
    positions = jnp.where(is_foreign, positions, placement.stored_rows)
    order = jnp.argsort(positions)  # stable, so that sums are the same each time
    positions = positions[order]
    return _Route(positions, order.astype(jnp.int32), _first_of_owners(placement, positions))


def _distinct_route(placement: Placement, positions: Int[Array, " ids"], is_foreign: Bool[Array, " ids"]) -> _Route:
    """Find the distinct positions of other owners, and for each id the index of its position among them."""
    ordered, order, _ = _ordered_route(placement, positions, is_foreign)
    starts = jnp.concatenate([jnp.ones_like(ordered[:1], bool), ordered[1:] != ordered[:-1]])
    number = jnp.cumsum(starts.astype(jnp.int32)) - 1
    distinct = jnp.full_like(ordered, placement.stored_rows).at[number].set(ordered, indices_are_sorted=True)
    return _Route(distinct, jnp.zeros_like(number).at[order].set(number), _first_of_owners(placement, distinct))


def _first_of_owners(placement: Placement, ordered: Int[Array, " ids"]) -> Int32[Array, " shards_and_1"]:
    edges = jnp.arange(placement.shards + 1, dtype=ordered.dtype) * placement.block
    return jnp.searchsorted(ordered, edges).astype(jnp.int32)


def _outgoing(
    route: _Route, number: int | Int[Array, ""], capacity: int
) -> tuple[Int32[Array, "shards capacity"], Bool[Array, "shards capacity"]]:
    """For each owner, the indices into a route that go to it in round `number`, and which of them exist."""
    places = route.first[:-1, None] + number * capacity + jnp.arange(capacity, dtype=jnp.int32)[None, :]
    exists = places < route.first[1:, None]
    return jnp.where(exists, places, 0), exists


def _sent(
    placement: Placement,
    local: Int[Array, "shards capacity"],
    places: Int32[Array, "shards capacity"],
    exists: Bool[Array, "shards capacity"],
    values: Shaped[Array, "ids *dim"],
) -> tuple[Int[Array, " received"], Shaped[Array, "received *dim"]]:
    """Exchange values and their positions in the owner's block; zero where `exists` is False."""
    rows = jnp.where(jnp.expand_dims(exists, tuple(range(2, values.ndim + 1))), values[places], 0)
    local, rows = _swapped(placement, local), _swapped(placement, rows)
    return jnp.ravel(local), jnp.reshape(rows, (-1, *values.shape[1:]))


def _swapped(placement: Placement, parts: Shaped[Array, "shards ..."]) -> Shaped[Array, "shards ..."]:
    """Send `parts[d]` to device `d`; returns the parts that all devices sent here."""
    return jax.lax.all_to_all(parts, placement.axes, 0, 0, tiled=True)


def start_of_device(placement: Placement, dtype: DTypeLike) -> Int[Array, ""]:
    """The stored position of this device's first row."""
    number = jax.lax.axis_index(placement.axes) if placement.axes else 0
    return jnp.asarray(number, dtype) * placement.block


def _owners(
    placement: Placement, positions: Int[Array, " ids"]
) -> tuple[Int[Array, " ids"], Int[Array, " ids"], Bool[Array, " ids"]]:
    """For each position: its index in this device's block (maybe out of bounds), its owner, whether that is another."""
    local = positions - start_of_device(placement, positions.dtype)
    is_foreign = (positions < placement.stored_rows) & ((local < 0) | (local >= placement.block))
    return local, positions // max(placement.block, 1), is_foreign


def _at(block: Shaped[Array, "block *dim"], local: Int[Array, "*batch"]) -> Shaped[Array, "*batch_dim"]:
    """Read rows of this device; an index out of bounds reads an arbitrary row."""
    return block.at[jnp.clip(local, 0, block.shape[0] - 1)].get(mode="promise_in_bounds")
