// What the convolutions share: products of prepared inputs and packed weights by tiles of
// registers, reading of inputs, and writing of outputs.
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

// The left factor: rows are kPanel floats apart, their elements in segments.
struct LeftFactor {
  const float* at;
  const Segment* segments;
  std::int64_t segment_count;
};

// The right factor: panels of kPanel columns, in which rows follow one another.
struct Panels {
  const float* at;
  std::int64_t step;
};

// As many accumulators as the registers hold beside the columns and a broadcast element.
constexpr int kMostPanels = kWidth == 16 ? 3 : 1;
constexpr int kMostRows[] = {0, kWidth == 16 ? 16 : (kWidth == 8 ? 6 : 3), 12, 8};

template <int kRows, int kPanels>
struct Sums {
  Vector part[kRows][kPanels * kPanelVectors];
};

template <int kRows, int kPanels>
static inline __attribute__((always_inline)) void add_product(Sums<kRows, kPanels>& sums,
                                                              const float* a, const float* b,
                                                              std::int64_t panel_step) {
  constexpr int kVectors = kPanels * kPanelVectors;
  Vector column[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    column[v] = load(b + v / kPanelVectors * panel_step + v % kPanelVectors * kWidth);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const float element = a[r * kPanel];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums.part[r][v] += column[v] * element;
  }
}

// A function of its own, so that its loop has the registers for itself.
template <int kRows, int kPanels, class Finish>
__attribute__((noinline)) void make_sums(const LeftFactor& left, const Panels& right,
                                         std::int64_t row, const Finish& finish) {
  Sums<kRows, kPanels> sums;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * kPanelVectors; ++v) sums.part[r][v] = Vector{};
  }
  const float* b = right.at;
  const std::int64_t panel_step = right.step;
  for (const Segment *s = left.segments, *end = s + left.segment_count; s != end; ++s) {
    const float* a = left.at + row * kPanel + s->offset;
    if (s->count == kPanel) {
#pragma GCC unroll 4
      for (int k = 0; k < kPanel; ++k, b += kPanel) {
        add_product<kRows, kPanels>(sums, a + k, b, panel_step);
      }
    } else {
#pragma GCC unroll 1
      for (int k = 0; k < s->count; ++k, b += kPanel) {
        add_product<kRows, kPanels>(sums, a + k, b, panel_step);
      }
    }
  }
  finish(row, sums);
}

template <int kRows, int kPanels, class Finish>
static inline void make_some_sums(std::int64_t rows, const LeftFactor& left, const Panels& right,
                                  std::int64_t row, const Finish& finish) {
  if (rows == kRows) return make_sums<kRows, kPanels>(left, right, row, finish);
  if constexpr (kRows > 1) make_some_sums<kRows - 1, kPanels>(rows, left, right, row, finish);
}

template <int kPanels, class Finish>
static inline void multiply_panels(const LeftFactor& left, const Panels& right, std::int64_t rows,
                                   const Finish& finish) {
  constexpr int kMost = kMostRows[kPanels];
  // Tiles of equal height, give or take a row: a low one would wait for its own additions.
  const std::int64_t tiles = (rows + kMost - 1) / kMost;
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t row = t * rows / tiles, end = (t + 1) * rows / tiles;
    make_some_sums<kMost, kPanels>(end - row, left, right, row, finish);
  }
}

// Calls finish.at(panel)(row, sums) with the tiles of left times right.
template <class Finish>
static inline void multiply(const LeftFactor& left, const Panels& right, std::int64_t rows,
                            std::int64_t panels, const Finish& finish) {
  for (std::int64_t p = 0; p < panels;) {
    const std::int64_t rest = panels - p;
    // Four are two and two: a single panel loads an element for each product.
    const std::int64_t wide = kMostPanels == 1 || rest == 1 ? 1 : (rest == 2 || rest == 4 ? 2 : 3);
    const Panels from = {right.at + p * right.step, right.step};
    if (wide == 1) multiply_panels<1>(left, from, rows, finish.at(p));
    if constexpr (kMostPanels > 1) {
      if (wide == 2) multiply_panels<2>(left, from, rows, finish.at(p));
      if (wide == 3) multiply_panels<3>(left, from, rows, finish.at(p));
    }
    p += wide;
  }
}

