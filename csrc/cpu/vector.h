// Vectors of the widest kind that an instruction set has, by GCC's and Clang's vector extension.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));

static inline Vector load(const float* from) {
  Vector v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

static inline void store(float* to, Vector v) { std::memcpy(to, &v, sizeof v); }

// The first n < kWidth lanes from memory, the others 0.
static inline Vector load_some(const float* from, std::int64_t n) {
#if defined(__AVX512F__)
  return (Vector)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from);
#else
  Vector v = {};
  std::memcpy(&v, from, static_cast<std::size_t>(n) * sizeof(float));
  return v;
#endif
}

static inline void store_some(float* to, Vector v, std::int64_t n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#else
  std::memcpy(to, &v, static_cast<std::size_t>(n) * sizeof(float));
#endif
}

static inline Vector filled(float value) { return Vector{} + value; }

// 1 / v within 2 ulp, for 2^-126 <= v <= 2^126; NaN stays NaN. A division takes a vector unit longer
// than all else in SiLU.
static inline Vector reciprocal(Vector v) {
#if defined(__AVX512F__)
  const Vector estimate = (Vector)_mm512_rcp14_ps((__m512)v);
  return estimate + estimate * (1.0f - v * estimate);
#else
  return 1.0f / v;
#endif
}

// v / (1 + exp(-v)), within 4 ulp; NaN stays NaN.
static inline Vector silu(Vector v) {
  // exp(-v) = 2^n exp(f), |f| <= log(2) / 2; the bounds keep 2^n finite.
  Vector t = -v;
  const Vector low = filled(-87.0f), high = filled(87.0f);
  t = t < low ? low : t;
  t = t > high ? high : t;
  const Vector rounding = filled(12582912.0f);  // 1.5 * 2^23 leaves the integer in the low bits
  const Vector shifted = t * 1.44269504f + rounding;
  const Vector n = shifted - rounding;
  const Vector f = t - n * 0.693359375f - n * -2.121944400e-04f;
  Vector p = filled(1.395047642e-03f);
  p = p * f + 8.368882351e-03f;
  p = p * f + 4.166620597e-02f;
  p = p * f + 1.666651815e-01f;
  p = p * f + 0.5f;
  p = p * f * f + f + 1.0f;
  typedef std::uint32_t Bits __attribute__((vector_size(kWidth * sizeof(float))));
  const Vector power = (Vector)(((Bits)shifted + 127u) << 23);
  return v * reciprocal(p * power + 1.0f);
}

}  // namespace advkd::ADVKD_ISA
