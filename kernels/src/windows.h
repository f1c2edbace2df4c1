// One step of plain SGD on the words of a window, at the vectors that the step before it has left.
//
// `update_pairs` is for skip-gram: each context's row of the inputs with each target's row of the outputs. For the
// window "the [king] holds" with one noise word "crown", the contexts are the rows of "the" and "holds", and the targets
// the rows of "king" (label 1) and "crown" (label 0). `update_mean` is for CBOW and for sub-words: one mean of rows with
// each target. A pair moves the two rows by `(label - logistic(input . output)) * factor` times one another.
//
// All gradients of a call are those at the old rows. A row that occurs twice is moved twice.
#pragma once

#include "kernels.h"
#include "logistic.h"
#include "parallel.h"

namespace embax::EMBAX_ISA {

// How many numbers a row has: the default width of vectors is known to the compiler, which unrolls its loops.
constexpr int64_t kUsualStride = 112;
template <int64_t kStride>
struct Stride {
  explicit Stride(int64_t stride) : any(stride) {}
  operator int64_t() const { return kStride ? kStride : any; }
  int64_t any;
};

// Pairs that one call may sum up: more would overshoot where a row is the same in all of them.
constexpr int64_t kContexts = 16;
// Targets of one call of `update_pairs`: with their sums, they fill the registers of AVX2.
constexpr int64_t kPaired = 6;
// Labels and factors stand there twice, for two rows of logits in one vector.
constexpr int64_t kTwice = 16;

// What pairs with a row: rows of the outputs, with kTwice labels and factors of which the first `number` count.
struct Targets {
  float* rows[kSlots];
  float labels[kTwice], factors[kTwice];
  float weights[kSlots];  // of the loss
  int64_t number;

