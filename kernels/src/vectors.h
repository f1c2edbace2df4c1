// Vectors of the width of the instruction set, and the four dtypes of a table's numbers.
//
// Each number of a vector is computed by itself, so results do not depend on the width. GCC and clang compile these
// vectors for any machine; intrinsics are used only for operations without an operator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace embax::EMBAX_ISA {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The dtype in which numbers are added up.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

template <typename A>
using Vector = std::conditional_t<std::is_same_v<A, double>, Doubles, Floats>;

// Numbers in a vector of accumulators.
template <typename A>
constexpr int64_t kLanes = kBytes / static_cast<int64_t>(sizeof(A));

template <typename To, typename From>
inline To bits_of(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <typename V>
inline V raw_load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

// ---- bfloat16, rounded to the nearest, ties to even; a NaN stays a NaN. U is one word, or a vector of words.

template <typename U>
inline U bfloat16_bits(U u) {
  const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const U quiet = (u >> 16) | 0x40;
  return (u & 0x7fffffff) > 0x7f800000 ? quiet : rounded;
}

// ---- float16, by integers and sums of normal numbers, so that a mode that flushes subnormal numbers changes nothing.

template <typename F, typename U>
inline F from_float16_bits(U h) {
  const U sign = (h & 0x8000) << 16;
  const U magnitude = (h & 0x7fff) << 13;
  const U exponent = magnitude & 0x0f800000;
  const U normal = magnitude + 0x38000000;
  const U special = (magnitude + 0x70000000) | ((h & 0x3ff) != 0 ? U(h * 0 + 0x400000) : U(h * 0));
  const F subnormal = bits_of<F>(U(magnitude + 0x38800000)) - bits_of<F>(U(h * 0 + 0x38800000));
  U out = exponent == 0 ? bits_of<U>(subnormal) : normal;
  out = exponent == 0x0f800000 ? special : out;
  return bits_of<F>(U(out | sign));
}

template <typename U, typename F>
inline U float16_bits(F x) {
  const U all = bits_of<U>(x);
  const U u = all & 0x7fffffff;
  const U half = u * 0 + 0x3f000000;
  const U subnormal = bits_of<U>(F(bits_of<F>(u) + bits_of<F>(half))) - half;
  const U normal = (u + 0xc8000fff + ((u >> 13) & 1)) >> 13;
  const U infinite = u * 0 + 0x7c00;
  const U quiet = 0x7e00 | ((u >> 13) & 0x3ff);
  U out = u < 0x38800000 ? subnormal : normal;
  out = u >= 0x47800000 ? infinite : out;
  out = u > 0x7f800000 ? quiet : out;
  return out | ((all >> 16) & 0x8000);
}

// ---- One number, or a vector of them, as accumulators.

inline float load_one(const float* p) { return *p; }
inline double load_one(const double* p) { return *p; }
inline float load_one(const bfloat16* p) { return bits_of<float>(uint32_t{p->bits} << 16); }
inline float load_one(const float16* p) { return from_float16_bits<float>(uint32_t{p->bits}); }

inline void store_one(float* p, float x) { *p = x; }
inline void store_one(double* p, double x) { *p = x; }
inline void store_one(bfloat16* p, float x) { p->bits = static_cast<uint16_t>(bfloat16_bits(bits_of<uint32_t>(x))); }
inline void store_one(float16* p, float x) { p->bits = static_cast<uint16_t>(float16_bits<uint32_t>(x)); }

inline Floats load(const float* p) { return raw_load<Floats>(p); }
inline Doubles load(const double* p) { return raw_load<Doubles>(p); }
inline Floats load(const bfloat16* p) {
  return bits_of<Floats>(Words(__builtin_convertvector(raw_load<Halves>(p), Words) << 16));
}

inline void store(float* p, Floats x) { std::memcpy(p, &x, sizeof x); }
inline void store(double* p, Doubles x) { std::memcpy(p, &x, sizeof x); }
inline void store(bfloat16* p, Floats x) {
  const Halves h = __builtin_convertvector(bfloat16_bits(bits_of<Words>(x)), Halves);
  std::memcpy(p, &h, sizeof h);
}

// The hardware's conversions give the same bits as the functions above, quiet NaNs included.
#if defined(__AVX512F__)
inline Floats load(const float16* p) { return (Floats)_mm512_cvtph_ps(raw_load<__m256i>(p)); }
inline void store(float16* p, Floats x) {
  const __m256i h = _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(p, &h, sizeof h);
}
#elif defined(__F16C__)
inline Floats load(const float16* p) { return (Floats)_mm256_cvtph_ps(raw_load<__m128i>(p)); }
inline void store(float16* p, Floats x) {
  const __m128i h = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof h);
}
#else
inline Floats load(const float16* p) {
  return from_float16_bits<Floats>(__builtin_convertvector(raw_load<Halves>(p), Words));
}
inline void store(float16* p, Floats x) {
  const Halves h = __builtin_convertvector(float16_bits<Words>(x), Halves);
  std::memcpy(p, &h, sizeof h);
}
#endif

