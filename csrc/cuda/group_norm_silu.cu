// The reference of kernels/group_norm_silu.py. A group that fits the registers of one block is read once; a
// larger one is cut into chunks, whose moments are merged as by Chan, Golub and LeVeque (1983), and
// read again. There are no atomics and every sum has a fixed order, so two runs agree bit for bit.
//
// A mean is kept as origin + rest, two float32 numbers: one alone, far from zero, would cost x_hat the
// digits that the mean has too many.
#include "cuda/group_norm_silu.h"

namespace advkd::cuda {
namespace {

constexpr int kMostThreads = 512;
constexpr int kMostGroups = 32;  // of a block
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Vectors that a thread keeps: what fits its registers beside the float32 numbers they widen to.
__host__ __device__ constexpr int held_vectors(int vector) {
  return vector == 1 ? 16 : vector == 4 ? 8 : 6;
}

// How x is cut. A block of threads works on a block of groups of one sample: `rows` of `columns`
// vectors, each row `stride` elements behind the last. channels_last, a row is a pixel's channels in
// those groups; else there is one group, and rows are the vectors of its run of memory. Vectors consist
// of units, each inside one group; a row has `group_units` of each group.
struct Cut {
  bool channels_last;
  unsigned channels, pixels, groups, group_channels;
  unsigned groups_in_block, columns, rows, chunk_rows, chunks, group_units, threads;
  std::int64_t stride;
  unsigned row_elements;  // of one group

  __host__ __device__ unsigned blocks() const { return groups / groups_in_block; }
};

// What a thread works on: vectors of one column, from `row` on in steps of `step`.
struct Place {
  unsigned sample, block, chunk, column, row, step, end;
  std::int64_t begin;  // of the block of groups, in x
  bool works;

  __device__ unsigned first_group(const Cut& cut) const {
    return sample * cut.groups + block * cut.groups_in_block;
  }
};

__device__ Place place_of_thread(const Cut& cut, int vector) {
  Place place;
  place.chunk = blockIdx.x % cut.chunks;
  const unsigned block_of_all = blockIdx.x / cut.chunks;
  place.block = block_of_all % cut.blocks();
  place.sample = block_of_all / cut.blocks();
  place.column = threadIdx.x % cut.columns;
  place.step = cut.threads / cut.columns;
  const unsigned thread_row = threadIdx.x / cut.columns;
  place.works = thread_row < place.step;
  place.row = place.chunk * cut.chunk_rows + thread_row;
  const unsigned last = (place.chunk + 1) * cut.chunk_rows;
  place.end = last < cut.rows ? last : cut.rows;
  const std::int64_t sample = static_cast<std::int64_t>(place.sample) * cut.channels * cut.pixels;
  const unsigned channel = place.block * cut.groups_in_block * cut.group_channels;
  place.begin = sample + (cut.channels_last ? channel + place.column * vector
                                            : static_cast<std::int64_t>(channel) * cut.pixels);
  return place;
}

template <class T, int kVector>
struct Held {
  Elements<T, kVector> at[held_vectors(kVector)];
};

template <class T, int kVector>
__device__ void load_held(const T* x, const Cut& cut, const Place& place, Held<T, kVector>& held) {
#pragma unroll
  for (int i = 0; i < held_vectors(kVector); ++i) {
    const unsigned row = place.row + i * place.step;
    if (place.works && row < place.end) {
      held.at[i] = load<T, kVector>(x + place.begin + row * cut.stride);
    }
  }
}

// Adds f(x) of the held elements to the sum of their unit.
template <class T, int kVector, int kUnits, class Function>
__device__ void sum_held(const Held<T, kVector>& held, const Place& place, const Function& f,
                         float (&sums)[kUnits]) {
  constexpr int kUnit = kVector / kUnits;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) sums[unit] = 0.0f;
#pragma unroll
  for (int i = 0; i < held_vectors(kVector); ++i) {
    if (place.works && place.row + i * place.step < place.end) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) sums[k / kUnit] += f(widened(held.at[i].at[k]), k / kUnit);
    }
  }
}

