// What the forward and the backward of GroupNorm-SiLU share: how a call is cut into tasks, and how
// a kernel walks over memory in either layout.
#pragma once

#include <cstdint>
#include <new>

#include "cpu/exponential.h"
#include "cpu/kernel_table.h"
#include "cpu/storage.h"
#include "cpu/thread_pool.h"

namespace advkd::ADVKD_ISA {

constexpr std::int64_t kBlockElements = 1 << 14;     // 64 KiB of float32
constexpr std::int64_t kResidentElements = 1 << 17;  // 512 KiB: stays in the second-level cache
constexpr std::int64_t kStreamedBytes = 1 << 23;     // outputs from here on pass the cache
constexpr std::int64_t kShortestPeriod = 64;

static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

static inline std::int64_t parts(std::int64_t whole, std::int64_t size) {
  return (whole + size - 1) / size;
}

// Uninitialised memory on a cache line's boundary.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size)
      : data_(static_cast<T*>(::operator new(static_cast<std::size_t>(size) * sizeof(T),
                                             std::align_val_t{64}))) {}
  ~Buffer() { ::operator delete(data_, std::align_val_t{64}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* const data_;
};

template <class T>
inline void fill(T* to, std::int64_t n, T value) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = value;
}

// A part of a unit: consecutive elements in memory. In NHWC, whole pixels. In NCHW, whole channels,
// or a part of one; `run` is the number of elements of each.
struct Block {
  std::int64_t start, length;  // in elements
  std::int64_t channel, channels, run;
};

// How a call is cut; it follows from the shape, never from the number of threads. A unit is what
// has statistics of its own: an image (NHWC, with those of all its groups) or a group of an image
// (NCHW).
struct Cut {
  bool last;
  std::int64_t channels, pixels, groups, group_channels;
  std::int64_t units, unit_groups, unit_channels;
  std::int64_t block_channels;  // NCHW: whole channels in a block; NHWC: all
  std::int64_t block_pixels;    // NHWC: in a block; NCHW: of a channel in a block
  std::int64_t segments;        // NCHW: parts of a channel; NHWC: parts of an image
  std::int64_t blocks;          // of a unit

  Cut(const ImageShape& shape, std::int64_t group_count)
      : last(shape.channels_last),
        channels(shape.channels),
        pixels(shape.pixels),
        groups(group_count),
        group_channels(channels / groups),
        units(shape.batch * (last ? 1 : groups)),
        unit_groups(last ? groups : 1),
        unit_channels(last ? channels : group_channels) {
    const std::int64_t most = last ? kBlockElements / channels : kBlockElements;
    block_pixels = least(pixels, most < 1 ? 1 : most);
    segments = parts(pixels, block_pixels);
    block_channels = unit_channels;
    if (!last) block_channels = segments > 1 ? 1 : least(group_channels, kBlockElements / pixels);
    blocks = segments * parts(unit_channels, block_channels);
  }

  std::int64_t unit_elements() const { return unit_channels * pixels; }
  std::int64_t image_of(std::int64_t unit) const { return last ? unit : unit / groups; }
  std::int64_t group_of(std::int64_t unit) const { return last ? 0 : unit % groups; }

