// 3 x 3 convolution with stride 1 by Winograd's minimal filtering: the transformed tiles of a block
// stay in the second-level cache while one group of panels after the other is multiplied with them,
// and each group's products are transformed back before the next.
#include "cpu/winograd.h"

#include <vector>

#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {
namespace {

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
      : args_(args), plan_(plan), input_(input_of(args)) {
    const std::int64_t tiles = plan.images * plan.rows * plan.columns;
    for (std::int64_t c = 0; c < plan.channel_blocks; ++c) {
      segments_.push_back(
          {c * tiles * kPanel, least(kPanel, args.shape.in_channels - c * kPanel)});
    }
  }

  void prepare(const ConvolutionBlock& block, std::int64_t c, float* left, float* scratch) const {
    const InputTiles<kOut> input(input_, args_.shape.pad_before, plan_.left_step);
    input.transform(block, c * kPanel, scratch, left + segments_[static_cast<std::size_t>(c)].offset);
  }

  void multiply(const ConvolutionBlock& block, std::int64_t panel, std::int64_t panels,
                const float* left, float* products) const {
    const std::int64_t inner = args_.shape.in_channels * kPanel;
    const std::int64_t tiles = block.images * block.rows * block.columns;
    for (int point = 0; point < kPoints; ++point) {
      const PreparedRows rows = {left + point * plan_.left_step, segments_.data(),
                                 plan_.channel_blocks, tiles};
      const Panels right = {args_.packed + (panel * kPoints + point) * inner, kPoints * inner,
                            panels};
      multiply_rows(rows, right, products + point * plan_.product_step);
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
  const Image input_;
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
