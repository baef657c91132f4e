// Workloads of the engine and of training, for compare.py to count instructions of: what runs
// between the entry of `measured` and its return, on one thread.
//
//   instructions few|many MODEL     a student's images, one or five: other algorithms
//   instructions sampler            a sampler's steps, on a small network with every operation
//   instructions training           a residual block's and an attention's kernels, and their
//                                   gradients, for a batch of 8
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include "advkd.h"
#include "network.h"
#include "runtime/convolution.h"
#include "runtime/dispatch.h"
#include "runtime/training_kernels.h"

using native::Floats;
using native::numbers;

extern "C" __attribute__((noinline)) void measured(const std::function<void()>& work) {
  work();
  asm volatile("" ::: "memory");
}

namespace {

void generate(const char* path, std::int64_t count) {
  advkd_model* model;
  char error[ADVKD_ERROR_SIZE];
  if (advkd_open_file(path, &model, error) != ADVKD_OK) throw std::runtime_error(error);
  advkd_request request = {};
  request.count = count;
  std::vector<char> workspace(advkd_workspace_size(model, &request));
  const auto side = static_cast<std::size_t>(advkd_image_size(model, 0));
  Floats out(static_cast<std::size_t>(count) * side * side * 3);
  measured([&] {
    if (advkd_generate(model, &request, workspace.data(), workspace.size(), out.data()) !=
        ADVKD_OK) {
      throw std::runtime_error("no image was generated");
    }
  });
  advkd_close(model);
}

void run_sampler() {
  native::Network network;
  const advkd::PooledPlan plan = network.plan();
  std::atomic<int> passes{0};
  measured([&] { native::sampled(plan, 6, 1, &passes); });
}

void convolve(const advkd::ConvolutionShape& shape, const Floats& x, const Floats& grad) {
  const Floats weights = numbers(
      static_cast<std::size_t>(9 * shape.in_channels * shape.out_channels), 4);
  Floats packed(static_cast<std::size_t>(advkd::packed_size(shape)));
  const auto I = shape.in_channels;
  const auto algorithm = advkd::choose_algorithm(shape, 1);
  Floats workspace(static_cast<std::size_t>(advkd::workspace_size(shape, algorithm, 1)));
  Floats wgrad_workspace(static_cast<std::size_t>(advkd::wgrad_workspace_size(shape, 1)));
  Floats y(grad.size()), dweights(weights.size());
  advkd::ConvolutionArgs args = {};
  args.shape = shape;
  args.algorithm = algorithm;
  args.x = x.data();
  args.x_stride = I;
  args.packed = packed.data();
  args.scale = 1.0f;
  args.y = y.data();
  args.y_stride = shape.out_channels;
  args.workspace = workspace.data();
  args.threads = 1;
  advkd::pack_weights(shape, {weights.data(), 9 * I, 1, 3 * I, I}, packed.data());
  advkd::convolution(args);
  advkd::ConvolutionWgradArgs wgrad = {};
  wgrad.shape = shape;
  wgrad.x = x.data();
  wgrad.x_stride = I;
  wgrad.grad_y = grad.data();
  wgrad.grad_y_stride = shape.out_channels;
  wgrad.dweights = dweights.data();
  wgrad.workspace = wgrad_workspace.data();
  wgrad.threads = 1;
  advkd::convolution_wgrad(wgrad);
}

void normalize(std::int64_t B, std::int64_t C, std::int64_t P, std::int64_t G, const Floats& x,
               const Floats& grad) {
  const Floats weight = numbers(static_cast<std::size_t>(C), 5);
  const advkd::AffineParameters<float> affine = {weight.data(), weight.data(), nullptr, nullptr};
  const advkd::ImageShape shape = {B, C, P, true};
  std::vector<double> mean(static_cast<std::size_t>(B * G)), rstd(mean.size());
  Floats y(x.size()), dweight(weight.size()), dbias(weight.size());
  const auto& kernels = advkd::training_kernels().group_norm_silu_float32;
  kernels.forward({x.data(), affine, y.data(), mean.data(), rstd.data(), shape, G, 1e-5, true, 1});
  kernels.backward({grad.data(), x.data(), affine, mean.data(), rstd.data(), y.data(),
                    dweight.data(), dbias.data(), nullptr, nullptr, shape, G, true, 1});
}

void attend(std::int64_t B, std::int64_t N, std::int64_t D, const Floats& x, const Floats& grad) {
  const auto rows = [&](auto* at) {
    return advkd::HeadRows<std::remove_pointer_t<decltype(at)>>{at, N * D, D, D};
  };
  const advkd::AttentionShape shape = {B, 1, N, N, D};
  Floats out(x.size()), lse(static_cast<std::size_t>(B * N));
  Floats dq(x.size()), dk(x.size()), dv(x.size());
  advkd::kernels().attention_float32({rows(x.data()), rows(x.data()), rows(x.data()),
                                      rows(out.data()), lse.data(), shape, 0.125f, nullptr, 1});
  advkd::training_kernels().attention_backward_float32(
      {rows(grad.data()), rows(x.data()), rows(x.data()), rows(x.data()),
       rows(static_cast<const float*>(out.data())), lse.data(), rows(dq.data()), rows(dk.data()),
       rows(dv.data()), shape, 0.125f, 1});
}

void train() {
  constexpr std::int64_t B = 8, S = 14, C = 48, N = 64, D = 64;
  const Floats x = numbers(B * S * S * C), grad = numbers(B * S * S * C, 2);
  const Floats tokens = numbers(B * N * D, 3), grad_tokens = numbers(B * N * D, 6);
  measured([&] {
    normalize(B, C, S * S, 8, x, grad);
    convolve({B, S, S, C, C, 3, 1, 1, 1, false}, x, grad);
    attend(B, N, D, tokens, grad_tokens);
  });
}

}  // namespace

int main(int argc, char** argv) try {
  const char* const name = argc > 1 ? argv[1] : "";
  if (std::strcmp(name, "few") == 0 && argc == 3) {
    generate(argv[2], 1);
  } else if (std::strcmp(name, "many") == 0 && argc == 3) {
    generate(argv[2], 5);
  } else if (std::strcmp(name, "sampler") == 0) {
    run_sampler();
  } else if (std::strcmp(name, "training") == 0) {
    train();
  } else {
    return 2;
  }
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
