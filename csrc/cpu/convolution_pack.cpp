// Packs weights in panels of kPanel output channels: [panel][row][column][in][kPanel], with zeros
// for the channels a last panel lacks.
#include "cpu/kernels.h"
#include "cpu/product.h"
#include "cpu/convolution_tile.h"

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

}  // namespace

void pack_convolution(const ConvolutionShape& shape, const ConvolutionWeights& weights,
                      float* packed) {
  const std::int64_t channels = shape.in_channels;
  const std::int64_t panels = (shape.out_channels + kPanel - 1) / kPanel;
  const int taps_count = shape.kernel * shape.kernel;
  Taps taps;
  for (std::int64_t o = 0; o < panels * kPanel; o += kWidth) {
    float* const to = packed + o / kPanel * taps_count * channels * kPanel + o % kPanel;
    const std::int64_t lanes = least(kWidth, shape.out_channels - o);
    for (std::int64_t i = 0; i < channels; i += kWidth) {
      const std::int64_t count = least(kWidth, channels - i);
      ConvolutionWeights part = weights;
      if (lanes > 0) part.at += o * weights.out + i * weights.in;
      taps.read(part, shape.kernel, lanes > 0 ? lanes : 0, count);
      for (int tap = 0; tap < taps_count; ++tap) {
        float* const row = to + (tap * channels + i) * kPanel;
        for (std::int64_t k = 0; k < count; ++k) store(row + k * kPanel, taps.at[tap][k]);
      }
    }
  }
}

}  // namespace advkd::ADVKD_ISA
