// What the forward and the backward of GroupNorm-SiLU share: how a call is cut into tasks, and how
// a kernel walks over memory in either layout.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/buffer.h"
#include "cpu/exponential.h"
#include "runtime/kernel_table.h"
#include "cpu/storage.h"
#include "runtime/thread_pool.h"

namespace advkd::ADVKD_ISA {

constexpr std::int64_t kBlockElements = 1 << 14;     // 64 KiB of float32
constexpr std::int64_t kResidentElements = 1 << 17;  // 512 KiB: stays in the L2 cache
constexpr std::int64_t kStreamedBytes = 1 << 23;     // outputs from here on pass the cache
constexpr std::int64_t kAheadBytes = 1 << 13;
constexpr std::int64_t kShortestPeriod = 64;

static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

static inline std::int64_t parts(std::int64_t whole, std::int64_t size) {
  return (whole + size - 1) / size;
}

// Uninitialized memory of the calling thread, reused by its next tasks: allocating would take
// longer than a small map takes. What it held before is lost.
template <class T>
T* scratch(std::int64_t size) {
  thread_local std::unique_ptr<Buffer<T>> memory;
  thread_local std::int64_t memory_size = 0;
  if (memory_size < size) {
    memory = nullptr;
    memory_size = 0;
    memory = std::make_unique<Buffer<T>>(size);
    memory_size = size;
  }
  return memory->data();
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

// The sums of `size` neighbors each.
static inline void sum_groups(const double* from, std::int64_t groups, std::int64_t size,
                              double* to) {
  for (std::int64_t g = 0; g < groups; ++g) {
    double sum = 0.0;
    for (std::int64_t i = 0; i < size; ++i) sum += from[g * size + i];
    to[g] = sum;
  }
}

// A part of an instance: consecutive elements in memory. In NHWC, whole pixels. In NCHW, whole
// channels, or a part of one; `run` is the number of elements of each.
struct Block {
  std::int64_t start, length;  // in elements
  std::int64_t channel, channels, run;
};

// How a call is cut; it follows from the shape, never from the number of threads. An instance is
// what has statistics of its own: an image (NHWC, with those of all its groups) or a group of an
// image (NCHW).
struct Cut {
  bool last;
  std::int64_t channels, pixels, groups, group_channels;
  std::int64_t instances, instance_groups, instance_channels;
  std::int64_t block_channels;  // NCHW: whole channels in a block; NHWC: all
  std::int64_t block_pixels;    // NHWC: in a block; NCHW: of a channel in a block
  std::int64_t segments;        // NCHW: parts of a channel; NHWC: parts of an image
  std::int64_t blocks;          // of an instance

  Cut(const ImageShape& shape, std::int64_t group_count)
      : last(shape.channels_last),
        channels(shape.channels),
        pixels(shape.pixels),
        groups(group_count),
        group_channels(channels / groups),
        instances(shape.batch * (last ? 1 : groups)),
        instance_groups(last ? groups : 1),
        instance_channels(last ? channels : group_channels) {
    const std::int64_t most = last ? kBlockElements / channels : kBlockElements;
    block_pixels = least(pixels, most < 1 ? 1 : most);
    segments = parts(pixels, block_pixels);
    block_channels = instance_channels;
    if (!last) block_channels = segments > 1 ? 1 : least(group_channels, kBlockElements / pixels);
    blocks = segments * parts(instance_channels, block_channels);
  }

  std::int64_t instance_elements() const { return instance_channels * pixels; }
  bool resident() const { return instance_elements() <= kResidentElements; }
  std::int64_t image_of(std::int64_t instance) const { return last ? instance : instance / groups; }
  std::int64_t group_of(std::int64_t instance) const { return last ? 0 : instance % groups; }

  Block block(std::int64_t instance, std::int64_t index) const {
    const std::int64_t pixel = index % segments * block_pixels;
    const std::int64_t channel = index / segments * block_channels;
    const std::int64_t run = least(block_pixels, pixels - pixel);
    const std::int64_t count = least(block_channels, instance_channels - channel);
    const std::int64_t within = last ? pixel * channels : channel * pixels + pixel;
    return {instance * instance_elements() + within, count * run,
            group_of(instance) * group_channels + channel, count, run};
  }
};

// The group of each channel of an instance, counted within the instance.
static inline void set_group_of(const Cut& cut, std::int32_t* group_of) {
  for (std::int64_t g = 0; g < cut.instance_groups; ++g) {
    fill(group_of + g * cut.group_channels, cut.group_channels, static_cast<std::int32_t>(g));
  }
}

// How many of the threads a call is worth waking.
static inline int threads_for(const ImageShape& shape, double cycles_per_element, int threads) {
  const double elements = static_cast<double>(shape.batch * shape.elements());
  return advkd::threads_for(cycles_per_element * elements, threads);
}

// Runs a kernel's phases: each block is measured, then the instance's results are settled, then
// each block is finished, last ones first, as those are still in the cache.
template <class Kernel>
void run_phases(const Kernel& kernel, const Cut& cut, int threads) {
  const bool resident = cut.resident();
  if (resident && (threads == 1 || cut.instances >= 2 * threads)) {
    parallel_for(cut.instances, threads, [&](std::int64_t instance) {
      for (std::int64_t b = 0; b < cut.blocks; ++b) kernel.measure(instance, b);
      kernel.settle(instance);
      for (std::int64_t b = cut.blocks; b-- > 0;) kernel.finish(instance, b);
    });
    return;
  }
  // Few or large instances: every block is a task. Large instances come one at a time, so that the
  // second phase finds in the cache what the first has read, as far as it goes.
  const std::int64_t together = resident ? cut.instances : 1, tasks = together * cut.blocks;
  for (std::int64_t first = 0; first < cut.instances; first += together) {
    parallel_for(tasks, threads, [&](std::int64_t task) {
      kernel.measure(first + task / cut.blocks, task % cut.blocks);
    });
    for (std::int64_t i = first; i < first + together; ++i) kernel.settle(i);
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

  // Copies the values of the first columns, one for each channel, to all columns.
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

// What will be read soon, to the L1 cache; the processor itself looks ahead too little for
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

// What the channels of a group share: its mean rounded to T, the rest of it, and 1 / deviation.
template <class T>
struct GroupValues {
  T *mean, *rest, *rstd;

  void set(std::int64_t group, double mean_of, double rstd_of) const {
    mean[group] = static_cast<T>(mean_of);
    rest[group] = static_cast<T>(mean_of - static_cast<double>(mean[group]));
    rstd[group] = static_cast<T>(rstd_of);
  }
};

// For channels of one image: u = (x - mean) factor + shift, the activation's argument, with the
// rest of the mean in the shift.
template <class T>
struct ChannelMaps {
  T *mean, *factor, *shift;
};

// Sets the maps of the channels of one instance, `first` being the first of them; group_of tells
// which of `values` is a channel's. Loops over all channels, as groups are too small to be vectors.
template <class T>
void set_channel_maps(const AffineParameters<T>& affine, const Cut& cut, std::int64_t instance,
                      const std::int32_t* group_of, const GroupValues<T>& values,
                      const ChannelMaps<T>& maps) {
  const std::int64_t count = cut.instance_channels;
  const std::int64_t first = cut.group_of(instance) * cut.group_channels;
  const std::int64_t at = cut.image_of(instance) * cut.channels + first;
  T *const mean = maps.mean + first, *const factor = maps.factor + first;
  T* const shift = maps.shift + first;
  for (std::int64_t c = 0; c < count; ++c) {
    mean[c] = values.mean[group_of[c]];
    factor[c] = values.rstd[group_of[c]];
    shift[c] = -values.rest[group_of[c]];
  }
  if (affine.weight) multiply(factor, affine.weight + first, count);
  multiply(shift, factor, count);
  if (affine.bias) add(shift, affine.bias + first, count);
  if (affine.scale) {
    const T* const scale = affine.scale + at;
    for (std::int64_t c = 0; c < count; ++c) {
      factor[c] *= T(1) + scale[c];
      shift[c] *= T(1) + scale[c];
    }
  }
  if (affine.shift) add(shift, affine.shift + at, count);
}

}  // namespace advkd::ADVKD_ISA