__device__ float warp_sum(float v) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) v += __shfl_xor_sync(kAllLanes, v, lane);
  return v;
}

// Replaces the sums of a thread's units by those of their groups over the whole block.
template <int kUnits, class Partial, class Totals>
__device__ void over_groups(const Cut& cut, const Place& place, Partial& partial, Totals& totals,
                            float (&sums)[kUnits]) {
  const unsigned thread_row = threadIdx.x / cut.columns;
  if (place.works) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      partial[(place.column * kUnits + unit) * place.step + thread_row] = sums[unit];
    }
  }
  __syncthreads();
  const unsigned members = cut.group_units * place.step;
  for (unsigned group = threadIdx.x / 32; group < cut.groups_in_block; group += cut.threads / 32) {
    float sum = 0.0f;
    for (unsigned i = threadIdx.x % 32; i < members; i += 32) sum += partial[group * members + i];
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) totals[group] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    sums[unit] = totals[(place.column * kUnits + unit) / cut.group_units];
  }
}

// Of a group's share of the chunk: the mean as origin + rest, and the squared deviations from it.
template <int kUnits>
struct Moments {
  float origin[kUnits], rest[kUnits], squares[kUnits];
};

template <class T, int kVector, int kUnits>
__device__ Moments<kUnits> moments_of(const Held<T, kVector>& held, const Cut& cut,
                                      const Place& place) {
  ADVKD_SHARED(float, partial, kMostThreads* kUnits);
  ADVKD_SHARED(float, totals, kMostGroups);
  const float count = static_cast<float>(place.end - place.chunk * cut.chunk_rows) *
                      static_cast<float>(cut.row_elements);
  Moments<kUnits> of;
  sum_held(held, place, [](float x, int) { return x; }, of.origin);
  over_groups(cut, place, partial, totals, of.origin);
#pragma unroll
  for (float& origin : of.origin) origin /= count;
  sum_held(held, place, [&](float x, int unit) { return x - of.origin[unit]; }, of.rest);
  over_groups(cut, place, partial, totals, of.rest);
#pragma unroll
  for (float& rest : of.rest) rest /= count;
  const auto square = [&](float x, int unit) {
    const float apart = (x - of.origin[unit]) - of.rest[unit];
    return apart * apart;
  };
  sum_held(held, place, square, of.squares);
  over_groups(cut, place, partial, totals, of.squares);
  return of;
}

// x_hat slope + offset is what the activation is applied to.
struct Affine {
  float slope, offset;
};

__device__ Affine affine_of(const GroupNormSiluArgs& args, const Cut& cut, unsigned sample,
                            unsigned channel) {
  Affine affine = {1.0f, 0.0f};
  const std::int64_t of_sample = static_cast<std::int64_t>(sample) * cut.channels + channel;
  if (args.weight != nullptr) affine.slope = args.weight[channel];
  if (args.bias != nullptr) affine.offset = args.bias[channel];
  if (args.scale != nullptr) {
    const float factor = 1.0f + args.scale[of_sample];
    affine.slope *= factor;
    affine.offset *= factor;
  }
  if (args.shift != nullptr) affine.offset += args.shift[of_sample];
  return affine;
}

// Statistics of a thread's units, and its channels' parameters where all its rows have the same.
template <class T, int kVector, int kUnits>
struct Normaliser {
  Moments<kUnits> of;  // but the squares
  float rstd[kUnits];
  Affine affine[kVector];

  __device__ void find_affine(const GroupNormSiluArgs& args, const Cut& cut, const Place& place) {
    if (!cut.channels_last || !place.works) return;
    const unsigned first =
        place.block * cut.groups_in_block * cut.group_channels + place.column * kVector;
#pragma unroll
    for (int k = 0; k < kVector; ++k) affine[k] = affine_of(args, cut, place.sample, first + k);
  }

