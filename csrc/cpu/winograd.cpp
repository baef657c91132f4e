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
    const InputTiles<kOut> input(input_, args_.shape.pad_before, plan_);
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
    const TileOrder<kOut> order(plan_, block);
    for (int point = 0; point < kPoints; ++point) {
      const auto tiles = order.of_point(point / kIn, point % kIn);
      const PreparedRows rows = {a + point * plan_.a_step + tiles.first * kPanel, segments_,
                                 plan_.channel_blocks, tiles.end - tiles.first};
      const Panels b = {transformed + point * plan_.transformed_step, plan_.transformed_panel,
                        panels};
      multiply_rows(rows, b, products + point * plan_.product_step + tiles.first * panels * kPanel);
    }
    write(block, order, panel * kPanel, panels * kPanel, products);
  }

 private:
  static constexpr int kIn = kOut + 2, kPoints = kIn * kIn;

  // The output of `columns` channels from `channel` on.
  void write(const ConvolutionBlock& block, const TileOrder<kOut>& order, std::int64_t channel,
             std::int64_t columns, const float* products) const {
    for (std::int64_t n = 0; n < block.images; ++n) {
      const OutputWriters writers(args_, block.image + n, channel, columns);
      for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t t = 0; t < block.columns; ++t) {
          const float* const from = products + order.index(n, r, t) * columns;
          const Place place = {block.image + n, order.row(r), order.column(t)};
          order.with_sides(r, t, [&](auto height, auto width) {
            for (int v = 0; v < writers.count(); ++v) {
              write_tile<height, width>(writers[v], place, from + v * kWidth);
            }
          });
        }
      }
    }
  }

  // Where a tile's first output lies.
  struct Place {
    std::int64_t image, row, column;
  };

  template <int kHeight, int kTileWidth>
  void write_tile(const OutputWriter writer, const Place& place, const float* from) const {
    Vector out[kHeight][kTileWidth];
    transform_rectangle<kHeight + 2, kHeight, kTileWidth + 2, kTileWidth>(
        [&](int y, int x) {
          const int point = point_of<kOut, kHeight>(y) * kIn + point_of<kOut, kTileWidth>(x);
          return load(from + point * plan_.product_step);
        },
        [](const auto& m, auto& sums) { Winograd<kHeight>::output(m, sums); },
        [](const auto& m, auto& sums) { Winograd<kTileWidth>::output(m, sums); },
        [&](int y, int x, Vector value) { out[y][x] = value; });
    if constexpr (kHeight < kOut || kTileWidth < kOut) {
      write_short(writer, place, kHeight, kTileWidth, &out[0][0]);
    } else {
      write_whole(writer, place, out);
    }
  }

  // Inlined, or the tile would pass through memory.
  inline __attribute__((always_inline)) void write_whole(const OutputWriter& writer,
                                                         const Place& place,
                                                         const Vector (&out)[kOut][kOut]) const {
    const std::int64_t pixel = pixel_of(place);
    const std::int64_t height = plan_.out_height - place.row;
    const std::int64_t width = plan_.out_width - place.column;
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

  // One function for all shorter tiles, which lie at two sides of an image: unrolled for each shape
  // they would be a tenth of a library.
  __attribute__((noinline)) void write_short(const OutputWriter& writer, const Place& place,
                                             std::int64_t height, std::int64_t width,
                                             const Vector* out) const {
    const std::int64_t rows = least(height, plan_.out_height - place.row);
    const std::int64_t columns = least(width, plan_.out_width - place.column);
    for (std::int64_t y = 0; y < rows; ++y) {
      const std::int64_t pixel = pixel_of(place) + y * plan_.out_width;
      for (std::int64_t x = 0; x < columns; ++x) writer.write(pixel + x, out[y * width + x]);
    }
  }

  std::int64_t pixel_of(const Place& place) const {
    return (place.image * plan_.out_height + place.row) * plan_.out_width + place.column;
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
