// step: an optimizer's whole step on the rows with an id. Each row, its state and its gradients are read once.
#pragma once

#include "combine.h"
#include "formulas.h"
#include "put.h"

namespace embax::EMBAX_ISA {

// A row of the mean as accumulators, if the mean has another dtype than the table.
template <typename A>
inline void widen_row(const State& state, int64_t at, A* out, int64_t width) {
  with_dtype(state.mean_dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    const M* row = static_cast<const M*>(state.mean) + at;
    for (int64_t j = 0; j < width; ++j) out[j] = static_cast<A>(load_one(row + j));
  });
}
template <typename A>
inline void narrow_row(const State& state, int64_t at, const A* row, int64_t width) {
  with_dtype(state.mean_dtype, [&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    M* out = static_cast<M*>(state.mean) + at;
    for (int64_t j = 0; j < width; ++j) store_one(out + j, static_cast<Accumulator<M>>(row[j]));
  });
}

// The rows of a table and of its state.
template <Optimizer kOptimizer, typename T>
class Stepped {
 public:
  using A = Accumulator<T>;
  static constexpr bool kMean = kOptimizer == Optimizer::adam || kOptimizer == Optimizer::rowwise_adam;
  static constexpr bool kByRow = kOptimizer == Optimizer::rowwise_adagrad || kOptimizer == Optimizer::rowwise_adam;
  static constexpr bool kSquares = kOptimizer == Optimizer::adagrad || kOptimizer == Optimizer::adam;

  Stepped(const Step& step, const Table& table, const State& state)
      : numbers_(step), table_(static_cast<T*>(table.data)), width_(table.width), state_(state),
        same_(state.mean_dtype == table.dtype) {}

  // The bytes of a row of the table, and of each array with as many numbers.
  int64_t row_bytes() const { return width_ * static_cast<int64_t>(sizeof(T)); }
  static constexpr int64_t kWholeRows = 1 + kMean + kSquares;

  void fetch(int64_t id) const {
    fetch_to_write(table_ + id * width_, row_bytes());
    if constexpr (kMean) {
      const int64_t bytes = bytes_of(state_.mean_dtype) * width_;
      fetch_to_write(static_cast<char*>(state_.mean) + id * bytes, bytes);
    }
    if constexpr (kSquares) fetch_to_write(static_cast<T*>(state_.squares) + id * width_, row_bytes());
  }

  // The number that a row has of its own. Fetched for many rows before the first of them: among the fetches of whole
  // rows, it comes too late, and a step takes a sixth longer.
  static constexpr int64_t kNumbers = 2048;
  void fetch_number(int64_t id) const {
    if constexpr (kByRow) __builtin_prefetch(static_cast<A*>(state_.squares) + id, 1, 3);
  }

  // `memory`: where the sum may stand; `own`: another row of accumulators.
  void row(int64_t id, const A* sum, A* memory, A* own) const {
    T* row = table_ + id * width_;
    if (numbers_.decay == Decay::gradient) {
      for_columns<A>(width_, [&](int64_t j, auto kind) {
        using X = decltype(kind);
        put(memory + j, get<X>(sum + j) + numbers_.decay_by * get<X>(row + j));
      });
      sum = memory;
    }
    if constexpr (kMean) {
      if (same_) {
        with_mean(id, row, static_cast<T*>(state_.mean) + id * width_, sum);
      } else {
        widen_row(state_, id * width_, own, width_);
        with_mean(id, row, own, sum);
        narrow_row(state_, id * width_, own, width_);
      }
    } else if constexpr (kOptimizer == Optimizer::adagrad) {
      adagrad_row(numbers_, row, static_cast<T*>(state_.squares) + id * width_, sum, width_);
    } else if constexpr (kOptimizer == Optimizer::rowwise_adagrad) {
      rowwise_adagrad_row(numbers_, row, static_cast<A*>(state_.squares) + id, sum, width_);
    } else {
      sgd_row(numbers_, row, sum, width_);
    }
  }

