#include "cuda/sampling_loop.h"

#include <algorithm>

#include "cuda/device_guard.h"

namespace advkd::cuda {
namespace {

// Holds the buffers for one run.
class Turn {
 public:
  explicit Turn(std::atomic<bool>& running) : running_(running) {
    if (running_.exchange(true)) {
      throw std::runtime_error("another run uses the buffers of this sampling loop");
    }
  }
  Turn(const Turn&) = delete;
  Turn& operator=(const Turn&) = delete;
  ~Turn() { running_ = false; }

 private:
  std::atomic<bool>& running_;
};

}  // namespace

std::string unavailable() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) return "";
  cudaGetLastError();  // or the next call would report it again
  if (status == cudaSuccess) return "no CUDA device: cudaGetDeviceCount counts none";
  return std::string("no CUDA device: cudaGetDeviceCount says ") + cudaGetErrorString(status);
}

SamplingLoop::SamplingLoop(int device, cudaGraph_t network, const StepBuffers& buffers)
    : device_(device), buffers_(buffers) {
  if (buffers.time_embedding_bytes % 16 != 0 || !begins_at_16_bytes(buffers.time_embedding)) {
    throw std::invalid_argument("the time embedding does not consist of whole 16 bytes");
  }
  if (buffers.x_in == nullptr && buffers.type != ElementType::kFloat32) {
    throw std::invalid_argument("a network of a half type needs an x_in of that type");
  }
  const DeviceGuard guard(device);
  check(cudaGraphCreate(graph_.out(), 0), "cudaGraphCreate");
  add_pass(network);
  check(cudaGraphInstantiate(executable_.out(), graph_.get(), 0), "cudaGraphInstantiate");
}

// The network, then one launch of our own. Both are graphs within the graph, which takes no call that
// drivers of CUDA 12.0 lack.
void SamplingLoop::add_pass(cudaGraph_t network) {
  Owned<cudaGraph_t, cudaGraphDestroy> step;
  capture_step(step);
  cudaGraphNode_t pass, update;
  check(cudaGraphAddChildGraphNode(&pass, graph_.get(), nullptr, 0, network),
        "cudaGraphAddChildGraphNode");
  check(cudaGraphAddChildGraphNode(&update, graph_.get(), &pass, 1, step.get()),
        "cudaGraphAddChildGraphNode");
}

void SamplingLoop::capture_step(Owned<cudaGraph_t, cudaGraphDestroy>& graph) const {
  Owned<cudaStream_t, cudaStreamDestroy> stream;
  check(cudaStreamCreateWithFlags(stream.out(), cudaStreamNonBlocking),
        "cudaStreamCreateWithFlags");
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  try {
    launch_sampling_step(buffers_, stream.get());
  } catch (...) {
    cudaStreamEndCapture(stream.get(), graph.out());
    throw;
  }
  check(cudaStreamEndCapture(stream.get(), graph.out()), "cudaStreamEndCapture");
}

void SamplingLoop::run(const SamplingRun& run, cudaStream_t stream) {
  if (run.steps < 1 || run.steps > kMaxSteps || run.chunk < 1) {
    throw std::invalid_argument("a run has 1 to 2^23 steps, in chunks of at least one");
  }
  if (run.purpose >> (32 - kPurposeBits) != 0) {
    throw std::invalid_argument("a purpose of noise is below 2^8");
  }
  const Turn turn(running_);
  const DeviceGuard guard(device_);
  try {
    start(run, stream);
    run_chunks(run, stream);
  } catch (...) {
    // The caller's buffers may go away now.
    cudaStreamSynchronize(stream);
    throw;
  }
}

void SamplingLoop::start(const SamplingRun& run, cudaStream_t stream) const {
  const LoopState state = {run.seed, run.image_index, run.rows, run.time_embedding, run.saved,
                           run.saved_half, run.clip, run.purpose << kPurposeBits,
                           static_cast<std::uint32_t>(run.steps), 0, 0};
  check(cudaMemcpyAsync(buffers_.loop, &state, sizeof state, cudaMemcpyHostToDevice, stream),
        "cudaMemcpyAsync");
  launch_first_state(buffers_, stream);
}

// While on_chunk reports a chunk, the next is already under way.
void SamplingLoop::run_chunks(const SamplingRun& run, cudaStream_t stream) const {
  Owned<cudaEvent_t, cudaEventDestroy> ends[2];
  for (auto& end : ends) {
    check(cudaEventCreateWithFlags(end.out(), cudaEventDisableTiming | cudaEventBlockingSync),
          "cudaEventCreateWithFlags");
  }
  std::int64_t queued = 0, reported = 0;
  for (int turn = 0; reported < run.steps; turn = 1 - turn) {
    const std::int64_t before = queued;
    if (queued < run.steps) {
      queued = before + std::min(run.chunk, run.steps - before);
      for (std::int64_t step = before; step < queued; ++step) {
        check(cudaGraphLaunch(executable_.get(), stream), "cudaGraphLaunch");
      }
      check(cudaEventRecord(ends[turn].get(), stream), "cudaEventRecord");
    }
    if (before > reported) {
      check(cudaEventSynchronize(ends[1 - turn].get()), "cudaEventSynchronize");
      reported = before;
      if (run.on_chunk) run.on_chunk(reported);
    }
  }
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

}  // namespace advkd::cuda
