// The transformations of Winograd's minimal filtering F(N x N, 3 x 3) (Lavin and Gray 2016), for
// the points 0, 1, -1 (and 2, -2 for N = 4, 2 for N = 3) and infinity; each works on kWidth channels
// at once.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/convolution_tile.h"

namespace advkd::ADVKD_ISA {

// In one dimension: of N + 2 inputs, of N + 2 products to N outputs, and of 3 weights; and for
// wgrad the last two transposed: of the gradients of N outputs, and to those of 3 weights.
template <int kOut>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kIn = 4;

  static inline __attribute__((always_inline)) void input(const Vector (&d)[4], Vector (&to)[4]) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[3] - d[1];
  }

  static inline __attribute__((always_inline)) void output(const Vector (&m)[4], Vector (&to)[2]) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] + m[3];
  }

  static inline __attribute__((always_inline)) void weights(const Vector (&g)[3], Vector (&to)[4]) {
    const Vector even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    to[0] = g[0];
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = g[2];
  }
};

template <>
struct Winograd<4> {
  static constexpr int kIn = 6;

  static inline __attribute__((always_inline)) void input(const Vector (&d)[6], Vector (&to)[6]) {
    const Vector a = d[4] - d[2] * 4.0f, b = d[3] - d[1] * 4.0f;
    const Vector c = d[4] - d[2], e = d[3] - d[1];
    to[0] = d[0] * 4.0f + (d[4] - d[2] * 5.0f);
    to[1] = a + b;
    to[2] = a - b;
    to[3] = c + e * 2.0f;
    to[4] = c - e * 2.0f;
    to[5] = d[1] * 4.0f + (d[5] - d[3] * 5.0f);
  }

  static inline __attribute__((always_inline)) void output(const Vector (&m)[6], Vector (&to)[4]) {
    const Vector near_sum = m[1] + m[2], near_difference = m[1] - m[2];
    const Vector far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    to[0] = m[0] + near_sum + far_sum;
    to[1] = far_difference * 2.0f + near_difference;
    to[2] = far_sum * 4.0f + near_sum;
    to[3] = far_difference * 8.0f + near_difference + m[5];
  }

  static inline __attribute__((always_inline)) void weights(const Vector (&g)[3], Vector (&to)[6]) {
    const Vector even = (g[0] + g[2]) * (-1.0f / 6.0f), odd = g[1] * (-1.0f / 6.0f);
    const Vector far_even = g[0] * (1.0f / 24.0f) + g[2] * (1.0f / 6.0f);
    const Vector far_odd = g[1] * (1.0f / 12.0f);
    to[0] = g[0] * 0.25f;
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = far_even + far_odd;
    to[4] = far_even - far_odd;
    to[5] = g[2];
  }

  static inline __attribute__((always_inline)) void output_gradient(const Vector (&y)[4],
                                                                    Vector (&to)[6]) {
    const Vector even = y[0] + y[2], odd = y[1] + y[3];
    const Vector far_even = y[0] + y[2] * 4.0f, far_odd = y[1] * 2.0f + y[3] * 8.0f;
    to[0] = y[0];
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = far_even + far_odd;
    to[4] = far_even - far_odd;
    to[5] = y[3];
  }

  static inline __attribute__((always_inline)) void wgrad(const Vector (&u)[6],
                                                                    Vector (&to)[3]) {
    const Vector near_sum = u[1] + u[2], near_difference = u[1] - u[2];
    const Vector far_sum = u[3] + u[4], far_difference = u[3] - u[4];
    to[0] = u[0] * 0.25f - near_sum * (1.0f / 6.0f) + far_sum * (1.0f / 24.0f);
    to[1] = far_difference * (1.0f / 12.0f) - near_difference * (1.0f / 6.0f);
    to[2] = (far_sum - near_sum) * (1.0f / 6.0f) + u[5];
  }
};

// A tile that is shorter than 4 by an output has the points of 4 but -2, in their order, and is
// multiplied with the same weights: the inputs have the factors that weights of its own would have.
template <>
struct Winograd<3> {
  static constexpr int kIn = 5;

  static inline __attribute__((always_inline)) void input(const Vector (&d)[5], Vector (&to)[5]) {
    const Vector a = d[1] * 2.0f, b = d[3] - d[2];
    to[0] = (d[0] - d[2]) * 4.0f + (d[3] * 2.0f - a);
    to[1] = b * 3.0f - d[1] * 6.0f;
    to[2] = a + (d[3] - d[2] * 3.0f);
    to[3] = (d[3] - d[1]) * 4.0f;
    to[4] = (d[4] - d[2]) + (a - d[3] * 2.0f);
  }

