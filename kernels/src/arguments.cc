#include "arguments.h"

#include <cstring>
#include <limits>
#include <sstream>
#include <vector>

namespace embax {
namespace {

template <typename Axes>
std::string shape_text(const Axes& axes) {
  std::string text = "(";
  for (const int64_t axis : axes) text += std::to_string(axis) + ",";
  if (text.size() > 1 && axes.size() > 1) text.pop_back();
  return text + ")";
}

std::string described(const Named& named) {
  std::ostringstream text;
  text << named.buffer.element_type() << shape_text(named.buffer.dimensions());
  return text.str();
}

}  // namespace

void refuse(const Named& named, const std::string& rule) {
  throw Refused{std::string("embax-kernels: `") + named.name + "` must be " + rule + ", got " + described(named) + "."};
}

void expect_dtype(const Named& named, ffi::DataType dtype) {
  if (named.is(dtype)) return;
  std::ostringstream rule;
  rule << "of dtype " << dtype;
  refuse(named, rule.str());
}

void expect_shape(const Named& named, std::initializer_list<int64_t> shape) {
  bool same = named.rank() == static_cast<int64_t>(shape.size());
  int64_t k = 0;
  for (const int64_t axis : shape) same = same && named.axis(k++) == axis;
  if (!same) refuse(named, "of shape " + shape_text(shape));
}

void expect_rows(const Named& named, const Named& table, int64_t number) {
  bool same = named.rank() == table.rank() && named.axis(0) == number;
  for (int64_t k = 1; same && k < table.rank(); ++k) same = named.axis(k) == table.axis(k);
  if (same) return;
  std::vector<int64_t> shape(table.buffer.dimensions().begin(), table.buffer.dimensions().end());
  shape[0] = number;
  refuse(named, "of shape " + shape_text(shape));
}

void expect_in_place(const Named& in, const Named& out) {
  expect_dtype(out, in.buffer.element_type());
  expect_rows(out, in, in.axis(0));
  if (in.size() > 0 && in.data() != out.data()) refuse(out, std::string("the same buffer as `") + in.name + "`");
}

// Numbers in a row.
static int64_t width_of(const Named& named) {
  if (named.rank() < 1) refuse(named, "of one axis or more");
  int64_t width = 1;
  for (int64_t k = 1; k < named.rank(); ++k) width *= named.axis(k);
  return width;
}

int64_t item_bytes(const Named& table) {
  const auto bytes = static_cast<int64_t>(ffi::ByteWidth(table.buffer.element_type()));
  if (bytes != 1 && bytes != 2 && bytes != 4 && bytes != 8) refuse(table, "of a dtype of 1, 2, 4 or 8 bytes");
  return bytes;
}

int64_t row_bytes_of(const Named& named) {
  return item_bytes(named) * width_of(named);
}

Table table_of(const Named& named) {
  const int64_t width = width_of(named);
  Table table{named.data(), named.axis(0), width, Dtype::float32};
  switch (named.buffer.element_type()) {
    case ffi::F32: table.dtype = Dtype::float32; break;
    case ffi::F64: table.dtype = Dtype::float64; break;
    case ffi::BF16: table.dtype = Dtype::bfloat16; break;
    case ffi::F16: table.dtype = Dtype::float16; break;
    default: refuse(named, "of dtype float32, float64, bfloat16 or float16");
  }
  return table;
}

ffi::DataType accumulator_of(const Named& named) { return named.is(ffi::F64) ? ffi::F64 : ffi::F32; }

Ids ids_of(const Named& named) {
  if (named.rank() != 1) refuse(named, "of one axis");
  if (!named.is(ffi::S32) && !named.is(ffi::S64)) refuse(named, "of dtype int32 or int64");
  if (named.size() > std::numeric_limits<int32_t>::max()) refuse(named, "fewer than 2**31 ids");
  return {named.data(), named.size(), named.is(ffi::S64)};
}

Factors factors_of(const Named& named, int64_t ids) {
  if (!named.is(ffi::F32) && !named.is(ffi::F64)) refuse(named, "of dtype float32 or float64");
  if (named.size() == 0 && named.rank() == 1) return {nullptr, false};
  expect_shape(named, {ids});
  return {named.data(), named.is(ffi::F64)};
}

Gradients gradients_of(const Named& values, const Named& bag_of, const Named& factors, int64_t length, int64_t ids) {
  const Table table = table_of(values);
  if (length < 0 || (length > 0 && (ids % length || table.rows != ids / length))) {
    refuse(values, "one row for each `length` ids, of which there are " + std::to_string(ids) + " by a length of " +
                       std::to_string(length));
  }
  expect_dtype(bag_of, ffi::S32);
  expect_shape(bag_of, {length == 0 ? ids : 0});
  const auto* numbers = length == 0 ? static_cast<const int32_t*>(bag_of.data()) : nullptr;
  return {table.data, table.rows, table.width, table.dtype, length, numbers, factors_of(factors, ids)};
}

std::string fill_row(const Named& table, bool nan) {
  const int64_t bytes = row_bytes_of(table);
  std::string row(static_cast<size_t>(bytes), '\0');
  if (!nan) return row;
  uint64_t bits = 0;
  switch (table.buffer.element_type()) {
    case ffi::F64: bits = 0x7ff8000000000000; break;
    case ffi::F32: bits = 0x7fc00000; break;
    case ffi::BF16: bits = 0x7fc0; break;
    case ffi::F16: bits = 0x7e00; break;
    default: refuse(table, "of dtype float32, float64, bfloat16 or float16, which have NaN");
  }
  const int64_t item = item_bytes(table);
  for (int64_t at = 0; at < bytes; at += item) std::memcpy(&row[at], &bits, item);  // the low bytes come first
  return row;
}

}  // namespace embax
