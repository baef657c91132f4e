// The operations that a plan knows.
#include <algorithm>
#include <cstring>
#include <map>

#include "runtime/convolution_int8.h"
#include "runtime/dispatch.h"
#include "runtime/plan_step.h"
#include "runtime/thread_pool.h"

namespace advkd {

ConvolutionShape convolution_shape(Fields& fields) {
  ConvolutionShape shape;
  shape.batch = 1;
  shape.height = fields.number("height", 1, kLargestSide);
  shape.width = fields.number("width", 1, kLargestSide);
  shape.in_channels = fields.channels("in_channels");
  shape.out_channels = fields.channels("out_channels");
  shape.kernel = static_cast<int>(fields.number("kernel", 1, 3));
  shape.stride = static_cast<int>(fields.number("stride", 1, 2));
  shape.pad_before = static_cast<int>(fields.number("pad_before", 0, 2));
  shape.pad_after = static_cast<int>(fields.number("pad_after", 0, 2));
  shape.upsample = fields.number("upsample", 0, 1) == 1;
  if (!supported(shape)) fields.fail("no kernel serves such a convolution");
  return shape;
}

namespace {

// y = (conv(act(x * x_scale + x_shift)) + bias + residual) * factor
class ConvolutionStep final : public PlanStep {
 public:
  explicit ConvolutionStep(Fields& fields) {
    shape_ = convolution_shape(fields);
    const std::int64_t pixels = shape_.out_height() * shape_.out_width();
    x_ = reads(fields.slice("x", shape_.in_channels, shape_.height * shape_.width));
    y_ = writes(fields.slice("y", shape_.out_channels, pixels));
    silu_ = fields.number("silu", 0, 1) == 1;
    affine_ = fields.has("x_scale");
    if (affine_) {
      x_scale_ = reads(fields.vector("x_scale", shape_.in_channels));
      x_shift_ = reads(fields.vector("x_shift", shape_.in_channels));
    }
    take_weights(fields);
    take_bias(fields);
    has_residual_ = fields.has("residual");
    if (has_residual_) residual_ = reads(fields.slice("residual", shape_.out_channels, pixels));
    scale_ = static_cast<float>(fields.factor());
  }

  std::int64_t workspace(std::int64_t batch, int threads) const override {
    const ConvolutionShape shape = shape_of(batch);
    if (kHasInt8 && int8_ != nullptr) return int8_workspace_size(shape, threads);
    return workspace_size(shape, algorithm_, convolution_threads(shape, algorithm_, threads));
  }

  void run(const Places& at) const override {
    ConvolutionArgs args = {};
    args.shape = shape_of(at.pass.batch);
    args.algorithm = algorithm_;
    args.x = at.input(x_);
    args.x_stride = x_.stride;
    args.x_scale = affine_ ? at.input(x_scale_) : nullptr;
    args.x_shift = affine_ ? at.input(x_shift_) : nullptr;
    args.x_silu = silu_;
    args.x_levels = levels_;
    args.packed = packed_;
    args.bias = bias_;
    if (bias_in_conditioning_) args.bias = at.pass.conditioning + bias_offset_;
    if (bias_in_buffer_) {
      args.bias = at.input(bias_slice_);
      args.bias_stride = bias_slice_.stride;
    }
    args.residual = has_residual_ ? at.input(residual_) : nullptr;
    args.residual_stride = residual_.stride;
    args.scale = scale_;
    args.y = at.output(y_);
    args.y_stride = y_.stride;
    args.workspace = at.workspace;
    args.threads = at.pass.threads;
    if (kHasInt8 && int8_ != nullptr) return int8_(args);
    args.threads = convolution_threads(args.shape, algorithm_, at.pass.threads);
    convolution(args);
  }

 private:
  ConvolutionShape shape_of(std::int64_t batch) const {
    ConvolutionShape shape = shape_;
    shape.batch = batch;
    return shape;
  }

