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

#include "network.h"
#include "runtime/convolution.h"
#include "runtime/dispatch.h"
#include "runtime/pooled_plan.h"
#include "runtime/sampling_loop.h"
#include "runtime/thread_pool.h"
#include "runtime/training_kernels.h"

namespace {

using native::Floats;
using native::Network;
using native::numbers;
using native::sampled;

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

// Two images share their operations among the threads; nine are parted among them.
void try_sampling_loop() {
  Network network;
  const advkd::PooledPlan plan = network.plan();
  for (const std::int64_t images : {2, 17}) {
    std::atomic<int> passes{0};
    const Floats expected = sampled(plan, images, 1, &passes);
    require(passes >= 3, "on_pass is called");
    require(std::all_of(expected.begin(), expected.end(), [](float v) { return std::isfinite(v); }),
            "images are finite");
    from_several_threads([&](int) {
      for (int repeat = 0; repeat < kRepeats; ++repeat) {
        require(sampled(plan, images, kThreads, &passes) == expected, "threads do not change bits");
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
    advkd::ConvolutionWgradArgs args = {};
    args.shape = shape;
    args.x = x.data();
    args.x_stride = C;
    args.grad_y = grad.data();
    args.grad_y_stride = D;
    args.dweights = to;
    args.dbias = to + D * 9 * C;
    args.workspace = memory.data();
    args.threads = threads;
    advkd::convolution_wgrad(args);
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
