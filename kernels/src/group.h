// The positions of each distinct id of a part, found by a small hash table.
#pragma once

#include "partition.h"

namespace embax::EMBAX_ISA {

// Distinct ids in the order in which they first occur, and the positions of each in rising order.
struct Groups {
  int64_t number = 0;
  int64_t* distinct = nullptr;  // (number,)
  uint32_t* starts = nullptr;   // (number + 1,) into order
  uint32_t* order = nullptr;    // positions
  const uint32_t* begin(int64_t group) const { return order + starts[group]; }
  int64_t count(int64_t group) const { return starts[group + 1] - starts[group]; }

  // Takes memory for so many positions.
  void carve(Carver& carver, int64_t size) {
    distinct = carver.array<int64_t>(size);
    starts = carver.array<uint32_t>(size + 2);
    order = carver.array<uint32_t>(size);
  }
};

// Memory for the work on one part; its contents are not needed afterwards.
struct GroupMemory {
  uint32_t* positions;
  uint32_t* owners;
  uint32_t* slots;
  int bits = 4;

  void carve(Carver& carver, int64_t size) {
    while ((int64_t{1} << bits) < 2 * size) ++bits;
    positions = carver.array<uint32_t>(size);
    owners = carver.array<uint32_t>(size);
    slots = carver.array<uint32_t>(int64_t{1} << bits);
  }
};

template <typename Id>
void group_ids(const Partition& partition, int64_t part, const Id* ids, const GroupMemory& memory, Groups& groups) {
  constexpr uint32_t kFree = 0xffffffff;
  constexpr int64_t kAhead = 16;
  const int64_t size = partition.size(part);
  // The bits of the hash below the bits that chose the part.
  const int shift = 64 - partition.part_bits() - memory.bits;
  const uint64_t mask = (uint64_t{1} << memory.bits) - 1;
  uint32_t *positions = memory.positions, *slots = memory.slots, *starts = groups.starts;
  partition.collect(part, positions);
  std::memset(slots, 0xff, sizeof(uint32_t) << memory.bits);
  std::memset(starts, 0, static_cast<size_t>(size + 2) * sizeof(uint32_t));
  uint32_t number = 0;
  for (int64_t k = 0; k < size; ++k) {
    if (k + kAhead < size) __builtin_prefetch(slots + (mixed(ids[positions[k + kAhead]]) >> shift & mask), 1, 3);
    const int64_t id = ids[positions[k]];
    uint64_t at = mixed(id) >> shift & mask;
    while (slots[at] != kFree && groups.distinct[slots[at]] != id) at = (at + 1) & mask;
    if (slots[at] == kFree) {
      slots[at] = number;
      groups.distinct[number++] = id;
    }
    memory.owners[k] = slots[at];
    ++starts[slots[at] + 2];
  }
  // starts[d + 1] is where the positions of d begin, and moves to their end.
  for (uint32_t d = 2; d <= number; ++d) starts[d] += starts[d - 1];
  for (int64_t k = 0; k < size; ++k) groups.order[starts[memory.owners[k] + 1]++] = positions[k];
  groups.number = number;
}

// Not inlined, so that all kinds of sums share one copy.
__attribute__((noinline)) inline void group(const Partition& partition, int64_t part, const GroupMemory& memory,
                                            Groups& groups) {
  with_ids(partition.ids(), [&](auto* ids) { group_ids(partition, part, ids, memory, groups); });
}

}  // namespace embax::EMBAX_ISA
