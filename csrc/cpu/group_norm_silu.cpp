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
struct Normalise {
  using T = WideOf<S>;
  static constexpr int kMostRows = 2;
  const S* x;
  S* y;
  std::int64_t period;
  const T *mean, *factor, *shift;

  template <int kRows>
  void rows(std::int64_t at, std::int64_t column) const {
    const Column map(*this, column);
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t place = at + r * period;
      prefetch(x + place);
      store_narrow<kStream>(y + place, map.applied(load_wide(x + place)));
    }
  }

  void some(std::int64_t at, std::int64_t column, std::int64_t n) const {
    store_narrow(y + at, Column(*this, column).applied(load_wide(x + at, n)), n);
  }

 private:
  struct Column {
    const VectorOf<T> mean, factor, shift;

    Column(const Normalise& of, std::int64_t column)
        : mean(load_vector(of.mean + column)),
          factor(load_vector(of.factor + column)),
          shift(load_vector(of.shift + column)) {}

    VectorOf<T> applied(const VectorOf<T>& v) const {
      const VectorOf<T> u = (v - mean) * factor + shift;
      return kSilu ? silu<T>(u) : u;
    }
  };
};

template <class S>
class Forward {
  using T = WideOf<S>;

 public:
  explicit Forward(const GroupNormSiluArgs<S>& args)
      : args_(args),
        cut_(args.shape, args.groups),
        columns_(cut_),
        moments_(cut_.units * cut_.blocks * cut_.unit_groups),
        maps_(args.shape.batch * 3 * map_size()),
        streams_(args.shape.batch * args.shape.elements() * sizeof(S) >= kStreamedBytes &&
                 streams_to(args.y, cut_.last ? cut_.block_pixels * cut_.channels : cut_.pixels) &&
                 streams_to(args.y, cut_.unit_elements())) {}

  void run() const { run_phases(*this, cut_, args_.threads); }

  void measure(std::int64_t unit, std::int64_t index) const {
    const Block block = cut_.block(unit, index);
    const S* const x = args_.x + block.start;
    const std::int64_t padded = columns_.padded(), channels = columns_.channels;
    const Buffer<T> columns(3 * padded + channels);
    T *const origin = columns.data(), *const sums = origin + padded, *const squares = sums + padded;
    T* const origins = squares + padded;
    const Buffer<double> memory(2 * channels);
    double *const totals = memory.data(), *const square_totals = totals + channels;

    const std::int64_t few = parts(block.length / channels, 8) * channels;
    fill(sums, 2 * padded, T(0));
    fill(totals, 2 * channels, 0.0);
    each_column<T>(few, columns_.period, AddValues<S>{x, columns_.period, sums});
    columns_.fold(sums, totals);
    for (std::int64_t c = 0; c < channels; c += group_columns()) {
      const double mean = sum_of(totals + c) / static_cast<double>(few / cut_.unit_groups);
      fill(origins + c, group_columns(), static_cast<T>(mean));
    }
    columns_.spread(origins, origin);

    fill(sums, padded, T(0));
    fill(totals, channels, 0.0);
    each_column<T>(block.length, columns_.period,
                   AddDeviations<S>{x, columns_.period, origin, sums, squares});
    columns_.fold(sums, totals);
    columns_.fold(squares, square_totals);
    const double count = group_elements(unit, index);
    Moments* out = moments_.data() + (unit * cut_.blocks + index) * cut_.unit_groups;
    for (std::int64_t c = 0; c < channels; c += group_columns()) {
      const double deviations = sum_of(totals + c);
      *out++ = {static_cast<double>(origins[c]) + deviations / count,
                sum_of(square_totals + c) - deviations * deviations / count};
    }
  }

  void settle(std::int64_t unit) const {
    const std::int64_t image = cut_.image_of(unit);
    const double elements = static_cast<double>(cut_.group_channels * cut_.pixels);
    for (std::int64_t i = 0; i < cut_.unit_groups; ++i) {
      const std::int64_t group = cut_.group_of(unit) + i;
      const Moments all = merged(unit, i);
      const double rstd = 1.0 / std::sqrt(all.squares / elements + args_.eps);
      args_.mean[image * cut_.groups + group] = all.mean;
      args_.rstd[image * cut_.groups + group] = rstd;
      T* const maps = map_of(image);
      channel_maps(args_.modulation, image, cut_.channels, group * cut_.group_channels,
                   cut_.group_channels, all.mean, rstd,
                   {maps, maps + map_size(), maps + 2 * map_size()});
    }
    if (!cut_.last) return;
    for (int k = 0; k < 3; ++k) {
      T* const map = map_of(image) + k * map_size();
      columns_.spread(map, map);
    }
  }

  void finish(std::int64_t unit, std::int64_t index) const {
    const auto normalise = args_.silu ? (streams_ ? &Forward::normalise<true, true>
                                                  : &Forward::normalise<true, false>)
                                      : (streams_ ? &Forward::normalise<false, true>
                                                  : &Forward::normalise<false, false>);
    (this->*normalise)(cut_.block(unit, index), map_of(cut_.image_of(unit)));
    if (streams_) end_streaming();
  }

 private:
  template <bool kSilu, bool kStream>
  void normalise(const Block& block, const T* maps) const {
    const S* const x = args_.x + block.start;
    S* const y = args_.y + block.start;
    const std::int64_t period = columns_.period, size = map_size();
    if (cut_.last) {
      each_column<T>(
          block.length, period,
          Normalise<S, kSilu, kStream>{x, y, period, maps, maps + size, maps + 2 * size});
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
          Normalise<S, kSilu, kStream>{x + at, y + at, period, mean, factor, shift});
    }
  }

  // In NCHW a block lies in one group, and all columns are as one channel of it.
  std::int64_t group_columns() const { return cut_.last ? cut_.group_channels : 1; }

  double group_elements(std::int64_t unit, std::int64_t block) const {
    return static_cast<double>(cut_.block(unit, block).length / cut_.unit_groups);
  }

  double sum_of(const double* per_channel) const {
    double sum = 0.0;
    for (std::int64_t i = 0; i < group_columns(); ++i) sum += per_channel[i];
    return sum;
  }

  // The blocks of one group, in order.
  Moments merged(std::int64_t unit, std::int64_t group) const {
    const Moments* const of_unit =
        moments_.data() + unit * cut_.blocks * cut_.unit_groups + group;
    Moments all = of_unit[0];
    double count = group_elements(unit, 0);
    for (std::int64_t b = 1; b < cut_.blocks; ++b) {
      const Moments& next = of_unit[b * cut_.unit_groups];
      const double more = group_elements(unit, b);
      const double apart = next.mean - all.mean, share = more / (count + more);
      all.mean += apart * share;
      all.squares += next.squares + apart * apart * share * count;
      count += more;
    }
    return all;
  }

  std::int64_t map_size() const { return cut_.last ? columns_.padded() : cut_.channels; }
  T* map_of(std::int64_t image) const { return maps_.data() + image * 3 * map_size(); }

  const GroupNormSiluArgs<S>& args_;
  const Cut cut_;
  const Columns<T> columns_;
  const Buffer<Moments> moments_;  // of each block's groups
  const Buffer<T> maps_;           // ChannelMaps of each image's columns (NHWC) or channels
  const bool streams_;
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
