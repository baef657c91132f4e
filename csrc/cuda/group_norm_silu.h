// GroupNorm (Wu and He 2018), FiLM (Perez et al. 2018) and SiLU, forward, on a GPU:
//   y = act((x_hat weight + bias) (1 + scale) + shift)
#pragma once

#include <cstdint>

#include "cuda/elements.h"

namespace advkd::cuda {

struct GroupNormSiluArgs {
  const void* x;  // (B, C, P), or (B, P, C) if channels_last; dense
  void* y;
  ElementType type;
  const float *weight, *bias;  // (C,), null for 1 and 0
  const float *scale, *shift;  // (B, C), null for 0
  std::int64_t batch, channels, pixels, groups;
  bool channels_last;
  float eps;
  bool silu;
  float* workspace;
};

// Floats of workspace that a call needs; 0 where groups fit a block and x is read once.
std::int64_t group_norm_silu_workspace(const GroupNormSiluArgs& args);

// One launch where groups fit a block (64 KiB of aligned elements), else three. Throws
// std::invalid_argument for sizes that no kernel serves.
void launch_group_norm_silu(const GroupNormSiluArgs& args, cudaStream_t stream);

}  // namespace advkd::cuda
