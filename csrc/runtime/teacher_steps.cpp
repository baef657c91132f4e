// Operations that only teachers have. Builds for students are made without this file.
#include "runtime/plan_step.h"
#include "runtime/thread_pool.h"
#include "runtime/training_kernels.h"

namespace advkd {
namespace {

// FiLM (Perez et al. 2018) of a norm's scale and shift: y = (x scale + shift)(1 + a) + b, where a and
// b are the halves of a part of the conditioning, or of a vector of each image.
class FilmStep final : public PlanStep {
 public:
  explicit FilmStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    scale_ = reads(fields.vector("scale", channels));
    shift_ = reads(fields.vector("shift", channels));
    in_conditioning_ = fields.has("film_conditioning");
    if (in_conditioning_) {
      offset_ = fields.conditioning("film_conditioning", 2 * channels);
    } else {
      film_ = reads(fields.slice("film", 2 * channels, 1));
    }
    y_scale_ = writes(fields.vector("y_scale", channels));
    y_shift_ = writes(fields.vector("y_shift", channels));
  }

  void run(const Places& at) const override {
    const std::int64_t channels = scale_.channels;
    for (std::int64_t b = 0; b < at.pass.batch; ++b) {
      const float* const film = in_conditioning_ ? at.pass.conditioning + offset_
                                                 : at.input(film_) + b * film_.stride;
      const float* const scale = at.input(scale_) + b * channels;
      const float* const shift = at.input(shift_) + b * channels;
      float* const y_scale = at.output(y_scale_) + b * channels;
      float* const y_shift = at.output(y_shift_) + b * channels;
      for (std::int64_t c = 0; c < channels; ++c) {
        const float factor = 1.0f + film[c];
        y_scale[c] = scale[c] * factor;
        y_shift[c] = shift[c] * factor + film[channels + c];
      }
    }
  }

 private:
  Slice scale_, shift_, film_{}, y_scale_, y_shift_;
  bool in_conditioning_;
  std::int64_t offset_ = 0;
};

// Averages of squares of 2 x 2 pixels of act(x * x_scale + x_shift).
class AveragePoolStep final : public PlanStep {
 public:
  explicit AveragePoolStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    height_ = fields.number("height", 2, kLargestSide);
    width_ = fields.number("width", 2, kLargestSide);
    if (height_ % 2 != 0 || width_ % 2 != 0) fields.fail("its sides are not even");
    x_ = reads(fields.slice("x", channels, height_ * width_));
    silu_ = fields.number("silu", 0, 1) == 1;
    affine_ = fields.has("x_scale");
    if (affine_) {
      x_scale_ = reads(fields.vector("x_scale", channels));
      x_shift_ = reads(fields.vector("x_shift", channels));
    }
    y_ = writes(fields.slice("y", channels, height_ / 2 * (width_ / 2)));
  }

  void run(const Places& at) const override {
    constexpr double kCyclesPerNumber = 1;
    const double numbers = static_cast<double>(at.pass.batch * x_.pixels * x_.channels);
    training_kernels().average_pool(
        {at.input(x_), x_.stride, at.pass.batch, height_, width_, x_.channels,
         affine_ ? at.input(x_scale_) : nullptr, affine_ ? at.input(x_shift_) : nullptr, silu_,
         at.output(y_), y_.stride, threads_for(kCyclesPerNumber * numbers, at.pass.threads)});
  }

 private:
  Slice x_, x_scale_{}, x_shift_{}, y_;
  std::int64_t height_, width_;
  bool silu_, affine_;
};

}  // namespace

std::unique_ptr<PlanStep> teacher_step_of(const std::string& kind, Fields& fields) {
  if (kind == "film") return std::make_unique<FilmStep>(fields);
  if (kind == "average_pool") return std::make_unique<AveragePoolStep>(fields);
  return nullptr;
}

}  // namespace advkd