  static inline __attribute__((always_inline)) void output(const Vector (&m)[5], Vector (&to)[3]) {
    const Vector sum = m[1] + m[2], difference = m[1] - m[2];
    to[0] = m[0] + sum + m[3];
    to[1] = m[3] * 2.0f + difference;
    to[2] = m[3] * 4.0f + sum + m[4];
  }

  static inline __attribute__((always_inline)) void output_gradient(const Vector (&y)[3],
                                                                    Vector (&to)[5]) {
    const Vector even = y[0] + y[2];
    to[0] = y[0];
    to[1] = even + y[1];
    to[2] = even - y[1];
    to[3] = y[0] + y[1] * 2.0f + y[2] * 4.0f;
    to[4] = y[2];
  }
};

// Calls store(y, x, value) with the kToY x kToX results of a transformation along both sides of the
// rectangle of load(y, x): line_y of kFromY numbers to kToY, and line_x of kFromX to kToX.
template <int kFromY, int kToY, int kFromX, int kToX, class Load, class LineY, class LineX,
          class Store>
static inline __attribute__((always_inline)) void transform_rectangle(const Load& load,
                                                                      const LineY& line_y,
                                                                      const LineX& line_x,
                                                                      const Store& store) {
  Vector down[kToY][kFromX];
#pragma GCC unroll 6
  for (int x = 0; x < kFromX; ++x) {
    Vector column[kFromY], result[kToY];
#pragma GCC unroll 6
    for (int y = 0; y < kFromY; ++y) column[y] = load(y, x);
    line_y(column, result);
#pragma GCC unroll 6
    for (int y = 0; y < kToY; ++y) down[y][x] = result[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kToY; ++y) {
    Vector result[kToX];
    line_x(down[y], result);
#pragma GCC unroll 6
    for (int x = 0; x < kToX; ++x) store(y, x, result[x]);
  }
}

// The same of a square, with one transformation for both sides.
template <int kFrom, int kTo, class Load, class Line, class Store>
static inline __attribute__((always_inline)) void transform_square(const Load& load,
                                                                   const Line& line,
                                                                   const Store& store) {
  transform_rectangle<kFrom, kTo, kFrom, kTo>(load, line, line, store);
}

// The tiles of a block in the order in which they are prepared: those that have a point follow one
// another, whichever the point. A shorter tile lacks the point kOut of its short side.
template <int kOut>
class TileOrder {
 public:
  TileOrder(const ConvolutionPlan& plan, const ConvolutionBlock& block)
      : images_(block.images),
        rows_(plan.whole_rows, block.row, block.rows),
        columns_(plan.whole_columns, block.column, block.columns) {}

  static constexpr bool kMixed = kOut == 4 && kShorterTiles;

  // Where tile (r, t) of the block's image n stands.
  std::int64_t index(std::int64_t n, std::int64_t r, std::int64_t t) const {
    if constexpr (!kMixed) return (n * rows_.count + r) * columns_.count + t;
    const bool short_row = r >= rows_.whole, short_column = t >= columns_.whole;
    const std::int64_t height = short_row ? rows_.count - rows_.whole : rows_.whole;
    const std::int64_t width = short_column ? columns_.count - columns_.whole : columns_.whole;
    const std::int64_t row = short_row ? r - rows_.whole : r;
    const std::int64_t column = short_column ? t - columns_.whole : t;
    return start(short_row, short_column) + (n * height + row) * width + column;
  }

  // Tiles [first, end) have a point.
  struct Range {
    std::int64_t first, end;
  };
  Range of_point(int y, int x) const {
    const std::int64_t all = images_ * rows_.count * columns_.count;
    if constexpr (!kMixed) return {0, all};
    const bool whole_row = y == kOut, whole_column = x == kOut;
    return {whole_column ? start(false, false) : 0,
            whole_row ? start(true, false) : (whole_column ? start(true, true) : all)};
  }

  // The first output of row r of tiles, and of column t, in the image.
  std::int64_t row(std::int64_t r) const { return rows_.output(r); }
  std::int64_t column(std::int64_t t) const { return columns_.output(t); }
  std::int64_t height() const { return row(rows_.count) - row(0); }
  std::int64_t width() const { return column(columns_.count) - column(0); }

  // Calls visit with the sides of tile (r, t) as integral constants.
  template <class Visit>
  void with_sides(std::int64_t r, std::int64_t t, const Visit& visit) const {
    constexpr std::integral_constant<int, kOut> whole;
    if constexpr (kMixed) {
      constexpr std::integral_constant<int, kOut - 1> shorter;
      if (r < rows_.whole) return t < columns_.whole ? visit(whole, whole) : visit(whole, shorter);
      t < columns_.whole ? visit(shorter, whole) : visit(shorter, shorter);
    } else {
      visit(whole, whole);
    }
  }

 private:
  // The block's tiles along one side of the image.
  struct Side {
    std::int64_t before_whole, first, count, whole;  // whole: the first ones of `count`

    Side(std::int64_t of_image, std::int64_t first_tile, std::int64_t tiles)
        : before_whole(of_image),
          first(first_tile),
          count(tiles),
          whole(of_image <= first_tile ? 0 : least(of_image - first_tile, tiles)) {}

    std::int64_t output(std::int64_t i) const {
      const std::int64_t tile = first + i;
      if constexpr (!kMixed) return tile * kOut;
      return tile * kOut - (tile > before_whole ? tile - before_whole : 0);
    }
  };

  // In the order: whole rows and short columns, both whole, short rows and whole columns, both short.
  std::int64_t start(bool short_row, bool short_column) const {
    const std::int64_t short_columns = columns_.count - columns_.whole;
    if (!short_row) return short_column ? 0 : images_ * rows_.whole * short_columns;
    const std::int64_t first = images_ * rows_.whole * columns_.count;
    return short_column ? first + images_ * (rows_.count - rows_.whole) * columns_.whole : first;
  }

  const std::int64_t images_;
  const Side rows_, columns_;
};

// The number that point k of a tile with that many outputs has among those of a whole one.
template <int kOut, int kSide>
constexpr int point_of(int k) {
  return k < kSide + 1 ? k : kOut + 1;
}

// The transformed input of one block of channels, (N + 2)^2 points that are point_step apart, the
// tiles of each in TileOrder at `to`. Pixels beyond the image's borders are 0.
template <int kOut>
class InputTiles {
 public:
  InputTiles(const Image& image, std::int64_t pad, const ConvolutionPlan& plan)
      : image_(image), pad_(pad), plan_(plan) {}

  void transform(const ConvolutionBlock& block, std::int64_t channel, float* scratch,
                 float* to) const {
    const RowReader reader(image_, channel);
    const TileOrder<kOut> order(plan_, block);
    const std::int64_t width = order.width() + 2, row_step = width * kPanel;
    for (std::int64_t n = 0; n < block.images; ++n) {
      for (std::int64_t y = 0; y < order.height() + 2; ++y) {
        reader.read(block.image + n, order.row(0) - pad_ + y, order.column(0) - pad_, width,
                    scratch + y * row_step);
      }
      for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t t = 0; t < block.columns; ++t) {
          const float* const from = scratch + (order.row(r) - order.row(0)) * row_step +
                                    (order.column(t) - order.column(0)) * kPanel;
          float* const at = to + order.index(n, r, t) * kPanel;
          order.with_sides(r, t, [&](auto height, auto wide) {
            for (int v = 0; v < kPanelVectors; ++v) {
              transform_tile<height, wide>(from + v * kWidth, row_step, at + v * kWidth);
            }
          });
        }
      }
    }
  }

 private:
  static constexpr int kIn = kOut + 2;

  template <int kHeight, int kTileWidth>
  void transform_tile(const float* from, std::int64_t row_step, float* to) const {
    transform_rectangle<kHeight + 2, kHeight + 2, kTileWidth + 2, kTileWidth + 2>(
        [&](int y, int x) { return load(from + y * row_step + x * kPanel); },
        [](const auto& d, auto& v) { Winograd<kHeight>::input(d, v); },
        [](const auto& d, auto& v) { Winograd<kTileWidth>::input(d, v); },
        [&](int y, int x, Vector v) {
          const int point = point_of<kOut, kHeight>(y) * kIn + point_of<kOut, kTileWidth>(x);
          store(to + point * plan_.a_step, v);
        });
  }

  const Image& image_;
  const std::int64_t pad_;
  const ConvolutionPlan& plan_;
};

}  // namespace advkd::ADVKD_ISA
