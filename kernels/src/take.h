// take: read rows by ids. Bytes are copied, so the dtype does not matter.
#pragma once

#include <cstring>

#include "parallel.h"
#include "vectors.h"

namespace embax::EMBAX_ISA {

// Copies rows of kRow bytes, or of any size if kRow is 0: the first one to `out`, the others behind it. A copy of constant
// size is compiled without a call.
template <int kRow, typename Id>
void take_some(const char* table, int64_t rows, int64_t row_bytes, const Id* ids, int64_t from_end, const char* fill,
               char* out, int64_t from, int64_t to) {
  const size_t bytes = kRow ? kRow : static_cast<size_t>(row_bytes);
  const int64_t ahead = distance(row_bytes);
  const auto row = [&](int64_t i) {
    const int64_t id = Ids::row_of(ids[i], from_end);
    return has_row(id, rows) ? table + id * static_cast<int64_t>(bytes) : fill;
  };
  for (int64_t i = from; i < smaller(from + ahead, to); ++i) fetch_to_read(row(i), bytes);
  int64_t i = from;
  for (; i + ahead < to; ++i) {
    fetch_to_read(row(i + ahead), bytes);
    std::memcpy(out + (i - from) * bytes, row(i), bytes);
  }
  for (; i < to; ++i) std::memcpy(out + (i - from) * bytes, row(i), bytes);
}

template <typename Id>
void take_ids(const char* table, int64_t rows, int64_t row_bytes, const Id* ids, int64_t from_end, const char* fill,
              char* out, int64_t from, int64_t to) {
  switch (row_bytes) {
#define EMBAX_OF(bytes) \
  case bytes: return take_some<bytes>(table, rows, row_bytes, ids, from_end, fill, out, from, to)
    EMBAX_OF(2);
    EMBAX_OF(4);
    EMBAX_OF(8);
    EMBAX_OF(16);
    EMBAX_OF(32);
    EMBAX_OF(64);
    EMBAX_OF(128);
    EMBAX_OF(256);
    EMBAX_OF(512);
#undef EMBAX_OF
    default: return take_some<0>(table, rows, row_bytes, ids, from_end, fill, out, from, to);
  }
}

inline void take(const Pool& pool, const void* table, int64_t rows, int64_t row_bytes, Ids ids, const void* fill,
                 const Parts& out) {
  if (row_bytes == 0) return;
  with_ids(ids, [&](auto* id) {
    in_pieces(pool, ids.number, row_bytes, [&](int64_t from, int64_t to) {
      in_parts(out, from, to, [&](int64_t begin, int64_t end, void* taken, int64_t at) {
        take_ids(static_cast<const char*>(table), rows, row_bytes, id, ids.from_end,
                 static_cast<const char*>(fill), static_cast<char*>(taken) + at * row_bytes, begin, end);
      });
    });
  });
}

}  // namespace embax::EMBAX_ISA