  // y of the vector in a row.
  __device__ void put(const GroupNormSiluArgs& args, const Cut& cut, const Place& place,
                      unsigned row, const Elements<T, kVector>& x) {
    if (!cut.channels_last) {
      const unsigned channel = place.block * cut.group_channels + row * kVector / cut.pixels;
      const Affine one = affine_of(args, cut, place.sample, channel);
#pragma unroll
      for (int k = 0; k < kVector; ++k) affine[k] = one;
    }
    float out[kVector];
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const int unit = k / (kVector / kUnits);
      const float x_hat = ((widened(x.at[k]) - of.origin[unit]) - of.rest[unit]) * rstd[unit];
      const float z = x_hat * affine[k].slope + affine[k].offset;
      out[k] = args.silu ? __fdividef(z, 1.0f + __expf(-z)) : z;
    }
    store(static_cast<T*>(args.y) + place.begin + row * cut.stride, out);
  }
};

template <class T, int kVector, int kUnits>
__global__ void __launch_bounds__(kMostThreads, 1)
    forward_kernel(const GroupNormSiluArgs args, const Cut cut) {
  const Place place = place_of_thread(cut, kVector);
  Held<T, kVector> held;
  load_held(static_cast<const T*>(args.x), cut, place, held);
  Normaliser<T, kVector, kUnits> normaliser;
  normaliser.of = moments_of<T, kVector, kUnits>(held, cut, place);
  const float count = static_cast<float>(cut.rows) * static_cast<float>(cut.row_elements);
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    normaliser.rstd[unit] = 1.0f / sqrtf(normaliser.of.squares[unit] / count + args.eps);
  }
  normaliser.find_affine(args, cut, place);
#pragma unroll
  for (int i = 0; i < held_vectors(kVector); ++i) {
    const unsigned row = place.row + i * place.step;
    if (place.works && row < place.end) normaliser.put(args, cut, place, row, held.at[i]);
  }
}

// The workspace: origin, rest and squares of each group's share of each chunk, (3, B groups, chunks);
// then origin, rest and rstd of each group, (3, B groups).
struct Workspace {
  float* at;
  std::int64_t groups, chunks;

  __host__ __device__ float& share(int what, std::int64_t group, std::int64_t chunk) const {
    return at[(what * groups + group) * chunks + chunk];
  }
  __host__ __device__ float& whole(int what, std::int64_t group) const {
    return at[(3 * chunks + what) * groups + group];
  }
};

template <class T, int kVector, int kUnits>
__global__ void __launch_bounds__(kMostThreads, 1)
    moments_kernel(const GroupNormSiluArgs args, const Cut cut, const Workspace workspace) {
  const Place place = place_of_thread(cut, kVector);
  Held<T, kVector> held;
  load_held(static_cast<const T*>(args.x), cut, place, held);
  const Moments<kUnits> of = moments_of<T, kVector, kUnits>(held, cut, place);
  if (threadIdx.x >= cut.columns) return;  // one row of threads is enough
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const unsigned column = place.column * kUnits + unit;
    if (column % cut.group_units != 0) continue;
    const std::int64_t group = place.first_group(cut) + column / cut.group_units;
    workspace.share(0, group, place.chunk) = of.origin[unit];
    workspace.share(1, group, place.chunk) = of.rest[unit];
    workspace.share(2, group, place.chunk) = of.squares[unit];
  }
}

