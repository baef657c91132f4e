// Averages of squares of 2 x 2 pixels, of what a norm and SiLU make of them on the way.
#include "cpu/exponential.h"
#include "cpu/vector.h"
#include "runtime/thread_pool.h"

namespace advkd::ADVKD_ISA {
namespace {

// One vector of channels of an image, or the `lanes` of it that are channels.
struct Lanes {
  const AveragePoolArgs& args;
  std::int64_t channel, lanes;
  Vector scale, shift;

  Lanes(const AveragePoolArgs& args, std::int64_t image, std::int64_t channel)
      : args(args),
        channel(channel),
        lanes(args.channels - channel < kWidth ? args.channels - channel : kWidth),
        scale(filled(1.0f)),
        shift(filled(0.0f)) {
    if (args.scale == nullptr) return;
    scale = read(args.scale + image * args.channels + channel);
    shift = read(args.shift + image * args.channels + channel);
  }

  Vector read(const float* from) const {
    return lanes == kWidth ? load(from) : load_some(from, lanes);
  }

  Vector value(const float* pixel) const {
    Vector v = read(pixel + channel);
    if (args.scale != nullptr) v = v * scale + shift;
    return args.silu ? silu(v) : v;
  }

  void write(float* pixel, Vector v) const {
    if (lanes == kWidth) return store(pixel + channel, v);
    store_some(pixel + channel, v, lanes);
  }
};

}  // namespace

void average_pool(const AveragePoolArgs& args) {
  const std::int64_t rows = args.height / 2, columns = args.width / 2;
  parallel_for(args.batch * rows, args.threads, [&](std::int64_t task) {
    const std::int64_t image = task / rows;
    const std::int64_t below = args.width * args.x_stride;
    const float* const x = args.x + 2 * task * below;
    float* const y = args.y + task * columns * args.y_stride;
    for (std::int64_t channel = 0; channel < args.channels; channel += kWidth) {
      const Lanes lanes(args, image, channel);
      for (std::int64_t i = 0; i < columns; ++i) {
        const float* const square = x + 2 * i * args.x_stride;
        const Vector upper = lanes.value(square) + lanes.value(square + args.x_stride);
        const Vector lower =
            lanes.value(square + below) + lanes.value(square + below + args.x_stride);
        lanes.write(y + i * args.y_stride, (upper + lower) * 0.25f);
      }
    }
  });
}

}  // namespace advkd::ADVKD_ISA
