// GroupNorm (Wu and He 2018) and SiLU in one kernel, forward. Statistics: blocks get the mean and
// the sum of squared deviations by the corrected formula about an origin that is the mean of their
// first eighth, and are merged in a fixed order (both by Chan, Golub and LeVeque, 1983). With N
// elements, n of them in the origin, its distance from the mean is at most sqrt(N / n) deviations
// (Cauchy and Schwarz), so at worst 3 bits cancel, and a large mean costs no digits.
#include "cpu/group_norm_silu.h"

#include <cmath>

#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {
namespace {

struct Moments {
  double mean, squares;  // squares: sum of squared deviations from the mean
};

template <class S>
struct AddValues {
  using T = WideOf<S>;
  static constexpr int kMostRows = 8;
  const S* x;
  std::int64_t period;
  T* sums;

  template <int kRows>
  void rows(std::int64_t at, std::int64_t column) const {
    VectorOf<T> sum = load_vector(sums + column);
    for (int r = 0; r < kRows; ++r) sum += load_wide(x + at + r * period);
    store_vector(sums + column, sum);
  }

  void some(std::int64_t at, std::int64_t column, std::int64_t n) const {
    store_vector(sums + column, load_vector(sums + column) + load_wide(x + at, n));
  }
};

// Sums of the deviations from an origin, and of their squares.
template <class S>
struct AddDeviations {
  using T = WideOf<S>;
  static constexpr int kMostRows = 8;
  const S* x;
  std::int64_t period;
  const T* origin;
  T *sums, *squares;

  void add(const VectorOf<T>& d, std::int64_t column) const {
    store_vector(sums + column, load_vector(sums + column) + d);
    store_vector(squares + column, load_vector(squares + column) + d * d);
  }

  template <int kRows>
  void rows(std::int64_t at, std::int64_t column) const {
    const VectorOf<T> from = load_vector(origin + column);
    VectorOf<T> sum = load_vector(sums + column), square = load_vector(squares + column);
    for (int r = 0; r < kRows; ++r) {
      prefetch(x + at + r * period);
      const VectorOf<T> d = load_wide(x + at + r * period) - from;
      sum += d;
      square += d * d;
    }
    store_vector(sums + column, sum);
    store_vector(squares + column, square);
  }

  void some(std::int64_t at, std::int64_t column, std::int64_t n) const {
    add(first_lanes<T>(load_wide(x + at, n) - load_vector(origin + column), n), column);
  }
};

template <class S, bool kSilu, bool kStream>
struct Normalize {
  using T = WideOf<S>;
  static constexpr int kMostRows = 2;
  const S* x;
  S* y;
  std::int64_t period;
  const T *mean, *factor, *shift;
  std::int64_t ahead;

  template <int kRows>
  void rows(std::int64_t at, std::int64_t column) const {
    const Column map(*this, column);
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t place = at + r * period;
      __builtin_prefetch(x + place + ahead, 0, 2);
      store_narrow<kStream>(y + place, map.applied(load_wide(x + place)));
    }
  }

  void some(std::int64_t at, std::int64_t column, std::int64_t n) const {
    store_narrow(y + at, Column(*this, column).applied(load_wide(x + at, n)), n);
  }

 private:
  struct Column {
    const VectorOf<T> mean, factor, shift;

    Column(const Normalize& of, std::int64_t column)
        : mean(load_vector(of.mean + column)),
          factor(load_vector(of.factor + column)),
          shift(load_vector(of.shift + column)) {}

    VectorOf<T> applied(const VectorOf<T>& v) const {
      const VectorOf<T> u = (v - mean) * factor + shift;
      return kSilu ? silu(u) : u;
    }
  };
};

template <class S>
class Forward {
  using T = WideOf<S>;

