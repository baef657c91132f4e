// GroupNorm (Wu and He 2018) as y = x * scale + shift, one scale and shift for each channel of an
// image, so that whoever reads x can apply it on the way. x is read once: sums and squares of the
// deviations from a nearby mean lose no digits to a large one, and are merged in float64 in an
// order that depends on the shape alone.
#include <cmath>
#include <cstdint>

#include "cpu/kernels.h"
#include "runtime/thread_pool.h"
#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {
namespace {

constexpr int kTileVectors = 4;
constexpr int kTileChannels = kTileVectors * kWidth;
constexpr std::int64_t kPivotRows = 8;    // their mean is what deviations are taken from
constexpr std::int64_t kBlockRows = 64;   // summed in float32
constexpr std::int64_t kTaskChannels = 64;

// Mean and sum of squared deviations of some elements.
struct Moments {
  double mean = 0.0, squares = 0.0, count = 0.0;

  // Chan, Golub and LeVeque (1983).
  void merge(double other_mean, double other_squares, double other_count) {
    const double apart = other_mean - mean;
    count += other_count;
    const double share = other_count / count;
    mean += apart * share;
    squares += other_squares + apart * apart * share * (count - other_count);
  }
};

// Moments of up to kTileChannels neighbouring channels.
struct TileMoments {
  double mean[kTileChannels], squares[kTileChannels];
};

// Of kVectors vectors of channels, the last of which has `last` lanes that are channels.
template <int kVectors>
struct Rows {
  const float* at;
  std::int64_t stride, last;

  Vector load_part(std::int64_t row, int vector) const {
    const float* const from = at + row * stride + vector * kWidth;
    return vector + 1 < kVectors || last == kWidth ? load(from) : load_some(from, last);
  }
};

template <int kVectors>
__attribute__((noinline)) void tile_moments(const Rows<kVectors>& x, std::int64_t pixels, TileMoments& out) {
  Vector pivot[kVectors] = {};
  const std::int64_t first = pixels < kPivotRows ? pixels : kPivotRows;
  for (std::int64_t r = 0; r < first; ++r) {
    for (int v = 0; v < kVectors; ++v) pivot[v] += x.load_part(r, v);
  }
  for (Vector& p : pivot) p = p / static_cast<float>(first);
  double sums[kTileChannels] = {}, squares[kTileChannels] = {};
  for (std::int64_t row = 0; row < pixels; row += kBlockRows) {
    const std::int64_t end = row + kBlockRows < pixels ? row + kBlockRows : pixels;
    Vector s[kVectors] = {}, q[kVectors] = {};
    for (std::int64_t r = row; r < end; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector d = x.load_part(r, v) - pivot[v];
        s[v] += d;
        q[v] += d * d;
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      for (int lane = 0; lane < kWidth; ++lane) {
        sums[v * kWidth + lane] += static_cast<double>(s[v][lane]);
        squares[v * kWidth + lane] += static_cast<double>(q[v][lane]);
      }
    }
  }
  const double count = static_cast<double>(pixels);
  for (int v = 0; v < kVectors; ++v) {
    for (int lane = 0; lane < kWidth; ++lane) {
      const int c = v * kWidth + lane;
      const double rest = squares[c] - sums[c] * sums[c] / count;
      out.mean[c] = static_cast<double>(pivot[v][lane]) + sums[c] / count;
      out.squares[c] = rest < 0.0 ? 0.0 : rest;
    }
  }
}

// The same for `channels` of them, at most kTileChannels.
void moments_of(const float* x, std::int64_t stride, std::int64_t channels, std::int64_t pixels,
                TileMoments& out) {
  const std::int64_t vectors = (channels + kWidth - 1) / kWidth;
  const std::int64_t last = channels - (vectors - 1) * kWidth;
  if (vectors == 1) return tile_moments<1>({x, stride, last}, pixels, out);
  if (vectors == 2) return tile_moments<2>({x, stride, last}, pixels, out);
  if (vectors == 3) return tile_moments<3>({x, stride, last}, pixels, out);
  tile_moments<4>({x, stride, last}, pixels, out);
}

void fill_group(const GroupNormAffineArgs& args, const Moments& moments, std::int64_t first,
                std::int64_t channels, float* scale, float* shift) {
  const double rstd = 1.0 / std::sqrt(moments.squares / moments.count + args.eps);
  for (std::int64_t c = first; c < first + channels; ++c) {
    const double factor = rstd * static_cast<double>(args.weight[c]);
    scale[c] = static_cast<float>(factor);
    shift[c] = static_cast<float>(static_cast<double>(args.bias[c]) - moments.mean * factor);
  }
}

// The groups [group, end) of one image.
void fill_groups(const GroupNormAffineArgs& args, std::int64_t image, std::int64_t group,
                 std::int64_t end) {
  const std::int64_t width = args.channels / args.groups;
  const float* const x = args.x + image * args.pixels * args.x_stride;
  float* const scale = args.scale + image * args.channels;
  float* const shift = args.shift + image * args.channels;
  Moments moments;
  TileMoments tile;
  for (std::int64_t first = group * width; first < end * width; first += kTileChannels) {
    const std::int64_t left = end * width - first;
    const std::int64_t channels = left < kTileChannels ? left : kTileChannels;
    moments_of(x + first, args.x_stride, channels, args.pixels, tile);
    for (std::int64_t i = 0; i < channels; ++i) {
      moments.merge(tile.mean[i], tile.squares[i], static_cast<double>(args.pixels));
      if ((first + i + 1) % width != 0) continue;
      fill_group(args, moments, first + i + 1 - width, width, scale, shift);
      moments = Moments();
    }
  }
}

}  // namespace

void group_norm_affine(const GroupNormAffineArgs& args) {
  const std::int64_t width = args.channels / args.groups;
  const std::int64_t groups = width >= kTaskChannels ? 1 : kTaskChannels / width;
  const std::int64_t tasks = (args.groups + groups - 1) / groups;
  parallel_for(args.batch * tasks, args.threads, [&](std::int64_t task) {
    const std::int64_t group = task % tasks * groups;
    const std::int64_t end = group + groups < args.groups ? group + groups : args.groups;
    fill_groups(args, task / tasks, group, end);
  });
}

}  // namespace advkd::ADVKD_ISA
