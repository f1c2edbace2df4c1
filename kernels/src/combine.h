// combine: the sum of the gradients of each distinct id.
#pragma once

#include "group.h"
#include "sum.h"

namespace embax::EMBAX_ISA {

// Calls body(group, sum) for the groups of a part, with gradients fetched ahead of their turn.
template <typename T, typename F>
inline void for_each_sum(const Groups& groups, const GradientSum<T>& sum, int64_t width, Accumulator<T>* memory,
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

// The groups of all parts, in one memory: the number of groups must be known before the first sum is stored.
class AllGroups {
 public:
  AllGroups(Ids ids, int64_t row_bytes) : partition_(ids, row_bytes) {
    Carver carver;
    carve(carver);
    carver.start(scratch(Holder::call, carver.used()));
    carve(carver);
  }

  void find(const Pool& pool, const Counted& counts) {
    partition_.split(pool, counts);
    in_parallel(pool, parts(), [&](int64_t part) {
      GroupMemory memory;
      Carver carver;
      memory.carve(carver, partition_.size(part));
      carver.start(scratch(Holder::part, carver.used()));
      memory.carve(carver, partition_.size(part));
      Groups groups = of(part);
      group(partition_, part, memory, groups);
      numbers_[part] = groups.number;
    });
    places_[0] = 0;
    for (int64_t part = 0; part < parts(); ++part) places_[part + 1] = places_[part] + numbers_[part];
  }

  int64_t parts() const { return partition_.parts(); }
  // How many groups there are: in all parts before this one, in this one, and in all.
  int64_t place(int64_t part) const { return places_[part]; }
  int64_t number() const { return places_[parts()]; }

  Groups of(int64_t part) const {
    const int64_t first = partition_.first(part);
    return {numbers_[part], all_.distinct + first, all_.starts + first + 2 * part, all_.order + first};
  }

 private:
  void carve(Carver& carver) {
    partition_.carve(carver);
    all_.carve(carver, partition_.ids().number + 2 * parts());
    numbers_ = carver.array<int64_t>(parts());
    places_ = carver.array<int64_t>(parts() + 1);
  }

  Partition partition_;
  Groups all_;
  int64_t *numbers_ = nullptr, *places_ = nullptr;
};

template <typename T>
void sums_of(const Groups& groups, const Gradients& gradients, T* out) {
  using A = Accumulator<T>;
  const int64_t width = gradients.width;
  const GradientSum<T> sum(gradients);
  A* memory = reinterpret_cast<A*>(scratch(Holder::part, sum.memory(width) * sizeof(A)));
  for_each_sum(groups, sum, width, memory, [&](int64_t d, const A* row) {
    T* to = out + d * width;
    for_columns<A>(width, [&](int64_t j, auto kind) { put(to + j, get<decltype(kind)>(row + j)); });
  });
}

inline int64_t combine(const Pool& pool, int64_t rows, Ids ids, const Gradients& gradients, void* out_ids,
                       void* out_sums) {
  const int64_t row_bytes = gradients.width * bytes_of(gradients.dtype);
  char* sums = static_cast<char*>(out_sums);
  AllGroups all(ids, row_bytes);
  all.find(pool, {rows, gradients.bag_of, gradients.number});
  in_parallel(pool, all.parts(), [&](int64_t part) {
    const Groups groups = all.of(part);
    with_ids(ids, [&](auto* id) {
      auto* to = static_cast<std::remove_const_t<std::remove_pointer_t<decltype(id)>>*>(out_ids) + all.place(part);
      for (int64_t d = 0; d < groups.number; ++d) to[d] = groups.distinct[d];
    });
    with_dtype(gradients.dtype, [&](auto* type) {
      sums_of(groups, gradients, reinterpret_cast<decltype(type)>(sums + all.place(part) * row_bytes));
    });
  });
  const int64_t number = all.number();
  with_ids(ids, [&](auto* id) {
    using Id = std::remove_const_t<std::remove_pointer_t<decltype(id)>>;
    for (int64_t k = number; k < ids.number; ++k) static_cast<Id*>(out_ids)[k] = static_cast<Id>(rows);
  });
  in_pieces(pool, (ids.number - number) * row_bytes, 1, [&](int64_t from, int64_t to) {
    std::memset(sums + number * row_bytes + from, 0, static_cast<size_t>(to - from));
  });
  return number;
}

}  // namespace embax::EMBAX_ISA
