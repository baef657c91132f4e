// GroupNorm-SiLU, backward. With d = x - mean, g = dL/du (u is the activation's argument), a the
// factor between xhat and u, and means over a group's N elements:
//
//   dx = rstd (g a - mean(g a) - xhat mean(g a xhat)),   xhat = d rstd,
//
// and every other gradient follows from sum(g) and sum(g d) of each channel of each image. They are
// summed in blocks and merged in a fixed order, in float64.
#include "cpu/group_norm_silu.h"
#include "cpu/kernels.h"

namespace advkd::ADVKD_ISA {
namespace {

// Where dx comes from: g is either what the gradient of y already is (no activation), or was left
// in dx by the first phase, or is recomputed, which costs less than the memory.
enum class Source { kGradY, kStored, kRecomputed };

// One value for each column or channel. u = d factor + shift; dx = g factor + d slope + offset.
enum Map { kMean, kFactor, kShift, kSlope, kOffset, kMaps };

template <class T>
struct Maps {
  const T* at;
  std::int64_t size;

  const T* operator[](Map map) const { return at + map * size; }
};

// g from the gradient of y.
template <class T, bool kSilu>
struct Slope {
  const VectorOf<T> factor, shift;

  Slope(const Maps<T>& maps, std::int64_t column)
      : factor(load_vector(maps[kFactor] + column)), shift(load_vector(maps[kShift] + column)) {}

  VectorOf<T> times(const VectorOf<T>& grad, const VectorOf<T>& d) const {
    return kSilu ? grad * silu_slope<T>(d * factor + shift) : grad;
  }
};

// Adds up g and g d, and may leave g in dx.
template <class S, bool kSilu, bool kStore>
struct AddGradients {
  using T = WideOf<S>;
  static constexpr int kMostRows = 2;
  const S *grad_y, *x;
  S* dx;
  std::int64_t period;
  Maps<T> maps;
  T *sums, *products;

  template <int kRows>
  void rows(std::int64_t at, std::int64_t column) const {
    const VectorOf<T> mean = load_vector(maps[kMean] + column);
    const Slope<T, kSilu> slope(maps, column);
    VectorOf<T> sum = load_vector(sums + column), product = load_vector(products + column);
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t place = at + r * period;
      prefetch(x + place);
      const VectorOf<T> d = load_wide(x + place) - mean;
      prefetch(grad_y + place);
      const VectorOf<T> g = slope.times(load_wide(grad_y + place), d);
      if constexpr (kStore) store_narrow<false>(dx + place, g);
      sum += g;
      product += g * d;
    }
    store_vector(sums + column, sum);
    store_vector(products + column, product);
  }

  void some(std::int64_t at, std::int64_t column, std::int64_t n) const {
    const VectorOf<T> d = load_wide(x + at, n) - load_vector(maps[kMean] + column);
    const VectorOf<T> all = Slope<T, kSilu>(maps, column).times(load_wide(grad_y + at, n), d);
    const VectorOf<T> g = first_lanes<T>(all, n);
    if constexpr (kStore) store_narrow(dx + at, g, n);
    store_vector(sums + column, load_vector(sums + column) + g);
    store_vector(products + column,
                 load_vector(products + column) + first_lanes<T>(g * d, n));
  }
};

template <class S, Source kSource, bool kStream>
struct WriteGradient {
  using T = WideOf<S>;
  static constexpr int kMostRows = 2;
  const S *grad_y, *x;
  S* dx;
  std::int64_t period;
  Maps<T> maps;

  template <int kRows>
  void rows(std::int64_t at, std::int64_t column) const {
    const Column map(*this, column);
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t place = at + r * period;
      prefetch(x + place);
      prefetch(from() + place);
      store_narrow<kStream>(dx + place,
                            map.applied(load_wide(from() + place), load_wide(x + place)));
    }
  }

  void some(std::int64_t at, std::int64_t column, std::int64_t n) const {
    const Column map(*this, column);
    store_narrow(dx + at, map.applied(load_wide(from() + at, n), load_wide(x + at, n)), n);
  }

 private:
  struct Column {
    const VectorOf<T> mean, factor, slope, offset;
    const Slope<T, kSource == Source::kRecomputed> activation;

