// One step of a sampler for a whole batch, by one launch that finds everything else in device memory,
// so that a CUDA graph can repeat it.
#pragma once

#include <cstdint>

#include "cuda/elements.h"

namespace advkd::cuda {

// A step's coefficients, and which kept target is its; -1: none. 32 bytes.
struct StepRow {
  float a_x, a_m, c_0, c_x, c_m, sigma;
  std::int32_t kept;
  std::int32_t keeps_x0;  // else x_t after the step
};

// In device memory; what differs between two runs over the same buffers, and where a run stands.
struct LoopState {
  std::uint64_t seed;
  const std::int64_t* image_index;  // (B,)
  const StepRow* rows;              // (steps,)
  const void* told;                 // (steps, told_bytes): what the network is told at each step
  void* kept;                       // (K, B, elements), laid out as the images
  std::int32_t kept_half;           // float16, else float32
  float clip;                       // of x0_hat; 0: none
  std::uint32_t steps;
  std::uint32_t step;         // the one to come
  std::uint32_t blocks_done;  // of the launch under way; 0 between launches
  std::uint32_t pause;        // the device's own loop stops before this step,
  std::uint32_t chunk;        // and the next time so many steps later
};

// The buffers that stay in their place: the network reads x_in and told and writes model_out.
struct StepBuffers {
  LoopState* loop;
  float* x_t;
  void* x_in;             // x_t in the network's type; null where that is float32 and it reads x_t
  const void* model_out;  // of that type
  ElementType type;
  void* told;
  std::int64_t told_bytes;  // of one step, a multiple of 16
  std::int64_t batch, channels, pixels;
  bool channels_last;  // x_t, x_in and model_out are (B, P, C), else (B, C, P)
};

constexpr std::uint32_t kXTStep = 0xFFFFFFFF;  // the Philox step whose normals are x_T

// Most channels of a channels_last image.
constexpr std::int64_t kMostChannels = 128;

// x_t = x_T, the network's view of it, and what it is told at step 0. One launch.
void launch_first_state(const StepBuffers& buffers, cudaStream_t stream);

// x_t = the state after loop->step, and all that the network reads of the next; one launch. With the
// `condition` of a graph's WHILE node, that ends where loop->step reaches loop->pause.
void launch_sampling_step(const StepBuffers& buffers, const cudaGraphConditionalHandle* condition,
                          cudaStream_t stream);

}  // namespace advkd::cuda
