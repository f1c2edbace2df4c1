// Checks of a handler's arguments, and their conversion into arguments of kernels.
//
// A check that fails throws an exception, which `guarded` turns into an error for XLA.
#pragma once

#include <initializer_list>
#include <string>

#include "kernels.h"
#include "pages.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace embax {

namespace ffi = xla::ffi;

struct Refused {
  std::string message;
};

// A buffer with its name for messages.
struct Named {
  const char* name;
  ffi::AnyBuffer buffer;

  int64_t rank() const { return static_cast<int64_t>(buffer.dimensions().size()); }
  int64_t axis(int64_t k) const { return buffer.dimensions()[k]; }
  int64_t size() const { return static_cast<int64_t>(buffer.element_count()); }
  bool is(ffi::DataType dtype) const { return buffer.element_type() == dtype; }
  void* data() const { return buffer.untyped_data(); }
};

[[noreturn]] void refuse(const Named& named, const std::string& rule);

void expect_dtype(const Named& named, ffi::DataType dtype);
void expect_shape(const Named& named, std::initializer_list<int64_t> shape);
// A buffer that holds `number` rows of the shape of a table's.
void expect_rows(const Named& named, const Named& table, int64_t number);
// Checks that input and output are the same memory. XLA copies an input that must not change, and passes the copy.
void expect_in_place(const Named& in, const Named& out);

// The bytes of a number, for the dtypes of tables.
int64_t item_bytes(const Named& table);
// A table of a dtype that can be added up. A row has all axes but the first.
Table table_of(const Named& named);
// A table of any dtype: its number of rows, and the bytes of a row.
int64_t row_bytes_of(const Named& named);
ffi::DataType accumulator_of(const Named& named);
Ids ids_of(const Named& named);
// Factors: none if the buffer is empty, else one for each id.
Factors factors_of(const Named& named, int64_t ids);
// `length` and `bag_of` as in `EmbaxCombine`; `values` has the same rank as a table.
Gradients gradients_of(const Named& values, const Named& bag_of, const Named& factors, int64_t length, int64_t ids);

// One row of zeros, or of NaN, in the dtype of a table.
std::string fill_row(const Named& table, bool nan);

inline void request_large_pages(const ffi::AnyBuffer& table) {
  request_large_pages(table.untyped_data(), table.size_bytes());
}

template <typename F>
ffi::Error guarded(F&& body) {
  try {
    body();
  } catch (const Refused& refused) {
    return ffi::Error::InvalidArgument(refused.message);
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "embax-kernels: no memory for the work on these ids.");
  }
  return ffi::Error::Success();
}

}  // namespace embax
