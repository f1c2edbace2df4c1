// XLA's pool of threads as the kernels see it.
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

}  // namespace embax
