// What the forward and the backward of GroupNorm-SiLU share: how a call is cut into tasks, and how
// a kernel walks over memory in either layout.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/buffer.h"
#include "cpu/exponential.h"
#include "cpu/kernel_table.h"
#include "cpu/storage.h"
#include "cpu/thread_pool.h"

namespace advkd::ADVKD_ISA {

constexpr std::int64_t kBlockElements = 1 << 14;     // 64 KiB of float32
constexpr std::int64_t kResidentElements = 1 << 17;  // 512 KiB: stays in the second-level cache
constexpr std::int64_t kStreamedBytes = 1 << 23;     // outputs from here on pass the cache
constexpr std::int64_t kAheadBytes = 1 << 13;
constexpr std::int64_t kShortestPeriod = 64;

static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

static inline std::int64_t parts(std::int64_t whole, std::int64_t size) {
  return (whole + size - 1) / size;
}

// Uninitialised memory of the calling thread, kept for its next tasks: small maps are done sooner
// than memory is had. What was there before is lost.
template <class T>
T* scratch(std::int64_t size) {
  thread_local std::unique_ptr<Buffer<T>> kept;
  thread_local std::int64_t kept_size = 0;
  if (kept_size < size) {
    kept = nullptr;
    kept_size = 0;
    kept = std::make_unique<Buffer<T>>(size);
    kept_size = size;
  }
  return kept->data();
}

template <class T>
inline void fill(T* to, std::int64_t n, T value) {
  for (std::int64_t i = 0; i < n; ++i) to[i] = value;
}

template <class T>
inline void multiply(T* __restrict to, const T* __restrict by, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] *= by[i];
}

template <class T>
inline void add(T* __restrict to, const T* __restrict what, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] += what[i];
}

// The sums of `size` neighbours each.
static inline void sum_groups(const double* from, std::int64_t groups, std::int64_t size,
                              double* to) {
  for (std::int64_t g = 0; g < groups; ++g) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < size; ++i) sum += from[g * size + i];
    to[g] = sum;
  }
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
  bool resident() const { return unit_elements() <= kResidentElements; }
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

// The group of each channel of a unit, counted within the unit.
static inline void set_group_of(const Cut& cut, std::int32_t* group_of) {
  for (std::int64_t g = 0; g < cut.unit_groups; ++g) {
    fill(group_of + g * cut.group_channels, cut.group_channels, static_cast<std::int32_t>(g));
  }
}

// As many of the threads as a call is worth.
static inline int threads_for(const ImageShape& shape, double cycles_per_element, int threads) {
  const double elements = static_cast<double>(shape.batch * shape.elements());
  return advkd::threads_for(cycles_per_element * elements, threads);
}

// Runs a kernel's phases: each block is measured, then the unit's results are settled, then each
// block is finished, last ones first, as those are still in the cache.
template <class Kernel>
void run_phases(const Kernel& kernel, const Cut& cut, int threads) {
  const bool resident = cut.resident();
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
class Columns {
 public:
  static constexpr int kLanes = kLanesOf<T>;
  const std::int64_t channels, groups;  // that have columns of their own
  const std::int64_t period, width;

  explicit Columns(const Cut& cut)
      : channels(cut.last ? cut.channels : 1),
        groups(cut.last ? cut.groups : 1),
        period(period_of(channels)),
        width(cut.last ? least(period, channels * cut.pixels) : period) {}

  std::int64_t padded() const { return parts(width, kLanes) * kLanes; }

  // The values of the channels, which are in their place, to all columns.
  void repeat(T* columns) const {
    for (std::int64_t k = channels; k < width; k += channels) {
      for (std::int64_t c = 0; c < channels; ++c) columns[k + c] = columns[c];
    }
    fill(columns + width, padded() - width, T(0));
  }

  // The sum of each channel's columns.
  void fold(const T* columns, double* of_channels) const {
    for (std::int64_t c = 0; c < channels; ++c) of_channels[c] = static_cast<double>(columns[c]);
    for (std::int64_t k = channels; k < width; k += channels) {
      for (std::int64_t c = 0; c < channels; ++c) {
        of_channels[c] += static_cast<double>(columns[k + c]);
      }
    }
  }

  // The sum of each group's columns; of_channels is memory for the sums of the channels.
  void fold_groups(const T* columns, double* of_channels, double* of_groups) const {
    fold(columns, of_channels);
    sum_groups(of_channels, groups, channels / groups, of_groups);
  }

 private:
  static std::int64_t period_of(std::int64_t channels) {
    std::int64_t period = channels;
    while (period % kLanes != 0) period *= 2;
    while (period < kShortestPeriod) period *= 2;
    return period;
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

// What will be read soon, to the first-level cache; the processor itself looks ahead too little for
// a kernel that computes as much as it reads.
template <class S>
inline void prefetch(const S* at) {
  __builtin_prefetch(at + kAheadBytes / static_cast<std::int64_t>(sizeof(S)), 0, 3);
}

// The first n lanes of v, the others 0.
template <class T>
inline VectorOf<T> first_lanes(const VectorOf<T>& v, std::int64_t n) {
  T part[kLanesOf<T>];
  store_vector(part, v);
  return load_first(part, n);
}

// The derivative of SiLU.
template <class T>
inline VectorOf<T> silu_slope(const VectorOf<T>& u) {
  const VectorOf<T> gate = T(1) / (exp_of(-u) + T(1));
  return gate * (u * (T(1) - gate) + T(1));
}

// What the channels of a group share: its mean, as T holds it and what is left of it, and 1/deviation.
template <class T>
struct GroupValues {
  T *mean, *rest, *rstd;

  void set(std::int64_t group, double mean_of, double rstd_of) const {
    mean[group] = static_cast<T>(mean_of);
    rest[group] = static_cast<T>(mean_of - static_cast<double>(mean[group]));
    rstd[group] = static_cast<T>(rstd_of);
  }
};

// For channels of one image: u = (x - mean) factor + shift, which is what the activation gets, with
// the rest of the mean in the shift.
template <class T>
struct ChannelMaps {
  T *mean, *factor, *shift;
};

// Sets the maps of the channels of one unit, `first` being the first of them; group_of tells which
// of `values` is a channel's. Loops over all channels, as groups are too small to be vectors.
template <class T>
void set_channel_maps(const Modulation<T>& m, const Cut& cut, std::int64_t unit,
                      const std::int32_t* group_of, const GroupValues<T>& values,
                      const ChannelMaps<T>& maps) {
  const std::int64_t count = cut.unit_channels, first = cut.group_of(unit) * cut.group_channels;
  const std::int64_t at = cut.image_of(unit) * cut.channels + first;
  T *const mean = maps.mean + first, *const factor = maps.factor + first;
  T* const shift = maps.shift + first;
  for (std::int64_t c = 0; c < count; ++c) {
    mean[c] = values.mean[group_of[c]];
    factor[c] = values.rstd[group_of[c]];
    shift[c] = -values.rest[group_of[c]];
  }
  if (m.weight) multiply(factor, m.weight + first, count);
  multiply(shift, factor, count);
  if (m.bias) add(shift, m.bias + first, count);
  if (m.scale) {
    const T* const scale = m.scale + at;
    for (std::int64_t c = 0; c < count; ++c) {
      factor[c] *= T(1) + scale[c];
      shift[c] *= T(1) + scale[c];
    }
  }
  if (m.shift) add(shift, m.shift + at, count);
}

}  // namespace advkd::ADVKD_ISA
