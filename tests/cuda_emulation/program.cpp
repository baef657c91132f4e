// Every kernel and the host's loop on tiny grids, for the sanitizers. With the argument "race" the one
// kernel that lacks a barrier, of which the thread sanitizer must complain.
#include <cstdio>
#include <cstring>
#include <vector>

#include "controls.h"
#include "cuda/philox.h"
#include "cuda/sampling_loop.h"
#include "toy_network.h"

using namespace advkd::cuda;

namespace {

// Memory of its own for each buffer, so that what lies outside of it is nobody's.
struct Memory {
  explicit Memory(std::int64_t bytes) : words(static_cast<std::size_t>(bytes + 15) / 16) {}
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(words.data());
  }
  struct alignas(16) Word {
    unsigned char bytes[16];
  };
  std::vector<Word> words;
};

void sample(ElementType type, std::int64_t channels, std::int64_t pixels) {
  constexpr std::int64_t kBatch = 2, kSteps = 3;
  const std::int64_t elements = kBatch * channels * pixels;
  Memory loop_state(sizeof(LoopState)), x_t(4 * elements), x_in(elements * size_of(type));
  Memory model_out(elements * size_of(type)), time_embedding(16), saved(4 * elements);
  Memory rows(kSteps * sizeof(StepRow)), time_embeddings(kSteps * 16);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    rows.as<StepRow>()[i] = {1.1f, -0.4f, 0.9f, 0.3f, 0.1f, 0.2f, i == kSteps - 1 ? 0 : -1, 0};
    for (int k = 0; k < 4; ++k) time_embeddings.as<float>()[4 * i + k] = 0.1f;
  }
  const std::int64_t image_index[kBatch] = {3, 1};
  const StepBuffers buffers = {loop_state.as<LoopState>(), x_t.as<float>(),
                               type == ElementType::kFloat32 ? nullptr : x_in.as<void>(),
                               model_out.as<void>(), type, time_embedding.as<void>(), 16, kBatch,
                               channels, pixels};
  Owned<cudaGraph_t, cudaGraphDestroy> network;
  *network.out() = captured_toy_network(buffers);
  Owned<cudaStream_t, cudaStreamDestroy> stream;
  check(cudaStreamCreateWithFlags(stream.out(), 0), "cudaStreamCreateWithFlags");
  SamplingLoop loop(0, network.get(), buffers);
  loop.run({kSteps, 7, 1, 1.0f, image_index, rows.as<StepRow>(), time_embeddings.as<void>(),
            saved.as<void>(), false, 2, [](std::int64_t) {}},
           stream.get());
}

void normals(std::int64_t channels, std::int64_t pixels, bool channels_last) {
  constexpr std::int64_t kBatch = 2;
  Memory out(4 * kBatch * channels * pixels);
  const std::int64_t image_index[kBatch] = {3, -1};
  launch_normals({7, 5, image_index, kBatch, channels, pixels, channels_last, out.as<float>()}, 0,
                 nullptr);
  check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

void sum(bool barrier) {
  Memory x(4 * 64), y(4 * 64);
  launch_sum(x.as<float>(), y.as<float>(), barrier, nullptr);
  check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "race") == 0) {
    sum(false);
    return 0;
  }
  sum(true);
  for (const unsigned order : {0u, 2u}) {
    emulation::set_order(order);
    normals(3, 35, true);
    normals(1, 2000, false);
    for (const ElementType type :
         {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
      sample(type, 3, 64);
      sample(type, 3, 35);
      sample(type, 1, 2000);
    }
  }
  std::puts("all kernels ran");
  return emulation::live_objects().empty() ? 0 : 1;
}
