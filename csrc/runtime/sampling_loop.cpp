#include "runtime/sampling_loop.h"

#include <string>
#include <utility>

#include "runtime/dispatch.h"
#include "runtime/error.h"
#include "runtime/half.h"
#include "runtime/training_kernels.h"

namespace advkd {
namespace {

class SamplingLoop {
 public:
  explicit SamplingLoop(const SamplingLoopArgs& args)
      : args_(args),
        pixels_(args.plan->data().buffers[0].pixels),
        channels_(args.plan->data().buffers[0].channels),
        elements_(pixels_ * channels_),
        state_(size()),
        next_(size()),
        model_out_(size()),
        x0_hat_(size()) {}

  void run() {
    kernels().philox_normal({noise(kXTStep, 0), shape(args_.images), state_.data(),
                             args_.threads});
    std::size_t saved = 0;
    for (std::int64_t step = 0; step < args_.steps; ++step) {
      const bool saves = saved < args_.saved.size() && args_.saved[saved] == step + 1;
      const std::int64_t target = saves ? static_cast<std::int64_t>(saved++) : -1;
      args_.plan->run_parts(args_.images, args_.threads,
                            [&](std::int64_t first, std::int64_t count, int threads) {
                              advance(step, first, count, threads);
                              if (target >= 0) save(step, target, first, count);
                              if (args_.on_pass) args_.on_pass();
                            });
      std::swap(state_, next_);
      if (args_.on_step) args_.on_step(step + 1);
    }
  }

 private:
  std::size_t size() const { return static_cast<std::size_t>(args_.images * elements_); }

  ImageShape shape(std::int64_t images) const { return {images, channels_, pixels_, true}; }

  // For images from number `first` of the batch on.
  NoiseSource noise(std::uint32_t step, std::int64_t first) const {
    return {args_.seed, args_.image_index + first, step_word(step, args_.purpose)};
  }

  StepCoefficients coefficients(std::int64_t step) const {
    const double* const c = args_.coefficients + 6 * step;
    const auto at = [c](int i) { return static_cast<float>(c[i]); };
    return {at(0), at(1), at(2), at(3), at(4), at(5)};
  }

  void advance(std::int64_t step, std::int64_t first, std::int64_t count, int threads) {
    const std::int64_t at = first * elements_;
    const float* const conditioning =
        args_.conditioning + step * args_.plan->data().conditioning;
    const std::int64_t* const labels = args_.labels == nullptr ? nullptr : args_.labels + first;
    args_.plan->run(
        {state_.data() + at, model_out_.data() + at, conditioning, labels, count, threads},
        args_.nan_fill);
    training_kernels().sampling_step({state_.data() + at, model_out_.data() + at, next_.data() + at,
                             x0_hat_.data() + at, shape(count), coefficients(step), args_.clip,
                             noise(static_cast<std::uint32_t>(step), first), threads});
  }

  void save(std::int64_t step, std::int64_t target, std::int64_t first, std::int64_t count) const {
    const bool denoised = args_.save_denoised && step + 1 < args_.steps;
    const float* const from = (denoised ? x0_hat_ : next_).data();
    for (std::int64_t i = first; i < first + count; ++i) {
      const std::int64_t to = i * args_.image_stride + target * args_.saved_stride;
      if (args_.half) {
        std::uint16_t* const out = static_cast<std::uint16_t*>(args_.out) + to;
        transpose(from + i * elements_, [out](std::int64_t at, float v) { out[at] = half_of(v); });
      } else {
        float* const out = static_cast<float*>(args_.out) + to;
        transpose(from + i * elements_, [out](std::int64_t at, float v) { out[at] = v; });
      }
    }
  }

  // From (P, C) to (C, P).
  template <class Store>
  void transpose(const float* from, const Store& store) const {
    for (std::int64_t c = 0; c < channels_; ++c) {
      for (std::int64_t p = 0; p < pixels_; ++p) store(c * pixels_ + p, from[p * channels_ + c]);
    }
  }

  const SamplingLoopArgs& args_;
  const std::int64_t pixels_, channels_, elements_;
  std::vector<float> state_, next_, model_out_, x0_hat_;
};

void check(const SamplingLoopArgs& args) {
  const PlanData& plan = args.plan->data();
  const PlanBuffer &in = plan.buffers[0], &out = plan.buffers[1];
  if (in.pixels != out.pixels || in.channels != out.channels) {
    refuse("the plan's output has another shape than its input");
  }
  if (args.purpose < 0 || args.purpose >= kMostPurposes) {
    refuse("purpose=" + std::to_string(args.purpose) + " is not between 0 and " +
           std::to_string(kMostPurposes - 1));
  }
  if (args.steps < 0 || args.steps > kMostSteps) {
    refuse("steps=" + std::to_string(args.steps) + " is not between 0 and " +
           std::to_string(kMostSteps));
  }
  std::int64_t before = 0;
  for (const std::int64_t step : args.saved) {
    if (step <= before || step > args.steps) {
      refuse("the steps to save do not ascend from 1 to the number of steps");
    }
    before = step;
  }
}

}  // namespace

void sampling_loop(const SamplingLoopArgs& args) {
  check(args);
  if (args.images > 0) SamplingLoop(args).run();
}

}  // namespace advkd
