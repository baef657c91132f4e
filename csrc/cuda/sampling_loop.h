// All steps of a sampler by launches of a CUDA graph: one pass of the network, captured elsewhere, and
// one sampling step. Python takes no part in a step.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>

#include "cuda/sampling_step.h"

namespace advkd::cuda {

// Why there is no CUDA device to use, as one sentence; empty where there is one.
std::string unavailable();

// What a run takes; pointers are to device memory.
struct SamplingRun {
  std::int64_t steps;
  std::uint64_t seed;
  std::uint32_t purpose;  // of the noise, below 2^8
  float clip;
  const std::int64_t* image_index;  // (B,)
  const StepRow* rows;              // (steps,)
  const void* time_embedding;       // (steps, time_embedding_bytes)
  void* saved;                      // (K, B, P, C), begins at 16 bytes
  bool saved_half;
  std::int64_t chunk;  // steps between two calls of on_chunk
  // Called with the number of steps done, on the calling thread; an exception ends the run.
  std::function<void(std::int64_t done)> on_chunk;
};

// A handle of the runtime, destroyed with its owner.
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
  // network: of one pass, which reads buffers.x_in (or x_t) and time_embedding, and writes model_out;
  // the graph is copied, but the memory it works in must stay. Throws std::runtime_error for what
  // CUDA refuses.
  SamplingLoop(int device, cudaGraph_t network, const StepBuffers& buffers);

  // Samples x_T and runs all steps on `stream`; returns when the targets are saved. An exception
  // leaves them unfinished, with no work of the run under way. Throws std::runtime_error while
  // another run uses the buffers, on this thread (from on_chunk) or another.
  void run(const SamplingRun& run, cudaStream_t stream);

 private:
  void add_pass(cudaGraph_t network);
  void capture_step(Owned<cudaGraph_t, cudaGraphDestroy>& graph) const;
  void start(const SamplingRun& run, cudaStream_t stream) const;
  void run_chunks(const SamplingRun& run, cudaStream_t stream) const;

  int device_;
  StepBuffers buffers_;
  std::atomic<bool> running_{false};
  Owned<cudaGraph_t, cudaGraphDestroy> graph_;
  Owned<cudaGraphExec_t, cudaGraphExecDestroy> executable_;
};

}  // namespace advkd::cuda
