// Every kernel and the host's loop on tiny grids, for the sanitizers. With the argument "race" the one
// kernel that lacks a barrier, of which the thread sanitizer must complain.
#include <cstdio>
#include <cstring>
#include <vector>

#include "controls.h"
#include "cuda/group_norm_silu.h"
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

void sample(ElementType type, std::int64_t channels, std::int64_t pixels, bool last, bool on_device) {
  constexpr std::int64_t kBatch = 2, kSteps = 3;
  const std::int64_t elements = kBatch * channels * pixels;
  Memory x_t(4 * elements), x_in(elements * size_of(type)), model_out(elements * size_of(type));
  Memory told(16), kept(4 * elements), rows(kSteps * sizeof(StepRow)), all_told(kSteps * 16);
  for (std::int64_t i = 0; i < kSteps; ++i) {
    rows.as<StepRow>()[i] = {1.1f, -0.4f, 0.9f, 0.3f, 0.1f, 0.2f, i == kSteps - 1 ? 0 : -1, 0};
    for (int k = 0; k < 4; ++k) all_told.as<float>()[4 * i + k] = 0.1f;
  }
  const std::int64_t image_index[kBatch] = {3, 1};
  const StepBuffers buffers = {nullptr, x_t.as<float>(),
                               type == ElementType::kFloat32 ? nullptr : x_in.as<void>(),
                               model_out.as<void>(), type, told.as<void>(), 16, kBatch, channels,
                               pixels, last};
  Owned<cudaGraph_t, cudaGraphDestroy> network;
  Owned<cudaStream_t, cudaStreamDestroy> stream;
  check(cudaGraphCreate(network.out(), 0), "cudaGraphCreate");
  check(cudaStreamCreateWithFlags(stream.out(), 0), "cudaStreamCreateWithFlags");
  check(cudaStreamBeginCaptureToGraph(stream.get(), network.get(), nullptr, nullptr, 0,
                                      cudaStreamCaptureModeThreadLocal),
        "cudaStreamBeginCaptureToGraph");
  launch_toy_network(buffers, stream.get());
  cudaGraph_t captured;
  check(cudaStreamEndCapture(stream.get(), &captured), "cudaStreamEndCapture");
  const SamplingLoop loop(0, network.get(), buffers, on_device);
  loop.run({kSteps, 7, 1.0f, image_index, rows.as<StepRow>(), all_told.as<void>(), kept.as<void>(),
            false, 2, [](std::int64_t) {}},
           stream.get());
}

void group_norm(ElementType type, std::int64_t channels, std::int64_t pixels, std::int64_t groups,
                bool last) {
  const std::int64_t bytes = channels * pixels * size_of(type);
  Memory x(bytes), y(bytes), weight(4 * channels), scale(4 * channels);
  std::memset(x.as<char>(), 0x3C, static_cast<std::size_t>(bytes));
  GroupNormSiluArgs args = {x.as<void>(), y.as<void>(), type, weight.as<float>(), nullptr,
                            scale.as<float>(), nullptr, 1, channels, pixels, groups, last, 1e-5f,
                            true, nullptr};
  Memory workspace(4 * group_norm_silu_workspace(args));
  args.workspace = workspace.as<float>();
  launch_group_norm_silu(args, nullptr);
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
  for (const unsigned order : {0u, 1u, 2u}) {
    emulation::set_order(order);
    for (const ElementType type :
         {ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16}) {
      for (const bool last : {false, true}) {
        sample(type, 3, 64, last, last);
        sample(type, 3, 35, last, !last);
        group_norm(type, 16, 64, 4, last);
        group_norm(type, 6, 35, 2, last);
      }
    }
  }
  // Large enough to be cut.
  group_norm(ElementType::kFloat32, 4, 70 * 70, 1, true);
  group_norm(ElementType::kBFloat16, 12, 64 * 64, 1, false);
  std::puts("all kernels ran");
  return emulation::live_objects().empty() ? 0 : 1;
}
