#include "runtime/student_images.h"

#include <numeric>
#include <vector>

#include "runtime/dispatch.h"
#include "runtime/noise.h"

namespace advkd {
namespace {

// NaN stays what it is.
float clamped(float value) { return value < -1.0f ? -1.0f : value > 1.0f ? 1.0f : value; }

// From (P, C) to (C, P), in [-1, 1].
void write_image(const PlanBuffer& shape, const float* from, float* to) {
  for (std::int64_t c = 0; c < shape.channels; ++c) {
    for (std::int64_t p = 0; p < shape.pixels; ++p) {
      to[c * shape.pixels + p] = clamped(from[p * shape.channels + c]);
    }
  }
}

std::size_t floats_of(const PlanBuffer& buffer, std::int64_t images) {
  return static_cast<std::size_t>(buffer.pixels * buffer.channels * images);
}

// The first word of each image's stream, scaled to the classes.
void draw_labels(const StudentImagesArgs& args, const std::vector<std::int64_t>& numbers,
                 std::int64_t* labels) {
  const auto count = static_cast<std::int64_t>(numbers.size());
  kernels().philox_uint32({{args.seed, numbers.data(), step_word(kLabelStep, args.purpose)},
                           count, 1, 0, labels, 1});
  const std::int64_t classes = args.plan->data().classes;
  for (std::int64_t i = 0; i < count; ++i) labels[i] = labels[i] * classes >> 32;
}

// `count` images from number `args.first + first` on.
void make_part(const StudentImagesArgs& args, std::int64_t first, std::int64_t count,
               int threads) {
  const PlanData& data = args.plan->data();
  const PlanBuffer &in = data.buffers[0], &out = data.buffers[1];
  std::vector<std::int64_t> numbers(static_cast<std::size_t>(count)), drawn;
  std::iota(numbers.begin(), numbers.end(), args.first + first);
  const std::int64_t* labels = args.labels == nullptr ? nullptr : args.labels + first;
  if (labels == nullptr && data.classes > 0) {
    drawn.resize(numbers.size());
    draw_labels(args, numbers, drawn.data());
    labels = drawn.data();
  }
  std::vector<float> x(floats_of(in, count)), y(floats_of(out, count));
  kernels().philox_normal({{args.seed, numbers.data(), step_word(kXTStep, args.purpose)},
                           {count, in.channels, in.pixels, true}, x.data(), threads});
  args.plan->run({x.data(), y.data(), nullptr, labels, count, threads});
  const auto image = static_cast<std::int64_t>(floats_of(out, 1));
  for (std::int64_t i = 0; i < count; ++i) {
    write_image(out, y.data() + i * image, args.out + (first + i) * image);
  }
}

}  // namespace

void student_images(const StudentImagesArgs& args) {
  args.plan->run_parts(args.images, args.threads,
                       [&](std::int64_t first, std::int64_t count, int threads) {
                         make_part(args, first, count, threads);
                       });
}

}  // namespace advkd
