// Elements as tensors hold them, and the vectors that arithmetic is done with: half types are
// widened to float32 when read and rounded to nearest even when written. Written once per
// instruction set, by bits, as not every one has conversions of its own.
#pragma once

#include <cstdint>
#include <cstring>

#include "runtime/kernel_table.h"
#include "cpu/product.h"

#ifdef __SSE2__
#include <immintrin.h>
#endif

namespace advkd::ADVKD_ISA {

typedef std::uint32_t Bits __attribute__((vector_size(kWidth * 4)));
typedef std::uint16_t HalfBits __attribute__((vector_size(kWidth * 2)));

static inline VectorOf<float> widened(HalfBits from, Float16) {
  const Bits bits = __builtin_convertvector(from, Bits);
  const Bits rest = (bits & 0x7FFFu) << 13, special = (Bits)(rest >= 0x0F800000u);
  // The exponent's bias goes from 15 to 127, for subnormal numbers too.
  const VectorOf<float> scaled = (VectorOf<float>)rest * 0x1p112f;
  return (VectorOf<float>)((Bits)scaled | (special & 0x7F800000u) | (bits & 0x8000u) << 16);
}

static inline VectorOf<float> widened(HalfBits from, BFloat16) {
  return (VectorOf<float>)(__builtin_convertvector(from, Bits) << 16);
}

static inline HalfBits narrowed(VectorOf<float> v, Float16) {
  const Bits bits = (Bits)v, twice = bits + bits;
  const VectorOf<float> size = (VectorOf<float>)(bits & 0x7FFFFFFFu);
  // Added to a power of two whose last place is that of the result, the number is rounded by it.
  const VectorOf<float> saturated = size * 0x1p112f * 0x1p-110f;
  Bits exponent = twice & 0xFF000000u;
  exponent = exponent < 0x71000000u ? Bits{} + 0x71000000u : exponent;
  const Bits rounded = (Bits)((VectorOf<float>)((exponent >> 1) + 0x07800000u) + saturated);
  const Bits number = ((rounded >> 13) & 0x7C00u) + (rounded & 0x0FFFu);
  const Bits result = twice > 0xFF000000u ? Bits{} + 0x7E00u : number;  // NaN
  return __builtin_convertvector(result | (bits & 0x80000000u) >> 16, HalfBits);
}

static inline HalfBits narrowed(VectorOf<float> v, BFloat16) {
  const Bits bits = (Bits)v;
  const Bits rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Bits nan = (bits >> 16) | 0x40u;
  const Bits result = (bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded;
  return __builtin_convertvector(result, HalfBits);
}

// Neighboring elements, as wide as the arithmetic.
template <class S>
inline VectorOf<WideOf<S>> load_wide(const S* from) {
  if constexpr (sizeof(S) == 2) {
    HalfBits bits;
    std::memcpy(&bits, from, sizeof bits);
    return widened(bits, S{});
  } else {
    return load_vector(from);
  }
}

// The first n lanes from memory, the others 0.
template <class S>
inline VectorOf<WideOf<S>> load_wide(const S* from, std::int64_t n) {
  S part[kLanesOf<WideOf<S>>] = {};
  std::memcpy(part, from, static_cast<std::size_t>(n) * sizeof(S));
  return load_wide(part);
}

// Past the cache where the processor can: for what will not be read soon. `to` is aligned.
template <class V>
inline void stream(void* to, const V& v) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64) return _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)v);
#endif
#ifdef __AVX__
  if constexpr (sizeof(V) == 32) return _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)v);
#endif
#ifdef __SSE2__
  if constexpr (sizeof(V) == 16) return _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)v);
#endif
  std::memcpy(to, &v, sizeof v);
}

// Before a task ends that streamed: what it wrote is seen by others afterwards.
static inline void end_streaming() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}

template <bool kStream, class V>
inline void put(void* to, const V& v) {
  if constexpr (kStream) {
    stream(to, v);
  } else {
    std::memcpy(to, &v, sizeof v);
  }
}

template <bool kStream, class S>
inline void store_narrow(S* to, VectorOf<WideOf<S>> v) {
  if constexpr (sizeof(S) == 2) {
    put<kStream>(to, narrowed(v, S{}));
  } else {
    put<kStream>(to, v);
  }
}

// The first n lanes only.
template <class S>
inline void store_narrow(S* to, VectorOf<WideOf<S>> v, std::int64_t n) {
  S part[kLanesOf<WideOf<S>>];
  store_narrow<false>(part, v);
  std::memcpy(to, part, static_cast<std::size_t>(n) * sizeof(S));
}

// Whether whole vectors that begin at multiples of `step` elements after `to` may be streamed.
template <class S>
inline bool streams_to(const S* to, std::int64_t step) {
  constexpr std::uintptr_t bytes = kLanesOf<WideOf<S>> * sizeof(S);
  return reinterpret_cast<std::uintptr_t>(to) % bytes == 0 &&
         static_cast<std::uintptr_t>(step) * sizeof(S) % bytes == 0;
}

}  // namespace advkd::ADVKD_ISA