  Block block(std::int64_t unit, std::int64_t index) const {
    const std::int64_t pixel = index % segments * block_pixels;
    const std::int64_t channel = index / segments * block_channels;
    const std::int64_t run = least(block_pixels, pixels - pixel);
    const std::int64_t count = least(block_channels, unit_channels - channel);
    const std::int64_t within = last ? pixel * channels : channel * pixels + pixel;
    return {unit * unit_elements() + within, count * run,
            group_of(unit) * group_channels + channel, count, run};
  }
};

// Runs a kernel's phases: each block is measured, then the unit's results are settled, then each
// block is finished, last ones first, as those are still in the cache.
template <class Kernel>
void run_phases(const Kernel& kernel, const Cut& cut, int threads) {
  const bool resident = cut.unit_elements() <= kResidentElements;
  if (resident && (threads == 1 || cut.units >= 2 * threads)) {
    parallel_for(cut.units, threads, [&](std::int64_t unit) {
      for (std::int64_t b = 0; b < cut.blocks; ++b) kernel.measure(unit, b);
      kernel.settle(unit);
      for (std::int64_t b = cut.blocks; b-- > 0;) kernel.finish(unit, b);
    });
    return;
  }
  // Few or large units: every block is a task. What one wave read, its second phase finds in the
  // cache as far as it goes.
  const std::int64_t wave = resident ? cut.units : 1, tasks = wave * cut.blocks;
  for (std::int64_t first = 0; first < cut.units; first += wave) {
    parallel_for(tasks, threads, [&](std::int64_t task) {
      kernel.measure(first + task / cut.blocks, task % cut.blocks);
    });
    for (std::int64_t unit = first; unit < first + wave; ++unit) kernel.settle(unit);
    parallel_for(tasks, threads, [&](std::int64_t task) {
      const std::int64_t back = tasks - 1 - task;
      kernel.finish(first + back / cut.blocks, back % cut.blocks);
    });
  }
}

// Consecutive elements are seen as rows of `period` columns, whole vectors, so that a column always
// belongs to one channel: in NHWC pixels are put side by side until vectors divide them. In NCHW
// all columns are of one channel. `width` columns are in use.
template <class T>
struct Columns {
  static constexpr int kLanes = kLanesOf<T>;
  std::int64_t channels, period, width;

  explicit Columns(const Cut& cut) : channels(cut.last ? cut.channels : 1), period(channels) {
    while (period % kLanes != 0) period *= 2;
    while (period < kShortestPeriod) period *= 2;
    width = least(period, channels * cut.pixels);
    if (!cut.last) width = period;
  }

  std::int64_t padded() const { return parts(width, kLanes) * kLanes; }

  // One value for each channel, to every column of it; `per_channel` may be the first of them.
  void spread(const T* per_channel, T* columns) const {
    for (std::int64_t k = 0; k < width; k += channels) {
      for (std::int64_t c = 0; c < channels; ++c) columns[k + c] = per_channel[c];
    }
    fill(columns + width, padded() - width, T(0));
  }

  // The sum of each channel's columns, added.
  void fold(const T* columns, double* per_channel) const {
    for (std::int64_t k = 0; k < width; k += channels) {
      for (std::int64_t c = 0; c < channels; ++c) {
        per_channel[c] += static_cast<double>(columns[k + c]);
      }
    }
  }
};

// Calls body.rows<n>(at, column) for n vectors at, at + period, ..., which share what is loaded for
// their columns, and body.some(at, column, n) where only n lanes are left. n is at most
// Body::kMostRows: sums are loaded and stored less often the more rows there are.
template <class T, class Body>
inline void each_column(std::int64_t length, std::int64_t period, const Body& body) {
  constexpr int lanes = kLanesOf<T>, kRows = Body::kMostRows;
  std::int64_t at = 0;
  for (; at + kRows * period <= length; at += kRows * period) {
    for (std::int64_t c = 0; c < period; c += lanes) body.template rows<kRows>(at + c, c);
  }
  for (; at < length; at += period) {
    const std::int64_t end = least(period, length - at);
    std::int64_t c = 0;
    for (; c + lanes <= end; c += lanes) body.template rows<1>(at + c, c);
    if (c < end) body.some(at + c, c, end - c);
  }
}

// What will be read soon, into the second-level cache; the processor itself looks ahead too little
// for a kernel that computes as much as it reads.
template <class S>
inline void prefetch(const S* at) {
  __builtin_prefetch(reinterpret_cast<const char*>(at) + (1 << 14), 0, 2);
}

// The first n lanes of v, the others 0.
template <class T>
inline VectorOf<T> first_lanes(const VectorOf<T>& v, std::int64_t n) {
  T part[kLanesOf<T>];
  store_vector(part, v);
  return load_first(part, n);
}

// 1 / d for d in [1, 2^127), within 2 ulp; NaN stays NaN.
template <class V>
inline V reciprocal(const V& d) {
#ifdef __AVX512F__
  if constexpr (sizeof(V) == 64 && sizeof(d[0]) == 4) {  // by Newton's step: divisions are slow
    const V r = (V)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)d);
    return r * (2.0f - d * r);
  }
