// 3 x 3 convolution with stride 1 by Winograd's minimal filtering: transformed tiles of the input
// are multiplied with transformed weights, point by point, and each group's products of a block are
// transformed back before the next. Weights are transformed in every call: stored transformed they
// would be four times as much to read from memory. The L2 cache holds the transformed weights of a
// group of panels.
#include "cpu/winograd.h"

#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {
namespace {

template <int kOut>
class WinogradConvolution {
 public:
  WinogradConvolution(const ConvolutionArgs& args, const ConvolutionPlan& plan)
      : args_(args), plan_(plan), input_(input_of(args)), segments_(segments_of(args)) {
    const std::int64_t tiles = plan.images * plan.rows * plan.columns;
    for (std::int64_t c = 0; c < plan.channel_blocks; ++c) {
      new (segments_of(args) + c)
          Segment(c * tiles * kPanel, least(kPanel, args.shape.in_channels - c * kPanel));
    }
  }

  void prepare(const ConvolutionBlock& block, std::int64_t c, float* a, float* scratch) const {
    const InputTiles<kOut> input(input_, args_.shape.pad_before, plan_.a_step);
    input.transform(block, c * kPanel, scratch, a + segments_[c].offset);
  }

  // [panel][point][in][kPanel]
  void transform(std::int64_t panel, std::int64_t panels, float* to) const {
    const std::int64_t inner = args_.shape.in_channels * kPanel;
    const float* from = args_.packed + panel * plan_.packed_panel;
    for (std::int64_t p = 0; p < panels; ++p) {
      for (std::int64_t i = 0; i < inner; i += kWidth) {
        transform_square<3, kIn>(
            [&](int y, int x) { return load(from + (y * 3 + x) * inner + i); },
            [](const auto& g, auto& u) { Winograd<kOut>::weights(g, u); },
            [&](int y, int x, Vector u) {
              store(to + (y * kIn + x) * plan_.transformed_step + i, u);
            });
      }
      from += plan_.packed_panel;
      to += plan_.transformed_panel;
    }
  }

  void multiply(const ConvolutionBlock& block, std::int64_t panel, std::int64_t panels,
                const float* a, const float* transformed, float* products) const {
    const std::int64_t tiles = block.images * block.rows * block.columns;
    for (int point = 0; point < kPoints; ++point) {
      const PreparedRows rows = {a + point * plan_.a_step, segments_, plan_.channel_blocks, tiles};
      const Panels b = {transformed + point * plan_.transformed_step, plan_.transformed_panel,
                        panels};
      multiply_rows(rows, b, products + point * plan_.product_step);
    }
    write(block, panel * kPanel, panels * kPanel, products);
  }

 private:
  static constexpr int kIn = Winograd<kOut>::kIn, kPoints = kIn * kIn;

  // The output of `columns` channels from `channel` on.
  void write(const ConvolutionBlock& block, std::int64_t channel, std::int64_t columns,
             const float* from) const {
    for (std::int64_t n = 0; n < block.images; ++n) {
      const OutputWriters writers(args_, block.image + n, channel, columns);
      for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t t = 0; t < block.columns; ++t, from += columns) {
          for (int v = 0; v < writers.count(); ++v) {
            const OutputWriter writer = writers[v];
            Vector out[kOut][kOut];
            transform_square<kIn, kOut>(
                [&](int y, int x) {
                  return load(from + v * kWidth + (y * kIn + x) * plan_.product_step);
                },
                [](const auto& m, auto& sums) { Winograd<kOut>::output(m, sums); },
                [&](int y, int x, Vector value) { out[y][x] = value; });
            write_tile(writer, block.image + n, (block.row + r) * kOut,
                       (block.column + t) * kOut, out);
          }
        }
      }
    }
  }

  void write_tile(const OutputWriter& writer, std::int64_t image, std::int64_t row,
                  std::int64_t column, const Vector (&out)[kOut][kOut]) const {
    const std::int64_t pixel = (image * plan_.out_height + row) * plan_.out_width + column;
    const std::int64_t height = plan_.out_height - row, width = plan_.out_width - column;
    // With 8 lanes it saves a quarter of the writing, with 16 nothing, and narrower ones are those of
    // browsers, where little code counts more.
    if constexpr (kWidth == 8) {
      if (height >= kOut && width >= kOut && writer.full()) {
        if (writer.has_residual()) return write_rows<true>(writer, pixel, out);
        return write_rows<false>(writer, pixel, out);
      }
    }
#pragma GCC unroll 4
    for (int y = 0; y < kOut; ++y) {
#pragma GCC unroll 4
      for (int x = 0; x < kOut; ++x) {
        if (y < height && x < width) writer.write(pixel + y * plan_.out_width + x, out[y][x]);
      }
    }
  }

  template <bool kResidual>
  void write_rows(const OutputWriter& writer, std::int64_t pixel,
                  const Vector (&out)[kOut][kOut]) const {
#pragma GCC unroll 4
    for (int y = 0; y < kOut; ++y) {
      writer.template write_row<kResidual>(pixel + y * plan_.out_width, out[y]);
    }
  }

  const ConvolutionArgs& args_;
  const ConvolutionPlan& plan_;
  const Image input_;
  const Segment* const segments_;
};

}  // namespace

void convolution_winograd2(const ConvolutionArgs& args, const ConvolutionPlan& plan) {
  BlockRunner<WinogradConvolution<2>>(args, plan, {args, plan}).run();
}

void convolution_winograd4(const ConvolutionArgs& args, const ConvolutionPlan& plan) {
  BlockRunner<WinogradConvolution<4>>(args, plan, {args, plan}).run();
}

}  // namespace advkd::ADVKD_ISA
