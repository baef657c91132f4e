// One step of DDIM (Song et al. 2021, eq. 12) or DDPM (Ho et al. 2020, algorithm 2), its
// coefficients given, in one pass over memory; the noise is generated where it is added.
#include <cstdint>

#include "cpu/philox.h"
#include "runtime/thread_pool.h"

namespace advkd::ADVKD_ISA {

// Pixels (channels_last) or elements of one task.
constexpr std::int64_t kTaskLength = 4 * kNormals;

// Each product and sum is rounded on its own, left to right, as the reference in
// advkd/ops/reference.py does. Noise waits in x_prev, whose cache lines are at hand, until the step
// replaces it.
template <bool kNoise>
static void step_run(const SamplingStepArgs& args, std::int64_t at, std::int64_t n) {
  const float *__restrict x_t = args.x_t + at, *__restrict model_out = args.model_out + at;
  float *__restrict x_prev = args.x_prev + at, *__restrict x0_hat = args.x0_hat + at;
  const float bound = args.clip > 0.0f ? args.clip : __builtin_inff();
  const auto [a_x, a_m, c_0, c_x, c_m, sigma] = args.coefficients;
  for (std::int64_t i = 0; i < n; ++i) {
    const float x = x_t[i], m = model_out[i];
    float x0 = a_x * x + a_m * m;
    x0 = x0 < -bound ? -bound : x0;
    x0 = x0 > bound ? bound : x0;
    float next = c_0 * x0 + c_x * x + c_m * m;
    if (kNoise) next = next + sigma * x_prev[i];
    x0_hat[i] = x0;
    x_prev[i] = next;
  }
}

// Elements [first, first + n) of an image in (C, P) order.
static void step_nchw(const SamplingStepArgs& args, std::int64_t image, std::int64_t first,
                      std::int64_t n) {
  const std::int64_t at = image * args.shape.elements() + first;
  if (args.coefficients.sigma == 0.0f) return step_run<false>(args, at, n);
  fill_normals(PhiloxStream(args.source, image), first, n, args.x_prev + at);
  step_run<true>(args, at, n);
}

// Pixels [first, first + n) of an image in (P, C) order; the noise still counts in (C, P) order.
static void step_nhwc(const SamplingStepArgs& args, std::int64_t image, std::int64_t first,
                      std::int64_t n) {
  const std::int64_t channels = args.shape.channels, pixels = args.shape.pixels;
  const std::int64_t at = (image * pixels + first) * channels;
  if (args.coefficients.sigma == 0.0f) return step_run<false>(args, at, n * channels);
  const PhiloxStream stream(args.source, image);
  float plane[kTaskLength];
  for (std::int64_t c = 0; c < channels; ++c) {
    fill_normals(stream, c * pixels + first, n, plane);
    for (std::int64_t i = 0; i < n; ++i) args.x_prev[at + i * channels + c] = plane[i];
  }
  step_run<true>(args, at, n * channels);
}

void sampling_step(const SamplingStepArgs& args) {
  const bool channels_last = args.shape.channels_last;
  const std::int64_t length = channels_last ? args.shape.pixels : args.shape.elements();
  const std::int64_t tasks_per_image = (length + kTaskLength - 1) / kTaskLength;
  parallel_for(args.shape.batch * tasks_per_image, args.threads, [&](std::int64_t task) {
    const std::int64_t image = task / tasks_per_image;
    const std::int64_t first = task % tasks_per_image * kTaskLength;
    const std::int64_t n = length - first < kTaskLength ? length - first : kTaskLength;
    (channels_last ? step_nhwc : step_nchw)(args, image, first, n);
  });
}

}  // namespace advkd::ADVKD_ISA
