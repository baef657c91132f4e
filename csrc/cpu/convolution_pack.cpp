// Packs weights in panels of kPanel output channels: [panel][row][column][in][kPanel] for direct,
// [panel][point][in][kPanel] for Winograd, with zeros for the channels a last panel lacks.
#include "cpu/convolution_tile.h"
#include "cpu/kernels.h"
#include "cpu/winograd.h"

namespace advkd::ADVKD_ISA {
namespace {

// The weights of one panel's output channels for one input channel, [row][column][kPanel].
struct Taps {
  float at[9][kPanel];

  Taps(const ConvolutionWeights& w, int kernel, std::int64_t first, std::int64_t lanes,
       std::int64_t channel) {
    for (int row = 0; row < kernel; ++row) {
      for (int column = 0; column < kernel; ++column) {
        float* const to = at[row * kernel + column];
        const float* from =
            w.at + first * w.out + channel * w.in + row * w.row + column * w.column;
        for (std::int64_t lane = 0; lane < kPanel; ++lane, from += w.out) {
          to[lane] = lane < lanes ? *from : 0.0f;
        }
      }
    }
  }
};

template <int kOut>
inline void transform_weights(const Taps& taps, int vector, float* to, std::int64_t point_step) {
  constexpr int kIn = Winograd<kOut>::kIn;
  Vector down[kIn][3];
  for (int x = 0; x < 3; ++x) {
    Vector column[3], result[kIn];
    for (int y = 0; y < 3; ++y) column[y] = load(taps.at[y * 3 + x] + vector * kWidth);
    Winograd<kOut>::weights(column, result);
    for (int y = 0; y < kIn; ++y) down[y][x] = result[y];
  }
  for (int y = 0; y < kIn; ++y) {
    Vector result[kIn];
    Winograd<kOut>::weights(down[y], result);
    for (int x = 0; x < kIn; ++x) store(to + (y * kIn + x) * point_step, result[x]);
  }
}

template <int kOut>
void pack_winograd(const Taps& taps, float* to, std::int64_t point_step) {
  for (int v = 0; v < kPanelVectors; ++v) {
    transform_weights<kOut>(taps, v, to + v * kWidth, point_step);
  }
}

void pack_direct(const Taps& taps, int count, float* to, std::int64_t tap_step) {
  for (int tap = 0; tap < count; ++tap) {
    for (int v = 0; v < kPanelVectors; ++v) {
      store(to + tap * tap_step + v * kWidth, load(taps.at[tap] + v * kWidth));
    }
  }
}

}  // namespace

void pack_convolution(const ConvolutionShape& shape, ConvolutionAlgorithm algorithm,
                      const ConvolutionWeights& weights, float* packed) {
  const std::int64_t panels = (shape.out_channels + kPanel - 1) / kPanel;
  const std::int64_t step = shape.in_channels * kPanel;
  const std::int64_t panel_size = panels > 0 ? packed_size(shape, algorithm) / panels : 0;
  for (std::int64_t panel = 0; panel < panels; ++panel) {
    const std::int64_t first = panel * kPanel, lanes = least(kPanel, shape.out_channels - first);
    for (std::int64_t i = 0; i < shape.in_channels; ++i) {
      const Taps taps(weights, shape.kernel, first, lanes, i);
      float* const to = packed + panel * panel_size + i * kPanel;
      switch (algorithm) {
        case ConvolutionAlgorithm::direct:
          pack_direct(taps, shape.kernel * shape.kernel, to, step);
          break;
        case ConvolutionAlgorithm::winograd2:
          pack_winograd<2>(taps, to, step);
          break;
        case ConvolutionAlgorithm::winograd4:
          pack_winograd<4>(taps, to, step);
          break;
      }
    }
  }
}

}  // namespace advkd::ADVKD_ISA
