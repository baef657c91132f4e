// Elements as tensors hold them: read and written 16 bytes at a time where the layout allows, widened
// to float32 for arithmetic and rounded to nearest even when written.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "cuda/runtime.h"
#ifndef ADVKD_CUDA_EMULATION
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace advkd::cuda {

enum class ElementType { kFloat32, kFloat16, kBFloat16 };

constexpr std::int64_t size_of(ElementType type) { return type == ElementType::kFloat32 ? 4 : 2; }

// Calls function(T{}) with the element type of that kind.
template <class Function>
void with_type(ElementType type, const Function& function) {
  switch (type) {
    case ElementType::kFloat32: return function(float{});
    case ElementType::kFloat16: return function(__half{});
    case ElementType::kBFloat16: return function(__nv_bfloat16{});
  }
  throw std::invalid_argument("no element type has this number");
}

__device__ __forceinline__ float widened(float v) { return v; }
__device__ __forceinline__ float widened(__half v) { return __half2float(v); }
__device__ __forceinline__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(float v, __half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// kCount neighbors in memory; a multiple of 16 bytes is accessed by 16.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount % 16 == 0 ? 16 : sizeof(T)) Elements {
  T at[kCount];
};

template <class T, int kCount>
__device__ __forceinline__ Elements<T, kCount> load(const T* from) {
  Elements<T, kCount> v;
  if constexpr (sizeof v % 16 == 0) {
    const uint4* const source = reinterpret_cast<const uint4*>(from);
    uint4* const target = reinterpret_cast<uint4*>(&v);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof v / 16); ++i) target[i] = source[i];
  } else {
    static_assert(kCount == 1, "elements that fill no 16 bytes go one by one");
    v.at[0] = *from;
  }
  return v;
}

template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const Elements<T, kCount>& v) {
  if constexpr (sizeof v % 16 == 0) {
    const uint4* const source = reinterpret_cast<const uint4*>(&v);
    uint4* const target = reinterpret_cast<uint4*>(to);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof v / 16); ++i) target[i] = source[i];
  } else {
    *to = v.at[0];
  }
}

template <class T, int kCount>
__device__ __forceinline__ void store(T* to, const float (&v)[kCount]) {
  Elements<T, kCount> narrowed;
#pragma unroll
  for (int i = 0; i < kCount; ++i) narrow(v[i], narrowed.at[i]);
  store(to, narrowed);
}

inline bool begins_at_16_bytes(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }

inline std::int64_t divide_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace advkd::cuda
