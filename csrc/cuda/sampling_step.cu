// One step of DDIM (Song et al. 2021, eq. 12) or DDPM (Ho et al. 2020, algorithm 2) on a GPU, with the
// bits of csrc/cpu/sampling_step.cpp: compiled without contraction, every float32 product and sum is
// rounded on its own.
#include "cuda/sampling_step.h"

#include "runtime/normals.h"

namespace advkd::cuda {
namespace {

constexpr int kThreads = 128, kMinBlocks = 8;  // of a multiprocessor: at most 64 registers a thread
constexpr int kVector = 8;  // elements of a thread: 16 bytes of the half types
constexpr int kTile = kThreads * kVector;

// How a batch is cut into tiles, one per block: consecutive pixels of one image.
struct Cut {
  unsigned channels;
  unsigned width;  // pixels of a tile; a multiple of kVector, so that tiles of aligned images are aligned
  unsigned tiles;  // of an image
  std::int64_t pixels;
};

struct Tile {
  unsigned image;
  std::int64_t pixel;  // the first
  std::int64_t begin;  // its first element among those of the batch
  int width, count;    // pixels, elements
};

__device__ Tile tile_of_block(const Cut& cut) {
  Tile tile;
  tile.image = blockIdx.x / cut.tiles;
  tile.pixel = static_cast<std::int64_t>(blockIdx.x % cut.tiles) * cut.width;
  tile.begin = (tile.image * cut.pixels + tile.pixel) * cut.channels;
  const std::int64_t left = cut.pixels - tile.pixel;
  tile.width = left < cut.width ? static_cast<int>(left) : static_cast<int>(cut.width);
  tile.count = tile.width * static_cast<int>(cut.channels);
  return tile;
}

// The tile's normals of a step word, in memory order. Philox blocks count elements in (C, P) order, so
// each thread computes the four normals of neighboring pixels of a channel and uses those inside the
// tile.
template <class Shared>
__device__ void compute_normals(const LoopState& loop, std::uint32_t step, const Cut& cut,
                                const Tile& tile, Shared& noise) {
  const std::int64_t index = loop.image_index[tile.image];
  const std::uint32_t word = step ^ loop.purpose;
  const int blocks = tile.width / 4 + 2;  // of one channel, at most
  const int channels = static_cast<int>(cut.channels);
  for (int i = threadIdx.x; i < blocks * channels; i += kThreads) {
    const int channel = i / blocks;
    const std::int64_t first = channel * cut.pixels + tile.pixel;
    const std::int64_t quad = (first >> 2) + i % blocks;
    const int pixel = static_cast<int>(4 * quad - first);
    if (pixel >= tile.width) continue;
    const PhiloxBlock block =
        philox_block(static_cast<std::uint32_t>(quad), word, static_cast<std::uint32_t>(index),
                     static_cast<std::uint32_t>(static_cast<std::uint64_t>(index) >> 32),
                     static_cast<std::uint32_t>(loop.seed),
                     static_cast<std::uint32_t>(loop.seed >> 32));
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const float radius = box_muller_radius(block.word[2 * pair]);
      const SineCosine turn = box_muller_angle(block.word[2 * pair + 1]);
      const int at = pixel + 2 * pair;
      if (at >= 0 && at < tile.width) noise[at * channels + channel] = radius * turn.cosine;
      if (at + 1 >= 0 && at + 1 < tile.width) {
        noise[(at + 1) * channels + channel] = radius * turn.sine;
      }
    }
  }
}

// Copies the time embedding of a step to where the network reads it.
__device__ void copy_time_embedding(const StepBuffers& buffers, std::uint32_t step) {
  const std::int64_t vectors = buffers.time_embedding_bytes / 16;
  const uint4* const from =
      static_cast<const uint4*>(buffers.loop->time_embedding) + step * vectors;
  const std::int64_t threads = static_cast<std::int64_t>(gridDim.x) * kThreads;
  for (std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < vectors;
       i += threads) {
    static_cast<uint4*>(buffers.time_embedding)[i] = from[i];
  }
}

// Counts the blocks; the last one advances the loop, when all have read which step it is.
__device__ void end_block(LoopState* loop, std::uint32_t step) {
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicInc(&loop->blocks_done, gridDim.x - 1) != gridDim.x - 1) return;
  loop->step = step + 1;
}

template <int kCount>
__device__ void save(const StepBuffers& buffers, std::int64_t target, std::int64_t at,
                     const float (&v)[kCount]) {
  const LoopState& loop = *buffers.loop;
  const std::int64_t to = target * buffers.batch * buffers.channels * buffers.pixels + at;
  if (loop.saved_half != 0) {
    store(static_cast<__half*>(loop.saved) + to, v);
  } else {
    store(static_cast<float*>(loop.saved) + to, v);
  }
}

