// What csrc/cuda takes of CUDA, for g++: its kernels run on the CPU, a block's threads as fibers that
// switch at __syncthreads, one block after the other. See emulation.cpp; the host's half is
// fake_runtime.h.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};

namespace emulation {

// Of the running thread, set at every switch.
extern dim3 thread_index, block_index, block_size, grid_size;

// Ends the launch under way with an exception.
[[noreturn]] void fail(const std::string& what);

void barrier(int line);
void register_shared(void* at, std::size_t bytes);
void run_grid(const std::string& kernel, unsigned grid, unsigned block,
              const std::function<void()>& body);

// Memory that the threads of a block share: NaN before each block, its bounds checked.
template <class T, std::size_t kCount>
class SharedArray {
 public:
  SharedArray() { register_shared(at_, sizeof at_); }
  T& operator[](std::size_t i) {
    if (i >= kCount) fail("shared memory has " + std::to_string(kCount) + " elements, not one at " +
                          std::to_string(static_cast<std::ptrdiff_t>(i)));
    return at_[i];
  }

 private:
  alignas(16) T at_[kCount];
};

}  // namespace emulation

#define threadIdx ::emulation::thread_index
#define blockIdx ::emulation::block_index
#define blockDim ::emulation::block_size
#define gridDim ::emulation::grid_size
#define __syncthreads() ::emulation::barrier(__LINE__)
#define ADVKD_SHARED(type, name, count) static ::emulation::SharedArray<type, (count)> name

// Fibers take turns on one thread, so these are atomic as they stand; for the thread sanitizer they
// are as strong as a fence on each side, and a missing __threadfence is not seen.
inline void __threadfence() {}
inline unsigned atomicInc(unsigned* at, unsigned limit) {
  unsigned old = __atomic_load_n(at, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(at, &old, old >= limit ? 0 : old + 1, false,
                                      __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};

inline float __half2float(__half h) {
  _Float16 v;
  std::memcpy(&v, &h, sizeof v);
  return static_cast<float>(v);
}
inline __half __float2half_rn(float f) {
  const _Float16 v = static_cast<_Float16>(f);
  __half h;
  std::memcpy(&h, &v, sizeof h);
  return h;
}
inline float __bfloat162float(__nv_bfloat16 b) {
  const std::uint32_t bits = static_cast<std::uint32_t>(b.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  std::uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  if (f != f) return {0x7FFF};
  return {static_cast<std::uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

#include "fake_runtime.h"
