// Exponentials and logarithms of vectors, for softmax, and SiLU.
#pragma once

#include <cmath>
#include <cstdint>

#include "cpu/product.h"

namespace advkd::ADVKD_ISA {

#ifdef __AVX512F__
// 2^x of 16 lanes, within 2 ulp: 2^floor(x) times a polynomial in what is left of x. NaN stays NaN.
// Two instructions take the parts of x that takes five elsewhere, and nothing needs a bound.
static inline __m512 exp2_by_parts(__m512 x) {
  constexpr int kFraction = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
  const __m512 f = _mm512_maskz_reduce_ps(0xFFFF, x, kFraction);  // in [0, 1]
  __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(1.877576578e-03f), _mm512_set1_ps(8.989340626e-03f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.582631752e-02f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.401536107e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.931530833e-01f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.999999404e-01f));
  return _mm512_maskz_scalef_ps(0xFFFF, p, x);
}
#else
// A number that is added to x > -128 leaves no digits behind the point, and those of x + 127, which
// are a power of two's exponent, in the lowest bits.
constexpr float kShift = 12582912.0f + 127.0f;  // 1.5 * 2^23

// 2^n 2^f where n stands in `shifted` and |f| <= 1/2, within 2 ulp: 0 for n = -127, infinite for 128.
static inline VectorOf<float> exp2_by_parts(VectorOf<float> shifted, VectorOf<float> f) {
  VectorOf<float> p = f * 1.534581243e-04f + 1.339993090e-03f;
  p = p * f + 9.618489072e-03f;
  p = p * f + 5.550328642e-02f;
  p = p * f + 2.402264625e-01f;
  p = p * f + 6.931471825e-01f;
  p = p * f + 1.0f;
  typedef std::uint32_t Bits __attribute__((vector_size(sizeof f)));
  return p * (VectorOf<float>)((Bits)shifted << 23);
}
#endif

// 2^x for x < 128, within 2 ulp; 0 where it is below 2^-126; NaN stays NaN.
static inline VectorOf<float> exp2_of(VectorOf<float> x) {
#ifdef __AVX512F__
  // Numbers below 2^-126 would be right here, but slow to multiply with.
  const __mmask16 below = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_LT_OQ);
  return (VectorOf<float>)_mm512_maskz_mov_ps(static_cast<__mmask16>(~below),
                                              exp2_by_parts((__m512)x));
#else
  const VectorOf<float> low = VectorOf<float>{} - 127.0f;
  x = low > x ? low : x;
  const VectorOf<float> shifted = x + kShift;
  return exp2_by_parts(shifted, x - (shifted - kShift));
#endif
}

// Gradients are checked in float64, which only has to be right.
static inline VectorOf<double> exp2_of(VectorOf<double> x) {
  for (int i = 0; i < kLanesOf<double>; ++i) x[i] = ::exp2(x[i]);
  return x;
}

// e^x within |x| + 2 ulp; at most 2^-126 below -87.7, infinite from 88.8 on; NaN stays NaN.
static inline VectorOf<float> exp_of(VectorOf<float> x) {
  constexpr float log2_e = 1.44269504f;
#ifdef __AVX512F__
  return (VectorOf<float>)exp2_by_parts((__m512)(x * log2_e));
#else
  const VectorOf<float> low = VectorOf<float>{} - 88.0f, high = VectorOf<float>{} + 89.0f;
  x = low > x ? low : x;
  x = high < x ? high : x;
  const VectorOf<float> shifted = x * log2_e + kShift;
  return exp2_by_parts(shifted, x * log2_e - (shifted - kShift));
#endif
}

static inline VectorOf<double> exp_of(VectorOf<double> x) {
  for (int i = 0; i < kLanesOf<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

// The natural logarithm of x >= 2^-126, within 2 ulp, by the polynomial of runtime/normals.h; NaN
// stays NaN.
static inline VectorOf<float> log_of(VectorOf<float> x) {
  typedef std::int32_t Bits __attribute__((vector_size(sizeof x)));
  const Bits exponent = ((Bits)x - 0x3F3504F3) >> 23;
  const VectorOf<float> f = (VectorOf<float>)((Bits)x - (exponent << 23)) - 1.0f;
  const VectorOf<float> e = __builtin_convertvector(exponent, VectorOf<float>);
  VectorOf<float> p = f * 6.746601313e-02f + -1.167564094e-01f;
  p = p * f + 1.188817471e-01f;
  p = p * f + -1.240559146e-01f;
  p = p * f + 1.421955079e-01f;
  p = p * f + -1.666799635e-01f;
  p = p * f + 2.000211924e-01f;
  p = p * f + -2.500000894e-01f;
  p = p * f + 3.333331347e-01f;
  const VectorOf<float> f2 = f * f;
  const VectorOf<float> log_x = p * f * f2 + e * -2.121944400e-04f - 0.5f * f2 + f;
  return log_x + e * 0.693359375f + (x - x);
}

static inline VectorOf<double> log_of(VectorOf<double> x) {
  for (int i = 0; i < kLanesOf<double>; ++i) x[i] = ::log(x[i]);
  return x;
}

// u / (1 + e^-u), as exact as e^-u; NaN stays NaN.
template <class V>
static inline V silu(V u) {
  return u / (exp_of(-u) + 1);
}

}  // namespace advkd::ADVKD_ISA
