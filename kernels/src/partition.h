// Positions of ids, split into parts by their rows: threads work on different rows, and duplicates are in one part.
//
// For example, the ids 7 3 7 9 in 2 parts, where the first part has the rows 3 and 7: the first part has the positions
// 0 1 2, the second one the position 3. Blocks of ids are split in parallel; a part then has one segment of each block,
// in rising order. If a result shows the order of parts, their number depends on the work, never on the threads.
#pragma once

#include <cstring>

#include "memory.h"
#include "parallel.h"
#include "vectors.h"

namespace embax::EMBAX_ISA {

inline uint64_t mixed(int64_t id) { return static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15ull; }

// Which ids count: ids with a row and, if bags hold the gradients, with a bag.
struct Counted {
  int64_t rows;
  const int32_t* bag_of = nullptr;
  int64_t bags = 0;
  bool operator()(int64_t id, int64_t i) const { return has_row(id, rows) && (!bag_of || has_row(bag_of[i], bags)); }
};

class Partition {
 public:
  static constexpr int64_t kMost = 256;
  static constexpr int64_t kRanges = 1024;

  // `row_bytes`: the bytes that are read and written for an id. `most`: the largest number of parts.
  Partition(Ids ids, int64_t row_bytes, int64_t most = kMost) : ids_(ids) {
    const int64_t number = ids.number, bytes = number * larger(row_bytes, 1);
    const int64_t wanted = smaller(most, smaller(number / 16, larger(bytes / kAlone, number / 2048)));
    while ((int64_t{2} << bits_) <= wanted) ++bits_;
    block_ = bits_ ? larger(2048, (number + kMost - 1) / kMost) : larger(1, number);
    blocks_ = (number + block_ - 1) / block_;
  }

  int64_t parts() const { return int64_t{1} << bits_; }

  // Lays out the memory of this object.
  void carve(Carver& carver) {
    positions_ = carver.array<uint32_t>(ids_.number);
    starts_ = carver.array<uint32_t>(blocks_ * (parts() + 1));
    firsts_ = carver.array<int64_t>(parts() + 1);
  }

  // `by_ranges`: a part may have a range of rows instead of rows here and there.
  void split(const Pool& pool, const Counted& counts, bool by_ranges = false) {
    with_ids(ids_, [&](auto* ids) {
      by_ranges = by_ranges && bits_ && find_ranges(ids, counts);
      in_parallel(pool, blocks_, [&](int64_t block) {
        if (!bits_) {
          filter_block(block, ids, counts);
        } else if (by_ranges) {
          split_block(block, ids, counts, [&](int64_t id) { return int64_t{ranges_[id >> range_shift_]}; });
        } else {
          split_block(block, ids, counts, [&](int64_t id) { return static_cast<int64_t>(mixed(id) >> (64 - bits_)); });
        }
      });
    });
    firsts_[0] = 0;
    for (int64_t part = 0; part < parts(); ++part) {
      int64_t size = 0;
      for (int64_t block = 0; block < blocks_; ++block) size += segment_size(block, part);
      firsts_[part + 1] = firsts_[part] + size;
    }
  }

  // How many ids count: in all parts before this one, in this one, and in all.
  int64_t first(int64_t part) const { return firsts_[part]; }
  int64_t size(int64_t part) const { return firsts_[part + 1] - firsts_[part]; }
  int64_t total() const { return firsts_[parts()]; }

  // Writes the positions of a part in rising order.
  void collect(int64_t part, uint32_t* out) const {
    for (int64_t block = 0; block < blocks_; ++block) {
      const int64_t size = segment_size(block, part);
      const uint32_t* from = positions_ + block * block_ + starts_[block * (parts() + 1) + part];
      if (size) std::memcpy(out, from, static_cast<size_t>(size) * sizeof(uint32_t));
      out += size;
    }
  }

  const Ids& ids() const { return ids_; }
  int part_bits() const { return bits_; }

 private:
  int64_t segment_size(int64_t block, int64_t part) const {
    const uint32_t* starts = starts_ + block * (parts() + 1) + part;
    return starts[1] - starts[0];
  }

