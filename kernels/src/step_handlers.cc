// XLA's calls of the optimizers' steps.
//
// The arguments are (table, state..., ids, values, bag_of, factors, scalars), the results (table, state...), in place.
#include "arguments.h"
#include "exports.h"

namespace embax {
namespace {

// The scalars of a step as an array of accumulators, in the order of the handler.
class Scalars {
 public:
  Scalars(const Named& named, const Named& table, int64_t number) : named_(named) {
    expect_dtype(named, accumulator_of(table));
    expect_shape(named, {number});
  }
  double next() {
    const int64_t at = next_++;
    return named_.is(ffi::F64) ? static_cast<const double*>(named_.data())[at]
                               : static_cast<const float*>(named_.data())[at];
  }

 private:
  Named named_;
  int64_t next_ = 0;
};

Decay decay_of(const Named& table, int32_t decay) {
  if (decay < 0 || decay > 2) refuse(table, "with a decay of 0, 1 or 2");
  return static_cast<Decay>(decay);
}

// What all steps have behind their state.
struct Rest {
  ffi::ThreadPool threads;
  ffi::AnyBuffer ids, values, bag_of, factors;
  int64_t length;
  int32_t wrap;
};

void run(const Step& step, const Named& table, const Table& rows, const State& state, Rest& rest) {
  Ids ids = ids_of({"ids", rest.ids});
  if (rest.wrap) ids.from_end = rows.rows;
  const Named values{"values", rest.values};
  expect_dtype(values, table.buffer.element_type());
  const Gradients gradients =
      gradients_of(values, {"bag_of", rest.bag_of}, {"factors", rest.factors}, rest.length, ids.number);
  expect_rows(values, table, gradients.number);
  Threads threads(rest.threads);
  request_large_pages(table.buffer);
  kernels().step(threads.pool(), step, rows, state, ids, gradients);
}

// A state with as many numbers as the table, or with one a row.
void expect_like(const Named& state, const Named& table) { expect_rows(state, table, table.axis(0)); }
void expect_by_row(const Named& state, const Named& table) {
  expect_dtype(state, accumulator_of(table));
  expect_shape(state, {table.axis(0)});
}

using In = ffi::AnyBuffer;
using Out = ffi::Result<ffi::AnyBuffer>;

ffi::Error sgd(ffi::ThreadPool threads, In table, In ids, In values, In bag_of, In factors, In scalars, Out out,
               int64_t length, int32_t decay, int32_t wrap) {
  return guarded([&] {
    const Named of_table{"table", table};
    const Table rows = table_of(of_table);
    expect_in_place(of_table, {"out", *out});
    Scalars next({"scalars", scalars}, of_table, 2);
    Step step{};
    step.optimizer = Optimizer::sgd;
    step.decay = decay_of(of_table, decay);
    step.rate = next.next();
    step.decay_by = next.next();
    Rest rest{threads, ids, values, bag_of, factors, length, wrap};
    run(step, of_table, rows, State{nullptr, rows.dtype, nullptr}, rest);
  });
}

template <Optimizer kOptimizer>
ffi::Error adagrad(ffi::ThreadPool threads, In table, In sum, In ids, In values, In bag_of, In factors, In scalars,
                   Out out, Out out_sum, int64_t length, int32_t decay, int32_t wrap) {
  return guarded([&] {
    const Named of_table{"table", table}, of_sum{"sum", sum};
    const Table rows = table_of(of_table);
    if (kOptimizer == Optimizer::adagrad) {
      expect_dtype(of_sum, table.element_type());
      expect_like(of_sum, of_table);
    } else {
      expect_by_row(of_sum, of_table);
    }
    expect_in_place(of_table, {"out", *out});
    expect_in_place(of_sum, {"out_sum", *out_sum});
    request_large_pages(sum);
    Scalars next({"scalars", scalars}, of_table, 3);
    Step step{};
    step.optimizer = kOptimizer;
    step.decay = decay_of(of_table, decay);
    step.rate = next.next();
    step.decay_by = next.next();
    step.eps = next.next();
    Rest rest{threads, ids, values, bag_of, factors, length, wrap};
    run(step, of_table, rows, State{nullptr, rows.dtype, of_sum.data()}, rest);
  });
}

template <Optimizer kOptimizer>
ffi::Error adam(ffi::ThreadPool threads, In table, In mu, In nu, In ids, In values, In bag_of, In factors, In scalars,
                Out out, Out out_mu, Out out_nu, int64_t length, int32_t decay, int32_t wrap, int32_t nesterov) {
  return guarded([&] {
    constexpr bool by_row = kOptimizer == Optimizer::rowwise_adam;
    const Named of_table{"table", table}, of_mu{"mu", mu}, of_nu{"nu", nu};
    expect_in_place(of_table, {"out", *out});
    expect_in_place(of_mu, {"out_mu", *out_mu});
    expect_in_place(of_nu, {"out_nu", *out_nu});
    Step step{};
    step.decay = decay_of(of_table, decay);
    step.nesterov = nesterov != 0;
    const Table rows = table_of(of_table), mean = table_of(of_mu);
    expect_like(of_mu, of_table);
    if (by_row) {
      expect_by_row(of_nu, of_table);
    } else {
      expect_dtype(of_nu, table.element_type());
      expect_like(of_nu, of_table);
    }
    request_large_pages(mu);
    request_large_pages(nu);
    Scalars next({"scalars", scalars}, of_table, by_row ? 9 : step.nesterov ? 11 : 10);
    step.optimizer = kOptimizer;
    step.rate = next.next();
    step.decay_by = next.next();
    step.eps = next.next();
    if (!by_row) step.eps_root = next.next();
    step.b1 = next.next();
    step.rest1 = next.next();
    step.b2 = next.next();
    step.rest2 = next.next();
    step.mean_by = next.next();
    step.square_by = next.next();
    if (step.nesterov) step.gradient_by = next.next();
    Rest rest{threads, ids, values, bag_of, factors, length, wrap};
    run(step, of_table, rows, State{of_mu.data(), mean.dtype, of_nu.data()}, rest);
  });
}

ffi::Error rowwise_adam(ffi::ThreadPool threads, In table, In mu, In nu, In ids, In values, In bag_of, In factors,
                        In scalars, Out out, Out out_mu, Out out_nu, int64_t length, int32_t decay, int32_t wrap) {
  return adam<Optimizer::rowwise_adam>(threads, table, mu, nu, ids, values, bag_of, factors, scalars, out, out_mu,
                                       out_nu, length, decay, wrap, 0);
}

namespace ffi = xla::ffi;

auto bind_sgd() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<In>().Arg<In>().Arg<In>().Arg<In>().Arg<In>().Arg<In>().Ret<In>();
}
auto bind_adagrad() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Ret<In>()
      .Ret<In>();
}
auto bind_adam() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Arg<In>()
      .Ret<In>()
      .Ret<In>()
      .Ret<In>();
}

}  // namespace
}  // namespace embax

XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxStepSgd, embax::sgd,
                              embax::bind_sgd().Attr<int64_t>("length").Attr<int32_t>("decay").Attr<int32_t>("wrap"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxStepAdagrad, embax::adagrad<embax::Optimizer::adagrad>,
                              embax::bind_adagrad().Attr<int64_t>("length").Attr<int32_t>("decay").Attr<int32_t>("wrap"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxStepRowwiseAdagrad, embax::adagrad<embax::Optimizer::rowwise_adagrad>,
                              embax::bind_adagrad().Attr<int64_t>("length").Attr<int32_t>("decay").Attr<int32_t>("wrap"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    EmbaxStepAdam, embax::adam<embax::Optimizer::adam>,
    embax::bind_adam().Attr<int64_t>("length").Attr<int32_t>("decay").Attr<int32_t>("wrap").Attr<int32_t>("nesterov"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(EmbaxStepRowwiseAdam, embax::rowwise_adam,
                              embax::bind_adam().Attr<int64_t>("length").Attr<int32_t>("decay").Attr<int32_t>("wrap"));
