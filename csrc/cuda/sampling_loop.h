// All steps of a sampler by launches of a CUDA graph: one pass of the network, captured elsewhere, and
// one sampling step. Python takes no part in a step.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "cuda/sampling_step.h"

namespace advkd::cuda {

// Why there is no CUDA device to use, as one sentence; empty where there is one.
std::string unavailable();

// Why a graph cannot repeat itself on the device (a WHILE node); empty where it can.
std::string device_loop_unavailable();

// What a run takes; pointers are to device memory.
struct SamplingRun {
  std::int64_t steps;
  std::uint64_t seed;
  float clip;
  const std::int64_t* image_index;  // (B,)
  const StepRow* rows;              // (steps,)
  const void* told;                 // (steps, told_bytes)
  void* kept;                       // (K, B, elements), laid out as the images, at 16 bytes
  bool kept_half;
  std::int64_t chunk;  // steps between two calls of on_chunk
  // Called with the steps that are done, on the calling thread; what it throws ends the run.
  std::function<void(std::int64_t done)> on_chunk;
};

// A handle of the runtime that is given back at the end.
template <class Handle, cudaError_t (*kDestroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (handle_ != Handle{}) kDestroy(handle_);
  }
  Handle* out() { return &handle_; }
  Handle get() const { return handle_; }

 private:
  Handle handle_ = {};
};

class SamplingLoop {
 public:
  // network: of one pass, which reads buffers.x_in (or x_t) and told, and writes model_out; it is
  // copied, but the memory it works in must stay. buffers.loop is ours. on_device: one launch runs a
  // chunk of steps, else each step is a launch. Throws std::runtime_error for what CUDA refuses.
  SamplingLoop(int device, cudaGraph_t network, const StepBuffers& buffers, bool on_device);

  // Draws x_T and runs all steps on `stream`; returns when what is kept stands in memory. An exception
  // leaves it unfinished, with nothing of the run still under way.
  void run(const SamplingRun& run, cudaStream_t stream) const;

 private:
  void add_pass(cudaGraph_t graph, cudaGraph_t network, const cudaGraphConditionalHandle* condition);
  cudaGraph_t add_device_loop(cudaGraphConditionalHandle* condition);
  void run_chunks(const SamplingRun& run, cudaStream_t stream) const;
  void launch_steps(std::int64_t steps, cudaStream_t stream) const;

  int device_;
  bool on_device_;
  Owned<void*, cudaFree> loop_;
  StepBuffers buffers_;
  Owned<cudaGraph_t, cudaGraphDestroy> graph_;
  Owned<cudaGraphExec_t, cudaGraphExecDestroy> executable_;
};

}  // namespace advkd::cuda