  // As float32 for one of the algorithms, or as int8.
  void take_weights(Fields& fields) {
    if (fields.has("x_range")) {
      const float* const range = fields.weights("x_range", 2);
      if (!levels_.cover(range[0], range[1])) fields.fail("its x_range is no range around 0");
    }
    if (kHasInt8 && fields.has("int8")) {
      int8_ = int8_convolution();
      if (int8_ == nullptr || levels_.step == 0.0f || !fits_int8(shape_)) {
        fields.fail("no kernel serves such a convolution of int8");
      }
      packed_ = fields.weights("int8", int8_packed_size(shape_));
      return;
    }
    algorithm_ = static_cast<ConvolutionAlgorithm>(fields.number("algorithm", 0, 2));
    const bool winograd = algorithm_ != ConvolutionAlgorithm::direct;
    if (winograd && (shape_.kernel != 3 || shape_.stride != 1)) {
      fields.fail("no kernel serves such a convolution");
    }
    packed_ = fields.weights("packed", packed_size(shape_));
  }

  // One of: weights, a part of the conditioning, a vector of each image.
  void take_bias(Fields& fields) {
    const std::int64_t channels = shape_.out_channels;
    if (fields.has("bias")) bias_ = fields.weights("bias", channels);
    bias_in_conditioning_ = fields.has("bias_conditioning");
    if (bias_in_conditioning_) bias_offset_ = fields.conditioning("bias_conditioning", channels);
    bias_in_buffer_ = fields.has("bias_buffer");
    if (bias_in_buffer_) bias_slice_ = reads(fields.slice("bias_buffer", channels, 1));
    if ((bias_ != nullptr) + bias_in_conditioning_ + bias_in_buffer_ > 1) {
      fields.fail("it has two biases");
    }
  }

  ConvolutionShape shape_;
  ConvolutionAlgorithm algorithm_ = ConvolutionAlgorithm::direct;
  Int8Convolution int8_ = nullptr;  // of the instruction set that the plan was made with
  Levels levels_ = {};
  Slice x_, y_, x_scale_{}, x_shift_{}, residual_{}, bias_slice_{};
  bool silu_, affine_, has_residual_, bias_in_conditioning_, bias_in_buffer_;
  const float* packed_;
  const float* bias_ = nullptr;
  std::int64_t bias_offset_ = 0;  // in the conditioning
  float scale_;
};

// GroupNorm as the scale and shift of every channel, for the reader of x to apply.
class NormStep final : public PlanStep {
 public:
  explicit NormStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    groups_ = fields.number("groups", 1, channels);
    if (channels % groups_ != 0) fields.fail("its groups do not divide the channels");
    const std::int64_t pixels = fields.number("pixels", 1, kLargestSide * kLargestSide);
    x_ = reads(fields.slice("x", channels, pixels));
    scale_ = writes(fields.vector("scale", channels));
    shift_ = writes(fields.vector("shift", channels));
    weight_ = fields.weights("weight", channels);
    bias_ = fields.weights("bias", channels);
    eps_ = fields.factor();
    if (eps_ < 0) fields.fail("its eps is negative");
  }

  void run(const Places& at) const override {
    constexpr double kCyclesPerNumber = 0.5;
    const double numbers = static_cast<double>(at.pass.batch * x_.pixels * x_.channels);
    kernels().group_norm_affine({at.input(x_), x_.stride, at.pass.batch, x_.pixels, x_.channels,
                                 groups_, eps_, weight_, bias_, at.output(scale_),
                                 at.output(shift_),
                                 threads_for(kCyclesPerNumber * numbers, at.pass.threads)});
  }

