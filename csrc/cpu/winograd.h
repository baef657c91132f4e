// The transformations of Winograd's minimal filtering F(N x N, 3 x 3) (Lavin and Gray 2016), for
// the points 0, 1, -1 (and 2, -2 for N = 4) and infinity; each works on kWidth channels at once.
#pragma once

#include <cstdint>

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

// Calls store(y, x, value) with the kTo x kTo results of `line`, a transformation of kFrom numbers
// to kTo, along both sides of the square of load(y, x).
template <int kFrom, int kTo, class Load, class Line, class Store>
static inline __attribute__((always_inline)) void transform_square(const Load& load,
                                                                   const Line& line,
                                                                   const Store& store) {
  Vector down[kTo][kFrom];
#pragma GCC unroll 6
  for (int x = 0; x < kFrom; ++x) {
    Vector column[kFrom], result[kTo];
#pragma GCC unroll 6
    for (int y = 0; y < kFrom; ++y) column[y] = load(y, x);
    line(column, result);
#pragma GCC unroll 6
    for (int y = 0; y < kTo; ++y) down[y][x] = result[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kTo; ++y) {
    Vector result[kTo];
    line(down[y], result);
#pragma GCC unroll 6
    for (int x = 0; x < kTo; ++x) store(y, x, result[x]);
  }
}

// The transformed input of one block of channels, (N + 2)^2 points that are point_step apart, tile
// after tile at `to`. Pixels beyond the image's borders are 0.
template <int kOut>
class InputTiles {
 public:
  InputTiles(const Image& image, std::int64_t pad, std::int64_t point_step)
      : image_(image), pad_(pad), point_step_(point_step) {}

  void transform(const ConvolutionBlock& block, std::int64_t channel, float* scratch,
                 float* to) const {
    const RowReader reader(image_, channel);
    const std::int64_t width = block.columns * kOut + 2, row_step = width * kPanel;
    for (std::int64_t n = 0; n < block.images; ++n) {
      for (std::int64_t y = 0; y < block.rows * kOut + 2; ++y) {
        reader.read(block.image + n, block.row * kOut - pad_ + y, block.column * kOut - pad_, width,
                    scratch + y * row_step);
      }
      for (std::int64_t r = 0; r < block.rows; ++r) {
        for (std::int64_t t = 0; t < block.columns; ++t, to += kPanel) {
          const float* const from = scratch + r * kOut * row_step + t * kOut * kPanel;
          for (int v = 0; v < kPanelVectors; ++v) {
            transform_tile(from + v * kWidth, row_step, to + v * kWidth);
          }
        }
      }
    }
  }

 private:
  static constexpr int kIn = Winograd<kOut>::kIn;

  void transform_tile(const float* from, std::int64_t row_step, float* to) const {
    transform_square<kIn, kIn>(
        [&](int y, int x) { return load(from + y * row_step + x * kPanel); },
        [](const auto& d, auto& v) { Winograd<kOut>::input(d, v); },
        [&](int y, int x, Vector v) { store(to + (y * kIn + x) * point_step_, v); });
  }

  const Image& image_;
  const std::int64_t pad_, point_step_;
};

}  // namespace advkd::ADVKD_ISA
