// Scratch memory that a thread keeps, so that the system has to provide its pages once and not in every call.
#pragma once

#include <cstddef>
#include <cstdint>

namespace embax {

// Who holds scratch memory: the call as a whole, the part of it that a thread works on, or the ids of the call.
enum class Holder : int { call, part, ids };

// Memory of this thread, aligned to 64 bytes, valid until the next request for the same holder.
char* scratch(Holder holder, size_t bytes);

// Hands out arrays one after the other; first without memory, to know how much they need.
class Carver {
 public:
  template <typename T>
  T* array(int64_t length) {
    T* at = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(length) * sizeof(T) + 63) & ~size_t{63};
    return at;
  }
  size_t used() const { return used_; }
  void start(char* base) {
    base_ = base;
    used_ = 0;
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace embax