    Column(const WriteGradient& of, std::int64_t column)
        : mean(load_vector(of.maps[kMean] + column)),
          factor(load_vector(of.maps[kFactor] + column)),
          slope(load_vector(of.maps[kSlope] + column)),
          offset(load_vector(of.maps[kOffset] + column)),
          activation(of.maps, column) {}

    VectorOf<T> applied(const VectorOf<T>& grad, const VectorOf<T>& v) const {
      const VectorOf<T> d = v - mean;
      return activation.times(grad, d) * factor + (d * slope + offset);
    }
  };

  const S* from() const { return kSource == Source::kStored ? dx : grad_y; }
};

template <class S>
class Backward {
  using T = WideOf<S>;

 public:
  explicit Backward(const GroupNormSiluBackwardArgs<S>& args)
      : args_(args),
        threads_(threads_for(args.shape, kCyclesPerElement, args.threads)),
        cut_(args.shape, args.groups),
        columns_(cut_),
        partial_(cut_.instances * cut_.blocks * cut_.block_channels * 2),
        for_weight_(args.shape.batch * cut_.channels),
        for_bias_(args.shape.batch * cut_.channels),
        maps_(args.shape.batch * kMaps * map_size()),
        group_of_(cut_.instance_channels),
        source_(source(args, cut_)),
        streams_(source_ != Source::kStored &&
                 args.shape.batch * args.shape.elements() * sizeof(S) >= kStreamedBytes &&
                 streams_to(args.dx, cut_.last ? cut_.block_pixels * cut_.channels : cut_.pixels) &&
                 streams_to(args.dx, cut_.instance_elements())) {
    set_group_of(cut_, group_of_.data());
  }

  void run() const {
    parallel_for(cut_.instances, threads_, [&](std::int64_t instance) { prepare(instance); });
    run_phases(*this, cut_, threads_);
    reduce_parameters();
  }

  void measure(std::int64_t instance, std::int64_t index) const {
    if (!args_.silu) {
      add_up<false, false>(instance, index);
    } else if (source_ == Source::kStored) {
      add_up<true, true>(instance, index);
    } else {
      add_up<true, false>(instance, index);
    }
  }

  void settle(std::int64_t instance) const {
    const std::int64_t count = cut_.instance_channels;
    double *const sums = scratch<double>(2 * count + 2 * cut_.instance_groups);
    double* const products = sums + count;
    merge(instance, sums, products);
    const std::int32_t* const group_of = group_of_.data();
    const double* const mean = args_.mean + first_group(instance);
    for (std::int64_t c = 0; c < count; ++c) {
      products[c] -= rest_of(mean[group_of[c]]) * sums[c];
    }
    keep_for_parameters(instance, sums, products);
    set_slopes(instance, sums, products);
  }

  void finish(std::int64_t instance, std::int64_t index) const {
    if (source_ == Source::kGradY) {
      streams_ ? write<Source::kGradY, true>(instance, index)
               : write<Source::kGradY, false>(instance, index);
    } else if (source_ == Source::kRecomputed) {
      streams_ ? write<Source::kRecomputed, true>(instance, index)
               : write<Source::kRecomputed, false>(instance, index);
    } else {
      write<Source::kStored, false>(instance, index);
    }
    if (streams_) end_streaming();
  }

 private:
  static Source source(const GroupNormSiluBackwardArgs<S>& args, const Cut& cut) {
    if (!args.silu) return Source::kGradY;
    // A half type would round g.
    const bool holds = sizeof(S) == sizeof(T) && cut.instance_elements() <= kResidentElements;
    return holds ? Source::kStored : Source::kRecomputed;
  }

  // Sets the maps that the first phase reads.
  void prepare(std::int64_t instance) const {
    const std::int64_t image = cut_.image_of(instance), groups = cut_.instance_groups;
    T* const memory = scratch<T>(3 * groups);
    const GroupValues<T> values = {memory, memory + groups, memory + 2 * groups};
    for (std::int64_t g = 0; g < groups; ++g) {
      values.set(g, args_.mean[first_group(instance) + g], args_.rstd[first_group(instance) + g]);
    }
    set_channel_maps(args_.affine, cut_, instance, group_of_.data(), values,
                     {map_of(image, kMean), map_of(image, kFactor), map_of(image, kShift)});
    repeat(image, kMean, kSlope);
  }

