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

// Vectors that the registers hold.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
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

}  // namespace advkd::ADVKD_ISA