// One warp merges the chunks of a group.
__global__ void __launch_bounds__(32)
    merge_kernel(const Cut cut, const float eps, const Workspace workspace) {
  const std::int64_t group = blockIdx.x;
  const auto merged = [&](const auto& term) {
    float sum = 0.0f;
    for (unsigned chunk = threadIdx.x; chunk < cut.chunks; chunk += 32) {
      const unsigned left = cut.rows - chunk * cut.chunk_rows;
      const unsigned rows = left < cut.chunk_rows ? left : cut.chunk_rows;
      sum += term(chunk, static_cast<float>(rows) * static_cast<float>(cut.row_elements));
    }
    return warp_sum(sum);
  };
  const float total = static_cast<float>(cut.rows) * static_cast<float>(cut.row_elements);
  const float origin = merged([&](unsigned chunk, float count) {
    return count / total * workspace.share(0, group, chunk);
  });
  const auto apart = [&](unsigned chunk) {
    return (workspace.share(0, group, chunk) - origin) + workspace.share(1, group, chunk);
  };
  const float rest =
      merged([&](unsigned chunk, float count) { return count * apart(chunk); }) / total;
  const float squares = merged([&](unsigned chunk, float count) {
    const float from_mean = apart(chunk) - rest;
    return workspace.share(2, group, chunk) + count * from_mean * from_mean;
  });
  if (threadIdx.x != 0) return;
  workspace.whole(0, group) = origin;
  workspace.whole(1, group) = rest;
  workspace.whole(2, group) = 1.0f / sqrtf(squares / total + eps);
}

template <class T, int kVector, int kUnits>
__global__ void __launch_bounds__(kMostThreads, 1)
    apply_kernel(const GroupNormSiluArgs args, const Cut cut, const Workspace workspace) {
  const Place place = place_of_thread(cut, kVector);
  if (!place.works) return;
  Normaliser<T, kVector, kUnits> normaliser;
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    const std::int64_t group =
        place.first_group(cut) + (place.column * kUnits + unit) / cut.group_units;
    normaliser.of.origin[unit] = workspace.whole(0, group);
    normaliser.of.rest[unit] = workspace.whole(1, group);
    normaliser.rstd[unit] = workspace.whole(2, group);
  }
  normaliser.find_affine(args, cut, place);
  const T* const x = static_cast<const T*>(args.x) + place.begin;
#pragma unroll 2
  for (unsigned row = place.row; row < place.end; row += place.step) {
    normaliser.put(args, cut, place, row, load<T, kVector>(x + row * cut.stride));
  }
}

// Elements of a vector and units in it, as pairs of the kernels' template arguments.
struct Vectors {
  int vector, units;
};

// The fewest groups whose channels in a pixel are whole vectors and, if that can be, fill a sector of
// 32 bytes; 0 where no number of groups is whole vectors.
unsigned groups_in_block(const GroupNormSiluArgs& args, int vector) {
  const std::int64_t size = args.channels / args.groups;
  unsigned found = 0;
  for (unsigned n = 1; n <= kMostGroups && n <= args.groups; ++n) {
    if (args.groups % n != 0 || n * size % vector != 0) continue;
    if (n * size > vector * std::int64_t{kMostThreads}) break;
    found = n;
    if (n * size * size_of(args.type) >= 32) break;
  }
  return found;
}

Vectors vectors_of(const GroupNormSiluArgs& args) {
  const int widest = static_cast<int>(16 / size_of(args.type));
  if (!begins_at_16_bytes(args.x) || !begins_at_16_bytes(args.y)) return {1, 1};
  if (!args.channels_last) return args.pixels % widest == 0 ? Vectors{widest, 1} : Vectors{1, 1};
  const std::int64_t size = args.channels / args.groups;
  if (groups_in_block(args, widest) == 0) return {1, 1};
  if (size % widest == 0) return {widest, 1};
  return widest == 8 && size % 4 == 0 ? Vectors{8, 2} : Vectors{1, 1};
}

