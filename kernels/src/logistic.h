// The arithmetic of word vectors: products of rows summed up across the numbers of a vector, and the logistic function.
//
// A product and a sum are rounded together if the instruction set has fused multiply-add. So results are the same on
// all machines with one instruction set, and differ in the last digits between instruction sets.
#pragma once

#include "vectors.h"

namespace embax::EMBAX_ISA {

// The most targets whose logits are computed together: the length of a row of logits.
constexpr int kSlots = 8;
// How many rows of logits one vector holds; 1 if a row takes more than one vector.
constexpr int kRowsAtOnce = kLanes<float> > kSlots ? static_cast<int>(kLanes<float>) / kSlots : 1;

inline Floats all(float x) { return x - Floats{}; }

// x * y + z
inline Floats multiply_add(Floats x, Floats y, Floats z) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#elif defined(__aarch64__)
  return (Floats)vfmaq_f32((float32x4_t)z, (float32x4_t)x, (float32x4_t)y);
#else
  return x * y + z;
#endif
}

// For each group of 4 numbers: the sum of a's four numbers, then of b's, c's and d's.
inline Floats sums_of_four(Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512F__)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  return (Floats)_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xEE));
#elif defined(__AVX2__)
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps((__m256)a, (__m256)b), _mm256_unpackhi_ps((__m256)a, (__m256)b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps((__m256)c, (__m256)d), _mm256_unpackhi_ps((__m256)c, (__m256)d));
  return (Floats)_mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xEE));
#elif defined(__SSE2__)
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps((__m128)a, (__m128)b), _mm_unpackhi_ps((__m128)a, (__m128)b));
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps((__m128)c, (__m128)d), _mm_unpackhi_ps((__m128)c, (__m128)d));
  return (Floats)_mm_add_ps(_mm_shuffle_ps(ab, cd, 0x44), _mm_shuffle_ps(ab, cd, 0xEE));
#else
  return Floats{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
                (d[0] + d[2]) + (d[1] + d[3])};
#endif
}

// Stores the sum of the numbers of each vector, for kRows rows of kSlots vectors. Inlined, so that the vectors stay in
// registers.
template <int kRows>
__attribute__((always_inline)) inline void store_sums(const Floats (*x)[kSlots], float* out) {
  static_assert(kRows <= kRowsAtOnce, "in one vector");
  Floats quarters[kRows][2];
  for (int h = 0; h < kRows; ++h) {
    for (int k = 0; k < 2; ++k) {
      quarters[h][k] = sums_of_four(x[h][4 * k], x[h][4 * k + 1], x[h][4 * k + 2], x[h][4 * k + 3]);
    }
  }
#if defined(__AVX512F__)
  const auto halves = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
  };
  const __m512 first = halves((__m512)quarters[0][0], (__m512)quarters[0][1]);
  const __m512 last = kRows == 1 ? first : halves((__m512)quarters[kRows - 1][0], (__m512)quarters[kRows - 1][1]);
  store(out, (Floats)halves(first, last));
#elif defined(__AVX2__)
  const __m256 a = (__m256)quarters[0][0], b = (__m256)quarters[0][1];
  store(out, (Floats)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
#else
  store(out, quarters[0][0]);
  store(out + 4, quarters[0][1]);
#endif
}

// 1 / (1 + exp(-x)), within 2e-7 of it. exp(-x) = 2^n * 2^f with |f| <= 1/2 and the series of 2^f.
inline Floats logistic(Floats x) {
  constexpr float kLog2E = 1.44269504f, kMost = 126;
  constexpr float kRounds = 12582912;  // 1.5 * 2^23: a sum with it is rounded to a whole number
  Floats t = x * -kLog2E;
  t = t < -kMost ? all(-kMost) : t;
  t = t > kMost ? all(kMost) : t;
  const Floats shifted = t + kRounds;
  const Floats f = t - (shifted - kRounds);
  // Terms are added in pairs, so that fewer additions wait for one another.
  const Floats f2 = f * f, f4 = f2 * f2;
  const Floats low = multiply_add(f, all(6.9314718e-1f), all(1.0f));
  const Floats middle = multiply_add(f, all(5.5504109e-2f), all(2.4022651e-1f));
  const Floats high = multiply_add(f, all(1.3333558e-3f), all(9.6181291e-3f));
  const Floats power =
      multiply_add(f4, multiply_add(f2, all(1.5403530e-4f), high), multiply_add(f2, middle, low));
  const Words exponent = (bits_of<Words>(shifted) - bits_of<Words>(all(kRounds))) << 23;
  return 1.0f / (1.0f + bits_of<Floats>(Words(bits_of<Words>(power) + exponent)));
}

// -log(logistic(x)), exact also for large x, where logistic(x) is nearly 1.
inline double loss_of(float x) {
  const float size = x < 0 ? -x : x;
  return (x < 0 ? size : 0.0f) + __builtin_log1pf(__builtin_expf(-size));
}

}  // namespace embax::EMBAX_ISA
