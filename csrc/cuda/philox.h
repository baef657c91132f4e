// Philox normals on a GPU: the bits of csrc/cpu/philox.cpp.
#pragma once

#include <cstdint>

#include "cuda/runtime.h"

namespace advkd::cuda {

// Pointers are to memory of the device.
struct NormalsArgs {
  std::uint64_t seed;
  std::uint32_t step;               // the second word of the counter
  const std::int64_t* image_index;  // (batch,)
  std::int64_t batch, channels, pixels;
  bool channels_last;
  float* out;  // (batch, channels, pixels), or (batch, pixels, channels) if channels_last
};

// Writes the normals of each image. One launch on `stream`, or none where there is nothing to write.
void launch_normals(const NormalsArgs& args, int device, cudaStream_t stream);

}  // namespace advkd::cuda
