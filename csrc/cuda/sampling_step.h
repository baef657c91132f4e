// One step of a sampler for a whole batch, by one launch that finds everything else in device memory,
// so that a CUDA graph can repeat it.
#pragma once

#include <cstdint>

#include "cuda/elements.h"

namespace advkd::cuda {

// A step's coefficients, and which target is saved after it; -1: none. 32 bytes.
struct StepRow {
  float a_x, a_m, c_0, c_x, c_m, sigma;
  std::int32_t saved;
  std::int32_t saves_x0;  // else x_t after the step
};

// In device memory; what differs between two runs over the same buffers, and how far a run is.
struct LoopState {
  std::uint64_t seed;
  const std::int64_t* image_index;  // (B,)
  const StepRow* rows;              // (steps,)
  const void* time_embedding;       // (steps, time_embedding_bytes)
  void* saved;                      // (K, B, P, C)
  std::int32_t saved_half;          // float16, else float32
  float clip;                       // of x0_hat; 0: none
  std::uint32_t purpose;            // shifted, as it is combined with the Philox step words
  std::uint32_t steps;
  std::uint32_t step;         // the next one
  std::uint32_t blocks_done;  // of the launch under way; 0 between launches
};

// The buffers whose addresses the graph holds: the network reads x_in and time_embedding and writes
// model_out. Images are (P, C): channels_last.
struct StepBuffers {
  LoopState* loop;
  float* x_t;
  void* x_in;             // x_t in the network's type; null where that is float32 and it reads x_t
  const void* model_out;  // of that type
  ElementType type;
  void* time_embedding;               // of the step under way
  std::int64_t time_embedding_bytes;  // a multiple of 16
  std::int64_t batch, channels, pixels;
};

constexpr std::uint32_t kXTStep = 0xFFFFFFFF;  // the Philox step word whose normals are x_T
constexpr int kPurposeBits = 24;               // of a step word, below the purpose
constexpr std::int64_t kMaxSteps = 1 << 23;    // so that no step reaches x_T's word
constexpr std::int64_t kMaxChannels = 128;     // of an image

// Writes x_t = x_T, x_in, and the time embedding of step 0. One launch.
void launch_first_state(const StepBuffers& buffers, cudaStream_t stream);

// Writes x_t after loop->step, and all that the network reads in the next step. One launch.
void launch_sampling_step(const StepBuffers& buffers, cudaStream_t stream);

}  // namespace advkd::cuda
