// GroupNorm (Wu and He 2018) and SiLU in one kernel. Statistics: blocks that fit the first-level
// cache get the corrected two-pass mean and sum of squared deviations, and are merged in a fixed
// order (both by Chan, Golub and LeVeque, 1983); so a mean of 1e4 beside a deviation of 1 costs no
// digits, and the result does not depend on the number of threads.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"
#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {
namespace {

constexpr int kLanes = 16;
constexpr std::int64_t kBlockElements = 4096;        // 16 KiB
constexpr std::int64_t kResidentElements = 1 << 17;  // 512 KiB: stays in the second-level cache

struct Moments {
  double mean, squares;  // squares: sum of squared deviations from the mean
};

template <class T>
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : data_(new T[static_cast<std::size_t>(size)]) {}
  ~Buffer() { delete[] data_; }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() const { return data_; }

 private:
  T* const data_;
};

struct Layout {
  std::int64_t channels, pixels, groups, group_channels;
  std::int64_t block_length;  // elements of a group (NCHW) or pixels of an image (NHWC)
  std::int64_t blocks;        // per group (NCHW) or per image (NHWC)

  Layout(const ImageShape& shape, std::int64_t group_count)
      : channels(shape.channels),
        pixels(shape.pixels),
        groups(group_count),
        group_channels(shape.channels / group_count) {
    const std::int64_t length = shape.channels_last ? pixels : group_channels * pixels;
    block_length = kBlockElements;
    if (shape.channels_last) {
      block_length = kBlockElements < channels ? 1 : kBlockElements / channels;
    }
    blocks = (length + block_length - 1) / block_length;
  }
};

// y = act((x - mean) * scale + shift), one entry for each channel of one image.
struct Affine {
  float *mean, *scale, *shift;
};

inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// kLanes floats side by side, spelled as vectors: left to itself the compiler vectorises the outer
// loops below, across cache lines.
constexpr int kVectors = kLanes / kWidth;

struct Lanes {
  Vector part[kVectors] = {};
};

inline Lanes all_lanes(float value) {
  Lanes lanes;
  for (Vector& part : lanes.part) part = filled(value);
  return lanes;
}

inline Lanes load_lanes(const float* from) {
  Lanes lanes;
  for (int v = 0; v < kVectors; ++v) lanes.part[v] = load(from + v * kWidth);
  return lanes;
}

inline void store_lanes(float* to, const Lanes& lanes) {
  for (int v = 0; v < kVectors; ++v) store(to + v * kWidth, lanes.part[v]);
}

inline void add_values(const float* x, Lanes& sums) {
  for (int v = 0; v < kVectors; ++v) sums.part[v] += load(x + v * kWidth);
}

// Sums of the deviations from a mean that is itself rounded, and of their squares.
struct Deviations {
  Lanes sums, squares;
};

inline void add_deviations(const float* x, const Lanes& mean, Deviations& out) {
  for (int v = 0; v < kVectors; ++v) {
    const Vector d = load(x + v * kWidth) - mean.part[v];
    out.sums.part[v] += d;
    out.squares.part[v] += d * d;
  }
}

// The corrected two-pass formulas: what the deviations sum to is the error of the rounded mean.
inline Moments corrected(float mean, double count, double deviations, double squares) {
  return {static_cast<double>(mean) + deviations / count,
          squares - deviations * deviations / count};
}

double lane_sum(const Lanes& lanes) {
  float each[kLanes];
  store_lanes(each, lanes);
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(each[i]);
  return sum;
}

Moments block_moments_nchw(const float* x, std::int64_t n) {
  const std::int64_t whole = n / kLanes * kLanes;
  const double count = static_cast<double>(n);
  Lanes sums;
  for (std::int64_t i = 0; i < whole; i += kLanes) add_values(x + i, sums);
  double sum = lane_sum(sums);
  for (std::int64_t i = whole; i < n; ++i) sum += static_cast<double>(x[i]);
  const float mean = static_cast<float>(sum / count);
  const Lanes means = all_lanes(mean);
  Deviations lanes;
  for (std::int64_t i = 0; i < whole; i += kLanes) add_deviations(x + i, means, lanes);
  double deviations = lane_sum(lanes.sums), squares = lane_sum(lanes.squares);
  for (std::int64_t i = whole; i < n; ++i) {
    const double d = static_cast<double>(x[i]) - static_cast<double>(mean);
    deviations += d;
    squares += d * d;
  }
  return corrected(mean, count, deviations, squares);
}

// Moments of kLanes neighbouring channels over `rows` pixels.
void tile_moments(const float* x, std::int64_t rows, std::int64_t stride, Moments* out) {
  const double count = static_cast<double>(rows);
  Lanes sums;
  for (std::int64_t r = 0; r < rows; ++r) add_values(x + r * stride, sums);
  float mean[kLanes], deviations[kLanes], squares[kLanes];
  store_lanes(mean, sums);
  for (int j = 0; j < kLanes; ++j) mean[j] = static_cast<float>(mean[j] / count);
  const Lanes means = load_lanes(mean);
  Deviations lanes;
  for (std::int64_t r = 0; r < rows; ++r) add_deviations(x + r * stride, means, lanes);
  store_lanes(deviations, lanes.sums);
  store_lanes(squares, lanes.squares);
  for (int j = 0; j < kLanes; ++j) out[j] = corrected(mean[j], count, deviations[j], squares[j]);
}

