// One step of plain SGD on the words of a window, at the vectors as the previous step left them.
//
// `update_pairs` is for skip-gram: each context's row of the inputs with each target's row of the outputs. For the
// window "the [king] holds" with one noise word "crown", the contexts are the rows of "the" and "holds", and the
// targets the rows of "king" (label 1) and "crown" (label 0). `update_mean` is for CBOW and for sub-words: one mean of
// rows with each target. A pair adds to both rows `(label - logistic(input . output)) * weight * rate` times the other
// row.
//
// A call computes all gradients at the old rows. A row that occurs twice is updated twice.
#pragma once

#include "kernels.h"
#include "logistic.h"
#include "parallel.h"

namespace embax::EMBAX_ISA {

// The number of floats in a row. For the default width of vectors it is a constant, so that the compiler unrolls loops.
constexpr int64_t kUsualStride = 112;
template <int64_t kStride>
struct Stride {
  explicit Stride(int64_t stride) : any(stride) {}
  operator int64_t() const { return kStride ? kStride : any; }
  int64_t any;
};

// Contexts of one call of `update_pairs`.
constexpr int64_t kContexts = 16;
// Targets of one call of `update_pairs`: their rows and sums fill the registers of AVX2.
constexpr int64_t kPaired = 6;
// The slots of two rows of logits; one vector may hold both rows.
constexpr int64_t kTwice = 2 * kSlots;

// For n in [0, kSlots]: in each half, n ones and then zeros.
struct FirstOnes {
  constexpr FirstOnes() : at() {
    for (int64_t n = 0; n <= kSlots; ++n) {
      for (int64_t k = 0; k < kTwice; ++k) at[n][k] = k % kSlots < n ? 1.0f : 0.0f;
    }
  }
  alignas(64) float at[kSlots + 1][kTwice];
};
constexpr FirstOnes kFirstOnes;

// Rows of the outputs that a row is paired with: first the rows with label 1, then noise words, all with one weight. A
// noise word that is noise for a part of the contexts only has a share of this weight. Shares are rare and have an
// array of their own: a CPU that reads, as one vector, numbers that it has just written one by one waits for these
// writes.
struct Targets {
  float* rows[kSlots];
  int64_t number = 0, ones = 0;
  float rate = 0, noise_weight = 1;
  bool shared = false;
  float shares[kTwice];

