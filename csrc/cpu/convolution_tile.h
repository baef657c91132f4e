// What the convolutions share: reading of inputs, products of prepared inputs and packed weights,
// writing of outputs, and the order of the blocks.
#pragma once

#include <cstdint>
#include <new>

#include "runtime/convolution_plan.h"
#include "cpu/exponential.h"
#include "runtime/thread_pool.h"

namespace advkd::ADVKD_ISA {

constexpr int kPanelVectors = static_cast<int>(kPanel) / kWidth;

static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// A run of the inner dimension: `count` elements, the first at + offset of a row's beginning. Lies
// in a workspace of floats.
struct Segment {
  std::int32_t offset, count;

  Segment(std::int64_t first, std::int64_t elements)
      : offset(static_cast<std::int32_t>(first)), count(static_cast<std::int32_t>(elements)) {}
};
static_assert(sizeof(Segment) == kSegmentFloats * sizeof(float) && alignof(Segment) <= 4);

// Pixels or tiles of a prepared input: rows are kPanel floats apart. Segments are the blocks of
// channels at each position of the kernel.
struct PreparedRows {
  const float* at;
  const Segment* segments;
  std::int64_t segment_count, rows;
};

// Packed weights: panels of kPanel columns, in which rows follow one another.
struct Panels {
  const float* at;
  std::int64_t step, count;
};

// Stores the product row by row, each with the columns of all panels.
void multiply_rows(const PreparedRows& a, const Panels& b, float* to);

static inline ConvolutionBlock block_at(const ConvolutionPlan& plan, std::int64_t batch,
                                        std::int64_t block) {
  const std::int64_t image = block / plan.column_blocks / plan.row_blocks * plan.images;
  const std::int64_t row = block / plan.column_blocks % plan.row_blocks * plan.rows;
  const std::int64_t column = block % plan.column_blocks * plan.columns;
  return {image,  least(plan.images, batch - image),
          row,    least(plan.rows, plan.tile_rows - row),
          column, least(plan.columns, plan.tile_columns - column)};
}

// What is read: act(x * scale + shift), of images of height x width stored pixels.
struct Image {
  const float* x;
  std::int64_t stride, height, width, channels;
  int doubling;  // 1: each pixel stands for 2 x 2
  const float *scale, *shift;
  bool silu;
  Levels levels;
};

static inline Image input_of(const ConvolutionArgs& args) {
  const ConvolutionShape& s = args.shape;
  return {args.x,        args.x_stride, s.height,     s.width,    s.in_channels,
          s.upsample ? 1 : 0, args.x_scale,  args.x_shift, args.x_silu, args.x_levels};
}

// Added to a small number it leaves no digits behind the point, and that number in the lowest bits.
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23

// kRounder + q for the level q of a number; NaN has level 0.
static inline Vector level_of(Vector number, const Levels& levels) {
  const Vector low = filled(kRounder), high = filled(kRounder + 255.0f);
  const Vector q = number * levels.per_step + (kRounder + levels.zero);
  const Vector bounded = q > low ? q : low;
  return bounded < high ? bounded : high;
}

// Reads rows of one block of channels; pixels beyond the image's borders are 0.
class RowReader {
 public:
  RowReader(const Image& image, std::int64_t channel)
      : image_(image), channel_(channel), lanes_(least(kPanel, image.channels - channel)) {}

  // Columns [column, column + count) of a row, kPanel floats apart in `to`.
  __attribute__((noinline)) void read(std::int64_t n, std::int64_t row, std::int64_t column,
                                      std::int64_t count, float* to) const {
    if (row < 0 || row >= image_.height << image_.doubling) return clear(to, count);
    const std::int64_t first = column < 0 ? least(-column, count) : 0;
    const std::int64_t inside = least(count, (image_.width << image_.doubling) - column);
    const std::int64_t end = inside < first ? first : inside;
    clear(to, first);
    visit(n, row, column + first, column + end, Floats{to + first * kPanel});
    if (image_.levels.step != 0.0f) round(to + first * kPanel, to + end * kPanel);
    clear(to + end * kPanel, count - end);
  }

  // Calls put(vector, value) and put.next() for columns [column, end) of a row, all inside.
  template <class Put>
  void visit(std::int64_t n, std::int64_t row, std::int64_t column, std::int64_t end,
             const Put& put) const {
    if (image_.scale == nullptr && !image_.silu) {
      visit_with<false, false>(n, row, column, end, put);
    } else if (image_.scale == nullptr) {
      visit_with<false, true>(n, row, column, end, put);
    } else if (!image_.silu) {
      visit_with<true, false>(n, row, column, end, put);
    } else {
      visit_with<true, true>(n, row, column, end, put);
    }
  }

