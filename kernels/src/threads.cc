#include "threads.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "exports.h"
#include "float_mode.h"

namespace embax {
namespace {

std::atomic<int> most_threads{0};  // 0: as many as the pool has
std::atomic<int64_t> calls{0};
std::atomic<int> threads_of_last_call{0};

// Turns of waiting until the caller lets others have its core.
constexpr int kSpins = 20'000;

// The tasks of one loop. Helpers that the pool starts late find none left, and touch nothing of the caller.
class Job {
 public:
  Job(int64_t tasks, void* context, Body body) : tasks_(tasks), context_(context), body_(body) {}

  void help() {
    const FloatModeGuard as_caller(mode_);
    work();
  }

  void work() {
    for (int64_t k; (k = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) {
      try {
        body_(context_, k);
      } catch (const std::bad_alloc&) {
        failed_.store(true, std::memory_order_relaxed);
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }

  void finish() {
    for (int spins = 0; done_.load(std::memory_order_acquire) < tasks_; ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
    if (failed_.load(std::memory_order_relaxed)) throw std::bad_alloc();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::atomic<int64_t> next_{0}, done_{0};
  std::atomic<bool> failed_{false};
  const int64_t tasks_;
  void* const context_;
  const Body body_;
  const FloatMode mode_ = float_mode();
};

// The threads of a new call, where `available` can run.
int threads_of_call(int64_t available) {
  const int limit = most_threads.load(std::memory_order_relaxed);
  const int number = limit > 0 ? limit : std::max(1, static_cast<int>(available));
  calls.fetch_add(1, std::memory_order_relaxed);
  threads_of_last_call.store(number, std::memory_order_relaxed);
  return number;
}

}  // namespace

Threads::Threads(xla::ffi::ThreadPool& pool) : pool_(pool), number_(threads_of_call(pool.num_threads())) {}

Pool Threads::pool() { return {&Threads::run, this, number_}; }

void Threads::run(void* handle, int64_t tasks, void* context, Body body) {
  auto* threads = static_cast<Threads*>(handle);
  const auto job = std::make_shared<Job>(tasks, context, body);
  const int64_t helpers = std::min<int64_t>(threads->number_, tasks) - 1;
  for (int64_t k = 0; k < helpers; ++k) threads->pool_.Schedule([job] { job->help(); });
  job->work();
  job->finish();
}

OwnThreads::OwnThreads(int64_t tasks)
    : number_(threads_of_call(std::min<int64_t>(tasks, std::thread::hardware_concurrency()))) {}

Pool OwnThreads::pool() { return {&OwnThreads::run, this, number_}; }

void OwnThreads::run(void* handle, int64_t tasks, void* context, Body body) {
  const int64_t helpers = std::min<int64_t>(static_cast<OwnThreads*>(handle)->number_, tasks) - 1;
  Job job(tasks, context, body);
  std::vector<std::thread> running;
  running.reserve(static_cast<size_t>(std::max<int64_t>(helpers, 0)));
  try {
    for (int64_t k = 0; k < helpers; ++k) running.emplace_back([&job] { job.help(); });
  } catch (const std::system_error&) {  // the machine has no more threads: those that run take all tasks
  }
  job.work();
  for (std::thread& thread : running) thread.join();
  job.finish();
}

}  // namespace embax

void embax_kernels_set_threads(int number) { embax::most_threads = number; }
int64_t embax_kernels_calls() { return embax::calls; }
int embax_kernels_threads_of_last_call() { return embax::threads_of_last_call; }
