#pragma once

#include "cuda/sampling_step.h"

namespace advkd::cuda {

void launch_toy_network(const StepBuffers& buffers, cudaStream_t stream);

// y[i] = x[i] + x[i + 1] of 64 numbers in a ring.
void launch_sum(const float* x, float* y, bool barrier, cudaStream_t stream);

}  // namespace advkd::cuda
