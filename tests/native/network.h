// A network to run natively, made of a plan by hand, and numbers to feed it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "runtime/convolution.h"
#include "runtime/pooled_plan.h"
#include "runtime/sampling_loop.h"

namespace native {

using Numbers = std::map<std::string, std::int64_t>;
using Floats = std::vector<float>;

inline Floats numbers(std::size_t count, std::uint32_t seed = 1) {
  Floats values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) * 0x1p-24f - 0.5f;
  }
  return values;
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

// Two saved steps of a sampler with three, (images, 2, 64 * 2); counts the network passes.
inline Floats sampled(const advkd::PooledPlan& plan, std::int64_t images, int threads,
                      std::atomic<int>* passes) {
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
  args.on_pass = [passes] { ++*passes; };
  args.on_step = [](std::int64_t) {};
  advkd::sampling_loop(args);
  return out;
}

}  // namespace native
