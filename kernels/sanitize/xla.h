// A stand-in for XLA: calls a handler as XLA does, with arrays in memory of exactly their size.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"

namespace stand_in {

inline int64_t bytes_of(XLA_FFI_DataType dtype) {
  switch (dtype) {
    case XLA_FFI_DataType_F64:
    case XLA_FFI_DataType_S64: return 8;
    case XLA_FFI_DataType_F32:
    case XLA_FFI_DataType_S32:
    case XLA_FFI_DataType_U32: return 4;
    case XLA_FFI_DataType_S8: return 1;
    default: return 2;
  }
}

// An array behind some bytes of its block, as a slice of a buffer may be. A read or a write beside it is found.
class Array {
 public:
  Array(XLA_FFI_DataType dtype, std::vector<int64_t> shape, int64_t offset = 0) : dtype_(dtype), shape_(shape) {
    bytes_ = bytes_of(dtype);
    for (const int64_t axis : shape) bytes_ *= axis;
    block_.reset(static_cast<char*>(std::calloc(static_cast<size_t>(bytes_ + offset ? bytes_ + offset : 1), 1)));
    data_ = block_.get() + offset;
  }
  char* data() { return data_; }
  int64_t bytes() const { return bytes_; }
  int64_t size() const { return bytes_ / bytes_of(dtype_); }
  XLA_FFI_DataType dtype() const { return dtype_; }
  std::vector<int64_t>& shape() { return shape_; }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  std::string copy() const { return std::string(data_, static_cast<size_t>(bytes_)); }

 private:
  struct Free {
    void operator()(char* block) const { std::free(block); }
  };
  XLA_FFI_DataType dtype_;
  std::vector<int64_t> shape_;
  int64_t bytes_;
  std::unique_ptr<char, Free> block_;
  char* data_;
};

// When the pool begins a task: on a thread of its own, at once in the caller, or after the call has returned.
enum class When : int { beside, inside, afterwards };

struct Context {
  int64_t threads;
  When when;
  std::vector<std::thread> running;
  std::vector<std::pair<XLA_FFI_Task*, void*>> waiting;
};

struct Attribute {
  XLA_FFI_DataType dtype;
  int64_t value;  // int32 or int64; the first bytes are the number on machines that store low bytes first
};

// The message of the error that a handler returns, or nothing.
std::string call(XLA_FFI_Handler* handler, const std::vector<Array*>& arguments, const std::vector<Array*>& results,
                 std::map<std::string, Attribute> attributes, int64_t threads, When when);

}  // namespace stand_in
