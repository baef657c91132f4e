// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011) and Box-Muller normals from it, for C++ and CUDA. The normals are the same bits in every
// instruction set, on every GPU and in advkd/ops/reference.py: only float32 additions,
// multiplications and square roots, each rounded on its own, so units that include this are
// compiled without contraction.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ADVKD_NUMBERS static __host__ __device__ __forceinline__
#define ADVKD_UNROLL _Pragma("unroll")
#else
#define ADVKD_NUMBERS static inline
#define ADVKD_UNROLL _Pragma("GCC unroll 10")
#endif

namespace advkd::ADVKD_ISA {

struct PhiloxBlock {
  std::uint32_t word[4];
};

// The block of a counter: (element / 4, step, image index low, image index high).
ADVKD_NUMBERS PhiloxBlock philox_block(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
                                       std::uint32_t c3, std::uint32_t k0, std::uint32_t k1) {
  ADVKD_UNROLL
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53} * c0;
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<std::uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<std::uint32_t>(product1);
    c2 = static_cast<std::uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<std::uint32_t>(product0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

// sqrt(-2 log u) with u = (bits + 1/2) / 2^32, rounded to float32 in (0, 1].
ADVKD_NUMBERS float box_muller_radius(std::uint32_t bits) {
  // Two exact halves, so that the one addition rounds as a conversion of all 32 bits would.
  const float whole = static_cast<float>(static_cast<std::int32_t>(bits >> 16)) * 65536.0f +
                      static_cast<float>(static_cast<std::int32_t>(bits & 0xFFFF));
  const float u = whole * 0x1p-32f + 0x1p-33f;
  // u = 2^e (1 + f), with 1 + f in [sqrt(1/2), sqrt(2))
  std::int32_t pattern;
  std::memcpy(&pattern, &u, sizeof pattern);
  const std::int32_t exponent = (pattern - 0x3F3504F3) >> 23;
  const std::int32_t mantissa = pattern - exponent * 0x800000;
  float one_plus_f;
  std::memcpy(&one_plus_f, &mantissa, sizeof one_plus_f);
  const float f = one_plus_f - 1.0f;
  const float e = static_cast<float>(exponent);
  float p = 6.746601313e-02f;
  p = p * f + -1.167564094e-01f;
  p = p * f + 1.188817471e-01f;
  p = p * f + -1.240559146e-01f;
  p = p * f + 1.421955079e-01f;
  p = p * f + -1.666799635e-01f;
  p = p * f + 2.000211924e-01f;
  p = p * f + -2.500000894e-01f;
  p = p * f + 3.333331347e-01f;
  const float f2 = f * f;
  // log 2 in two parts: the first has 9 bits, so that e times it is exact.
  float log_u = p * f * f2 + e * -2.121944400e-04f;
  log_u = log_u - 0.5f * f2;
  log_u = log_u + f;
  log_u = log_u + e * 0.693359375f;
  return std::sqrt(-2.0f * log_u);
}

struct SineCosine {
  float sine, cosine;
};

// Sine and cosine of 2 pi bits / 2^32.
ADVKD_NUMBERS SineCosine box_muller_angle(std::uint32_t bits) {
  // The nearest quarter turn, and what is left: a signed fraction, scaled by 4 to fill 32 bits.
  const std::uint32_t quarter = (bits + 0x20000000u) >> 30;
  const float angle = static_cast<float>(static_cast<std::int32_t>(bits << 2)) * 3.657295300e-10f;
  const float a2 = angle * angle;
  float s = 2.718307769e-06f;
  s = s * a2 + -1.983933471e-04f;
  s = s * a2 + 8.333329111e-03f;
  s = s * a2 + -1.666666716e-01f;
  s = s * a2 * angle + angle;
  float c = 2.443841367e-05f;
  c = c * a2 + -1.388736768e-03f;
  c = c * a2 + 4.166664556e-02f;
  c = c * a2 * a2 - 0.5f * a2 + 1.0f;
  const float sine = (quarter & 1) ? c : s;
  const float cosine = (quarter & 1) ? s : c;
  return {(quarter & 2) ? -sine : sine, ((quarter + 1) & 2) ? -cosine : cosine};
}

}  // namespace advkd::ADVKD_ISA