  template <bool kSilu, bool kStore>
  void add_up(std::int64_t instance, std::int64_t index) const {
    const Block block = cut_.block(instance, index);
    const S *const grad_y = args_.grad_y + block.start, *const x = args_.x + block.start;
    S* const dx = args_.dx + block.start;
    const std::int64_t period = columns_.period, padded = columns_.padded();
    T *const sums = scratch<T>(2 * padded), *const products = sums + padded;
    double* out = partial_of(instance, index);
    each_panel(block, [&](std::int64_t at, std::int64_t length, const Maps<T>& maps) {
      fill(sums, 2 * padded, T(0));
      each_column<T>(
          length, period,
          AddGradients<S, kSilu, kStore>{grad_y + at, x + at, dx + at, period, maps, sums,
                                         products});
      columns_.fold(sums, out);
      columns_.fold(products, out + cut_.block_channels);
      ++out;  // the next panel is the next channel
    });
  }

  template <Source kSource, bool kStream>
  void write(std::int64_t instance, std::int64_t index) const {
    const Block block = cut_.block(instance, index);
    const S *const grad_y = args_.grad_y + block.start, *const x = args_.x + block.start;
    S* const dx = args_.dx + block.start;
    const std::int64_t period = columns_.period;
    each_panel(block, [&](std::int64_t at, std::int64_t length, const Maps<T>& maps) {
      each_column<T>(
          length, period,
          WriteGradient<S, kSource, kStream>{grad_y + at, x + at, dx + at, period, maps});
    });
  }

  // The parts of a block that have the same columns: all of it (NHWC), or a channel (NCHW).
  template <class Visit>
  void each_panel(const Block& block, const Visit& visit) const {
    const std::int64_t image = block.start / args_.shape.elements();
    if (cut_.last) {
      visit(std::int64_t{0}, block.length, Maps<T>{map_of(image, kMean), map_size()});
      return;
    }
    T columns[kMaps * kShortestPeriod];
    for (std::int64_t i = 0; i < block.channels; ++i) {
      for (int map = 0; map < kMaps; ++map) {
        fill(columns + map * kShortestPeriod, kShortestPeriod,
             map_of(image, static_cast<Map>(map))[block.channel + i]);
      }
      visit(i * block.run, block.run, Maps<T>{columns, kShortestPeriod});
    }
  }

  // The sums of an instance's channels, over its blocks in order.
  void merge(std::int64_t instance, double* sums, double* products) const {
    const std::int64_t count = cut_.instance_channels, width = cut_.block_channels;
    fill(sums, 2 * count, 0.0);
    for (std::int64_t c = 0; c < count; c += width) {
      const std::int64_t n = least(width, count - c);
      for (std::int64_t segment = 0; segment < cut_.segments; ++segment) {
        const double* const from = partial_of(instance, c / width * cut_.segments + segment);
        add(sums + c, from, n);
        add(products + c, from + width, n);
      }
    }
  }

  // The part of the mean that is lost when it is rounded to T.
  static double rest_of(double mean) { return mean - static_cast<double>(static_cast<T>(mean)); }

  // With a channel's sums of g and of g d: the gradients of its scale and shift, and its image's
  // part in those of weight and bias.
  void keep_for_parameters(std::int64_t instance, const double* sums,
                           const double* products) const {
    const std::int64_t first = cut_.group_of(instance) * cut_.group_channels;
    const std::int64_t at = cut_.image_of(instance) * cut_.channels + first;
    const AffineParameters<T>& affine = args_.affine;
    const double* const rstd = args_.rstd + first_group(instance);
    for (std::int64_t c = 0; c < cut_.instance_channels; ++c) {
      const double gain = affine.scale ? 1.0 + static_cast<double>(affine.scale[at + c]) : 1.0;
      const double along_x_hat = rstd[group_of_.data()[c]] * products[c];
      for_weight_.data()[at + c] = gain * along_x_hat;
      for_bias_.data()[at + c] = gain * sums[c];
      if (args_.dshift) args_.dshift[at + c] = static_cast<T>(sums[c]);
      if (!args_.dscale) continue;
      const double weight = affine.weight ? static_cast<double>(affine.weight[first + c]) : 1.0;
      const double bias = affine.bias ? static_cast<double>(affine.bias[first + c]) : 0.0;
      args_.dscale[at + c] = static_cast<T>(weight * along_x_hat + bias * sums[c]);
    }
  }

