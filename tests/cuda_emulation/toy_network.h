#pragma once

#include "cuda/sampling_step.h"

namespace advkd::cuda {

// The graph of one pass of the toy network.
cudaGraph_t captured_toy_network(const StepBuffers& buffers);

// y[i] = x[i] + x[i + 1] of 64 numbers in a ring.
void launch_sum(const float* x, float* y, bool barrier, cudaStream_t stream);

}  // namespace advkd::cuda