template <class T, int kCount>
__device__ void put_state(const StepBuffers& buffers, std::int64_t at, const float (&v)[kCount]) {
  store(buffers.x_t + at, v);
  if (buffers.x_in != nullptr) store(static_cast<T*>(buffers.x_in) + at, v);
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    first_state_kernel(const StepBuffers buffers, const Cut cut) {
  ADVKD_SHARED(float, noise, kTile);
  const Tile tile = tile_of_block(cut);
  compute_normals(*buffers.loop, kXTStep, cut, tile, noise);
  copy_time_embedding(buffers, 0);
  __syncthreads();
  for (int i = threadIdx.x * kCount; i < tile.count; i += kThreads * kCount) {
    float x_T[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) x_T[k] = noise[i + k];
    put_state<T>(buffers, tile.begin + i, x_T);
  }
}

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    sampling_step_kernel(const StepBuffers buffers, const Cut cut) {
  ADVKD_SHARED(float, noise, kTile);
  const LoopState& loop = *buffers.loop;
  const std::uint32_t step = loop.step;
  const StepRow row = loop.rows[step];
  const Tile tile = tile_of_block(cut);
  const bool noisy = row.sigma != 0.0f;
  if (noisy) compute_normals(loop, step, cut, tile, noise);
  if (step + 1 < loop.steps) copy_time_embedding(buffers, step + 1);
  // Now the normals are complete, and every thread of the block has read the step.
  __syncthreads();
  const float bound = loop.clip > 0.0f ? loop.clip : INFINITY;
  for (int i = threadIdx.x * kCount; i < tile.count; i += kThreads * kCount) {
    const std::int64_t at = tile.begin + i;
    const auto x_t = load<float, kCount>(buffers.x_t + at);
    const auto model_out = load<T, kCount>(static_cast<const T*>(buffers.model_out) + at);
    float x_prev[kCount], saved[kCount];
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
      const float x = x_t.at[k], m = widened(model_out.at[k]);
      float x0 = row.a_x * x + row.a_m * m;
      x0 = x0 < -bound ? -bound : x0;
      x0 = x0 > bound ? bound : x0;
      float next = row.c_0 * x0 + row.c_x * x + row.c_m * m;
      if (noisy) next = next + row.sigma * noise[i + k];
      x_prev[k] = next;
      saved[k] = row.saves_x0 != 0 ? x0 : next;
    }
    put_state<T>(buffers, at, x_prev);
    if (row.saved >= 0) save(buffers, row.saved, at, saved);
  }
  end_block(buffers.loop, step);
}

Cut cut_of(const StepBuffers& buffers) {
  if (buffers.channels < 1 || buffers.channels > kMaxChannels) {
    throw std::invalid_argument("an image on a CUDA device has from 1 to 128 channels");
  }
  const std::int64_t width = kTile / buffers.channels / kVector * kVector;
  const std::int64_t tiles = divide_up(buffers.pixels, width), blocks = buffers.batch * tiles;
  if (blocks < 1 || blocks > 0x7FFFFFFF) {
    throw std::invalid_argument("a batch has from one element to 2^31 tiles of elements");
  }
  return {static_cast<unsigned>(buffers.channels), static_cast<unsigned>(width),
          static_cast<unsigned>(tiles), buffers.pixels};
}

unsigned blocks_of(const StepBuffers& buffers, const Cut& cut) {
  return static_cast<unsigned>(buffers.batch) * cut.tiles;
}

// Whether every image begins at 16 bytes in every buffer. The saved targets are an allocation of
// their own, which does.
bool aligned(const StepBuffers& buffers) {
  return buffers.channels * buffers.pixels % kVector == 0 && begins_at_16_bytes(buffers.x_t) &&
         begins_at_16_bytes(buffers.x_in) && begins_at_16_bytes(buffers.model_out);
}

template <class T, int kCount>
void launch_step(const StepBuffers& buffers, cudaStream_t stream) {
  const auto kernel = sampling_step_kernel<T, kCount>;
  const Cut cut = cut_of(buffers);
  ADVKD_LAUNCH(kernel, blocks_of(buffers, cut), kThreads, stream, buffers, cut);
}

template <class T, int kCount>
void launch_first(const StepBuffers& buffers, cudaStream_t stream) {
  const auto kernel = first_state_kernel<T, kCount>;
  const Cut cut = cut_of(buffers);
  ADVKD_LAUNCH(kernel, blocks_of(buffers, cut), kThreads, stream, buffers, cut);
}

}  // namespace

void launch_first_state(const StepBuffers& buffers, cudaStream_t stream) {
  with_type(buffers.type, [&](auto element) {
    using T = decltype(element);
    (aligned(buffers) ? launch_first<T, kVector> : launch_first<T, 1>)(buffers, stream);
  });
}

void launch_sampling_step(const StepBuffers& buffers, cudaStream_t stream) {
  with_type(buffers.type, [&](auto element) {
    using T = decltype(element);
    (aligned(buffers) ? launch_step<T, kVector> : launch_step<T, 1>)(buffers, stream);
  });
}

}  // namespace advkd::cuda
