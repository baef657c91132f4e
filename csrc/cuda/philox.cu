// Compiled without contraction, so that every float32 product and sum is rounded on its own.
#include "cuda/philox.h"

#include "cuda/device_guard.h"
#include "cuda/elements.h"
#include "runtime/normals.h"

namespace advkd::cuda {
namespace {

constexpr int kThreads = 128;

// A thread computes the four normals of a Philox block, which counts an image's elements in (C, P)
// order, and writes those that exist.
__global__ void __launch_bounds__(kThreads)
    normals_kernel(const NormalsArgs args, const unsigned blocks) {
  const std::int64_t image = blockIdx.x / blocks, elements = args.channels * args.pixels;
  const std::int64_t quad = static_cast<std::int64_t>(blockIdx.x % blocks) * kThreads + threadIdx.x;
  const std::uint64_t index = static_cast<std::uint64_t>(args.image_index[image]);
  const PhiloxBlock block = philox_block(
      static_cast<std::uint32_t>(quad), args.step, static_cast<std::uint32_t>(index),
      static_cast<std::uint32_t>(index >> 32), static_cast<std::uint32_t>(args.seed),
      static_cast<std::uint32_t>(args.seed >> 32));
  float normals[4];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    const float radius = box_muller_radius(block.word[2 * pair]);
    const SineCosine turn = box_muller_angle(block.word[2 * pair + 1]);
    normals[2 * pair] = radius * turn.cosine;
    normals[2 * pair + 1] = radius * turn.sine;
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const std::int64_t element = 4 * quad + k;
    if (element >= elements) return;
    const std::int64_t at = args.channels_last
                                ? element % args.pixels * args.channels + element / args.pixels
                                : element;
    args.out[image * elements + at] = normals[k];
  }
}

}  // namespace

void launch_normals(const NormalsArgs& args, int device, cudaStream_t stream) {
  const std::int64_t elements = args.channels * args.pixels;
  const std::int64_t blocks = divide_up(divide_up(elements, 4), kThreads);
  if (args.batch * blocks == 0) return;
  if (args.batch * blocks > 0x7FFFFFFF) {
    throw std::invalid_argument("a batch of normals has at most 2^31 blocks of 512");
  }
  const DeviceGuard guard(device);
  ADVKD_LAUNCH(normals_kernel, static_cast<unsigned>(args.batch * blocks), kThreads, stream, args,
               static_cast<unsigned>(blocks));
}

}  // namespace advkd::cuda