 public:
  explicit Forward(const GroupNormSiluArgs<S>& args)
      : args_(args),
        threads_(threads_for(args.shape, kCyclesPerElement, args.threads)),
        cut_(args.shape, args.groups),
        columns_(cut_),
        moments_(cut_.instances * cut_.blocks * cut_.instance_groups),
        maps_(args.shape.batch * 3 * map_size()),
        group_of_(cut_.instance_channels),
        streams_(args.shape.batch * args.shape.elements() * sizeof(S) >= kStreamedBytes &&
                 streams_to(args.y, cut_.last ? cut_.block_pixels * cut_.channels : cut_.pixels) &&
                 streams_to(args.y, cut_.instance_elements())),
        ahead_(cut_.resident() ? cut_.instance_elements() * threads_
                               : kAheadBytes / static_cast<std::int64_t>(sizeof(S))) {
    set_group_of(cut_, group_of_.data());
  }

  void run() const { run_phases(*this, cut_, threads_); }

  void measure(std::int64_t instance, std::int64_t index) const {
    const Block block = cut_.block(instance, index);
    const S* const x = args_.x + block.start;
    const std::int64_t padded = columns_.padded(), groups = columns_.groups;
    T *const origin = scratch<T>(3 * padded), *const sums = origin + padded;
    T* const squares = sums + padded;
    double* const of_channels = scratch<double>(columns_.channels + 2 * groups);
    double *const totals = of_channels + columns_.channels, *const square_totals = totals + groups;

    const std::int64_t few = parts(block.length / columns_.channels, 8) * columns_.channels;
    fill(sums, padded, T(0));
    each_column<T>(few, columns_.period, AddValues<S>{x, columns_.period, sums});
    columns_.fold_groups(sums, of_channels, totals);
    Moments* const out = moments_.data() + (instance * cut_.blocks + index) * groups;
    set_origins(totals, static_cast<double>(groups) / static_cast<double>(few), out, origin);

    fill(sums, 2 * padded, T(0));
    each_column<T>(block.length, columns_.period,
                   AddDeviations<S>{x, columns_.period, origin, sums, squares});
    columns_.fold_groups(sums, of_channels, totals);
    columns_.fold_groups(squares, of_channels, square_totals);
    const double share = static_cast<double>(groups) / static_cast<double>(block.length);
    for (std::int64_t g = 0; g < groups; ++g) {
      const double apart = totals[g] * share;
      out[g] = {out[g].mean + apart, square_totals[g] - totals[g] * apart};
    }
  }

  void settle(std::int64_t instance) const {
    const std::int64_t image = cut_.image_of(instance), groups = cut_.instance_groups;
    const double elements = static_cast<double>(cut_.group_channels * cut_.pixels);
    T* const memory = scratch<T>(3 * groups);
    const GroupValues<T> values = {memory, memory + groups, memory + 2 * groups};
    const std::int64_t at = image * cut_.groups + cut_.group_of(instance);
    for (std::int64_t g = 0; g < groups; ++g) {
      const Moments all = merged(instance, g);
      const double rstd = 1.0 / std::sqrt(all.squares / elements + args_.eps);
      values.set(g, all.mean, rstd);
      if (!args_.mean) continue;
      args_.mean[at + g] = all.mean;
      args_.rstd[at + g] = rstd;
    }
    T* const maps = map_of(image);
    const ChannelMaps<T> of_image = {maps, maps + map_size(), maps + 2 * map_size()};
    set_channel_maps(args_.affine, cut_, instance, group_of_.data(), values, of_image);
    if (!cut_.last) return;
    for (int k = 0; k < 3; ++k) columns_.repeat(maps + k * map_size());
  }

  void finish(std::int64_t instance, std::int64_t index) const {
    if (args_.y == nullptr) return;
    const auto normalize = args_.silu ? (streams_ ? &Forward::normalize<true, true>
                                                  : &Forward::normalize<true, false>)
                                      : (streams_ ? &Forward::normalize<false, true>
                                                  : &Forward::normalize<false, false>);
    (this->*normalize)(cut_.block(instance, index), map_of(cut_.image_of(instance)));
    if (streams_) end_streaming();
  }

