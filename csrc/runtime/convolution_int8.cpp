#include "runtime/convolution_int8.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "runtime/convolution_plan.h"

namespace advkd {
namespace {

constexpr std::int64_t kGroup = 4;             // channels of one dot product
constexpr std::int64_t kBandBytes = 64 << 10;  // stay in a core's caches
constexpr std::int64_t kSpill = kPanel;        // bytes that the last pixel's block may be longer

std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
std::int64_t whole_lines(std::int64_t floats) { return divided_up(floats, kPanel) * kPanel; }

}  // namespace

Int8Plan::Int8Plan(const ConvolutionShape& s) {
  in_width = s.in_width() + s.pad_before + s.pad_after;
  pixel_bytes = divided_up(s.in_channels, kGroup) * kGroup;
  const std::int64_t pitch = in_width * pixel_bytes;
  rows = std::clamp<std::int64_t>((kBandBytes / pitch - s.kernel) / s.stride + 1, 1, s.out_height());
  bands = divided_up(s.out_height(), rows);
  panels = divided_up(s.out_channels, kPanel);
  panel_floats = kInt8Head + s.kernel * s.kernel * pixel_bytes / kGroup * kPanel;
  const std::int64_t in_rows = (rows - 1) * s.stride + s.kernel;
  band_floats = whole_lines(divided_up(in_rows * pitch + kSpill, sizeof(float)));
}

bool fits_int8(const ConvolutionShape& s) {
  constexpr std::int64_t kLargestProduct = 255 * 127;
  return s.in_channels * s.kernel * s.kernel <=
         std::numeric_limits<std::int32_t>::max() / (2 * kLargestProduct);
}

std::int64_t int8_packed_size(const ConvolutionShape& shape) {
  const Int8Plan plan(shape);
  return plan.panels * plan.panel_floats;
}

void pack_int8(const ConvolutionShape& s, const std::int8_t* weights,
               const unsigned char* scales, const Levels& x_levels, float* packed) {
  const Int8Plan plan(s);
  const std::int64_t taps = s.kernel * s.kernel;
  std::memset(packed, 0, static_cast<std::size_t>(int8_packed_size(s)) * sizeof(float));
  for (std::int64_t o = 0; o < s.out_channels; ++o) {
    const std::int64_t lane = o % kPanel;
    float* const panel = packed + o / kPanel * plan.panel_floats;
    std::int8_t* const to = reinterpret_cast<std::int8_t*>(panel + kInt8Head) + lane * kGroup;
    std::int32_t total = 0;
    for (std::int64_t i = 0; i < s.in_channels; ++i) {
      for (std::int64_t tap = 0; tap < taps; ++tap) {
        const std::int8_t weight = weights[(o * s.in_channels + i) * taps + tap];
        to[(tap * plan.pixel_bytes + i / kGroup * kGroup) * kPanel + i % kGroup] = weight;
        total += weight;
      }
    }
    const std::int32_t first = -static_cast<std::int32_t>(x_levels.zero) * total;
    std::memcpy(panel + lane, &first, sizeof first);
    float scale;
    std::memcpy(&scale, scales + o * static_cast<std::int64_t>(sizeof scale), sizeof scale);
    panel[kPanel + lane] = x_levels.step * scale;
    std::memcpy(panel + 2 * kPanel + lane, &total, sizeof total);
  }
}

std::int64_t int8_workspace_size(const ConvolutionShape& shape, int threads) {
  const Int8Plan plan(shape);
  return threads * plan.band_floats;
}

}  // namespace advkd
