// XLA's calls of the primitives.
#include <limits>
#include <vector>

#include "arguments.h"
#include "exports.h"

namespace embax {
namespace {

ffi::Error take(ffi::ThreadPool threads, ffi::AnyBuffer table, ffi::AnyBuffer ids, ffi::Result<ffi::AnyBuffer> out,
                int32_t nan, int32_t wrap) {
  return guarded([&] {
    const Named of_table{"table", table}, of_out{"out", *out};
    const int64_t row_bytes = row_bytes_of(of_table);
    Ids which = ids_of({"ids", ids});
    if (wrap) which.from_end = of_table.axis(0);
    expect_dtype(of_out, table.element_type());
    expect_rows(of_out, of_table, which.number);
    const std::string fill = fill_row(of_table, nan);
    Threads on(threads);
    request_large_pages(table);
    kernels().take(on.pool(), of_table.data(), of_table.axis(0), row_bytes, which, fill.data(), of_out.data());
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
    const Named of_table{"table", table}, of_ids{"ids", ids};
    const Named of_offsets{"offsets", offsets}, of_firsts{"firsts", firsts};
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
    expect_dtype(of_firsts, ffi::S32);
    expect_shape(of_firsts, {static_cast<int64_t>(outs.size())});
    std::vector<void*> data;
    std::vector<int64_t> sizes;
    Parts parts{static_cast<int64_t>(outs.size()), nullptr, static_cast<const int32_t*>(of_firsts.data()), nullptr};
    for (int64_t k = 0; k < parts.number; ++k) {
      const Named out{"out", *outs.get<ffi::AnyBuffer>(k).value()};
      if (out.rank() < 1) refuse(out, "of one axis or more");
      expect_dtype(out, accumulator_of(of_table));
      expect_rows(out, of_table, out.axis(0));
      if (parts.firsts[k] < 0 || out.axis(0) > bags.number - parts.firsts[k]) {
        refuse(out, "of bags below " + std::to_string(bags.number));
      }
      data.push_back(out.data());
      sizes.push_back(out.axis(0));
    }
    parts.data = data.data();
    parts.sizes = sizes.data();
    const std::string fill = fill_row(of_table, nan);
    Threads on(threads);
    request_large_pages(table);
    kernels().pool(on.pool(), rows, which, bags, fill.data(), parts);
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
                                  .Ret<ffi::AnyBuffer>()
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
