// What the convolutions share: reading of inputs, products of prepared inputs and packed weights,
// writing of outputs, and the way through the blocks.
#pragma once

#include <atomic>
#include <cstdint>

#include "cpu/convolution_plan.h"
#include "cpu/thread_pool.h"
#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

constexpr int kPanelVectors = static_cast<int>(kPanel) / kWidth;

static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// A run of the inner dimension: `count` elements, the first at + offset of a row's beginning.
struct Segment {
  std::int64_t offset, count;
};

// Pixels or tiles of a prepared input: rows are kPanel floats apart, and so are their channels' blocks
// and the kernel's places, which are the segments.
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

// The product, a row of all panels' columns after the other.
void multiply_rows(const PreparedRows& left, const Panels& right, float* to);

static inline ConvolutionBlock block_at(const ConvolutionPlan& plan, std::int64_t batch,
                                        std::int64_t block) {
  const std::int64_t image = block / plan.column_blocks / plan.row_blocks * plan.images;
  const std::int64_t row = block / plan.column_blocks % plan.row_blocks * plan.rows;
  const std::int64_t column = block % plan.column_blocks * plan.columns;
  return {image,  least(plan.images, batch - image),
          row,    least(plan.rows, plan.unit_rows - row),
          column, least(plan.columns, plan.unit_columns - column)};
}

// What is read: act(x * scale + shift), of images of height x width stored pixels.
struct Image {
  const float* x;
  std::int64_t stride, height, width, channels;
  int doubling;  // 1: each pixel stands for 2 x 2
  const float *scale, *shift;
  bool silu;
};

static inline Image input_of(const ConvolutionArgs& args) {
  const ConvolutionShape& s = args.shape;
  return {args.x,        args.x_stride, s.height,     s.width,    s.in_channels,
          s.upsample ? 1 : 0, args.x_scale,  args.x_shift, args.x_silu};
}

// Reads rows of one block of channels; pixels beyond the image's borders are 0.
class RowReader {
 public:
  RowReader(const Image& image, std::int64_t channel)
      : image_(image), channel_(channel), lanes_(least(kPanel, image.channels - channel)) {}

  // Columns [column, column + count) of a row, kPanel floats apart in `to`.
  void read(std::int64_t n, std::int64_t row, std::int64_t column, std::int64_t count,
            float* to) const {
    if (row < 0 || row >= image_.height << image_.doubling) return clear(to, count);
    const std::int64_t first = column < 0 ? least(-column, count) : 0;
    const std::int64_t inside = least(count, (image_.width << image_.doubling) - column);
    const std::int64_t end = inside < first ? first : inside;
    clear(to, first);
    if (image_.scale == nullptr && !image_.silu) {
      copy<false, false>(n, row, column, first, end, to);
    } else if (image_.scale == nullptr) {
      copy<false, true>(n, row, column, first, end, to);
    } else if (!image_.silu) {
      copy<true, false>(n, row, column, first, end, to);
    } else {
      copy<true, true>(n, row, column, first, end, to);
    }
    clear(to + end * kPanel, count - end);
  }

 private:
  static void clear(float* to, std::int64_t count) {
    if (count > 0) std::memset(to, 0, static_cast<std::size_t>(count * kPanel) * sizeof(float));
  }

  template <bool kAffine, bool kSilu>
  void copy(std::int64_t n, std::int64_t row, std::int64_t column, std::int64_t first,
            std::int64_t end, float* to) const {
    const std::int64_t line = n * image_.height + (row >> image_.doubling);
    const float* const from = image_.x + line * image_.width * image_.stride + channel_;
    Vector scale[kPanelVectors], shift[kPanelVectors];
    if constexpr (kAffine) {
      const std::int64_t at = n * image_.channels + channel_;
      for (int v = 0; v < kPanelVectors; ++v) {
        scale[v] = some(image_.scale + at + v * kWidth, lanes_ - v * kWidth);
        shift[v] = some(image_.shift + at + v * kWidth, lanes_ - v * kWidth);
      }
    }
    for (std::int64_t c = first; c < end; ++c) {
      const float* const pixel = from + ((column + c) >> image_.doubling) * image_.stride;
      if (lanes_ < kPanel) {
        float part[kPanel] = {};
        for (std::int64_t i = 0; i < lanes_; ++i) part[i] = pixel[i];
        convert<kAffine, kSilu>(part, scale, shift, to + c * kPanel);
      } else {
        convert<kAffine, kSilu>(pixel, scale, shift, to + c * kPanel);
      }
    }
  }