// The same for one channel.
Moments channel_moments(const float* x, std::int64_t rows, std::int64_t stride) {
  const double count = static_cast<double>(rows);
  double sum = 0.0, deviations = 0.0, squares = 0.0;
  for (std::int64_t r = 0; r < rows; ++r) sum += static_cast<double>(x[r * stride]);
  const float mean = static_cast<float>(sum / count);
  for (std::int64_t r = 0; r < rows; ++r) {
    const double d = static_cast<double>(x[r * stride]) - static_cast<double>(mean);
    deviations += d;
    squares += d * d;
  }
  return corrected(mean, count, deviations, squares);
}

// Moments of every group over `rows` pixels; `out` holds one for each group.
void block_moments_nhwc(const Layout& layout, const float* x, std::int64_t rows, Moments* out) {
  const Buffer<Moments> per_channel(layout.channels);
  std::int64_t c = 0;
  for (; c + kLanes <= layout.channels; c += kLanes) {
    tile_moments(x + c, rows, layout.channels, per_channel.data() + c);
  }
  for (; c < layout.channels; ++c) {
    per_channel.data()[c] = channel_moments(x + c, rows, layout.channels);
  }
  for (std::int64_t g = 0; g < layout.groups; ++g) {
    const Moments* const channel = per_channel.data() + g * layout.group_channels;
    double mean = 0.0, squares = 0.0;
    for (std::int64_t c = 0; c < layout.group_channels; ++c) mean += channel[c].mean;
    mean /= static_cast<double>(layout.group_channels);
    for (std::int64_t c = 0; c < layout.group_channels; ++c) {
      const double apart = channel[c].mean - mean;
      squares += channel[c].squares + static_cast<double>(rows) * apart * apart;
    }
    out[g] = {mean, squares};
  }
}

// Merges the blocks of one group; `stride` lies between their moments, and a block of length L
// stands for L * weight elements.
Moments merge(const Moments* block, const Layout& layout, std::int64_t stride, std::int64_t length,
              std::int64_t weight) {
  Moments all = block[0];
  std::int64_t count = smaller(layout.block_length, length) * weight;
  for (std::int64_t b = 1; b < layout.blocks; ++b) {
    const Moments& next = block[b * stride];
    const std::int64_t more =
        smaller(layout.block_length, length - b * layout.block_length) * weight;
    const double apart = next.mean - all.mean;
    const double share = static_cast<double>(more) / static_cast<double>(count + more);
    all.mean += apart * share;
    all.squares += next.squares + apart * apart * share * static_cast<double>(count);
    count += more;
  }
  return all;
}

void fill_affine(const GroupNormSiluArgs& args, const Layout& layout, std::int64_t group,
                 const Moments& moments, const Affine& out) {
  const double elements = static_cast<double>(layout.group_channels * layout.pixels);
  const double variance = moments.squares / elements;
  const double inverse = 1.0 / std::sqrt(variance + static_cast<double>(args.eps));
  const float mean = static_cast<float>(moments.mean);
  // What float32 cannot hold of the mean goes into the shift.
  const double rest = moments.mean - static_cast<double>(mean);
  for (std::int64_t i = 0; i < layout.group_channels; ++i) {
    const std::int64_t c = group * layout.group_channels + i;
    const double scale = inverse * static_cast<double>(args.weight[c]);
    out.mean[c] = mean;
    out.scale[c] = static_cast<float>(scale);
    out.shift[c] = static_cast<float>(static_cast<double>(args.bias[c]) - rest * scale);
  }
}

template <bool kSilu>
inline Vector activated(Vector v) {
  return kSilu ? silu(v) : v;
}

template <bool kSilu>
void normalise_run(const float* x, float* y, std::int64_t n, float mean, float scale, float shift) {
  std::int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    store(y + i, activated<kSilu>((load(x + i) - mean) * scale + shift));
  }
  if (i < n) {
    const Vector v = (load_some(x + i, n - i) - mean) * scale + shift;
    store_some(y + i, activated<kSilu>(v), n - i);
  }
}

template <bool kSilu>
void normalise_rows(const float* x, float* y, std::int64_t rows, std::int64_t channels,
                    const Affine& affine) {
  const float *const mean = affine.mean, *const scale = affine.scale, *const shift = affine.shift;
  for (std::int64_t r = 0; r < rows; ++r, x += channels, y += channels) {
    std::int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      const Vector v = (load(x + c) - load(mean + c)) * load(scale + c) + load(shift + c);
      store(y + c, activated<kSilu>(v));
    }
    if (c < channels) {
      const std::int64_t n = channels - c;
      const Vector v = (load_some(x + c, n) - load_some(mean + c, n)) * load_some(scale + c, n) +
                       load_some(shift + c, n);
      store_some(y + c, activated<kSilu>(v), n);
    }
  }
}

