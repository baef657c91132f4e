// The CPU kernels' arguments, and the table of their versions for each instruction set.
#pragma once

#include <cstdint>

namespace advkd {

// Images lie densely as (B, C, P) or, channels_last, as (B, P, C); P = H * W pixels.
struct ImageShape {
  std::int64_t batch, channels, pixels;
  bool channels_last;

  std::int64_t elements() const { return channels * pixels; }
};

// One stream of Philox numbers for each image: counter = (element / 4, step, image index).
struct NoiseSource {
  std::uint64_t seed;
  const std::int64_t* image_index;  // (B,)
  std::uint32_t step;
};

struct PhiloxUint32Args {
  NoiseSource source;
  std::int64_t batch, count;
  std::uint32_t first_block;
  std::int64_t* out;  // (B, count)
  int threads;
};

struct PhiloxNormalArgs {
  NoiseSource source;
  ImageShape shape;
  float* out;
  int threads;
};

// x0_hat = clip(a_x x_t + a_m m);  x_prev = c_0 x0_hat + c_x x_t + c_m m + sigma z
struct SamplingStepArgs {
  const float *x_t, *model_out;
  float *x_prev, *x0_hat;
  ImageShape shape;
  float a_x, a_m, c_0, c_x, c_m, sigma;
  float clip;  // 0: none
  NoiseSource source;
  int threads;
};

struct GroupNormSiluArgs {
  const float *x, *weight, *bias;  // weight, bias: (C,)
  float* y;
  ImageShape shape;
  std::int64_t groups;
  float eps;
  bool silu;
  int threads;
};

struct KernelTable {
  const char* isa;
  void (*philox_uint32)(const PhiloxUint32Args&);
  void (*philox_normal)(const PhiloxNormalArgs&);
  void (*sampling_step)(const SamplingStepArgs&);
  void (*group_norm_silu)(const GroupNormSiluArgs&);
};

namespace portable {
extern const KernelTable table;
}
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}

}  // namespace advkd
