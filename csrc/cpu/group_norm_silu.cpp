// GroupNorm (Wu and He 2018) and SiLU in one kernel. Statistics: blocks that fit the first-level
// cache get a two-pass mean and sum of squared deviations about a shift taken from the data, and
// are merged in a fixed order by Chan, Golub and LeVeque's rule; so a mean of 1e4 beside a
// deviation of 1 costs no digits, and the result does not depend on the number of threads.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/thread_pool.h"

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

inline float silu(float v) {
  // exp(-v) = 2^n exp(f), |f| <= log(2) / 2; the clamp keeps 2^n finite and lets NaN through.
  float t = -v;
  t = t < -87.0f ? -87.0f : t;
  t = t > 88.0f ? 88.0f : t;
  const float rounding = 12582912.0f;  // 1.5 * 2^23: adding it leaves the integer in the low bits
  const float shifted = t * 1.44269504f + rounding;
  const float n = shifted - rounding;
  const float f = t - n * 0.693359375f - n * -2.121944400e-04f;
  float p = 1.395047642e-03f;
  p = p * f + 8.368882351e-03f;
  p = p * f + 4.166620597e-02f;
  p = p * f + 1.666651815e-01f;
  p = p * f + 0.5f;
  p = p * f * f + f + 1.0f;
  std::uint32_t power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power + 127u) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return v / (1.0f + p * scale);
}

double lane_sum(const float* lanes) {
  double sum = 0.0;
  for (int i = 0; i < kLanes; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

Moments block_moments_nchw(const float* x, std::int64_t n) {
  const float origin = x[0];
  const std::int64_t whole = n / kLanes * kLanes;
  float sums[kLanes] = {};
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) sums[j] += x[i + j] - origin;
  }
  for (std::int64_t i = whole; i < n; ++i) sums[i - whole] += x[i] - origin;
  const double offset = lane_sum(sums) / static_cast<double>(n);
  const float centre = static_cast<float>(offset);
  float squares[kLanes] = {};
  for (std::int64_t i = 0; i < whole; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float d = x[i + j] - origin - centre;
      squares[j] += d * d;
    }
  }
  for (std::int64_t i = whole; i < n; ++i) {
    const float d = x[i] - origin - centre;
    squares[i - whole] += d * d;
  }
  return {static_cast<double>(origin) + offset, lane_sum(squares)};
}

// Moments of `width` <= kLanes neighbouring channels over `rows` pixels.
template <bool kFull>
void tile_moments(const float* x, std::int64_t rows, std::int64_t stride, int width, Moments* out) {
  const int lanes = kFull ? kLanes : width;
  float origin[kLanes], sums[kLanes] = {}, centre[kLanes], squares[kLanes] = {};
  for (int j = 0; j < lanes; ++j) origin[j] = x[j];
  for (std::int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < lanes; ++j) sums[j] += x[r * stride + j] - origin[j];
  }
  const double share = 1.0 / static_cast<double>(rows);
  for (int j = 0; j < lanes; ++j) {
    const double offset = static_cast<double>(sums[j]) * share;
    centre[j] = static_cast<float>(offset);
    out[j].mean = static_cast<double>(origin[j]) + offset;
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < lanes; ++j) {
      const float d = x[r * stride + j] - origin[j] - centre[j];
      squares[j] += d * d;
    }
  }
  for (int j = 0; j < lanes; ++j) out[j].squares = static_cast<double>(squares[j]);
}

// Moments of every group over `rows` pixels; `out` holds one for each group.
void block_moments_nhwc(const Layout& layout, const float* x, std::int64_t rows, Moments* out) {
  const Buffer<Moments> per_channel(layout.channels);
  for (std::int64_t c = 0; c < layout.channels; c += kLanes) {
    const int width = static_cast<int>(smaller(kLanes, layout.channels - c));
    (width == kLanes ? tile_moments<true> : tile_moments<false>)(
        x + c, rows, layout.channels, width, per_channel.data() + c);
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
void normalise_run(const float* __restrict x, float* __restrict y, std::int64_t n, float mean,
                   float scale, float shift) {
  for (std::int64_t i = 0; i < n; ++i) {
    const float v = (x[i] - mean) * scale + shift;
    y[i] = kSilu ? silu(v) : v;
  }
}

template <bool kSilu>
void normalise_rows(const float* __restrict x, float* __restrict y, std::int64_t rows,
                    std::int64_t channels, const Affine& affine) {
  const float *__restrict mean = affine.mean, *__restrict scale = affine.scale;
  const float* __restrict shift = affine.shift;
  for (std::int64_t r = 0; r < rows; ++r, x += channels, y += channels) {
    for (std::int64_t c = 0; c < channels; ++c) {
      const float v = (x[c] - mean[c]) * scale[c] + shift[c];
      y[c] = kSilu ? silu(v) : v;
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