  template <bool kAffine, bool kSilu>
  static void convert(const float* from, const Vector* scale, const Vector* shift, float* to) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      Vector value = load(from + v * kWidth);
      if constexpr (kAffine) value = value * scale[v] + shift[v];
      if constexpr (kSilu) value = silu(value);
      store(to + v * kWidth, value);
    }
  }

  static Vector some(const float* from, std::int64_t lanes) {
    if (lanes >= kWidth) return load(from);
    return lanes > 0 ? load_some(from, lanes) : Vector{};
  }

  const Image& image_;
  const std::int64_t channel_, lanes_;
};

// Writes (sum + bias + residual) * scale for the channels of one vector.
class OutputWriter {
 public:
  OutputWriter(const ConvolutionArgs& args, std::int64_t image, std::int64_t channel)
      : args_(args), channel_(channel), lanes_(least(kWidth, args.shape.out_channels - channel)) {
    if (args.bias != nullptr && lanes_ > 0) {
      const float* const from = args.bias + image * args.bias_stride + channel;
      bias_ = lanes_ == kWidth ? load(from) : load_some(from, lanes_);
    }
  }

  void write(std::int64_t pixel, Vector sum) const {
    float* const to = args_.y + pixel * args_.y_stride + channel_;
    const float* const residual = args_.residual + pixel * args_.residual_stride + channel_;
    if (lanes_ == kWidth) {
      sum += bias_;
      if (args_.residual != nullptr) sum += load(residual);
      return store(to, sum * args_.scale);
    }
    sum += bias_;
    for (std::int64_t i = 0; i < lanes_; ++i) {
      const float value = args_.residual != nullptr ? sum[i] + residual[i] : sum[i];
      to[i] = value * args_.scale;
    }
  }

 private:
  const ConvolutionArgs& args_;
  const std::int64_t channel_, lanes_;
  Vector bias_ = {};
};

// Calls task(0) ... task(count - 1) on the threads, telling each which thread's memory is its.
template <class Task>
void for_each_slot(std::int64_t count, int threads, const Task& task) {
  std::atomic<std::int64_t> next{0};
  parallel_for(threads, threads, [&](std::int64_t slot) {
    for (;;) {
      const std::int64_t index = next.fetch_add(1, std::memory_order_relaxed);
      if (index >= count) return;
      task(index, slot);
    }
  });
}

// Goes through all blocks. Method: prepare(block, channel_block, left, scratch) makes a part of a
// block's left factor, multiply(block, first panel, panels, left, products) all of a group's output.
template <class Method>
void run_blocks(const ConvolutionArgs& args, const ConvolutionPlan& plan, const Method& method) {
  const std::int64_t blocks = plan.blocks, groups = plan.groups;
  const std::int64_t own = plan.product_size + plan.scratch_size;
  const auto multiply_group = [&](const ConvolutionBlock& block, std::int64_t group,
                                  const float* left, float* products) {
    const std::int64_t panel = group * plan.group;
    method.multiply(block, panel, least(plan.group, plan.panels - panel), left, products);
  };
  if (!plan.shared) {
    for_each_slot(blocks, args.threads, [&](std::int64_t index, std::int64_t slot) {
      const ConvolutionBlock block = block_at(plan, args.shape.batch, index);
      float* const left = args.workspace + slot * (plan.left_size + own);
      float* const products = left + plan.left_size;
      for (std::int64_t c = 0; c < plan.channel_blocks; ++c) {
        method.prepare(block, c, left, products + plan.product_size);
      }
      for (std::int64_t g = 0; g < groups; ++g) multiply_group(block, g, left, products);
    });
    return;
  }
  float* const lefts = args.workspace;
  float* const slots = lefts + blocks * plan.left_size;
  for_each_slot(blocks * plan.channel_blocks, args.threads, [&](std::int64_t i, std::int64_t slot) {
    const std::int64_t index = i / plan.channel_blocks;
    method.prepare(block_at(plan, args.shape.batch, index), i % plan.channel_blocks,
                   lefts + index * plan.left_size, slots + slot * own + plan.product_size);
  });
  for_each_slot(blocks * groups, args.threads, [&](std::int64_t i, std::int64_t slot) {
    const std::int64_t index = i / groups;
    multiply_group(block_at(plan, args.shape.batch, index), i % groups,
                   lefts + index * plan.left_size, slots + slot * own);
  });
}

}  // namespace advkd::ADVKD_ISA