 private:
  Slice x_, scale_, shift_;
  std::int64_t groups_;
  const float *weight_, *bias_;
  double eps_;
};

// Self-attention; a pixel of qkv holds q, k and v of all heads.
class AttentionStep final : public PlanStep {
 public:
  explicit AttentionStep(Fields& fields) {
    heads_ = fields.channels("heads");
    head_dim_ = fields.channels("head_dim");
    const std::int64_t channels = product(heads_, head_dim_);
    const std::int64_t tokens = fields.number("pixels", 1, kLargestSide * kLargestSide);
    qkv_ = reads(fields.slice("qkv", product(3, channels), tokens));
    y_ = writes(fields.slice("y", channels, tokens));
    lse_ = writes(fields.vector("lse", product(heads_, tokens)));
    scale_ = static_cast<float>(fields.factor());
  }

  std::int64_t workspace(std::int64_t batch, int threads) const override {
    const AttentionShape shape = shape_of(batch);
    return kernels().attention_workspace(shape, threads_of(shape, threads));
  }

  void run(const Places& at) const override {
    const std::int64_t channels = heads_ * head_dim_, tokens = qkv_.pixels;
    const auto part = [&](std::int64_t index) {
      return HeadRows<const float>{at.input(qkv_) + index * channels, tokens * qkv_.stride,
                                   head_dim_, qkv_.stride};
    };
    const HeadRows<float> out = {at.output(y_), tokens * y_.stride, head_dim_, y_.stride};
    const AttentionShape shape = shape_of(at.pass.batch);
    kernels().attention_float32({part(0), part(1), part(2), out, at.output(lse_), shape, scale_,
                                 at.workspace, threads_of(shape, at.pass.threads)});
  }

 private:
  AttentionShape shape_of(std::int64_t batch) const {
    return {batch, heads_, qkv_.pixels, qkv_.pixels, head_dim_};
  }

  static int threads_of(const AttentionShape& shape, int threads) {
    constexpr double kProductsPerCycle = 20;
    const double pairs = static_cast<double>(shape.queries) * static_cast<double>(shape.keys);
    const double channels = static_cast<double>(shape.batch * shape.heads * shape.head_dim);
    return threads_for(2.0 * pairs * channels / kProductsPerCycle, threads);
  }

  Slice qkv_, y_, lse_;
  std::int64_t heads_, head_dim_;
  float scale_;
};

int copying_threads(const Places& at, const Slice& slice) {
  constexpr double kCyclesPerNumber = 0.25;
  const double numbers = static_cast<double>(at.pass.batch * slice.pixels * slice.channels);
  return threads_for(kCyclesPerNumber * numbers, at.pass.threads);
}

// Nearest-neighbor doubling, for readers that cannot fold it in.
class UpsampleStep final : public PlanStep {
 public:
  explicit UpsampleStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    height_ = fields.number("height", 1, kLargestSide);
    width_ = fields.number("width", 1, kLargestSide);
    x_ = reads(fields.slice("x", channels, height_ * width_));
    y_ = writes(fields.slice("y", channels, 4 * height_ * width_));
  }

  void run(const Places& at) const override {
    const float* const x = at.input(x_);
    float* const y = at.output(y_);
    parallel_for(at.pass.batch * 2 * height_, copying_threads(at, y_), [&](std::int64_t task) {
      const float* from = x + task / 2 * width_ * x_.stride;
      float* to = y + task * 2 * width_ * y_.stride;
      const std::size_t bytes = static_cast<std::size_t>(x_.channels) * sizeof(float);
      for (std::int64_t i = 0; i < width_; ++i, from += x_.stride) {
        for (int twice = 0; twice < 2; ++twice, to += y_.stride) std::memcpy(to, from, bytes);
      }
    });
  }

 private:
  Slice x_, y_;
  std::int64_t height_, width_;
};

