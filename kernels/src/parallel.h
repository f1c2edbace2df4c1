// Work in pieces on the threads of a pool, and rows fetched ahead of their turn.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels.h"

namespace embax::EMBAX_ISA {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <typename F>
inline void in_parallel(const Pool& pool, int64_t tasks, F&& body) {
  if (tasks <= 1 || pool.threads <= 1) {
    for (int64_t k = 0; k < tasks; ++k) body(k);
    return;
  }
  using Plain = std::remove_reference_t<F>;
  pool.run(pool.handle, tasks, &body, [](void* context, int64_t k) { (*static_cast<Plain*>(context))(k); });
}

// Work on fewer bytes is done before another thread would have started.
constexpr int64_t kAlone = int64_t{1} << 17;

// Calls body(from, to) on pieces of [0, number), each of about so many bytes. Results do not depend on the pieces.
template <typename F>
inline void in_pieces(const Pool& pool, int64_t number, int64_t bytes_each, F&& body) {
  const int64_t bytes = number * larger(bytes_each, 1);
  int64_t tasks = 1;
  if (pool.threads > 1 && bytes >= kAlone) {
    tasks = larger(1, smaller(number, smaller(bytes / (kAlone / 2), int64_t{8} * pool.threads)));
  }
  in_parallel(pool, tasks, [&](int64_t k) {
    const int64_t from = number * k / tasks, to = number * (k + 1) / tasks;
    if (from < to) body(from, to);
  });
}

// Calls body(from, to, data, at) for the results that are in both [from, to) and an array; the first one is number `at`
// of the array.
template <typename F>
inline void in_parts(const Parts& parts, int64_t from, int64_t to, F&& body) {
  for (int64_t k = 0; k < parts.number; ++k) {
    const int64_t begin = larger(from, parts.firsts[k]), end = smaller(to, parts.firsts[k] + parts.sizes[k]);
    if (begin < end) body(begin, end, parts.data[k], begin - parts.firsts[k]);
  }
}

// How many rows ahead to fetch: about as many as a processor core can have in flight.
inline int64_t distance(int64_t row_bytes, int64_t budget = 4096) {
  return larger(2, smaller(64, budget / larger(row_bytes, 1)));
}

// How much of a row to fetch; the hardware fetches the rest of a long row by itself.
constexpr int64_t kFetched = 1024;

template <int kWrite>
inline void fetch(const void* row, int64_t bytes) {
  const char* p = static_cast<const char*>(row);
  const int64_t length = smaller(bytes, kFetched);
  for (int64_t k = 0; k < length; k += 64) __builtin_prefetch(p + k, kWrite, 3);
  if (length > 0) __builtin_prefetch(p + length - 1, kWrite, 3);
}

inline void fetch_to_read(const void* row, int64_t bytes) { fetch<0>(row, bytes); }
inline void fetch_to_write(const void* row, int64_t bytes) { fetch<1>(row, bytes); }

}  // namespace embax::EMBAX_ISA