// One call of the kernel, with the scratch that its phases share.
class GroupNormSilu {
 public:
  explicit GroupNormSilu(const GroupNormSiluArgs& args)
      : args_(args),
        layout_(args.shape, args.groups),
        last_(args.shape.channels_last),
        moments_(args.shape.batch * layout_.groups * layout_.blocks),
        affine_(args.shape.batch * layout_.channels * 3) {}

  void run() const {
    // A unit is one image (NHWC) or one group of one image (NCHW).
    const std::int64_t units = args_.shape.batch * (last_ ? 1 : layout_.groups);
    const std::int64_t unit_elements = args_.shape.batch * args_.shape.elements() / units;
    if (unit_elements <= kResidentElements && units >= 2 * args_.threads) {
      parallel_for(units, args_.threads, [&](std::int64_t unit) { run_unit(unit); });
      return;
    }
    // Few or large units: every block is a task, with the merging between the two passes.
    const std::int64_t blocks = units * layout_.blocks;
    parallel_for(blocks, args_.threads, [&](std::int64_t task) {
      measure(task / layout_.blocks, task % layout_.blocks);
    });
    for (std::int64_t unit = 0; unit < units; ++unit) settle(unit);
    parallel_for(blocks, args_.threads, [&](std::int64_t task) {
      normalise(task / layout_.blocks, task % layout_.blocks);
    });
  }

 private:
  void run_unit(std::int64_t unit) const {
    for (std::int64_t block = 0; block < layout_.blocks; ++block) measure(unit, block);
    settle(unit);
    for (std::int64_t block = 0; block < layout_.blocks; ++block) normalise(unit, block);
  }

  std::int64_t unit_length() const {
    return last_ ? layout_.pixels : layout_.group_channels * layout_.pixels;
  }

  std::int64_t length_of(std::int64_t block) const {
    return smaller(layout_.block_length, unit_length() - block * layout_.block_length);
  }

  // Where a block begins, in elements.
  std::int64_t start_of(std::int64_t unit, std::int64_t block) const {
    const std::int64_t position = unit * unit_length() + block * layout_.block_length;
    return last_ ? position * layout_.channels : position;
  }

  void measure(std::int64_t unit, std::int64_t block) const {
    const float* const x = args_.x + start_of(unit, block);
    Moments* const out = moments_.data() + unit * layout_.blocks * (last_ ? layout_.groups : 1);
    if (last_) {
      block_moments_nhwc(layout_, x, length_of(block), out + block * layout_.groups);
    } else {
      out[block] = block_moments_nchw(x, length_of(block));
    }
  }

  void settle(std::int64_t unit) const {
    if (!last_) {
      const Moments* const block = moments_.data() + unit * layout_.blocks;
      fill_affine(args_, layout_, unit % layout_.groups, merge(block, layout_, 1, unit_length(), 1),
                  affine_of(unit / layout_.groups));
      return;
    }
    const Moments* const block = moments_.data() + unit * layout_.blocks * layout_.groups;
    for (std::int64_t g = 0; g < layout_.groups; ++g) {
      const Moments all =
          merge(block + g, layout_, layout_.groups, unit_length(), layout_.group_channels);
      fill_affine(args_, layout_, g, all, affine_of(unit));
    }
  }

  void normalise(std::int64_t unit, std::int64_t block) const {
    const std::int64_t start = start_of(unit, block), length = length_of(block);
    const float* const x = args_.x + start;
    float* const y = args_.y + start;
    if (last_) {
      (args_.silu ? normalise_rows<true> : normalise_rows<false>)(
          x, y, length, layout_.channels, affine_of(unit));
      return;
    }
    const Affine affine = affine_of(unit / layout_.groups);
    const std::int64_t first_channel = unit % layout_.groups * layout_.group_channels;
    for (std::int64_t done = 0; done < length;) {
      const std::int64_t position = block * layout_.block_length + done;
      const std::int64_t c = first_channel + position / layout_.pixels;
      const std::int64_t n = smaller(layout_.pixels - position % layout_.pixels, length - done);
      (args_.silu ? normalise_run<true> : normalise_run<false>)(
          x + done, y + done, n, affine.mean[c], affine.scale[c], affine.shift[c]);
      done += n;
    }
  }

  Affine affine_of(std::int64_t image) const {
    float* const base = affine_.data() + image * layout_.channels * 3;
    return {base, base + layout_.channels, base + 2 * layout_.channels};
  }

  const GroupNormSiluArgs& args_;
  const Layout layout_;
  const bool last_;
  const Buffer<Moments> moments_;
  const Buffer<float> affine_;
};

}  // namespace

void group_norm_silu(const GroupNormSiluArgs& args) {
  if (args.shape.batch * args.shape.elements() > 0) GroupNormSilu(args).run();
}

}  // namespace advkd::ADVKD_ISA
