// Drives the thread pool, a plan's executor with its sampling loop, and the kernels of training from
// several threads, for the thread sanitizer. Ends with status 0 where results are right, too.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "runtime/convolution.h"
#include "runtime/dispatch.h"
#include "runtime/pooled_plan.h"
#include "runtime/sampling_loop.h"
#include "runtime/thread_pool.h"
#include "runtime/training_kernels.h"

namespace {

using advkd::PlanOp;
using Numbers = std::map<std::string, std::int64_t>;
using Floats = std::vector<float>;

constexpr int kThreads = 4;  // of a job
constexpr int kCallers = 3;
constexpr int kRepeats = 5;

std::atomic<bool> all_right{true};

// Goes on where something is wrong, since the race behind it may be reported only later.
void require(bool holds, const char* what) {
  if (!holds && all_right.exchange(false)) std::fprintf(stderr, "wrong: %s\n", what);
}

void from_several_threads(const std::function<void(int)>& call) {
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) callers.emplace_back(call, i);
  for (std::thread& caller : callers) caller.join();
}

Floats numbers(std::size_t count, std::uint32_t seed = 1) {
  Floats values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) * 0x1p-24f - 0.5f;
  }
  return values;
}

// Many short jobs. Their results lie in memory that no lock guards: a job that ends too early, or a
// task that runs twice, races.
void try_thread_pool() {
  from_several_threads([](int caller) {
    for (int job = 0; job < 200; ++job) {
      const std::int64_t tasks = 1 + job % 7;
      std::vector<std::int64_t> done(static_cast<std::size_t>(2 * tasks), caller);
      advkd::parallel_for(tasks, kThreads, [&](std::int64_t task) {
        // Also shared, where the outer tasks found the pool busy and the inner ones do not.
        advkd::parallel_for(2, kThreads, [&](std::int64_t inner) {
          done[static_cast<std::size_t>(2 * task + inner)] += task;
        });
      });
      for (std::int64_t i = 0; i < 2 * tasks; ++i) {
        require(done[static_cast<std::size_t>(i)] == i / 2 + caller, "every task runs once");
      }
    }
  });
}

// Two tasks that wait for each other, so that both of them throw.
void try_exceptions() {
  for (int job = 0; job < 20; ++job) {
    std::atomic<int> met{0};
    bool caught = false;
    try {
      advkd::parallel_for(2, 2, [&](std::int64_t task) {
        met.fetch_add(1, std::memory_order_relaxed);
        while (met.load(std::memory_order_relaxed) < 2) std::this_thread::yield();
        throw std::runtime_error("task " + std::to_string(task));
      });
    } catch (const std::runtime_error&) {
      caught = true;
    }
    require(caught, "an exception reaches the caller");
  }
}

// A small class-conditional network with every kind of operation, 8 x 8 pixels of 2 channels.
class Network {
 public:
  Network() {
    const int x = buffer(64, 2, false), y = buffer(64, 2, false);
    const int temb = buffer(1, 8), h = buffer(64, 16), scale = buffer(1, 16), shift = buffer(1, 16);
    const int qkv = buffer(64, 48), lse = buffer(1, 2 * 64), mixed = buffer(64, 16);
    const int bias = buffer(1, 16), doubled = buffer(256, 16), deep = buffer(64, 64);
    const int ones = buffer(1, 64), zeros = buffer(1, 64);
    add("embed", {{"channels", 8}, {"table", weights(3 * 8)}, {"conditioning", 0}}, {{"y", temb}});
    convolution(1, 1, 1, 8, 16, 0, {{"bias", weights(16)}}, {{"x", temb}, {"y", bias}});
    convolution(3, 8, 8, 2, 16, 1, {}, {{"x", x}, {"y", h}, {"bias_buffer", bias}});
    add("norm",
        {{"channels", 16}, {"groups", 4}, {"pixels", 64}, {"weight", weights(16)},
         {"bias", weights(16)}},
        {{"x", h}, {"scale", scale}, {"shift", shift}}, 1e-5);
    convolution(1, 8, 8, 16, 48, 0, {{"bias", weights(48)}},
                {{"x", h}, {"y", qkv}, {"x_scale", scale}, {"x_shift", shift}});
    add("attention", {{"heads", 2}, {"head_dim", 8}, {"pixels", 64}},
        {{"qkv", qkv}, {"y", mixed}, {"lse", lse}}, 0.35);
    add("upsample", {{"channels", 16}, {"height", 8}, {"width", 8}}, {{"x", mixed}, {"y", doubled}});
    add("space_to_depth", {{"channels", 16}, {"block", 2}, {"height", 16}, {"width", 16}},
        {{"x", doubled}, {"y", deep}});
    add("constant", {{"channels", 64}, {"values", weights(64)}}, {{"y", ones}});
    add("constant", {{"channels", 64}, {"values", weights(64)}}, {{"y", zeros}});
    convolution(3, 8, 8, 64, 2, 2, {{"bias_conditioning", 8}},
                {{"x", deep}, {"y", y}, {"x_scale", ones}, {"x_shift", zeros}, {"residual", x}});
    plan_.classes = 3;
    plan_.conditioning = 10;
    plan_.batch = 4;
  }