 private:
  template <bool kSilu, bool kStream>
  void normalize(const Block& block, const T* maps) const {
    const S* const x = args_.x + block.start;
    S* const y = args_.y + block.start;
    const std::int64_t period = columns_.period, size = map_size();
    if (cut_.last) {
      each_column<T>(
          block.length, period,
          Normalize<S, kSilu, kStream>{x, y, period, maps, maps + size, maps + 2 * size, ahead_});
      return;
    }
    T mean[kShortestPeriod], factor[kShortestPeriod], shift[kShortestPeriod];
    for (std::int64_t i = 0; i < block.channels; ++i) {
      const T* const map = maps + block.channel + i;
      fill(mean, kShortestPeriod, map[0]);
      fill(factor, kShortestPeriod, map[size]);
      fill(shift, kShortestPeriod, map[2 * size]);
      const std::int64_t at = i * block.run;
      each_column<T>(
          block.run, period,
          Normalize<S, kSilu, kStream>{x + at, y + at, period, mean, factor, shift, ahead_});
    }
  }

  // Sets every column's origin, and out, to its group's mean of a block's first elements, rounded
  // to T.
  void set_origins(const double* sums, double share, Moments* out, T* origin) const {
    const std::int64_t size = columns_.channels / columns_.groups;
    for (std::int64_t g = 0; g < columns_.groups; ++g) {
      const T mean = static_cast<T>(sums[g] * share);
      out[g].mean = static_cast<double>(mean);
      fill(origin + g * size, size, mean);
    }
    columns_.repeat(origin);
  }

  double group_elements(std::int64_t instance, std::int64_t block) const {
    return static_cast<double>(cut_.block(instance, block).length / cut_.instance_groups);
  }

  // The blocks of one group, in order.
  Moments merged(std::int64_t instance, std::int64_t group) const {
    const Moments* const of_instance =
        moments_.data() + instance * cut_.blocks * cut_.instance_groups + group;
    Moments all = of_instance[0];
    double count = group_elements(instance, 0);
    for (std::int64_t b = 1; b < cut_.blocks; ++b) {
      const Moments& next = of_instance[b * cut_.instance_groups];
      const double more = group_elements(instance, b);
      const double apart = next.mean - all.mean, share = more / (count + more);
      all.mean += apart * share;
      all.squares += next.squares + apart * apart * share * count;
      count += more;
    }
    return all;
  }

  std::int64_t map_size() const { return cut_.last ? columns_.padded() : cut_.channels; }
  T* map_of(std::int64_t image) const { return maps_.data() + image * 3 * map_size(); }

  static constexpr double kCyclesPerElement = 1;

  const GroupNormSiluArgs<S>& args_;
  const int threads_;
  const Cut cut_;
  const Columns<T> columns_;
  const Buffer<Moments> moments_;  // of each block's groups
  const Buffer<T> maps_;           // ChannelMaps of each image's columns (NHWC) or channels
  const Buffer<std::int32_t> group_of_;
  const bool streams_;
  // How far the second phase looks ahead. What it reads of a resident instance is in the cache, and
  // what this thread reads next is likely the instance after those that the others have.
  const std::int64_t ahead_;
};

}  // namespace

template <class S>
void group_norm_silu(const GroupNormSiluArgs<S>& args) {
  if (args.shape.batch * args.shape.elements() > 0) Forward<S>(args).run();
}

template void group_norm_silu(const GroupNormSiluArgs<float>& args);
template void group_norm_silu(const GroupNormSiluArgs<double>& args);
template void group_norm_silu(const GroupNormSiluArgs<Float16>& args);
template void group_norm_silu(const GroupNormSiluArgs<BFloat16>& args);

}  // namespace advkd::ADVKD_ISA
