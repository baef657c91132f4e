#include "cuda/sampling_loop.h"

#include <algorithm>

namespace advkd::cuda {

std::string unavailable() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) return "";
  cudaGetLastError();  // or the next call would report it again
  if (status == cudaSuccess) return "no CUDA device: cudaGetDeviceCount counts none";
  return std::string("no CUDA device: cudaGetDeviceCount says ") + cudaGetErrorString(status);
}

std::string device_loop_unavailable() {
  constexpr int kFirst = 12040;
  int driver = 0;
  check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
  if (driver >= kFirst) return "";
  return "the driver is of CUDA " + std::to_string(driver / 1000) + "." +
         std::to_string(driver % 1000 / 10) + ", and WHILE nodes are of 12.4";
}

SamplingLoop::SamplingLoop(int device, cudaGraph_t network, const StepBuffers& buffers,
                           bool on_device)
    : device_(device), on_device_(on_device), buffers_(buffers) {
  if (buffers.told_bytes % 16 != 0 || !begins_at_16_bytes(buffers.told)) {
    throw std::invalid_argument("what the network is told is no whole number of 16 bytes");
  }
  if (buffers.x_in == nullptr && buffers.type != ElementType::kFloat32) {
    throw std::invalid_argument("a network of a half type needs an x_in of that type");
  }
  check(cudaSetDevice(device), "cudaSetDevice");
  check(cudaMalloc(loop_.out(), sizeof(LoopState)), "cudaMalloc");
  buffers_.loop = static_cast<LoopState*>(loop_.get());
  check(cudaGraphCreate(graph_.out(), 0), "cudaGraphCreate");
  if (on_device) {
    cudaGraphConditionalHandle condition;
    const cudaGraph_t body = add_device_loop(&condition);
    add_pass(body, network, &condition);
  } else {
    add_pass(graph_.get(), network, nullptr);
  }
  check(cudaGraphInstantiate(executable_.out(), graph_.get(), 0), "cudaGraphInstantiate");
}

// A WHILE node, whose body is returned. Each launch of the graph enters it.
cudaGraph_t SamplingLoop::add_device_loop(cudaGraphConditionalHandle* condition) {
  check(cudaGraphConditionalHandleCreate(condition, graph_.get(), 1, cudaGraphCondAssignDefault),
        "cudaGraphConditionalHandleCreate");
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = *condition;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  cudaGraphNode_t node;
#if CUDART_VERSION >= 13000
  check(cudaGraphAddNode(&node, graph_.get(), nullptr, nullptr, 0, &params), "cudaGraphAddNode");
#else
  check(cudaGraphAddNode(&node, graph_.get(), nullptr, 0, &params), "cudaGraphAddNode");
#endif
  return params.conditional.phGraph_out[0];
}

// The network, then one launch of our own.
void SamplingLoop::add_pass(cudaGraph_t graph, cudaGraph_t network,
                            const cudaGraphConditionalHandle* condition) {
  cudaGraphNode_t pass;
  check(cudaGraphAddChildGraphNode(&pass, graph, nullptr, 0, network),
        "cudaGraphAddChildGraphNode");
  Owned<cudaStream_t, cudaStreamDestroy> stream;
  check(cudaStreamCreateWithFlags(stream.out(), cudaStreamNonBlocking),
        "cudaStreamCreateWithFlags");
  check(cudaStreamBeginCaptureToGraph(stream.get(), graph, &pass, nullptr, 1,
                                      cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCaptureToGraph");
  launch_sampling_step(buffers_, condition, stream.get());
  cudaGraph_t captured;
  check(cudaStreamEndCapture(stream.get(), &captured), "cudaStreamEndCapture");
}

void SamplingLoop::run(const SamplingRun& run, cudaStream_t stream) const {
  if (run.steps < 1 || run.steps >= kXTStep || run.chunk < 1) {
    throw std::invalid_argument("a run has at least one step, fewer than 2^32 - 1, and chunks of at least one");
  }
  check(cudaSetDevice(device_), "cudaSetDevice");
  const auto chunk = static_cast<std::uint32_t>(std::min(run.chunk, run.steps));
  const LoopState state = {run.seed, run.image_index, run.rows, run.told, run.kept, run.kept_half,
                           run.clip, static_cast<std::uint32_t>(run.steps), 0, 0, chunk, chunk};
  try {
    check(cudaMemcpyAsync(buffers_.loop, &state, sizeof state, cudaMemcpyHostToDevice, stream),
          "cudaMemcpyAsync");
    launch_first_state(buffers_, stream);
    run_chunks(run, stream);
  } catch (...) {
    // The caller's buffers may go away now.
    cudaStreamSynchronize(stream);
    throw;
  }
}

// While a chunk is told about, the next is already under way.
void SamplingLoop::run_chunks(const SamplingRun& run, cudaStream_t stream) const {
  Owned<cudaEvent_t, cudaEventDestroy> ends[2];
  for (auto& end : ends) {
    check(cudaEventCreateWithFlags(end.out(), cudaEventDisableTiming | cudaEventBlockingSync),
          "cudaEventCreateWithFlags");
  }
  std::int64_t queued = 0, told = 0;
  for (int turn = 0; told < run.steps; turn = 1 - turn) {
    const std::int64_t before = queued;
    if (queued < run.steps) {
      queued = std::min(queued + run.chunk, run.steps);
      launch_steps(queued - before, stream);
      check(cudaEventRecord(ends[turn].get(), stream), "cudaEventRecord");
    }
    if (before > told) {
      check(cudaEventSynchronize(ends[1 - turn].get()), "cudaEventSynchronize");
      told = before;
      if (run.on_chunk) run.on_chunk(told);
    }
  }
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
}

void SamplingLoop::launch_steps(std::int64_t steps, cudaStream_t stream) const {
  const std::int64_t launches = on_device_ ? 1 : steps;
  for (std::int64_t i = 0; i < launches; ++i) {
    check(cudaGraphLaunch(executable_.get(), stream), "cudaGraphLaunch");
  }
}

}  // namespace advkd::cuda
