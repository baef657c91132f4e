// What the bindings of convolutions share.
#pragma once

#include <array>
#include <cstdint>

#include "runtime/convolution.h"

namespace advkd {

// (batch, height, width, channels in, channels out)
using Sizes = std::array<std::int64_t, 5>;

// Of (out, in, row, column).
using WeightStrides = std::array<std::int64_t, 4>;

ConvolutionWeights weights_at(std::uintptr_t address, const WeightStrides& strides);

// A 3 x 3 convolution that keeps the size.
ConvolutionShape conv3x3_shape(const Sizes& sizes);

// The calling thread's memory on a cache line's boundary, reused from call to call: fresh pages
// would cost as much as a small convolution.
float* thread_memory(std::int64_t size);

std::int64_t in_cache_lines(std::int64_t floats);

// Floats of memory that `convolve` takes.
std::int64_t convolve_memory(const ConvolutionShape& shape, int threads);

// Packs the weights and convolves; args has all but the algorithm, the packed weights, the
// workspace and the threads.
void convolve(ConvolutionArgs args, const ConvolutionWeights& weights, float* memory, int threads);

}  // namespace advkd