  void clear(float with_rate, float weight) {
    number = ones = 0;
    rate = with_rate;
    noise_weight = weight;
    shared = false;
  }
  void add(float* row) { rows[number++] = row, ++ones; }
  void add_noise(float* row, float share) {
    if (share != 1) {
      for (int64_t k = 0; !shared && k < kTwice; ++k) shares[k] = 1;
      shared = true;
      shares[number] = shares[number + kSlots] = share;
    }
    rows[number++] = row;
  }
  float weight(int64_t k) const { return k < ones ? 1 : noise_weight * (shared ? shares[k] : 1); }
};

// Turns rows of logits into rows of errors times the learning rate.
inline void errors_of_logits(float* logits, int64_t number, const Targets& targets, double* loss) {
  if (loss) {
    for (int64_t c = 0; c < number; ++c) {
      for (int64_t t = 0; t < targets.number; ++t) {
        const float x = logits[kSlots * c + t];
        *loss += targets.weight(t) * loss_of(t < targets.ones ? x : -x);
      }
    }
  }
  for (int64_t k = 0; k < kSlots * number; k += kLanes<float>) {
    const Floats label = load(kFirstOnes.at[targets.ones] + k % kSlots);
    const Floats any = load(kFirstOnes.at[targets.number] + k % kSlots);
    Floats weight = label + (any - label) * targets.noise_weight;
    if (targets.shared) weight *= load(targets.shares + k % kSlots);
    store(logits + k, (label - logistic(load(logits + k))) * (weight * targets.rate));
  }
}

// `errors` has room for one more row than there are contexts. Not inlined, because its loops need all registers.
template <int kTargets, typename S>
__attribute__((noinline)) void update_pairs_of(float* const* contexts, int64_t number, const Targets& targets, S stride,
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
    store_sums<kRowsAtOnce>(sums, errors + kSlots * c);
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
    // Read the rows again: a row that occurs twice has just been written.
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

// Updates the rows of the targets, and adds the update of the mean to `error`; the first targets of a mean set `error`.
template <int kTargets, typename S>
__attribute__((noinline)) void update_mean_of(const float* __restrict mean, const Targets& targets, S stride, float* __restrict error,
                           bool first, double* loss) {
  constexpr int64_t lanes = kLanes<float>;
  float* rows[kTargets];
  for (int t = 0; t < kTargets; ++t) rows[t] = targets.rows[t];
  Floats sums[1][kSlots] = {};
  for (int64_t j = 0; j < stride; j += lanes) {
    const Floats x = load(mean + j);
    for (int t = 0; t < kTargets; ++t) sums[0][t] = multiply_add(x, load(rows[t] + j), sums[0][t]);
  }
  alignas(64) float errors[kSlots * kRowsAtOnce];
  store_sums<1>(sums, errors);
  errors_of_logits(errors, 1, targets, loss);
  Floats by[kTargets];
  for (int t = 0; t < kTargets; ++t) by[t] = all(errors[t]);
  for (int64_t j = 0; j < stride; j += lanes) {
    const Floats x = load(mean + j);
    Floats sum = first ? Floats{} : load(error + j);
    for (int t = 0; t < kTargets; ++t) {
      const Floats y = load(rows[t] + j);
      sum = multiply_add(by[t], y, sum);
      store(rows[t] + j, multiply_add(by[t], x, y));
    }
    store(error + j, sum);
  }
}

template <typename S>
inline void update_mean(const float* mean, const Targets& targets, S stride, float* error, bool first,
                        double* loss) {
  switch (targets.number) {
    case 1: return update_mean_of<1>(mean, targets, stride, error, first, loss);
    case 2: return update_mean_of<2>(mean, targets, stride, error, first, loss);
    case 3: return update_mean_of<3>(mean, targets, stride, error, first, loss);
    case 4: return update_mean_of<4>(mean, targets, stride, error, first, loss);
    case 5: return update_mean_of<5>(mean, targets, stride, error, first, loss);
    case 6: return update_mean_of<6>(mean, targets, stride, error, first, loss);
    case 7: return update_mean_of<7>(mean, targets, stride, error, first, loss);
    case 8: return update_mean_of<8>(mean, targets, stride, error, first, loss);
  }
}

// Calls body(j, number) for blocks of columns: `number` vectors, a constant, from column j on.
template <typename S, typename F>
inline void for_blocks(S stride, F&& body) {
  constexpr int64_t lanes = kLanes<float>;
  int64_t j = 0;
  if constexpr (std::is_same_v<S, Stride<kUsualStride>>) {
    for (; j < stride; j += 7 * lanes) body(j, std::integral_constant<int, 7>{});
    return;
  }
  for (; j + 8 * lanes <= stride; j += 8 * lanes) body(j, std::integral_constant<int, 8>{});
  for (; j + 4 * lanes <= stride; j += 4 * lanes) body(j, std::integral_constant<int, 4>{});
  for (; j < stride; j += lanes) body(j, std::integral_constant<int, 1>{});
}

// Adds the sum of the rows times the factor to `mean`; the first rows set `mean`.
template <typename S>
inline void add_rows(float* const* rows, int64_t number, float factor, bool first, S stride, float* mean) {
  for_blocks(stride, [&](int64_t j, auto vectors) {
    Floats sums[vectors];
    for (int v = 0; v < vectors; ++v) sums[v] = Floats{};
    for (int64_t k = 0; k < number; ++k) {
      for (int v = 0; v < vectors; ++v) sums[v] += load(rows[k] + j + v * kLanes<float>);
    }
    for (int v = 0; v < vectors; ++v) {
      float* const to = mean + j + v * kLanes<float>;
      store(to, first ? sums[v] * factor : multiply_add(sums[v], all(factor), load(to)));
    }
  });
}

// Adds `move` to each row.
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

template <typename S>
inline void sum_of(const float* a, const float* b, S stride, float* out) {
  for (int64_t j = 0; j < stride; j += kLanes<float>) store(out + j, load(a + j) + load(b + j));
}

}  // namespace embax::EMBAX_ISA
