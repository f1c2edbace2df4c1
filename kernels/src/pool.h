// pool: the sum of the rows of each bag.
#pragma once

#include <limits>

#include "sum.h"

namespace embax::EMBAX_ISA {

// The rows of up to so many ids are added up one after the other, as in XLA; the sums of longer bags in twice the
// precision.
constexpr int64_t kChunk = 64;

template <typename T>
class BagSum {
 public:
  using A = Accumulator<T>;

  BagSum(const Table& table, Ids ids, const Bags& bags, const void* fill)
      : table_(static_cast<const T*>(table.data)),
        rows_(table.rows),
        width_(table.width),
        ids_(ids),
        skip_(ids.wide ? std::numeric_limits<int64_t>::min() : std::numeric_limits<int32_t>::min()),
        bags_(bags),
        length_(bags.number ? ids.number / bags.number : 0),
        fill_(static_cast<const T*>(fill)) {}

  static int64_t memory(int64_t width) { return GradientSum<T>::memory(width); }

  // Where the ids of a bag begin; offsets outside of the ids are clipped.
  int64_t start(int64_t bag) const {
    return bags_.offsets ? larger(0, smaller(bags_.offsets[bag], ids_.number)) : bag * length_;
  }

  // Sums bags; the first one's is written to `out`, and the others behind it.
  void some(int64_t from, int64_t to, A* out, A* memory) const {
    const int64_t row_bytes = width_ * static_cast<int64_t>(sizeof(T)), ahead = distance(row_bytes);
    const int64_t last = start(to);
    for (int64_t i = start(from); i < smaller(start(from) + ahead, last); ++i) fetch_to_read(row(ids_[i]), row_bytes);
    for (int64_t bag = from; bag < to; ++bag) {
      const int64_t begin = start(bag), end = start(bag + 1);
      A* sum = out + (bag - from) * width_;
      if (end - begin <= kChunk) {
        chunk(begin, end, last, sum);
        continue;
      }
      WideRow<A> wide(memory + ((width_ + 15) & ~int64_t{15}), width_);
      wide.clear();
      for (int64_t at = begin; at < end; at += kChunk) {
        chunk(at, smaller(at + kChunk, end), last, memory);
        wide.add(memory);
      }
      wide.get(sum);
    }
  }

 private:
  const T* row(int64_t id) const { return has_row(id, rows_) ? table_ + id * width_ : fill_; }

  void chunk(int64_t begin, int64_t end, int64_t last, A* out) const {
    const int64_t row_bytes = width_ * static_cast<int64_t>(sizeof(T)), ahead = distance(row_bytes);
    const T* rows[kChunk];
    A factors[kChunk];
    const bool scaled = bags_.factors.data;
    int64_t count = 0;
    for (int64_t i = begin; i < end; ++i) {
      if (i + ahead < last) fetch_to_read(row(ids_[i + ahead]), row_bytes);
      if (ids_[i] == skip_) continue;
      rows[count] = row(ids_[i]);
      if (scaled) factors[count] = factor_of<A>(bags_.factors, i);
      ++count;
    }
    add_up(rows, scaled ? factors : nullptr, count, width_, out);
  }

  const T* table_;
  int64_t rows_, width_;
  Ids ids_;
  int64_t skip_;
  Bags bags_;
  int64_t length_;
  const T* fill_;
};

inline void pool(const Pool& threads, Table table, Ids ids, const Bags& bags, const void* fill, const Parts& out) {
  with_dtype(table.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    using A = Accumulator<T>;
    const BagSum<T> sum(table, ids, bags, fill);
    const int64_t ids_each = bags.number ? ids.number / bags.number + 1 : 1;
    in_pieces(threads, bags.number, ids_each * table.width * static_cast<int64_t>(sizeof(T)),
              [&](int64_t from, int64_t to) {
                auto* memory = reinterpret_cast<A*>(scratch(Holder::part, sum.memory(table.width) * sizeof(A)));
                in_parts(out, from, to, [&](int64_t begin, int64_t end, void* sums, int64_t at) {
                  sum.some(begin, end, static_cast<A*>(sums) + at * table.width, memory);
                });
              });
  });
}

}  // namespace embax::EMBAX_ISA
