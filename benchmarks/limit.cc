// What the memory allows: touches the rows of a work, and does nothing else. Threads wait for each other before the
// clock starts, rows are fetched ahead, and arrays are on large pages where the system has them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
enum Mode { kRead, kGather, kUpdate };
constexpr long kAhead = 16;  // rows

struct Work {
  Mode mode;
  int arrays;
  float* const* data;
  const long* widths;
  const int32_t* ids;
  long number;      // of ids
  float* values;    // the rows that are gathered, or their gradients
  long value_rows;  // gradients may be more than ids: those of duplicates
};

float part(const Work& work, long begin, long end) {
  const long width = work.widths[0];
  std::vector<float> sums(width);
  float* __restrict sum = sums.data();
  for (long i = begin; i < end; ++i) {
    const long next = work.ids[std::min(i + kAhead, end - 1)];
    for (int a = 0; a < work.arrays; ++a)
      for (long j = 0; j < work.widths[a]; j += 16) __builtin_prefetch(work.data[a] + next * work.widths[a] + j);
    float* __restrict value = work.values + (i % work.value_rows) * width;
    for (int a = 0; a < work.arrays; ++a) {
      const long w = work.widths[a];
      float* __restrict row = work.data[a] + work.ids[i] * w;
      if (work.mode == kRead) for (long j = 0; j < w; ++j) sum[j] += row[j];
      if (work.mode == kGather) for (long j = 0; j < w; ++j) value[j] = row[j];
      if (work.mode == kUpdate) for (long j = 0; j < w; ++j) row[j] += value[j];
    }
  }
  if (work.mode == kUpdate) {  // this thread's part of the gradients that are left
    const long left = std::max(0L, work.value_rows - work.number);
    const long first = work.number + left * begin / work.number, last = work.number + left * end / work.number;
    for (long i = first; i < last; ++i)
      for (long j = 0; j < width; ++j) sum[j] += work.values[i * width + j];
  }
  float all = 0;
  for (float x : sums) all += x;
  return all;
}

}  // namespace

extern "C" {

// An array of zeros whose pages exist.
float* make_array(long numbers) {
  const size_t page = size_t{2} << 20, bytes = (numbers * sizeof(float) + page - 1) / page * page;
  auto* array = static_cast<float*>(std::aligned_alloc(page, bytes));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (array) madvise(array, bytes, MADV_HUGEPAGE);
#endif
  if (array) std::fill(array, array + numbers, 0.0f);
  return array;
}

void free_array(float* array) { std::free(array); }

// Returns the seconds from when all threads are there until the last one is done.
double touch(int mode, int threads, int arrays, float* const* data, const long* widths, const int32_t* ids, long number,
             float* values, long value_rows) {
  const Work work{static_cast<Mode>(mode), arrays, data, widths, ids, number, values, value_rows};
  std::atomic<int> waiting{threads};
  std::vector<Clock::time_point> begun(threads), done(threads);
  static volatile float sink;
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t)
    pool.emplace_back([&, t] {
      for (--waiting; waiting.load() > 0;) {}
      begun[t] = Clock::now();
      sink = part(work, number * t / threads, number * (t + 1) / threads);
      done[t] = Clock::now();
    });
  for (auto& thread : pool) thread.join();
  const auto first = *std::min_element(begun.begin(), begun.end());
  return std::chrono::duration<double>(*std::max_element(done.begin(), done.end()) - first).count();
}
}