  void clear() {
    number = 0;
    for (int64_t k = 0; k < kTwice; ++k) labels[k] = factors[k] = 0;
  }
  void add(float* row, float label, float weight, float rate) {
    const int64_t k = number++;
    rows[k] = row;
    labels[k] = labels[k + kSlots] = label;
    factors[k] = factors[k + kSlots] = weight * rate;
    weights[k] = weight;
  }
};

// Turns rows of logits into rows of errors times factors.
inline void errors_of_logits(float* logits, int64_t rows, const Targets& targets, double* loss) {
  if (loss) {
    for (int64_t c = 0; c < rows; ++c) {
      for (int64_t t = 0; t < targets.number; ++t) {
        const float x = logits[kSlots * c + t];
        *loss += targets.weights[t] * loss_of(targets.labels[t] > 0 ? x : -x);
      }
    }
  }
  for (int64_t k = 0; k < kSlots * rows; k += kLanes<float>) {
    const Floats label = load(targets.labels + k % kSlots), factor = load(targets.factors + k % kSlots);
    store(logits + k, (label - logistic(load(logits + k))) * factor);
  }
}

// `errors` has room for one row more than there are contexts.
template <int kTargets, typename S>
inline void update_pairs_of(float* const* contexts, int64_t number, const Targets& targets, S stride,
                            float* __restrict errors, double* loss) {
  constexpr int64_t lanes = kLanes<float>;
  float* rows[kTargets];
  for (int t = 0; t < kTargets; ++t) rows[t] = targets.rows[t];
  for (int64_t c = 0; c < number; c += kRowsAtOnce) {
    const float* inputs[kRowsAtOnce];
    for (int h = 0; h < kRowsAtOnce; ++h) inputs[h] = contexts[smaller(c + h, number - 1)];
    Floats sums[kRowsAtOnce][kSlots] = {};
    for (int64_t j = 0; j < stride; j += lanes) {
      Floats x[kRowsAtOnce];
      for (int h = 0; h < kRowsAtOnce; ++h) x[h] = load(inputs[h] + j);
      for (int t = 0; t < kTargets; ++t) {
        const Floats y = load(rows[t] + j);
        for (int h = 0; h < kRowsAtOnce; ++h) sums[h][t] = multiply_add(x[h], y, sums[h][t]);
      }
    }
    store_sums(sums, errors + kSlots * c);
  }
  errors_of_logits(errors, number, targets, loss);
  for (int64_t j = 0; j < stride; j += lanes) {
    Floats old[kTargets], moves[kTargets];
    for (int t = 0; t < kTargets; ++t) {
      old[t] = load(rows[t] + j);
      moves[t] = Floats{};
    }
    for (int64_t c = 0; c < number; ++c) {
      float* const row = contexts[c] + j;
      const Floats x = load(row);
      Floats moved = x;
      for (int t = 0; t < kTargets; ++t) {
        const Floats error = all(errors[kSlots * c + t]);
        moved = multiply_add(error, old[t], moved);
        moves[t] = multiply_add(error, x, moves[t]);
      }
      store(row, moved);
    }
    // Read again: a row that occurs twice has just been written.
    for (int t = 0; t < kTargets; ++t) store(rows[t] + j, load(rows[t] + j) + moves[t]);
  }
}

template <typename S>
inline void update_pairs(float* const* contexts, int64_t number, const Targets& targets, S stride, float* errors,
                         double* loss) {
  switch (targets.number) {
    case 1: return update_pairs_of<1>(contexts, number, targets, stride, errors, loss);
    case 2: return update_pairs_of<2>(contexts, number, targets, stride, errors, loss);
    case 3: return update_pairs_of<3>(contexts, number, targets, stride, errors, loss);
    case 4: return update_pairs_of<4>(contexts, number, targets, stride, errors, loss);
    case 5: return update_pairs_of<5>(contexts, number, targets, stride, errors, loss);
    case 6: return update_pairs_of<6>(contexts, number, targets, stride, errors, loss);
  }
}

// Moves the targets' rows, and adds to `error` how the mean has to move.
template <int kTargets, typename S>
inline void update_mean_of(const float* __restrict mean, const Targets& targets, S stride, float* __restrict error,
                           double* loss) {
  constexpr int64_t lanes = kLanes<float>;
  Floats sums[kRowsAtOnce][kSlots] = {};
  for (int64_t j = 0; j < stride; j += lanes) {
    const Floats x = load(mean + j);
    for (int t = 0; t < kTargets; ++t) sums[0][t] = multiply_add(x, load(targets.rows[t] + j), sums[0][t]);
  }
  alignas(64) float errors[kSlots * kRowsAtOnce];
  store_sums(sums, errors);
  errors_of_logits(errors, 1, targets, loss);
  for (int64_t j = 0; j < stride; j += lanes) {
    const Floats x = load(mean + j);
    Floats sum = load(error + j);
    for (int t = 0; t < kTargets; ++t) {
      const Floats y = load(targets.rows[t] + j), by = all(errors[t]);
      sum = multiply_add(by, y, sum);
      store(targets.rows[t] + j, multiply_add(by, x, y));
    }
    store(error + j, sum);
  }
}

template <typename S>
inline void update_mean(const float* mean, const Targets& targets, S stride, float* error, double* loss) {
  switch (targets.number) {
    case 1: return update_mean_of<1>(mean, targets, stride, error, loss);
    case 2: return update_mean_of<2>(mean, targets, stride, error, loss);
    case 3: return update_mean_of<3>(mean, targets, stride, error, loss);
    case 4: return update_mean_of<4>(mean, targets, stride, error, loss);
    case 5: return update_mean_of<5>(mean, targets, stride, error, loss);
    case 6: return update_mean_of<6>(mean, targets, stride, error, loss);
    case 7: return update_mean_of<7>(mean, targets, stride, error, loss);
    case 8: return update_mean_of<8>(mean, targets, stride, error, loss);
  }
}

// body(j, number) for columns j of `number` vectors, a constant.
template <typename S, typename F>
inline void for_blocks(S stride, F&& body) {
  constexpr int64_t lanes = kLanes<float>;
  int64_t j = 0;
  for (; j + 8 * lanes <= stride; j += 8 * lanes) body(j, std::integral_constant<int, 8>{});
  for (; j + 4 * lanes <= stride; j += 4 * lanes) body(j, std::integral_constant<int, 4>{});
  for (; j < stride; j += lanes) body(j, std::integral_constant<int, 1>{});
}

// sum += all rows
template <typename S>
inline void add_rows(float* const* rows, int64_t number, S stride, float* sum) {
  for_blocks(stride, [&](int64_t j, auto vectors) {
    Floats x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = load(sum + j + v * kLanes<float>);
    for (int64_t k = 0; k < number; ++k) {
      for (int v = 0; v < vectors; ++v) x[v] += load(rows[k] + j + v * kLanes<float>);
    }
    for (int v = 0; v < vectors; ++v) store(sum + j + v * kLanes<float>, x[v]);
  });
}

// each row += move
template <typename S>
inline void move_rows(float* const* rows, int64_t number, S stride, const float* move) {
  for_blocks(stride, [&](int64_t j, auto vectors) {
    Floats x[vectors];
    for (int v = 0; v < vectors; ++v) x[v] = load(move + j + v * kLanes<float>);
    for (int64_t k = 0; k < number; ++k) {
      float* const row = rows[k] + j;
      for (int v = 0; v < vectors; ++v) store(row + v * kLanes<float>, load(row + v * kLanes<float>) + x[v]);
    }
  });
}

// out = a + b * factor
template <typename S>
inline void sum_of(const float* a, const float* b, float factor, S stride, float* out) {
  for (int64_t j = 0; j < stride; j += kLanes<float>) store(out + j, multiply_add(load(b + j), all(factor), load(a + j)));
}

template <typename S>
inline void clear(float* row, S stride) {
  for (int64_t j = 0; j < stride; j += kLanes<float>) store(row + j, Floats{});
}

}  // namespace embax::EMBAX_ISA
