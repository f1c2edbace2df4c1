// set and add: write rows in place. Each row belongs to one part, so duplicates are written in order.
#pragma once

#include "combine.h"

namespace embax::EMBAX_ISA {

// The positions of a part in rising order.
inline const uint32_t* positions_of(const Partition& partition, int64_t part) {
  auto* positions = reinterpret_cast<uint32_t*>(scratch(Holder::part, partition.size(part) * sizeof(uint32_t)));
  partition.collect(part, positions);
  return positions;
}

inline void set(const Pool& pool, void* table, int64_t rows, int64_t row_bytes, Ids ids, const void* values) {
  if (row_bytes == 0) return;
  char* into = static_cast<char*>(table);
  const char* from = static_cast<const char*>(values);
  const int64_t ahead = distance(row_bytes);
  for_each_part(pool, ids, {rows}, row_bytes, [&](const Partition& partition, int64_t part) {
    const uint32_t* positions = positions_of(partition, part);
    const int64_t size = partition.size(part);
    for (int64_t k = 0; k < size; ++k) {
      if (k + ahead < size) fetch_to_write(into + ids[positions[k + ahead]] * row_bytes, row_bytes);
      std::memcpy(into + ids[positions[k]] * row_bytes, from + positions[k] * row_bytes, row_bytes);
    }
  });
}

template <typename T, typename A>
inline void add_row(T* row, const A* values, int64_t width) {
  for_columns<Accumulator<T>>(width, [&](int64_t j, auto kind) {
    using X = decltype(kind);
    put(row + j, get<X>(row + j) + get<X>(values + j));
  });
}

// Duplicates are added one after the other.
template <typename T>
void add_wide(const Pool& pool, T* table, int64_t rows, int64_t width, Ids ids, const T* values) {
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T)), ahead = distance(row_bytes);
  for_each_part(pool, ids, {rows}, row_bytes, [&](const Partition& partition, int64_t part) {
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

// Memory for the work on a part, if duplicates are summed.
template <typename A>
struct PartMemory {
  GroupMemory memory;
  Groups groups;
  A *sums = nullptr, *own = nullptr;

  PartMemory(const Partition& partition, int64_t part, int64_t sum_size, int64_t width) {
    Carver carver;
    carve(carver, partition.size(part), sum_size, width);
    carver.start(scratch(Holder::part, carver.used()));
    carve(carver, partition.size(part), sum_size, width);
    group(partition, part, memory, groups);
  }

 private:
  void carve(Carver& carver, int64_t size, int64_t sum_size, int64_t width) {
    memory.carve(carver, size);
    groups.carve(carver, size);
    sums = carver.array<A>(sum_size);
    own = carver.array<A>(width);
  }
};

// Duplicates are summed in a wider dtype, and the row is rounded once.
template <typename T>
void add_narrow(const Pool& pool, T* table, int64_t rows, int64_t width, Ids ids, const T* values) {
  using A = Accumulator<T>;
  const int64_t row_bytes = width * static_cast<int64_t>(sizeof(T)), ahead = distance(row_bytes);
  const GradientSum<T> sum({values, ids.number, width, Dtype::float32, 1, nullptr, {nullptr, false}});
  for_each_part(pool, ids, {rows}, row_bytes, [&](const Partition& partition, int64_t part) {
    const PartMemory<A> of(partition, part, sum.memory(width), width);
    const Groups& groups = of.groups;
    for_each_sum(groups, sum, width, of.sums, [&](int64_t d, const A* row) {
      if (d + ahead < groups.number) fetch_to_write(table + groups.distinct[d + ahead] * width, row_bytes);
      add_row(table + groups.distinct[d] * width, row, width);
    });
  });
}

inline void add(const Pool& pool, Table table, Ids ids, const void* values) {
  if (table.width == 0) return;
  with_dtype(table.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* into = static_cast<T*>(table.data);
    const auto* from = static_cast<const T*>(values);
    if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
      add_wide(pool, into, table.rows, table.width, ids, from);
    } else {
      add_narrow(pool, into, table.rows, table.width, ids, from);
    }
  });
}

}  // namespace embax::EMBAX_ISA
