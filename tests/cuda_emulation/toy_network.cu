// Stands in for a network: model_out = x_in / 4 + time_embedding[0], one product and one sum, which torch
// rounds alike. Without its barrier the sum races, as the thread sanitizer must find.
#include "toy_network.h"

namespace advkd::cuda {
namespace {

template <class T>
__global__ void toy_network_kernel(const void* x_in, const float* time_embedding,
                                   void* model_out, std::int64_t elements) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 64 + threadIdx.x;
  if (i >= elements) return;
  const float x = widened(static_cast<const T*>(x_in)[i]);
  narrow(x * 0.25f + time_embedding[0], static_cast<T*>(model_out)[i]);
}

__global__ void sum_kernel(const float* x, float* y, bool barrier) {
  ADVKD_SHARED(float, shared, 64);
  shared[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x] + shared[(threadIdx.x + 1) % 64];
}

void launch_toy_network(const StepBuffers& buffers, cudaStream_t stream) {
  const std::int64_t elements = buffers.batch * buffers.channels * buffers.pixels;
  const void* const x_in = buffers.x_in == nullptr ? buffers.x_t : buffers.x_in;
  with_type(buffers.type, [&](auto element) {
    const auto kernel = toy_network_kernel<decltype(element)>;
    ADVKD_LAUNCH(kernel, static_cast<unsigned>(divide_up(elements, 64)), 64u, stream, x_in,
                 static_cast<const float*>(buffers.time_embedding),
                 const_cast<void*>(buffers.model_out), elements);
  });
}

}  // namespace

cudaGraph_t captured_toy_network(const StepBuffers& buffers) {
  cudaStream_t stream;
  check(cudaStreamCreateWithFlags(&stream, 0), "cudaStreamCreateWithFlags");
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCapture");
  launch_toy_network(buffers, stream);
  cudaGraph_t graph;
  check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
  cudaStreamDestroy(stream);
  return graph;
}

void launch_sum(const float* x, float* y, bool barrier, cudaStream_t stream) {
  ADVKD_LAUNCH(sum_kernel, 1u, 64u, stream, x, y, barrier);
}

}  // namespace advkd::cuda