#endif
  return 1 / d;
}

// 1 / (1 + e^-u), for float32 within 8 ulp where |u| <= 87, and as at that bound beyond it; NaN
// stays NaN. Less general than exp_of, and therefore faster.
static inline VectorOf<float> gate_of(VectorOf<float> u) {
  const VectorOf<float> low = VectorOf<float>{} - 87.0f, high = VectorOf<float>{} + 87.0f;
  u = low > u ? low : u;
  u = high < u ? high : u;
  // e^-u = 2^n e^f, |f| <= log(2) / 2; 1.5 * 2^23 leaves n in the low bits.
  const VectorOf<float> shifted = u * -1.44269504f + 12582912.0f;
  const VectorOf<float> n = shifted - 12582912.0f;
  const VectorOf<float> f = n * 2.121944400e-04f - (n * 0.693359375f + u);
  VectorOf<float> p = f * 8.290308528e-03f + 4.189796746e-02f;
  p = p * f + 1.666763723e-01f;
  p = p * f + 4.999915063e-01f;
  p = p * f + 9.999997020e-01f;
  p = p * f + 1.0f;
  typedef std::uint32_t Bits __attribute__((vector_size(sizeof u)));
  // n + 127 in the place of the exponent is 2^n.
  return reciprocal(p * (VectorOf<float>)(((Bits)shifted + 127u) << 23) + 1.0f);
}

static inline VectorOf<double> gate_of(VectorOf<double> u) { return 1.0 / (exp_of(-u) + 1.0); }

template <class T>
inline VectorOf<T> silu(const VectorOf<T>& u) {
  return u * gate_of(u);
}

// The derivative of SiLU.
template <class T>
inline VectorOf<T> silu_slope(const VectorOf<T>& u) {
  const VectorOf<T> gate = gate_of(u);
  return gate * (u * (T(1) - gate) + T(1));
}

// For channels of one image: u = (x - mean) factor + shift, which is what the activation gets, with
// `mean` as the arithmetic's type holds it and the rest of the true mean in the shift.
template <class T>
struct ChannelMaps {
  T *mean, *factor, *shift;
};

template <class T>
inline double weight_of(const Modulation<T>& m, std::int64_t c) {
  return m.weight ? static_cast<double>(m.weight[c]) : 1.0;
}

template <class T>
inline double bias_of(const Modulation<T>& m, std::int64_t c) {
  return m.bias ? static_cast<double>(m.bias[c]) : 0.0;
}

// 1 + scale of channel number `at` of all images' channels.
template <class T>
inline double gain_of(const Modulation<T>& m, std::int64_t at) {
  return m.scale ? 1.0 + static_cast<double>(m.scale[at]) : 1.0;
}

// Sets the maps of `count` channels from `first` on, which share their statistics.
template <class T>
void channel_maps(const Modulation<T>& m, std::int64_t image, std::int64_t channels,
                  std::int64_t first, std::int64_t count, double mean, double rstd,
                  const ChannelMaps<T>& maps) {
  const T held = static_cast<T>(mean);
  const double rest = mean - static_cast<double>(held);
  fill(maps.mean + first, count, held);
  if (m.weight && m.bias && !m.scale && !m.shift) {  // the commonest case, without questions
    for (std::int64_t c = first; c < first + count; ++c) {
      const double scale = rstd * static_cast<double>(m.weight[c]);
      maps.factor[c] = static_cast<T>(scale);
      maps.shift[c] = static_cast<T>(static_cast<double>(m.bias[c]) - rest * scale);
    }
    return;
  }
  for (std::int64_t c = first; c < first + count; ++c) {
    const std::int64_t at = image * channels + c;
    const double scale = rstd * weight_of(m, c), gain = gain_of(m, at);
    const double shift = m.shift ? static_cast<double>(m.shift[at]) : 0.0;
    maps.factor[c] = static_cast<T>(scale * gain);
    maps.shift[c] = static_cast<T>((bias_of(m, c) - rest * scale) * gain + shift);
  }
}

}  // namespace advkd::ADVKD_ISA