  // Sets the last maps from a channel's sums of g and of g d, which are overwritten.
  void set_slopes(std::int64_t instance, double* sums, double* products) const {
    const std::int64_t image = cut_.image_of(instance), count = cut_.instance_channels;
    const std::int64_t first = cut_.group_of(instance) * cut_.group_channels;
    const std::int64_t groups = cut_.instance_groups;
    const T* const factor = map_of(image, kFactor) + first;
    for (std::int64_t c = 0; c < count; ++c) {
      sums[c] *= static_cast<double>(factor[c]);
      products[c] *= static_cast<double>(factor[c]);
    }
    double *const along_one = products + count, *const along_x = along_one + groups;
    sum_groups(sums, groups, cut_.group_channels, along_one);
    sum_groups(products, groups, cut_.group_channels, along_x);
    T *const slopes = scratch<T>(2 * groups), *const offsets = slopes + groups;
    const double elements = static_cast<double>(cut_.group_channels * cut_.pixels);
    for (std::int64_t g = 0; g < groups; ++g) {
      const double rstd = args_.rstd[first_group(instance) + g];
      const double slope = -rstd * rstd * along_x[g] / elements;
      const double rest = rest_of(args_.mean[first_group(instance) + g]);
      slopes[g] = static_cast<T>(slope);
      offsets[g] = static_cast<T>(-along_one[g] / elements - slope * rest);
    }
    T *const slope = map_of(image, kSlope) + first, *const offset = map_of(image, kOffset) + first;
    for (std::int64_t c = 0; c < count; ++c) {
      slope[c] = slopes[group_of_.data()[c]];
      offset[c] = offsets[group_of_.data()[c]];
    }
    repeat(image, kSlope, kMaps);
  }

  // The gradients of weight and bias, summed over the images in order.
  void reduce_parameters() const {
    reduce(for_weight_.data(), args_.dweight);
    reduce(for_bias_.data(), args_.dbias);
  }

  void reduce(double* of_images, T* to) const {
    if (!to) return;
    const std::int64_t channels = cut_.channels;
    for (std::int64_t image = 1; image < args_.shape.batch; ++image) {
      add(of_images, of_images + image * channels, channels);
    }
    for (std::int64_t c = 0; c < channels; ++c) to[c] = static_cast<T>(of_images[c]);
  }

  std::int64_t first_group(std::int64_t instance) const {
    return cut_.image_of(instance) * cut_.groups + cut_.group_of(instance);
  }

  double* partial_of(std::int64_t instance, std::int64_t block) const {
    return partial_.data() + (instance * cut_.blocks + block) * cut_.block_channels * 2;
  }

  std::int64_t map_size() const { return cut_.last ? columns_.padded() : cut_.channels; }

  T* map_of(std::int64_t image, Map map) const {
    return maps_.data() + (image * kMaps + map) * map_size();
  }

  void repeat(std::int64_t image, Map from, Map to) const {
    if (!cut_.last) return;
    for (int map = from; map < to; ++map) columns_.repeat(map_of(image, static_cast<Map>(map)));
  }

  static constexpr double kCyclesPerElement = 2;

  const GroupNormSiluBackwardArgs<S>& args_;
  const int threads_;
  const Cut cut_;
  const Columns<T> columns_;
  const Buffer<double> partial_;  // sums of each block's channels
  const Buffer<double> for_weight_, for_bias_;  // each image's part of dweight and dbias
  const Buffer<T> maps_;          // of each image's columns (NHWC) or channels
  const Buffer<std::int32_t> group_of_;
  const Source source_;
  const bool streams_;
};

}  // namespace

template <class S>
void group_norm_silu_backward(const GroupNormSiluBackwardArgs<S>& args) {
  if (args.shape.batch * args.shape.elements() > 0) Backward<S>(args).run();
}

template void group_norm_silu_backward(const GroupNormSiluBackwardArgs<float>& args);
template void group_norm_silu_backward(const GroupNormSiluBackwardArgs<double>& args);
template void group_norm_silu_backward(const GroupNormSiluBackwardArgs<Float16>& args);
template void group_norm_silu_backward(const GroupNormSiluBackwardArgs<BFloat16>& args);

}  // namespace advkd::ADVKD_ISA