  // Finds ranges of rows with about as many ids in each, by a sample of the ids. Returns false if there are none, as for
  // rows in the order of their frequency, or if ids that follow each other are in different ranges.
  template <typename Id>
  bool find_ranges(const Id* ids, const Counted& counts) {
    while ((counts.rows - 1) >> range_shift_ >= kRanges) ++range_shift_;
    const int64_t every = larger(1, ids_.number / larger(4096, 64 * parts()));
    int64_t sizes[kRanges] = {}, total = 0;
    for (int64_t i = 0; i < ids_.number; i += every) {
      if (!counts(ids[i], i)) continue;
      ++sizes[ids[i] >> range_shift_];
      ++total;
    }
    int64_t before = 0, size = 0, most = 0;
    for (int64_t k = 0; k < kRanges; ++k) {
      const int64_t part = smaller((before + sizes[k] / 2) * parts() / larger(1, total), parts() - 1);
      if (k && part != ranges_[k - 1]) size = 0;
      ranges_[k] = static_cast<uint8_t>(part);
      before += sizes[k];
      size += sizes[k];
      most = larger(most, size);
    }
    if (2 * most * parts() > 3 * total) return false;
    int64_t changes = 0, last = -1;
    for (int64_t i = 0; i < ids_.number; i += every) {
      if (!counts(ids[i], i)) continue;
      const int64_t part = ranges_[ids[i] >> range_shift_];
      changes += part != last;
      last = part;
    }
    return 4 * changes <= total;
  }

  // A counting sort by part; ids that do not count come last.
  template <typename Id, typename F>
  void split_block(int64_t block, const Id* ids, const Counted& counts, F&& part_with_row) {
    const int64_t from = block * block_, to = smaller(from + block_, ids_.number), parts = this->parts();
    uint32_t sizes[kMost + 1] = {};
    uint32_t* starts = starts_ + block * (parts + 1);
    const auto part_of = [&](int64_t i) {
      const int64_t id = ids[i];
      return counts(id, i) ? part_with_row(id) : parts;
    };
    for (int64_t i = from; i < to; ++i) ++sizes[part_of(i)];
    uint32_t sum = 0;
    for (int64_t part = 0; part <= parts; ++part) {
      starts[part] = sum;
      sum += sizes[part];
      sizes[part] = starts[part];
    }
    for (int64_t i = from; i < to; ++i) positions_[from + sizes[part_of(i)]++] = static_cast<uint32_t>(i);
  }

  template <typename Id>
  void filter_block(int64_t block, const Id* ids, const Counted& counts) {
    const int64_t from = block * block_, to = smaller(from + block_, ids_.number);
    uint32_t size = 0;
    for (int64_t i = from; i < to; ++i) {
      positions_[from + size] = static_cast<uint32_t>(i);
      size += counts(ids[i], i);
    }
    starts_[2 * block] = 0;
    starts_[2 * block + 1] = size;
  }

  Ids ids_;
  int64_t block_ = 1, blocks_ = 0;
  int bits_ = 0;  // of the number of a part
  int range_shift_ = 0;
  uint8_t ranges_[kRanges];  // the part of the rows from k << range_shift_ on
  uint32_t* positions_ = nullptr;
  uint32_t* starts_ = nullptr;  // of the segments, from the start of their block
  int64_t* firsts_ = nullptr;
};

// From so many ids on, ranges of rows are worth a search for them; the random calls under sanitizers have fewer ids.
#ifdef EMBAX_SANITIZE
constexpr int64_t kManyIds = 256;
#else
constexpr int64_t kManyIds = int64_t{1} << 15;
#endif

// Calls body(partition, part) for each part of the ids, on any thread; for work in place, whose result does not show
// the order of parts. With fewer parts, more values and gradients are read one after the other; with too many ids in a
// part, the hash table that groups them does not fit into the cache. There are four parts for each thread, so that the
// threads end nearly together though parts differ in their work.
//
// Ids of many tables that are stored as one come table by table. Then a part has a range of rows: its gradients are next
// to each other, too, and a step takes a quarter less than if rows were dealt out by their hashes.
template <typename F>
inline void for_each_part(const Pool& pool, Ids ids, const Counted& counts, int64_t row_bytes, F&& body) {
  const int64_t for_threads = pool.threads > 1 ? int64_t{4} * pool.threads : 1;
  Partition partition(ids, row_bytes, smaller(Partition::kMost, larger(for_threads, ids.number / 16384)));
  Carver carver;
  partition.carve(carver);
  carver.start(scratch(Holder::call, carver.used()));
  partition.carve(carver);
  partition.split(pool, counts, ids.number >= kManyIds);
  in_parallel(pool, partition.parts(), [&](int64_t part) { body(partition, part); });
}

}  // namespace embax::EMBAX_ISA
