#include "cpu/sampling_loop.h"

#include <cstring>
#include <stdexcept>
#include <utility>

#include "cpu/dispatch.h"

namespace advkd {

std::uint16_t half_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) {
    return static_cast<std::uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x1FF));
  }
  if (magnitude >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24, rounded, in the low bits.
    float small;
    std::memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    std::memcpy(&bits, &small, sizeof bits);
    return static_cast<std::uint16_t>(sign | (bits - 0x3F000000));
  }
  const std::uint32_t odd = magnitude >> 13 & 1;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + odd) >> 13));
}

namespace {

constexpr std::uint32_t kXTStep = 0xFFFFFFFF;

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
    const NoiseSource source = {args_.seed, args_.image_index, kXTStep};
    kernels().philox_normal({source, shape(args_.images), state_.data(), args_.threads});
    std::size_t kept = 0;
    for (std::int64_t step = 0; step < args_.steps; ++step) {
      const bool keeps = kept < args_.kept.size() && args_.kept[kept] == step + 1;
      const std::int64_t place = keeps ? static_cast<std::int64_t>(kept++) : -1;
      args_.plan->run_parts(args_.images, args_.threads,
                            [&](std::int64_t first, std::int64_t count, int threads) {
                              advance(step, first, count, threads);
                              if (place >= 0) keep(step, place, first, count);
                              if (args_.on_pass) args_.on_pass();
                            });
      std::swap(state_, next_);
      if (args_.on_step) args_.on_step(step + 1);
    }
  }

 private:
  std::size_t size() const { return static_cast<std::size_t>(args_.images * elements_); }

  ImageShape shape(std::int64_t images) const { return {images, channels_, pixels_, true}; }

  void advance(std::int64_t step, std::int64_t first, std::int64_t count, int threads) {
    const std::int64_t at = first * elements_;
    const float* const row = args_.rows + step * args_.plan->data().row;
    const std::int64_t* const labels = args_.labels == nullptr ? nullptr : args_.labels + first;
    args_.plan->run({state_.data() + at, model_out_.data() + at, row, labels, count, threads},
                    args_.nan_fill);
    const double* const c = args_.coefficients + 6 * step;
    const auto coefficient = [c](int i) { return static_cast<float>(c[i]); };
    const NoiseSource source = {args_.seed, args_.image_index + first,
                                static_cast<std::uint32_t>(step)};
    kernels().sampling_step({state_.data() + at, model_out_.data() + at, next_.data() + at,
                             x0_hat_.data() + at, shape(count), coefficient(0), coefficient(1),
                             coefficient(2), coefficient(3), coefficient(4), coefficient(5),
                             args_.clip, source, threads});
  }

  void keep(std::int64_t step, std::int64_t place, std::int64_t first, std::int64_t count) const {
    const bool denoised = args_.keep_denoised && step + 1 < args_.steps;
    const float* const from = (denoised ? x0_hat_ : next_).data();
    for (std::int64_t i = first; i < first + count; ++i) {
      const std::int64_t to = i * args_.image_stride + place * args_.kept_stride;
      if (args_.half) {
        std::uint16_t* const out = static_cast<std::uint16_t*>(args_.out) + to;
        turn(from + i * elements_, [out](std::int64_t at, float v) { out[at] = half_of(v); });
      } else {
        float* const out = static_cast<float*>(args_.out) + to;
        turn(from + i * elements_, [out](std::int64_t at, float v) { out[at] = v; });
      }
    }
  }

  // From (P, C) to (C, P).
  template <class Store>
  void turn(const float* from, const Store& store) const {
    for (std::int64_t c = 0; c < channels_; ++c) {
      for (std::int64_t p = 0; p < pixels_; ++p) store(c * pixels_ + p, from[p * channels_ + c]);
    }
  }

  const SamplingLoopArgs& args_;
  const std::int64_t pixels_, channels_, elements_;
  std::vector<float> state_, next_, model_out_, x0_hat_;
};

}  // namespace

void sampling_loop(const SamplingLoopArgs& args) {
  const PlanData& plan = args.plan->data();
  const PlanBuffer &in = plan.buffers[0], &out = plan.buffers[1];
  if (in.pixels != out.pixels || in.channels != out.channels) {
    throw std::invalid_argument("the plan's output has another shape than its input");
  }
  std::int64_t before = 0;
  for (const std::int64_t step : args.kept) {
    if (step <= before || step > args.steps) {
      throw std::invalid_argument("steps to keep do not ascend from 1 to the number of steps");
    }
    before = step;
  }
  if (args.images > 0) SamplingLoop(args).run();
}

}  // namespace advkd