  advkd::PooledPlan plan() {
    weights_ = numbers(static_cast<std::size_t>(plan_.weights_size));
    for (float& weight : weights_) weight *= 0.3f;
    plan_.weights = weights_.data();
    return advkd::PooledPlan(plan_);
  }

 private:
  using Buffers = std::map<std::string, int>;

  int buffer(std::int64_t pixels, std::int64_t channels, bool in_arena = true) {
    plan_.buffers.push_back({in_arena ? plan_.arena : 0, pixels, channels});
    if (in_arena) plan_.arena += (pixels * channels + 15) / 16 * 16;
    return static_cast<int>(plan_.buffers.size()) - 1;
  }

  std::int64_t weights(std::int64_t count) {
    const std::int64_t offset = plan_.weights_size;
    plan_.weights_size += count;
    return offset;
  }

  void add(const char* kind, Numbers fields, const Buffers& buffers, double factor = 1.0) {
    for (const auto& [name, index] : buffers) {
      fields[name] = index;
      fields[name + "_channel"] = 0;
    }
    plan_.ops.push_back({kind, fields, factor});
  }

  void convolution(int kernel, int height, int width, int in, int out, int algorithm,
                   Numbers fields, const Buffers& buffers) {
    const int pad = kernel / 2;
    const Numbers shape = {
        {"kernel", kernel},    {"height", height},      {"width", width},  {"in_channels", in},
        {"out_channels", out}, {"stride", 1},           {"upsample", 0},   {"pad_before", pad},
        {"pad_after", pad},    {"algorithm", algorithm}, {"silu", 1},
        {"packed", weights(advkd::packed_size({1, height, width, in, out, kernel, 1, pad, pad,
                                               false}))}};
    fields.insert(shape.begin(), shape.end());
    add("convolution", fields, buffers, 0.7);
  }

  advkd::PlanData plan_ = {};
  Floats weights_;
};

Floats sampled(const advkd::PooledPlan& plan, std::int64_t images, int threads) {
  constexpr std::int64_t kSteps = 3, kElements = 2 * 64;
  std::vector<double> coefficients;
  for (std::int64_t step = 0; step < kSteps; ++step) {
    for (double value : {1.0, -0.1, 0.5, 0.4, 0.1, 0.2}) coefficients.push_back(value);
  }
  const Floats conditioning = numbers(kSteps * 10, 7);
  std::vector<std::int64_t> index(static_cast<std::size_t>(images)), labels(index.size());
  std::iota(index.begin(), index.end(), 0);
  for (std::size_t i = 0; i < labels.size(); ++i) labels[i] = static_cast<std::int64_t>(i % 3);
  Floats out(static_cast<std::size_t>(images * 2 * kElements));
  std::atomic<int> passes{0};
  advkd::SamplingLoopArgs args = {};
  args.plan = &plan;
  args.steps = kSteps;
  args.coefficients = coefficients.data();
  args.conditioning = conditioning.data();
  args.clip = 2.0f;
  args.seed = 5;
  args.purpose = 1;
  args.images = images;
  args.image_index = index.data();
  args.labels = labels.data();
  args.saved = {1, kSteps};
  args.save_denoised = true;
  args.out = out.data();
  args.image_stride = 2 * kElements;
  args.saved_stride = kElements;
  args.threads = threads;
  args.nan_fill = true;
  args.on_pass = [&] { ++passes; };
  args.on_step = [](std::int64_t) {};
  advkd::sampling_loop(args);
  require(passes >= kSteps, "on_pass is called");
  return out;
}

// Two images share their operations among the threads; nine are parted among them.
void try_sampling_loop() {
  Network network;
  const advkd::PooledPlan plan = network.plan();
  for (const std::int64_t images : {2, 17}) {
    const Floats expected = sampled(plan, images, 1);
    require(std::all_of(expected.begin(), expected.end(), [](float v) { return std::isfinite(v); }),
            "images are finite");
    from_several_threads([&](int) {
      for (int repeat = 0; repeat < kRepeats; ++repeat) {
        require(sampled(plan, images, kThreads) == expected, "threads do not change bits");
      }
    });
  }
}

// The results of a kernel that writes `count` floats, at one and at several threads.
void try_kernel(const char* name, std::size_t count,
                const std::function<void(float* out, int threads)>& kernel) {
  Floats expected(count), found(count);
  kernel(expected.data(), 1);
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    kernel(found.data(), kThreads);
    require(found == expected, name);
  }
}

