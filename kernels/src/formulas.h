// The update of one row by each optimizer, given the sum of its gradients: optax's formulas, number by number.
//
// Numbers are computed as accumulators, and each array is rounded once. As in optax, a gradient that is NaN or infinite
// makes its row NaN.
#pragma once

#include "vectors.h"

namespace embax::EMBAX_ISA {

// The numbers of a step as accumulators.
template <typename A>
struct Numbers {
  explicit Numbers(const Step& s)
      : rate(A(s.rate)), decay_by(A(s.decay_by)), eps(A(s.eps)), eps_root(A(s.eps_root)), b1(A(s.b1)),
        rest1(A(s.rest1)), b2(A(s.b2)), rest2(A(s.rest2)), mean_by(A(s.mean_by)), square_by(A(s.square_by)),
        gradient_by(A(s.gradient_by)), decay(s.decay), nesterov(s.nesterov) {}
  A rate, decay_by, eps, eps_root, b1, rest1, b2, rest2, mean_by, square_by, gradient_by;
  Decay decay;
  bool nesterov;
};

// The sum of the numbers of a vector: its upper half is added to its lower one, until one number is left.
template <typename A, int kBytes>
inline A folded(A __attribute__((vector_size(kBytes))) x) {
  if constexpr (kBytes == sizeof(A)) {
    return x[0];
  } else {
    typedef A Half __attribute__((vector_size(kBytes / 2)));
    Half halves[2];
    std::memcpy(halves, &x, sizeof x);
    return folded<A, kBytes / 2>(halves[0] + halves[1]);
  }
}

// By 16 partial sums, of which the upper half is added to the lower one in turn, for any width of vectors.
template <typename A>
inline A mean_square(const A* row, int64_t width) {
  constexpr int kSums = 16;
  constexpr int kVectors = kSums / static_cast<int>(kLanes<A>);
  Vector<A> sums[kVectors] = {};
  int64_t j = 0;
  for (; j + kSums <= width; j += kSums) {
    for (int v = 0; v < kVectors; ++v) {
      const Vector<A> x = load(row + j + v * kLanes<A>);
      sums[v] += x * x;
    }
  }
  if (j < width) {
    A lanes[kSums];
    std::memcpy(lanes, sums, sizeof lanes);
    for (int k = 0; j < width; ++j, ++k) lanes[k] += row[j] * row[j];
    std::memcpy(sums, lanes, sizeof lanes);
  }
  for (int half = kVectors / 2; half > 0; half /= 2) {
    for (int v = 0; v < half; ++v) sums[v] += sums[v + half];
  }
  return folded<A, sizeof(Vector<A>)>(sums[0]) / static_cast<A>(width);
}

// Subtracts the update from numbers of a row.
template <typename T, typename X, typename A>
inline void move(const Numbers<A>& n, T* weight, X update) {
  const X w = get<X>(weight);
  if (n.decay == Decay::update) update += n.decay_by * w;
  put(weight, w - n.rate * update);
}

template <typename T, typename A>
inline void sgd_row(const Numbers<A>& n, T* row, const A* sum, int64_t width) {
  for_columns<A>(width, [&](int64_t j, auto kind) { move(n, row + j, get<decltype(kind)>(sum + j)); });
}

template <typename T, typename A>
inline void adagrad_row(const Numbers<A>& n, T* row, T* squares, const A* sum, int64_t width) {
  for_columns<A>(width, [&](int64_t j, auto kind) {
    using X = decltype(kind);
    const X g = get<X>(sum + j), s = g * g + get<X>(squares + j);
    put(squares + j, s);
    const X inverse = 1 / root(X(s + n.eps));
    move(n, row + j, X((s > A{0} ? inverse : X{}) * g));
  });
}

template <typename T, typename A>
inline void rowwise_adagrad_row(const Numbers<A>& n, T* row, A* square, const A* sum, int64_t width) {
  const A s = *square + mean_square(sum, width);
  *square = s;
  const A inverse = s > 0 ? 1 / (root(s) + n.eps) : A{0};
  for_columns<A>(width, [&](int64_t j, auto kind) {
    using X = decltype(kind);
    move(n, row + j, X(get<X>(sum + j) * inverse));
  });
}

template <typename T, typename M, typename A>
inline void adam_row(const Numbers<A>& n, T* row, M* mean, T* squares, const A* sum, int64_t width) {
  for_columns<A>(width, [&](int64_t j, auto kind) {
    using X = decltype(kind);
    const X g = get<X>(sum + j);
    const X m = n.rest1 * g + n.b1 * get<X>(mean + j);
    const X v = n.rest2 * (g * g) + n.b2 * get<X>(squares + j);
    put(mean + j, m);
    put(squares + j, v);
    X hat = m * n.mean_by;
    if (n.nesterov) hat += g * n.gradient_by;
    move(n, row + j, X(hat / (root(X(v * n.square_by + n.eps_root)) + n.eps)));
  });
}

template <typename T, typename M, typename A>
inline void rowwise_adam_row(const Numbers<A>& n, T* row, M* mean, A* square, const A* sum, int64_t width) {
  const A v = n.b2 * *square + n.rest2 * mean_square(sum, width);
  *square = v;
  const A factor = n.mean_by / (root(A(v * n.square_by)) + n.eps);
  for_columns<A>(width, [&](int64_t j, auto kind) {
    using X = decltype(kind);
    const X m = n.b1 * get<X>(mean + j) + n.rest1 * get<X>(sum + j);
    put(mean + j, m);
    move(n, row + j, X(m * factor));
  });
}

}  // namespace embax::EMBAX_ISA