 private:
  template <typename M>
  void with_mean(int64_t id, T* row, M* mean, const A* sum) const {
    if constexpr (kOptimizer == Optimizer::adam) {
      adam_row(numbers_, row, mean, static_cast<T*>(state_.squares) + id * width_, sum, width_);
    } else {
      rowwise_adam_row(numbers_, row, mean, static_cast<A*>(state_.squares) + id, sum, width_);
    }
  }

  Numbers<A> numbers_;
  T* table_;
  int64_t width_;
  State state_;
  bool same_;
};

template <Optimizer kOptimizer, typename T>
void step_typed(const Pool& pool, const Step& step, const Table& table, const State& state, Ids ids,
                const Gradients& gradients) {
  using A = Accumulator<T>;
  const Stepped<kOptimizer, T> stepped(step, table, state);
  const GradientSum<T> sum(gradients);
  const int64_t width = table.width, ahead = distance(stepped.row_bytes() * stepped.kWholeRows);
  const Counted counts{table.rows, gradients.bag_of, gradients.number};
  for_each_part(pool, ids, counts, stepped.row_bytes(), [&](const Partition& partition, int64_t part) {
    const PartMemory<A> of(partition, part, sum.memory(width), width);
    const Groups& groups = of.groups;
    const auto fetch_numbers = [&](int64_t from) {
      const int64_t to = smaller(from + stepped.kNumbers, groups.number);
      for (int64_t d = from; d < to; ++d) stepped.fetch_number(groups.distinct[d]);
    };
    fetch_numbers(0);
    for (int64_t d = 0; d < smaller(ahead, groups.number); ++d) stepped.fetch(groups.distinct[d]);
    for_each_sum(groups, sum, width, of.sums, [&](int64_t d, const A* row) {
      if (d % stepped.kNumbers == 0) fetch_numbers(d + stepped.kNumbers);
      if (d + ahead < groups.number) stepped.fetch(groups.distinct[d + ahead]);
      stepped.row(groups.distinct[d], row, of.sums, of.own);
    });
  });
}

template <Optimizer kOptimizer>
void step_of(const Pool& pool, const Step& step, const Table& table, const State& state, Ids ids,
             const Gradients& gradients) {
  with_dtype(table.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    step_typed<kOptimizer, T>(pool, step, table, state, ids, gradients);
  });
}

// The ids with none that counts from the end: the same memory if there is none, else a copy.
inline Ids counted_from_start(Ids ids) {
  if (!ids.from_end) return ids;
  bool any = false;
  with_ids(ids, [&](auto* id) {
    for (int64_t i = 0; i < ids.number; ++i) any |= id[i] < 0;
  });
  if (!any) return {ids.data, ids.number, ids.wide};
  auto* copy = reinterpret_cast<int64_t*>(scratch(Holder::ids, static_cast<size_t>(ids.number) * sizeof(int64_t)));
  for (int64_t i = 0; i < ids.number; ++i) copy[i] = ids[i];
  return {copy, ids.number, true};
}

inline void step(const Pool& pool, const Step& step, Table table, State state, Ids ids, const Gradients& gradients) {
  if (table.width == 0) return;
  ids = counted_from_start(ids);
  switch (step.optimizer) {
    case Optimizer::sgd: return step_of<Optimizer::sgd>(pool, step, table, state, ids, gradients);
    case Optimizer::adagrad: return step_of<Optimizer::adagrad>(pool, step, table, state, ids, gradients);
    case Optimizer::rowwise_adagrad:
      return step_of<Optimizer::rowwise_adagrad>(pool, step, table, state, ids, gradients);
    case Optimizer::adam: return step_of<Optimizer::adam>(pool, step, table, state, ids, gradients);
    case Optimizer::rowwise_adam: return step_of<Optimizer::rowwise_adam>(pool, step, table, state, ids, gradients);
  }
}

}  // namespace embax::EMBAX_ISA