void try_group_norm_silu() {
  constexpr std::size_t B = 8, C = 8, P = 900, G = 2, N = B * C * P;
  const Floats x = numbers(N), grad = numbers(N, 2), weight = numbers(C, 3), bias = numbers(C, 4);
  const Floats scale = numbers(B * C, 5), shift = numbers(B * C, 6);
  const auto& kernels = advkd::training_kernels().group_norm_silu_float32;
  for (const bool last : {false, true}) {
    const advkd::ImageShape shape = {B, C, P, last};
    const advkd::AffineParameters<float> affine = {weight.data(), bias.data(), scale.data(),
                                                   shift.data()};
    std::vector<double> mean(B * G), rstd(B * G);
    try_kernel("group_norm_silu", N, [&](float* y, int threads) {
      kernels.forward({x.data(), affine, y, mean.data(), rstd.data(), shape, G, 1e-5, true,
                       threads});
    });
    try_kernel("group_norm_silu backward", N + 2 * C + 2 * B * C, [&](float* out, int threads) {
      float* const after = out + N;
      kernels.backward({grad.data(), x.data(), affine, mean.data(), rstd.data(), out, after,
                        after + C, after + 2 * C, after + 2 * C + B * C, shape, G, true, threads});
    });
  }
}

// Few heads with many keys: their ranges are tasks of their own.
void try_attention() {
  constexpr std::int64_t M = 300, N = 40, D = 16;
  const Floats q = numbers(N * D), k = numbers(M * D, 2), v = numbers(M * D, 3);
  const Floats grad = numbers(N * D, 4);
  Floats out(N * D), lse(N);
  const auto rows = [](auto* at, std::int64_t count) {
    return advkd::HeadRows<std::remove_pointer_t<decltype(at)>>{at, count * D, D, D};
  };
  const advkd::AttentionShape shape = {1, 1, N, M, D};
  try_kernel("attention", N * D, [&](float* to, int threads) {
    advkd::kernels().attention_float32({rows(q.data(), N), rows(k.data(), M), rows(v.data(), M),
                                        rows(to, N), lse.data(), shape, 0.25f, nullptr, threads});
    std::copy_n(to, N * D, out.data());
  });
  try_kernel("attention backward", (N + 2 * M) * D, [&](float* to, int threads) {
    advkd::training_kernels().attention_backward_float32(
        {rows(grad.data(), N), rows(q.data(), N), rows(k.data(), M), rows(v.data(), M),
         rows(static_cast<const float*>(out.data()), N), lse.data(), rows(to, N),
         rows(to + N * D, M), rows(to + (N + M) * D, M), shape, 0.25f, threads});
  });
}

// Large enough that several threads surely take part.
void try_convolution() {
  constexpr std::int64_t B = 8, S = 13, C = 20, D = 24;
  const advkd::ConvolutionShape shape = {B, S, S, C, D, 3, 1, 1, 1, false};
  const Floats x = numbers(B * S * S * C), grad = numbers(B * S * S * D, 2);
  const Floats packed = numbers(static_cast<std::size_t>(advkd::packed_size(shape)), 3);
  for (const auto algorithm :
       {advkd::ConvolutionAlgorithm::direct, advkd::ConvolutionAlgorithm::winograd2,
        advkd::ConvolutionAlgorithm::winograd4}) {
    try_kernel("convolution", B * S * S * D, [&](float* to, int threads) {
      const std::int64_t size = advkd::workspace_size(shape, algorithm, threads);
      Floats memory(static_cast<std::size_t>(size));
      advkd::ConvolutionArgs args = {};
      args.shape = shape;
      args.algorithm = algorithm;
      args.x = x.data();
      args.x_stride = C;
      args.packed = packed.data();
      args.scale = 1.0f;
      args.y = to;
      args.y_stride = D;
      args.workspace = memory.data();
      args.threads = threads;
      advkd::convolution(args);
    });
  }
  try_kernel("convolution wgrad", D * 9 * C + D, [&](float* to, int threads) {
    Floats memory(static_cast<std::size_t>(advkd::wgrad_workspace_size(shape, threads)));
    advkd::convolution_wgrad({shape, x.data(), C, grad.data(), D, to, to + D * 9 * C,
                              memory.data(), threads});
  });
}

}  // namespace

int main() {
  advkd::set_worth_sharing(0.0);
  try_thread_pool();
  try_exceptions();
  try_sampling_loop();
  try_group_norm_silu();
  try_attention();
  try_convolution();
  if (!all_right) return 1;
  std::puts("thread pool, executor, sampling loop and kernels of training: no race");
  return 0;
}