// Each block of factor x factor pixels becomes one pixel with all their channels, in row order.
class SpaceToDepthStep final : public PlanStep {
 public:
  explicit SpaceToDepthStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    factor_ = fields.number("block", 1, 1 << 10);
    height_ = fields.number("height", 1, kLargestSide);
    width_ = fields.number("width", 1, kLargestSide);
    if (height_ % factor_ != 0 || width_ % factor_ != 0) fields.fail("its block does not divide");
    x_ = reads(fields.slice("x", channels, height_ * width_));
    const std::int64_t out = channels * factor_ * factor_;
    y_ = writes(fields.slice("y", out, height_ * width_ / (factor_ * factor_)));
  }

  void run(const Places& at) const override {
    const float* const x = at.input(x_);
    float* const y = at.output(y_);
    const std::int64_t c = x_.channels;
    const std::size_t bytes = static_cast<std::size_t>(c) * sizeof(float);
    parallel_for(at.pass.batch * height_, copying_threads(at, x_), [&](std::int64_t row) {
      const std::int64_t out_row = row / factor_, i = row % factor_;
      for (std::int64_t column = 0; column < width_; ++column) {
        const std::int64_t out_pixel = out_row * (width_ / factor_) + column / factor_;
        const std::int64_t place = i * factor_ + column % factor_;
        std::memcpy(y + out_pixel * y_.stride + place * c, x + (row * width_ + column) * x_.stride,
                    bytes);
      }
    });
  }

 private:
  Slice x_, y_;
  std::int64_t factor_, height_, width_;
};

// A vector of weights, the same for every image.
class ConstantStep final : public PlanStep {
 public:
  explicit ConstantStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    y_ = writes(fields.vector("y", channels));
    values_ = fields.weights("values", channels);
  }

  void run(const Places& at) const override {
    float* const y = at.output(y_);
    for (std::int64_t b = 0; b < at.pass.batch; ++b) {
      std::copy_n(values_, y_.channels, y + b * y_.channels);
    }
  }

 private:
  Slice y_;
  const float* values_;
};

// The embedding of an image's class, plus a part of the conditioning.
class EmbedStep final : public PlanStep {
 public:
  explicit EmbedStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    y_ = writes(fields.vector("y", channels));
    if (fields.plan().classes < 1) fields.fail("the plan has no classes");
    table_ = fields.weights("table", product(fields.plan().classes, channels));
    conditioned_ = fields.has("conditioning");
    if (conditioned_) offset_ = fields.conditioning("conditioning", channels);
  }

  void run(const Places& at) const override {
    float* y = at.output(y_);
    for (std::int64_t b = 0; b < at.pass.batch; ++b, y += y_.channels) {
      const float* const embedded = table_ + at.pass.labels[b] * y_.channels;
      for (std::int64_t c = 0; c < y_.channels; ++c) {
        y[c] = embedded[c] + (conditioned_ ? at.pass.conditioning[offset_ + c] : 0.0f);
      }
    }
  }

 private:
  Slice y_;
  const float* table_;
  bool conditioned_;
  std::int64_t offset_ = 0;  // in the conditioning
};

template <class Step>
std::unique_ptr<PlanStep> made(Fields& fields) {
  return std::make_unique<Step>(fields);
}

}  // namespace

std::unique_ptr<PlanStep> step_of(const PlanOp& op, std::size_t index, const PlanData& plan) {
  static const std::map<std::string, std::unique_ptr<PlanStep> (*)(Fields&)> makers = {
      {"convolution", made<ConvolutionStep>},  {"norm", made<NormStep>},
      {"attention", made<AttentionStep>},      {"upsample", made<UpsampleStep>},
      {"space_to_depth", made<SpaceToDepthStep>}, {"constant", made<ConstantStep>},
      {"embed", made<EmbedStep>},
  };
  Fields fields(op, index, plan);
#ifdef ADVKD_TEACHERS
  if (auto step = teacher_step_of(op.kind, fields)) {
    fields.finish();
    return step;
  }
#endif
  const auto maker = makers.find(op.kind);
  if (maker == makers.end()) fields.fail("there is no such kind");
  auto step = maker->second(fields);
  fields.finish();
  return step;
}

}  // namespace advkd
