// All steps of a sampler in one call: noise, network passes by a plan, updates, and what is saved.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "runtime/pooled_plan.h"

namespace advkd {

struct SamplingLoopArgs {
  const PooledPlan* plan;  // its input and output are (pixels, channels) of an image
  std::int64_t steps;
  const double* coefficients;  // (steps, 6): a_x, a_m, c_0, c_x, c_m, sigma
  const float* conditioning;   // (steps, conditioning of the plan)
  float clip;                  // of x0_hat; 0: none
  std::uint64_t seed;
  int purpose;  // of the noise; see runtime/noise.h
  std::int64_t images;
  const std::int64_t* image_index;  // (images,)
  const std::int64_t* labels;       // (images,), null without classes
  std::vector<std::int64_t> saved;  // after which of the steps 1 .. steps a target is saved
  bool save_denoised;               // x0_hat of a step, else x_t; of the last step always x_t
  void* out;  // target k of image i, (C, P), at i * image_stride + k * saved_stride
  bool half;  // out is float16, else float32
  std::int64_t image_stride, saved_stride;  // elements
  int threads;
  bool nan_fill;  // fill the plan's memory with NaN before each pass, for tests
  // Called after each pass over a part of the batch, on the thread that made it, and after each
  // step; an exception from either ends the loop.
  std::function<void()> on_pass;
  std::function<void(std::int64_t steps_done)> on_step;
};

// The final sample is x_t after the last step. An image's bits depend on the plan, the seed, the
// purpose and the image's number, not on the batch or the threads. Refuses a
// plan that is not a teacher's, a purpose that there is not, too many steps, and steps to save that
// do not ascend from 1 to at most `steps`.
void sampling_loop(const SamplingLoopArgs& args);

}  // namespace advkd
