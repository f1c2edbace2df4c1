// XLA's calls of the primitives.
#include <limits>
#include <vector>

#include "arguments.h"
#include "exports.h"

namespace embax {
namespace {

// The arrays for the results of a kernel.
class Results {
 public:
  // Each has rows like the table, in a dtype.
  Results(const ffi::RemainingRets& outs, const Named& table, ffi::DataType dtype) {
    for (size_t k = 0; k < outs.size(); ++k) {
      const Named out{"out", *outs.get<ffi::AnyBuffer>(k).value()};
      if (out.rank() < 1) refuse(out, "of one axis or more");
      expect_dtype(out, dtype);
      expect_rows(out, table, out.axis(0));
      data_.push_back(out.data());
      sizes_.push_back(out.axis(0));
      firsts_.push_back(total_);
      total_ += out.axis(0);
    }
  }

  int64_t total() const { return total_; }

  // By default, an array begins where the one before it ends.
  void begin_at(const Named& firsts, int64_t number) {
    expect_dtype(firsts, ffi::S32);
    expect_shape(firsts, {static_cast<int64_t>(data_.size())});
    for (size_t k = 0; k < data_.size(); ++k) {
      firsts_[k] = static_cast<const int32_t*>(firsts.data())[k];
      if (firsts_[k] < 0 || sizes_[k] > number - firsts_[k]) {
        refuse(firsts, "of arrays that end at " + std::to_string(number) + " or before");
      }
    }
  }

  Parts parts() const { return {static_cast<int64_t>(data_.size()), data_.data(), firsts_.data(), sizes_.data()}; }

 private:
  std::vector<void*> data_;
  std::vector<int64_t> firsts_, sizes_;
  int64_t total_ = 0;
};

ffi::Error take(ffi::ThreadPool threads, ffi::AnyBuffer table, ffi::AnyBuffer ids, ffi::RemainingRets outs, int32_t nan,
                int32_t wrap) {
  return guarded([&] {
    const Named of_table{"table", table}, of_ids{"ids", ids};
    const int64_t row_bytes = row_bytes_of(of_table);
    Ids which = ids_of(of_ids);
    if (wrap) which.from_end = of_table.axis(0);
    const Results results(outs, of_table, table.element_type());
    if (results.total() != which.number) refuse(of_ids, "one for each row of the results");
    const std::string fill = fill_row(of_table, nan);
    Threads on(threads);
    request_large_pages(table);
    kernels().take(on.pool(), of_table.data(), of_table.axis(0), row_bytes, which, fill.data(), results.parts());
  });
}

ffi::Error put(ffi::ThreadPool threads, ffi::AnyBuffer table, ffi::AnyBuffer ids, ffi::AnyBuffer values,
               ffi::Result<ffi::AnyBuffer> out, int32_t add) {
  return guarded([&] {
    const Named of_table{"table", table}, of_values{"values", values};
    const int64_t row_bytes = row_bytes_of(of_table);
    const Ids which = ids_of({"ids", ids});
    expect_dtype(of_values, table.element_type());
    expect_rows(of_values, of_table, which.number);
    expect_in_place(of_table, {"out", *out});
    Threads on(threads);
    request_large_pages(table);
    if (add) {
      kernels().add(on.pool(), table_of(of_table), which, of_values.data());
    } else {
      kernels().set(on.pool(), of_table.data(), of_table.axis(0), row_bytes, which, of_values.data());
    }
  });
}

ffi::Error combine(ffi::ThreadPool threads, ffi::AnyBuffer ids, ffi::AnyBuffer values, ffi::AnyBuffer bag_of,
                   ffi::AnyBuffer factors, ffi::Result<ffi::AnyBuffer> out_ids, ffi::Result<ffi::AnyBuffer> sums,
                   ffi::Result<ffi::AnyBuffer> number, int64_t rows, int64_t length) {
  return guarded([&] {
    const Named of_ids{"ids", ids}, of_values{"values", values}, of_out{"distinct", *out_ids};
    const Named of_sums{"sums", *sums}, of_number{"number", *number};
    const Ids which = ids_of(of_ids);
    if (rows < 0 || (!which.wide && rows > std::numeric_limits<int32_t>::max())) {
      refuse(of_ids, "of a dtype that holds the number of rows, " + std::to_string(rows));
    }
    const Gradients gradients =
        gradients_of(of_values, {"bag_of", bag_of}, {"factors", factors}, length, which.number);
    expect_dtype(of_out, ids.element_type());
    expect_shape(of_out, {which.number});
    expect_dtype(of_sums, values.element_type());
    expect_rows(of_sums, of_values, which.number);
    expect_dtype(of_number, ffi::S32);
    expect_shape(of_number, {});
    Threads on(threads);
    const int64_t distinct = kernels().combine(on.pool(), rows, which, gradients, of_out.data(), of_sums.data());
    *static_cast<int32_t*>(of_number.data()) = static_cast<int32_t>(distinct);
  });
}

ffi::Error pool(ffi::ThreadPool threads, ffi::AnyBuffer table, ffi::AnyBuffer ids, ffi::AnyBuffer offsets,
                ffi::AnyBuffer factors, ffi::AnyBuffer firsts, ffi::RemainingRets outs, int64_t number, int32_t nan,
                int32_t wrap) {
  return guarded([&] {
    const Named of_table{"table", table}, of_ids{"ids", ids}, of_offsets{"offsets", offsets};
    const Table rows = table_of(of_table);
    Ids which = ids_of(of_ids);
    if (wrap) which.from_end = rows.rows;
    if (number < 0 || number > std::numeric_limits<int32_t>::max()) refuse(of_ids, "of 0 to 2,147,483,647 bags");
    Bags bags{number, nullptr, factors_of({"factors", factors}, which.number)};
    expect_dtype(of_offsets, ffi::S32);
    if (of_offsets.size() > 0) {
      expect_shape(of_offsets, {bags.number + 1});
      bags.offsets = static_cast<const int32_t*>(of_offsets.data());
    } else if (bags.number == 0 ? which.number != 0 : which.number % bags.number != 0) {
      refuse(of_ids, "as many ids for each of " + std::to_string(bags.number) + " bags");
    }
    Results results(outs, of_table, accumulator_of(of_table));
    results.begin_at({"firsts", firsts}, number);
    const std::string fill = fill_row(of_table, nan);
    Threads on(threads);
    request_large_pages(table);
    kernels().pool(on.pool(), rows, which, bags, fill.data(), results.parts());
  });
}

}  // namespace
}  // namespace embax

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxTake, embax::take,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int32_t>("nan")
                                  .Attr<int32_t>("wrap"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxPut, embax::put,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int32_t>("add"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxCombine, embax::combine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("rows")
                                  .Attr<int64_t>("length"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxPool, embax::pool,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingRets()
                                  .Attr<int64_t>("number")
                                  .Attr<int32_t>("nan")
                                  .Attr<int32_t>("wrap"));
