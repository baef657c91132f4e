// The CUDA runtime, or under tests/cuda_emulation what stands in for it: this is the one include that
// tells the two apart. Every call's status goes through `check`.
#pragma once

#ifdef ADVKD_CUDA_EMULATION
#include "emulation.h"
#else
#include <cuda_runtime.h>

// A launch, whose failure is reported where it happens and not by a later call.
#define ADVKD_LAUNCH(kernel, grid, block, stream, ...)    \
  (kernel<<<(grid), (block), 0, (stream)>>>(__VA_ARGS__), \
   ::advkd::cuda::check(cudaGetLastError(), #kernel))

// An array of count elements that the threads of a block share.
#define ADVKD_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

#include <stdexcept>
#include <string>

namespace advkd::cuda {

// Throws std::runtime_error that names the call, unless it succeeded.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(call) + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

}  // namespace advkd::cuda