// ---- Square roots, rounded correctly.

inline float root(float x) { return std::sqrt(x); }
inline double root(double x) { return std::sqrt(x); }
#if defined(__AVX512F__)
inline Floats root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
inline Doubles root(Doubles x) { return (Doubles)_mm512_sqrt_pd((__m512d)x); }
#elif defined(__AVX__)
inline Floats root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
inline Doubles root(Doubles x) { return (Doubles)_mm256_sqrt_pd((__m256d)x); }
#elif defined(__SSE2__)
inline Floats root(Floats x) { return (Floats)_mm_sqrt_ps((__m128)x); }
inline Doubles root(Doubles x) { return (Doubles)_mm_sqrt_pd((__m128d)x); }
#elif defined(__aarch64__)
inline Floats root(Floats x) { return (Floats)vsqrtq_f32((float32x4_t)x); }
inline Doubles root(Doubles x) { return (Doubles)vsqrtq_f64((float64x2_t)x); }
#else
template <typename V>
inline V root(V x) {
  for (size_t k = 0; k < sizeof(x) / sizeof(x[0]); ++k) x[k] = std::sqrt(x[k]);
  return x;
}
#endif

// ---- Columns of rows: body(j, kind) for vectors, then for single numbers; `kind` is a zero of either.

template <typename A, typename F>
inline void for_columns(int64_t width, F&& body) {
  int64_t j = 0;
  for (; j + kLanes<A> <= width; j += kLanes<A>) body(j, Vector<A>{});
  for (; j < width; ++j) body(j, A{0});
}

template <typename X, typename T>
inline X get(const T* p) {
  if constexpr (std::is_arithmetic_v<X>) {
    return load_one(p);
  } else {
    return load(p);
  }
}

template <typename T, typename X>
inline void put(T* p, X x) {
  if constexpr (std::is_arithmetic_v<X>) {
    store_one(p, x);
  } else {
    store(p, x);
  }
}

// ---- Calls with the type that an argument names.

inline int64_t bytes_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

template <typename F>
inline auto with_dtype(Dtype dtype, F&& call) {
  switch (dtype) {
    case Dtype::float64: return call(static_cast<double*>(nullptr));
    case Dtype::bfloat16: return call(static_cast<bfloat16*>(nullptr));
    case Dtype::float16: return call(static_cast<float16*>(nullptr));
    default: return call(static_cast<float*>(nullptr));
  }
}

template <typename F>
inline auto with_ids(Ids ids, F&& call) {
  return ids.wide ? call(static_cast<const int64_t*>(ids.data)) : call(static_cast<const int32_t*>(ids.data));
}

inline bool has_row(int64_t id, int64_t rows) { return static_cast<uint64_t>(id) < static_cast<uint64_t>(rows); }

template <typename A>
inline A factor_of(Factors factors, int64_t i) {
  if (!factors.data) return 1;
  return factors.wide ? static_cast<A>(static_cast<const double*>(factors.data)[i])
                      : static_cast<A>(static_cast<const float*>(factors.data)[i]);
}

}  // namespace embax::EMBAX_ISA