 private:
  struct Floats {
    float* to;

    void operator()(int vector, Vector value) const { store(to + vector * kWidth, value); }
    void next() { to += kPanel; }
  };

  static void clear(float* to, std::int64_t count) {
    if (count > 0) std::memset(to, 0, static_cast<std::size_t>(count * kPanel) * sizeof(float));
  }

  __attribute__((noinline)) void round(float* from, const float* end) const {
    const Vector zero = filled(kRounder + image_.levels.zero);
    for (; from < end; from += kWidth) {
      store(from, (level_of(load(from), image_.levels) - zero) * image_.levels.step);
    }
  }

  // A function of its own: inlined wherever rows are read it would be a quarter of the code.
  template <bool kAffine, bool kSilu, class Put>
  __attribute__((noinline)) void visit_with(std::int64_t n, std::int64_t row, std::int64_t column,
                                            std::int64_t end, Put put) const {
    const std::int64_t line = n * image_.height + (row >> image_.doubling);
    const float* const from = image_.x + line * image_.width * image_.stride + channel_;
    // Copies, as what is put may be bytes, which a compiler expects to change anything.
    const std::int64_t stride = image_.stride, lanes = lanes_;
    const int doubling = image_.doubling;
    Vector scale[kPanelVectors], shift[kPanelVectors];
    if constexpr (kAffine) {
      const std::int64_t at = n * image_.channels + channel_;
      for (int v = 0; v < kPanelVectors; ++v) {
        scale[v] = some(image_.scale + at + v * kWidth, lanes - v * kWidth);
        shift[v] = some(image_.shift + at + v * kWidth, lanes - v * kWidth);
      }
    }
    for (; column < end; ++column, put.next()) {
      const float* const pixel = from + (column >> doubling) * stride;
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) {
        Vector value = some(pixel + v * kWidth, lanes - v * kWidth);
        if constexpr (kAffine) value = value * scale[v] + shift[v];
        if constexpr (kSilu) value = silu(value);
        put(v, value);
      }
    }
  }

  static Vector some(const float* from, std::int64_t lanes) {
    if (lanes >= kWidth) return load(from);
    return lanes > 0 ? load_some(from, lanes) : Vector{};
  }

  const Image& image_;
  const std::int64_t channel_, lanes_;
};

// Writes (accumulator + bias + residual) * scale for the channels of one vector.
class OutputWriter {
 public:
  OutputWriter() = default;
  OutputWriter(const ConvolutionArgs& args, std::int64_t image, std::int64_t channel)
      : y_(args.y + channel),
        y_stride_(args.y_stride),
        residual_(args.residual == nullptr ? nullptr : args.residual + channel),
        residual_stride_(args.residual_stride),
        lanes_(least(kWidth, args.shape.out_channels - channel)),
        scale_(args.scale) {
    if (args.bias == nullptr) return;
    const float* const from = args.bias + image * args.bias_stride + channel;
    bias_ = lanes_ == kWidth ? load(from) : load_some(from, lanes_);
  }

  // Whether its channels fill a vector.
  bool full() const { return lanes_ == kWidth; }
  bool has_residual() const { return residual_ != nullptr; }

  // kCount pixels one after the other, where `full`.
  template <bool kResidual, int kCount>
  void write_row(std::int64_t pixel, const Vector (&sums)[kCount]) const {
    float* const to = y_ + pixel * y_stride_;
    const float* const residual = residual_ + pixel * residual_stride_;
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) {
      Vector sum = sums[i] + bias_;
      if constexpr (kResidual) sum += load(residual + i * residual_stride_);
      store(to + i * y_stride_, sum * scale_);
    }
  }

  void write(std::int64_t pixel, Vector sum) const {
    float* const to = y_ + pixel * y_stride_;
    const float* const residual = residual_ + pixel * residual_stride_;
    sum += bias_;
    if (lanes_ == kWidth) {
      if (residual_ != nullptr) sum += load(residual);
      return store(to, sum * scale_);
    }
    if (residual_ != nullptr) sum += load_some(residual, lanes_);
    store_some(to, sum * scale_, lanes_);
  }

 private:
  float* y_;
  std::int64_t y_stride_;
  const float* residual_;
  std::int64_t residual_stride_;
  std::int64_t lanes_;
  float scale_;
  Vector bias_ = {};
};