Cut cut_of(const GroupNormSiluArgs& args, const Vectors& vectors) {
  Cut cut = {};
  cut.channels_last = args.channels_last;
  cut.channels = static_cast<unsigned>(args.channels);
  cut.pixels = static_cast<unsigned>(args.pixels);
  cut.groups = static_cast<unsigned>(args.groups);
  cut.group_channels = cut.channels / cut.groups;
  const unsigned vector = static_cast<unsigned>(vectors.vector);
  if (args.channels_last) {
    cut.groups_in_block = groups_in_block(args, vectors.vector);
    if (cut.groups_in_block == 0) {
      throw std::invalid_argument("a channels_last group has too many channels for a block");
    }
    cut.columns = cut.groups_in_block * cut.group_channels / vector;
    cut.rows = cut.pixels;
    cut.stride = args.channels;
    cut.group_units = cut.group_channels * static_cast<unsigned>(vectors.units) / vector;
    cut.row_elements = cut.group_channels;
  } else {
    cut.groups_in_block = cut.columns = cut.group_units = 1;
    cut.rows = cut.group_channels * cut.pixels / vector;
    cut.stride = vectors.vector;
    cut.row_elements = vector;
  }
  const unsigned held = static_cast<unsigned>(held_vectors(vectors.vector));
  cut.threads = 128;
  while (cut.threads < kMostThreads && cut.threads / cut.columns * held < cut.rows) {
    cut.threads *= 2;
  }
  const unsigned most = cut.threads / cut.columns * held;
  cut.chunks = (cut.rows + most - 1) / most;
  cut.chunk_rows = (cut.rows + cut.chunks - 1) / cut.chunks;
  return cut;
}

void check_sizes(const GroupNormSiluArgs& args) {
  const std::int64_t largest = std::int64_t{1} << 31;
  if (args.groups < 1 || args.channels % args.groups != 0) {
    throw std::invalid_argument("the number of groups does not divide the channels");
  }
  if (args.channels * args.pixels >= largest || args.batch * args.groups >= largest / 1024) {
    throw std::invalid_argument("a sample has fewer than 2^31 elements, a batch 2^21 groups");
  }
}

template <class T, int kVector, int kUnits>
void launch(const GroupNormSiluArgs& args, const Cut& cut, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(args.batch) * cut.blocks() * cut.chunks;
  if (cut.chunks == 1) {
    const auto forward = forward_kernel<T, kVector, kUnits>;
    ADVKD_LAUNCH(forward, blocks, cut.threads, stream, args, cut);
    return;
  }
  const Workspace workspace = {args.workspace, args.batch * args.groups, cut.chunks};
  const auto moments = moments_kernel<T, kVector, kUnits>;
  ADVKD_LAUNCH(moments, blocks, cut.threads, stream, args, cut, workspace);
  ADVKD_LAUNCH(merge_kernel, static_cast<unsigned>(workspace.groups), 32u, stream, cut, args.eps,
               workspace);
  const auto apply = apply_kernel<T, kVector, kUnits>;
  ADVKD_LAUNCH(apply, blocks, cut.threads, stream, args, cut, workspace);
}

}  // namespace

std::int64_t group_norm_silu_workspace(const GroupNormSiluArgs& args) {
  check_sizes(args);
  const Cut cut = cut_of(args, vectors_of(args));
  return cut.chunks == 1 ? 0 : 3 * args.batch * args.groups * (std::int64_t{cut.chunks} + 1);
}

void launch_group_norm_silu(const GroupNormSiluArgs& args, cudaStream_t stream) {
  check_sizes(args);
  if (args.batch * args.pixels == 0) return;
  const Vectors vectors = vectors_of(args);
  const Cut cut = cut_of(args, vectors);
  with_type(args.type, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidest = 16 / sizeof(T);
    if (vectors.vector == 1) return launch<T, 1, 1>(args, cut, stream);
    if constexpr (kWidest == 8) {
      if (vectors.units == 2) return launch<T, kWidest, 2>(args, cut, stream);
    }
    launch<T, kWidest, 1>(args, cut, stream);
  });
}

}  // namespace advkd::cuda
