// Packs weights in panels of kPanel output channels: [panel][row][column][in][kPanel] for direct,
// [panel][point][in][kPanel] for Winograd, with zeros for the channels a last panel lacks.
#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/winograd.h"

namespace advkd::ADVKD_ISA {
namespace {

// The weights of up to kWidth input channels for kWidth output channels, the latter in lanes.
struct Taps {
  Vector at[9][kWidth];

  // lanes, count: how many output and input channels there are.
  void read(const ConvolutionWeights& w, int kernel, std::int64_t lanes, std::int64_t count) {
    for (int tap = 0; tap < kernel * kernel; ++tap) {
      const float* const from = w.at + tap / kernel * w.row + tap % kernel * w.column;
      if (w.out == 1) {
        for (std::int64_t i = 0; i < count; ++i) {
          at[tap][i] = load_first<float>(from + i * w.in, lanes);
        }
      } else if (w.in == 1) {
        for (std::int64_t o = 0; o < kWidth; ++o) {
          at[tap][o] = o < lanes ? load_first<float>(from + o * w.out, count) : Vector{};
        }
        transpose_from<float, kWidth / 2>(at[tap]);
      } else {
        for (std::int64_t i = 0; i < count; ++i) {
          at[tap][i] = gathered(from + i * w.in, w.out, lanes);
        }
      }
    }
  }

 private:
  static Vector gathered(const float* from, std::int64_t step, std::int64_t lanes) {
    float lane[kWidth] = {};
    for (std::int64_t o = 0; o < lanes; ++o) lane[o] = from[o * step];
    return load(lane);
  }
};

template <int kOut>
inline void transform_weights(const Taps& taps, std::int64_t i, float* to,
                              std::int64_t point_step) {
  constexpr int kIn = Winograd<kOut>::kIn;
  Vector down[kIn][3];
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) {
    Vector column[3], result[kIn];
#pragma GCC unroll 3
    for (int y = 0; y < 3; ++y) column[y] = taps.at[y * 3 + x][i];
    Winograd<kOut>::weights(column, result);
#pragma GCC unroll 6
    for (int y = 0; y < kIn; ++y) down[y][x] = result[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < kIn; ++y) {
    Vector result[kIn];
    Winograd<kOut>::weights(down[y], result);
#pragma GCC unroll 6
    for (int x = 0; x < kIn; ++x) store(to + (y * kIn + x) * point_step, result[x]);
  }
}

void write(const Taps& taps, std::int64_t count, int kernel, ConvolutionAlgorithm algorithm,
           float* to, std::int64_t point_step) {
  for (std::int64_t i = 0; i < count; ++i, to += kPanel) {
    if (algorithm == ConvolutionAlgorithm::winograd4) {
      transform_weights<4>(taps, i, to, point_step);
    } else if (algorithm == ConvolutionAlgorithm::winograd2) {
      transform_weights<2>(taps, i, to, point_step);
    } else {
      for (int tap = 0; tap < kernel * kernel; ++tap) store(to + tap * point_step, taps.at[tap][i]);
    }
  }
}

}  // namespace

void pack_convolution(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm,
                      const ConvolutionWeights& weights, float* packed) {
  const std::int64_t channels = shape.in_channels, panels = (shape.out_channels + kPanel - 1) / kPanel;
  const std::int64_t panel_size = packed_size(shape, algorithm) / panels;
  Taps taps;
  for (std::int64_t o = 0; o < panels * kPanel; o += kWidth) {
    float* const to = packed + o / kPanel * panel_size + o % kPanel;
    const std::int64_t lanes = least(kWidth, shape.out_channels - o);
    for (std::int64_t i = 0; i < channels; i += kWidth) {
      const std::int64_t count = least(kWidth, channels - i);
      ConvolutionWeights part = weights;
      if (lanes > 0) part.at += o * weights.out + i * weights.in;
      taps.read(part, shape.kernel, lanes > 0 ? lanes : 0, count);
      write(taps, count, shape.kernel, algorithm, to + i * kPanel, channels * kPanel);
    }
  }
}

}  // namespace advkd::ADVKD_ISA
