// 3 x 3 convolution with stride 1 by Winograd's minimal filtering: the transformed tiles of a block
// stay in the second-level cache while one group of panels after the other is multiplied with them,
// and each group's products are transformed back before the next.
#include "cpu/winograd.h"

#include <vector>

#include "cpu/convolution_tile.h"
#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {
namespace {

// Row by row and then down the columns. The rows of the result are made a few at a time, so that
// what lies between the two passes stays in registers.
template <int kOut>
inline void transform_input(const float* from, std::int64_t row_step, float* to,
                            std::int64_t point_step) {
  constexpr int kIn = Winograd<kOut>::kIn;
  Vector down[kIn][kIn];  // [row of the result][column]
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    Vector column[kIn], result[kIn];
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) column[y] = load(from + y * row_step + x * kPanel);
    Winograd<kOut>::input(column, result);
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) down[y][x] = result[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kIn; ++y) {
    Vector result[kIn];
    Winograd<kOut>::input(down[y], result);
#pragma GCC unroll 6
    for (int x = 0; x < kIn; ++x) store(to + (y * kIn + x) * point_step, result[x]);
  }
}

template <int kOut>
inline void transform_output(const float* from, std::int64_t point_step,
                             Vector (&to)[kOut][kOut]) {
  constexpr int kIn = Winograd<kOut>::kIn;
  Vector down[kOut][kIn];
#pragma GCC unroll 6
  for (int x = 0; x < kIn; ++x) {
    Vector column[kIn], result[kOut];
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) column[y] = load(from + (y * kIn + x) * point_step);
    Winograd<kOut>::output(column, result);
#pragma GCC unroll 4
    for (int y = 0; y < kOut; ++y) down[y][x] = result[y];
  }
#pragma GCC unroll 4
  for (int y = 0; y < kOut; ++y) Winograd<kOut>::output(down[y], to[y]);
}

template <int kOut>
class WinogradConvolution {
 public:
  WinogradConvolution(const ConvolutionArgs& args, const ConvolutionPlan& plan)
      : args_(args), plan_(plan) {
    const std::int64_t tiles = plan.images * plan.rows * plan.columns;
    for (std::int64_t c = 0; c < plan.channel_blocks; ++c) {
      segments_.push_back(
          {c * tiles * kPanel, least(kPanel, args.shape.in_channels - c * kPanel)});
    }
  }

  void prepare(const ConvolutionBlock& block, std::int64_t c, float* left, float* scratch) const {
    const InputReader reader(args_, plan_, c * kPanel);
    const std::int64_t width = block.columns * kOut + 2, row_step = width * kPanel;
    float* to = left + segments_[static_cast<std::size_t>(c)].offset;
    for (std::int64_t n = 0; n < block.images; ++n) {
      for (std::int64_t y = 0; y < block.rows * kOut + 2; ++y) {
        reader.read(block.image + n, block.row * kOut - args_.shape.pad_before + y,
                    block.column * kOut - args_.shape.pad_before, width, scratch + y * row_step);
      }
      for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t t = 0; t < block.columns; ++t, to += kPanel) {
          const float* const from = scratch + r * kOut * row_step + t * kOut * kPanel;
          for (int v = 0; v < kPanelVectors; ++v) {
            transform_input<kOut>(from + v * kWidth, row_step, to + v * kWidth, plan_.left_step);
          }
        }
      }
    }
  }

  void multiply(const ConvolutionBlock& block, std::int64_t panel, std::int64_t panels,
                const float* left, float* products) const {
    const std::int64_t inner = args_.shape.in_channels * kPanel;
    const std::int64_t tiles = block.images * block.rows * block.columns;
    for (int point = 0; point < kPoints; ++point) {
      const LeftFactor factor = {left + point * plan_.left_step, segments_.data(),
                                 plan_.channel_blocks};
      const Panels right = {args_.packed + (panel * kPoints + point) * inner, kPoints * inner};
      ADVKD_ISA::multiply(factor, right, tiles, panels,
                          Store{products + point * plan_.product_step, panels * kPanel});
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      for (int v = 0; v < kPanelVectors; ++v) {
        write_channels(block, (panel + p) * kPanel + v * kWidth,
                       products + p * kPanel + v * kWidth, panels * kPanel);
      }
    }
  }

 private:
  static constexpr int kIn = Winograd<kOut>::kIn, kPoints = kIn * kIn;

  struct Store {
    float* to;
    std::int64_t step;

    struct At {
      float* to;
      std::int64_t step;

      template <int kRows, int kPanels>
      void operator()(std::int64_t row, const Sums<kRows, kPanels>& sums) const {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < kPanels * kPanelVectors; ++v) {
            store(to + (row + r) * step + v * kWidth, sums.part[r][v]);
          }
        }
      }
    };

    At at(std::int64_t panel) const { return {to + panel * kPanel, step}; }
  };

  void write_channels(const ConvolutionBlock& block, std::int64_t channel, const float* from,
                      std::int64_t tile_step) const {
    if (channel >= args_.shape.out_channels) return;
    for (std::int64_t n = 0; n < block.images; ++n) {
      const OutputWriter writer(args_, block.image + n, channel);
      for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t t = 0; t < block.columns; ++t, from += tile_step) {
          Vector out[kOut][kOut];
          transform_output<kOut>(from, plan_.product_step, out);
          write_tile(writer, block.image + n, (block.row + r) * kOut, (block.column + t) * kOut,
                     out);
        }
      }
    }
  }

  void write_tile(const OutputWriter& writer, std::int64_t image, std::int64_t row,
                  std::int64_t column, const Vector (&out)[kOut][kOut]) const {
    const std::int64_t pixel = (image * plan_.out_height + row) * plan_.out_width + column;
    const std::int64_t height = plan_.out_height - row, width = plan_.out_width - column;
#pragma GCC unroll 4
    for (int y = 0; y < kOut; ++y) {
#pragma GCC unroll 4
      for (int x = 0; x < kOut; ++x) {
        if (y < height && x < width) writer.write(pixel + y * plan_.out_width + x, out[y][x]);
      }
    }
  }

  const ConvolutionArgs& args_;
  const ConvolutionPlan& plan_;
  std::vector<Segment> segments_;
};

}  // namespace

void convolution_winograd2(const ConvolutionArgs& args, const ConvolutionPlan& plan) {
  run_blocks(args, plan, WinogradConvolution<2>(args, plan));
}

void convolution_winograd4(const ConvolutionArgs& args, const ConvolutionPlan& plan) {
  run_blocks(args, plan, WinogradConvolution<4>(args, plan));
}

}  // namespace advkd::ADVKD_ISA