static inline ConvolutionBlock block_at(const ConvolutionPlan& plan, std::int64_t batch,
                                        std::int64_t block) {
  const std::int64_t image = block / plan.column_blocks / plan.row_blocks * plan.images;
  const std::int64_t row = block / plan.column_blocks % plan.row_blocks * plan.rows;
  const std::int64_t column = block % plan.column_blocks * plan.columns;
  return {image,  least(plan.images, batch - image),
          row,    least(plan.rows, plan.unit_rows - row),
          column, least(plan.columns, plan.unit_columns - column)};
}

// The input of one block of channels, as act(x * scale + shift), zero beyond the image's borders.
class InputReader {
 public:
  InputReader(const ConvolutionArgs& args, const ConvolutionPlan& plan, std::int64_t channel)
      : args_(args),
        plan_(plan),
        channel_(channel),
        lanes_(least(kPanel, args.shape.in_channels - channel)) {}

  // Columns [column, column + count) of a row, `step` floats apart in `to`.
  void read(std::int64_t image, std::int64_t row, std::int64_t column, std::int64_t count,
            float* to) const {
    if (row < 0 || row >= plan_.in_height) return clear(to, count);
    const std::int64_t first = column < 0 ? least(-column, count) : 0;
    const std::int64_t end = least(count, plan_.in_width - column);
    clear(to, first);
    if (end > first) {
      if (args_.x_scale == nullptr && !args_.x_silu) {
        copy<false, false>(image, row, column, first, end, to);
      } else if (args_.x_scale == nullptr) {
        copy<false, true>(image, row, column, first, end, to);
      } else if (!args_.x_silu) {
        copy<true, false>(image, row, column, first, end, to);
      } else {
        copy<true, true>(image, row, column, first, end, to);
      }
    }
    const std::int64_t filled_to = end > first ? end : first;
    clear(to + filled_to * kPanel, count - filled_to);
  }

 private:
  static void clear(float* to, std::int64_t count) {
    if (count > 0) std::memset(to, 0, static_cast<std::size_t>(count * kPanel) * sizeof(float));
  }

  template <bool kAffine, bool kSilu>
  void copy(std::int64_t image, std::int64_t row, std::int64_t column, std::int64_t first,
            std::int64_t end, float* to) const {
    const ConvolutionShape& s = args_.shape;
    const int shift = s.upsample ? 1 : 0;
    const float* from =
        args_.x + (image * s.height + (row >> shift)) * s.width * args_.x_stride + channel_;
    Vector scale[kPanelVectors], offset[kPanelVectors];
    if constexpr (kAffine) {
      const std::int64_t at = image * s.in_channels + channel_;
      for (int v = 0; v < kPanelVectors; ++v) {
        scale[v] = some(args_.x_scale + at + v * kWidth, lanes_ - v * kWidth);
        offset[v] = some(args_.x_shift + at + v * kWidth, lanes_ - v * kWidth);
      }
    }
    for (std::int64_t c = first; c < end; ++c) {
      const float* const pixel = from + ((column + c) >> shift) * args_.x_stride;
      if (lanes_ < kPanel) {
        float part[kPanel] = {};
        for (std::int64_t i = 0; i < lanes_; ++i) part[i] = pixel[i];
        convert<kAffine, kSilu>(part, scale, offset, to + c * kPanel);
      } else {
        convert<kAffine, kSilu>(pixel, scale, offset, to + c * kPanel);
      }
    }
  }

  template <bool kAffine, bool kSilu>
  static void convert(const float* from, const Vector* scale, const Vector* offset, float* to) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      Vector value = load(from + v * kWidth);
      if constexpr (kAffine) value = value * scale[v] + offset[v];
      if constexpr (kSilu) value = silu(value);
      store(to + v * kWidth, value);
    }
  }

  static Vector some(const float* from, std::int64_t lanes) {
    if (lanes >= kWidth) return load(from);
    return lanes > 0 ? load_some(from, lanes) : Vector{};
  }

  const ConvolutionArgs& args_;
  const ConvolutionPlan& plan_;
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
