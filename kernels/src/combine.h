// combine: the sum of the gradients of each distinct id.
#pragma once

#include "group.h"
#include "sum.h"

namespace embax::EMBAX_ISA {

// Calls body(group, sum) for the groups of a part, with gradients fetched ahead of their turn.
template <typename T, typename Id, typename F>
inline void for_each_sum(const Groups<Id>& groups, const GradientSum<T>& sum, int64_t width, Accumulator<T>* memory,
                         F&& body) {
  const int64_t ahead = distance(width * static_cast<int64_t>(sizeof(T)), 2048);
  const int64_t total = groups.number ? groups.starts[groups.number] : 0;
  for (int64_t k = 0; k < smaller(ahead, total); ++k) sum.fetch(groups.order[k]);
  for (int64_t d = 0; d < groups.number; ++d) {
    const int64_t end = smaller(groups.starts[d + 1] + ahead, total);
    for (int64_t k = groups.starts[d] + ahead; k < end; ++k) sum.fetch(groups.order[k]);
    body(d, sum(groups.begin(d), groups.count(d), memory));
  }
}

template <typename T, typename A>
inline void store_row(T* out, const A* row, int64_t width) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) store(out + j, load(row + j));
  for (; j < width; ++j) store_one(out + j, row[j]);
}

template <typename T, typename Id>
int64_t combine_typed(const Pool& pool, int64_t rows, const Id* ids, int64_t number, const Gradients& gradients,
                      Id* out_ids, T* out) {
  using A = Accumulator<T>;
  const int64_t width = gradients.width, row_bytes = width * static_cast<int64_t>(sizeof(T));
  const GradientSum<T> sum(gradients);
  Partition<Id> partition(ids, number, row_bytes);
  const int64_t parts = partition.parts();

  // Groups of all parts in one memory: how many there are must be known before the first sum has its place.
  Groups<Id> all;
  int64_t *numbers = nullptr, *places = nullptr;
  const auto carve = [&](Carver& carver) {
    partition.carve(carver);
    all.carve(carver, number + 2 * parts);
    numbers = carver.array<int64_t>(parts);
    places = carver.array<int64_t>(parts + 1);
  };
  Carver carver;
  carve(carver);
  carver.start(scratch(Holder::call, carver.used()));
  carve(carver);
  const auto groups_of = [&](int64_t part) {
    const int64_t first = partition.first(part);
    return Groups<Id>{0, all.distinct + first, all.starts + first + 2 * part, all.order + first};
  };
  const auto write = [&](const Groups<Id>& groups, int64_t place) {
    A* memory = reinterpret_cast<A*>(scratch(Holder::part, sum.memory(width) * sizeof(A)));
    if (groups.number) std::memcpy(out_ids + place, groups.distinct, static_cast<size_t>(groups.number) * sizeof(Id));
    for_each_sum(groups, sum, width, memory,
                 [&](int64_t d, const A* row) { store_row(out + (place + d) * width, row, width); });
  };

  partition.split(pool, {rows, gradients.bag_of, gradients.number});
  in_parallel(pool, parts, [&](int64_t part) {
    GroupMemory memory;
    Carver own;
    memory.carve(own, partition.size(part));
    own.start(scratch(Holder::part, own.used()));
    memory.carve(own, partition.size(part));
    Groups<Id> groups = groups_of(part);
    group(partition, part, memory, groups);
    numbers[part] = groups.number;
  });
  places[0] = 0;
  for (int64_t part = 0; part < parts; ++part) places[part + 1] = places[part] + numbers[part];
  in_parallel(pool, parts, [&](int64_t part) {
    Groups<Id> groups = groups_of(part);
    groups.number = numbers[part];
    write(groups, places[part]);
  });

  const int64_t distinct = places[parts];
  for (int64_t k = distinct; k < number; ++k) out_ids[k] = static_cast<Id>(rows);
  char* rest = reinterpret_cast<char*>(out + distinct * width);
  in_pieces(pool, (number - distinct) * row_bytes, 1,
            [&](int64_t from, int64_t to) { std::memset(rest + from, 0, static_cast<size_t>(to - from)); });
  return distinct;
}

inline int64_t combine(const Pool& pool, int64_t rows, Ids ids, const Gradients& gradients, void* out_ids,
                       void* out_sums) {
  return with_ids(ids, [&](auto* id) {
    using Id = std::remove_const_t<std::remove_pointer_t<decltype(id)>>;
    return with_dtype(gradients.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      return combine_typed<T>(pool, rows, id, ids.number, gradients, static_cast<Id*>(out_ids),
                              static_cast<T*>(out_sums));
    });
  });
}

}  // namespace embax::EMBAX_ISA
