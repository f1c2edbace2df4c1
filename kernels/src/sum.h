// Sums of rows with bounded errors. The order of additions depends only on the number of rows.
//
// A few rows are added up one after the other in registers. Many rows are split into groups of a few, and the sums of
// the groups are added up in twice the precision: the error is a few roundings for any number of rows.
#pragma once

#include <cmath>
#include <cstring>

#include "memory.h"
#include "parallel.h"
#include "vectors.h"

namespace embax::EMBAX_ISA {

// out = the sum of rows[k] * factors[k], starting at zero, for columns of kVectors vectors in registers.
template <int kVectors, bool kScaled, typename T, typename A>
inline void add_up_columns(const T* const* rows, const A* factors, int64_t count, int64_t at, A* out) {
  Vector<A> sums[kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
    const T* row = rows[k] + at;
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> x = load(row + v * kLanes<A>);
      sums[v] += kScaled ? x * factors[k] : x;
    }
  }
  for (int v = 0; v < kVectors; ++v) store(out + at + v * kLanes<A>, sums[v]);
}

template <bool kScaled, typename T, typename A>
inline void add_up_rows(const T* const* rows, const A* factors, int64_t count, int64_t width, A* out) {
  constexpr int64_t lanes = kLanes<A>;
  int64_t at = 0;
  for (; at + 8 * lanes <= width; at += 8 * lanes) add_up_columns<8, kScaled>(rows, factors, count, at, out);
  if (at + 4 * lanes <= width) {
    add_up_columns<4, kScaled>(rows, factors, count, at, out);
    at += 4 * lanes;
  }
  if (at + 2 * lanes <= width) {
    add_up_columns<2, kScaled>(rows, factors, count, at, out);
    at += 2 * lanes;
  }
  if (at + lanes <= width) {
    add_up_columns<1, kScaled>(rows, factors, count, at, out);
    at += lanes;
  }
  for (; at < width; ++at) {
    A sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      const A x = load_one(rows[k] + at);
      sum += kScaled ? x * factors[k] : x;
    }
    store_one(out + at, sum);
  }
}

// `factors` may be null. Not inlined, so that all kinds of work share one copy.
template <typename T, typename A>
__attribute__((noinline)) void add_up(const T* const* rows, const A* factors, int64_t count, int64_t width, A* out) {
  if (factors) {
    add_up_rows<true>(rows, factors, count, width, out);
  } else {
    add_up_rows<false>(rows, factors, count, width, out);
  }
}

// A row of sums in twice the precision of A. Its memory is 2 * width numbers of A, aligned for double.
template <typename A>
class WideRow;

template <>
class WideRow<float> {
 public:
  WideRow(float* memory, int64_t width) : sums_(reinterpret_cast<double*>(memory)), width_(width) {}
  void clear() { std::memset(sums_, 0, static_cast<size_t>(width_) * sizeof(double)); }
  void add(const float* __restrict row) {
    double* __restrict sums = sums_;
    for (int64_t j = 0; j < width_; ++j) sums[j] += static_cast<double>(row[j]);
  }
  void get(float* __restrict out) const {
    const double* __restrict sums = sums_;
    for (int64_t j = 0; j < width_; ++j) out[j] = static_cast<float>(sums[j]);
  }

 private:
  double* sums_;
  int64_t width_;
};

// By Knuth's sum with its exact error, https://dl.acm.org/doi/book/10.5555/270146, section 4.2.2.
template <>
class WideRow<double> {
 public:
  WideRow(double* memory, int64_t width) : sums_(memory), errors_(memory + width), width_(width) {}
  void clear() { std::memset(sums_, 0, static_cast<size_t>(width_) * 2 * sizeof(double)); }
  void add(const double* __restrict row) {
    double *__restrict sums = sums_, *__restrict errors = errors_;
    for (int64_t j = 0; j < width_; ++j) {
      const double a = sums[j], b = row[j], sum = a + b, part = sum - a;
      errors[j] += (a - (sum - part)) + (b - part);
      sums[j] = sum;
    }
  }
  void get(double* __restrict out) const {
    const double *__restrict sums = sums_, *__restrict errors = errors_;
    // If the sum is infinite, its error would be NaN.
    for (int64_t j = 0; j < width_; ++j) out[j] = std::isfinite(sums[j]) ? sums[j] + errors[j] : sums[j];
  }

 private:
  double *sums_, *errors_;
  int64_t width_;
};

// Up to so many gradients of one row are added up one after the other: the error is at most 7 half units in the last
// place of the sum of their magnitudes. More gradients are added up in groups of 4.
constexpr int64_t kFew = 8, kAtATime = 4;

// Sums of the gradients of one row, as accumulators.
template <typename T>
class GradientSum {
 public:
  using A = Accumulator<T>;

  explicit GradientSum(const Gradients& gradients)
      : data_(static_cast<const T*>(gradients.data)), gradients_(gradients), width_(gradients.width) {}

  const T* row(uint32_t position) const {
    const int64_t length = gradients_.length;
    const int64_t number = length == 1 ? position : length ? position / length : gradients_.bag_of[position];
    return data_ + number * width_;
  }

  void fetch(uint32_t position) const { fetch_to_read(row(position), width_ * static_cast<int64_t>(sizeof(T))); }

  // How many numbers of memory a sum needs: for the sum, and for a row of twice the precision.
  static int64_t memory(int64_t width) { return 3 * width + 16; }

  // Returns the sum: in `memory`, or the gradient itself if there is only one.
  const A* operator()(const uint32_t* positions, int64_t count, A* memory) const {
    const bool scaled = gradients_.factors.data;
    if constexpr (sizeof(T) == sizeof(A)) {
      if (count == 1 && !scaled) return row(positions[0]);
    }
    return sum_of_several(positions, count, memory);
  }

 private:
  __attribute__((noinline)) const A* sum_of_several(const uint32_t* positions, int64_t count, A* memory) const {
    const bool scaled = gradients_.factors.data;
    const T* rows[kFew];
    A factors[kFew];
    const auto gather = [&](int64_t from, int64_t number) {
      for (int64_t k = 0; k < number; ++k) {
        rows[k] = row(positions[from + k]);
        if (scaled) factors[k] = factor_of<A>(gradients_.factors, positions[from + k]);
      }
    };
    A* out = memory;
    const A* scales = scaled ? factors : nullptr;
    if (count <= kFew) {
      gather(0, count);
      add_up(rows, scales, count, width_, out);
      return out;
    }
    WideRow<A> wide(memory + ((width_ + 15) & ~int64_t{15}), width_);
    wide.clear();
    for (int64_t from = 0; from < count; from += kAtATime) {
      const int64_t number = smaller(kAtATime, count - from);
      gather(from, number);
      add_up(rows, scales, number, width_, out);
      wide.add(out);
    }
    wide.get(out);
    return out;
  }

  const T* data_;
  Gradients gradients_;
  int64_t width_;
};

}  // namespace embax::EMBAX_ISA