// The writers of a group of panels, one for each vector that holds channels.
class OutputWriters {
 public:
  OutputWriters(const ConvolutionArgs& args, std::int64_t image, std::int64_t channel,
                std::int64_t columns) {
    const std::int64_t channels = least(columns, args.shape.out_channels - channel);
    for (; count_ * kWidth < channels; ++count_) {
      writers_[count_] = OutputWriter(args, image, channel + count_ * kWidth);
    }
  }
  int count() const { return count_; }
  const OutputWriter& operator[](int vector) const { return writers_[vector]; }

 private:
  OutputWriter writers_[kMostGroup * kPanelVectors];
  int count_ = 0;
};

// The place of a convolution's segments, at the beginning of its workspace.
static inline Segment* segments_of(const ConvolutionArgs& args) {
  return reinterpret_cast<Segment*>(args.workspace);
}

// Computes all blocks. Method: prepare(block, channel_block, a, scratch) makes a part of a
// block's A operand, transform(panel, panels, b) the B operand of some panels, if that is not the
// packed weights, and multiply(block, panel, panels, a, b, products) their output.
template <class Method>
class BlockRunner {
 public:
  BlockRunner(const ConvolutionArgs& args, const ConvolutionPlan& plan, const Method& method)
      : args_(args),
        plan_(plan),
        method_(method),
        shared_(args.workspace + plan.segment_size),
        own_(shared_ + plan.shared_size()) {}

  void run() const {
    if (plan_.tile_batch == 0) return run_apart();
    for (std::int64_t first = 0; first < plan_.blocks; first += plan_.tile_batch) {
      run_tile_batch(first, least(plan_.tile_batch, plan_.blocks - first));
    }
  }

 private:
  ConvolutionBlock block(std::int64_t index) const {
    return block_at(plan_, args_.shape.batch, index);
  }
  // Groups are as equal as can be: one of a single panel would take nearly as long as one of two.
  std::int64_t first_panel(std::int64_t group) const {
    return group * plan_.panels / plan_.groups;
  }
  float* own(std::int64_t slot) const { return own_ + slot * plan_.own_size(); }
  const float* packed(std::int64_t panel) const {
    return args_.packed + panel * plan_.packed_panel;
  }

  // Few weights: all are transformed first, and stay in the cache.
  void run_apart() const {
    float* const transformed = shared_;
    if (plan_.transformed_panel != 0) method_.transform(0, plan_.panels, transformed);
    for_each_slot(plan_.blocks, args_.threads, [&](std::int64_t index, std::int64_t slot) {
      float* const a = own(slot);
      float* const products = a + plan_.a_size;
      for (std::int64_t c = 0; c < plan_.channel_blocks; ++c) {
        method_.prepare(block(index), c, a, products + plan_.product_size);
      }
      for (std::int64_t group = 0; group < plan_.groups; ++group) {
        const std::int64_t panel = first_panel(group);
        const float* const b = plan_.transformed_panel == 0
                                       ? packed(panel)
                                       : transformed + panel * plan_.transformed_panel;
        method_.multiply(block(index), panel, first_panel(group + 1) - panel, a, b, products);
      }
    });
  }

  // Many weights, or few blocks for the threads: a group's transformed weights stay in a thread's
  // cache while the blocks pass by.
  void run_tile_batch(std::int64_t first, std::int64_t count) const {
    float* const inputs = shared_;
    for_each_slot(count * plan_.channel_blocks, args_.threads,
                  [&](std::int64_t task, std::int64_t slot) {
                    const std::int64_t index = task / plan_.channel_blocks;
                    method_.prepare(block(first + index), task % plan_.channel_blocks,
                                    inputs + index * plan_.a_size,
                                    own(slot) + plan_.product_size);
                  });
    const std::int64_t parts = least(plan_.parts, count);
    for_each_slot(plan_.groups * parts, args_.threads, [&](std::int64_t task, std::int64_t slot) {
      const std::int64_t panel = first_panel(task / parts), part = task % parts;
      const std::int64_t panels = first_panel(task / parts + 1) - panel;
      float* const products = own(slot);
      float* const transformed = products + plan_.product_size + plan_.scratch_size;
      if (plan_.transformed_panel != 0) method_.transform(panel, panels, transformed);
      const float* const b = plan_.transformed_panel == 0 ? packed(panel) : transformed;
      for (std::int64_t i = part * count / parts; i < (part + 1) * count / parts; ++i) {
        method_.multiply(block(first + i), panel, panels, inputs + i * plan_.a_size, b,
                         products);
      }
    });
  }

  const ConvolutionArgs& args_;
  const ConvolutionPlan& plan_;
  const Method& method_;
  float *const shared_, *const own_;
};

}  // namespace advkd::ADVKD_ISA
