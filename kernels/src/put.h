// set and add: rows written in place. Each row belongs to one part, so duplicates meet in order.
#pragma once

#include "combine.h"

namespace embax::EMBAX_ISA {

// Calls body(part, positions, size) for each part of the ids, with its positions in rising order.
template <typename Id, typename F>
inline void for_each_part(const Pool& pool, const Id* ids, int64_t number, int64_t rows, int64_t row_bytes, F&& body) {
  Partition<Id> partition(ids, number, row_bytes);
  Carver carver;
  partition.carve(carver);
  carver.start(scratch(Holder::call, carver.used()));
  partition.carve(carver);
  partition.split(pool, {rows});
  in_parallel(pool, partition.parts(), [&](int64_t part) { body(partition, part); });
}

template <typename Id>
inline uint32_t* positions_of(const Partition<Id>& partition, int64_t part) {
  auto* positions = reinterpret_cast<uint32_t*>(scratch(Holder::part, (partition.size(part) + 1) * sizeof(uint32_t)));
  partition.collect(part, positions);
  return positions;
}

inline void set(const Pool& pool, void* table, int64_t rows, int64_t row_bytes, Ids ids, const void* values) {
  if (row_bytes == 0) return;
  char* into = static_cast<char*>(table);
  const char* from = static_cast<const char*>(values);
  const int64_t ahead = distance(row_bytes);
  with_ids(ids, [&](auto* id) {
    for_each_part(pool, id, ids.number, rows, row_bytes, [&](const auto& partition, int64_t part) {
      const uint32_t* positions = positions_of(partition, part);
      const int64_t size = partition.size(part);
      for (int64_t k = 0; k < size; ++k) {
        if (k + ahead < size) fetch_to_write(into + id[positions[k + ahead]] * row_bytes, row_bytes);
        std::memcpy(into + id[positions[k]] * row_bytes, from + positions[k] * row_bytes, row_bytes);
      }
    });
  });
}

template <typename T, typename A>
inline void add_row(T* row, const A* values, int64_t width) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) store(row + j, load(row + j) + load(values + j));
  for (; j < width; ++j) store_one(row + j, load_one(row + j) + load_one(values + j));
}

// Duplicates are added one after the other.
template <typename T, typename Id>
void add_wide(const Pool& pool, T* table, int64_t rows, int64_t width, const Id* ids, int64_t number, const T* values) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T)), ahead = distance(row_bytes);
  for_each_part(pool, ids, number, rows, row_bytes, [&](const auto& partition, int64_t part) {
    const uint32_t* positions = positions_of(partition, part);
    const int64_t size = partition.size(part);
    for (int64_t k = 0; k < size; ++k) {
      if (k + ahead < size) {
        fetch_to_write(table + ids[positions[k + ahead]] * width, row_bytes);
        fetch_to_read(values + positions[k + ahead] * width, row_bytes);
      }
      add_row(table + ids[positions[k]] * width, values + positions[k] * width, width);
    }
  });
}

// Duplicates are summed in wider numbers, and the row is rounded once.
template <typename T, typename Id>
void add_narrow(const Pool& pool, T* table, int64_t rows, int64_t width, const Id* ids, int64_t number,
                const T* values) {
  using A = Accumulator<T>;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T)), ahead = distance(row_bytes);
  const GradientSum<T> sum({values, number, width, Dtype::float32, 1, nullptr, {nullptr, false}});
  for_each_part(pool, ids, number, rows, row_bytes, [&](const auto& partition, int64_t part) {
    GroupMemory memory;
    Groups<Id> groups;
    A* sums = nullptr;
    const auto carve = [&](Carver& carver) {
      memory.carve(carver, partition.size(part));
      groups.carve(carver, partition.size(part));
      sums = carver.array<A>(sum.memory(width));
    };
    Carver carver;
    carve(carver);
    carver.start(scratch(Holder::part, carver.used()));
    carve(carver);
    group(partition, part, memory, groups);
    for_each_sum(groups, sum, width, sums, [&](int64_t d, const A* row) {
      if (d + ahead < groups.number) fetch_to_write(table + groups.distinct[d + ahead] * width, row_bytes);
      add_row(table + groups.distinct[d] * width, row, width);
    });
  });
}

inline void add(const Pool& pool, Table table, Ids ids, const void* values) {
  if (table.width == 0) return;
  with_ids(ids, [&](auto* id) {
    with_dtype(table.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      auto* into = static_cast<T*>(table.data);
      const auto* from = static_cast<const T*>(values);
      if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
        add_wide(pool, into, table.rows, table.width, id, ids.number, from);
      } else {
        add_narrow(pool, into, table.rows, table.width, id, ids.number, from);
      }
    });
  });
}

}  // namespace embax::EMBAX_ISA
