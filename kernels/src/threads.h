// Threads as the kernels see them: XLA's pool, or threads of a call of its own.
#pragma once

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace embax {

// The pool of one call. The caller works, too, and waits for nothing that nobody has begun.
class Threads {
 public:
  explicit Threads(xla::ffi::ThreadPool& pool);
  Pool pool();

 private:
  static void run(void* handle, int64_t tasks, void* context, Body body);

  xla::ffi::ThreadPool& pool_;
  int number_;
};

// Threads that start in a loop and end with it, for calls that do not come from XLA.
class OwnThreads {
 public:
  // As many as there are tasks, but no more than the machine runs at a time.
  explicit OwnThreads(int64_t tasks);
  Pool pool();

 private:
  static void run(void* handle, int64_t tasks, void* context, Body body);

  int number_;
};

}  // namespace embax
