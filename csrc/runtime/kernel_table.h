// The CPU kernels' arguments, and the table of their versions for each instruction set.
#pragma once

#include <cstdint>

#include "runtime/convolution_plan.h"
#include "runtime/noise.h"

namespace advkd {

// Images lie densely as (B, C, P) or, channels_last, as (B, P, C); P = H * W pixels.
struct ImageShape {
  std::int64_t batch, channels, pixels;
  bool channels_last;

  std::int64_t elements() const { return channels * pixels; }
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

struct StepCoefficients {
  float a_x, a_m, c_0, c_x, c_m, sigma;
};

// x0_hat = clip(a_x x_t + a_m m);  x_prev = c_0 x0_hat + c_x x_t + c_m m + sigma z
struct SamplingStepArgs {
  const float *x_t, *model_out;
  float *x_prev, *x0_hat;
  ImageShape shape;
  StepCoefficients coefficients;
  float clip;  // 0: none
  NoiseSource source;
  int threads;
};

// Elements that are only stored, never computed with.
struct Float16 {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};

template <class S>
struct WideType {
  using type = float;
};
template <>
struct WideType<double> {
  using type = double;
};

// What elements of type S are computed with.
template <class S>
using WideOf = typename WideType<S>::type;

// Affine parameters and FiLM of y = act((xhat weight + bias) (1 + scale) + shift); null where there
// are none.
template <class T>
struct AffineParameters {
  const T *weight, *bias;  // (C,)
  const T *scale, *shift;  // (B, C)
};

template <class S>
struct GroupNormSiluArgs {
  const S* x;
  AffineParameters<WideOf<S>> affine;
  S* y;                 // null: only mean and rstd are wanted
  double *mean, *rstd;  // (B, G); null where they are not wanted
  ImageShape shape;
  std::int64_t groups;
  double eps;
  bool silu;
  int threads;
};

template <class S>
struct GroupNormSiluBackwardArgs {
  const S *grad_y, *x;
  AffineParameters<WideOf<S>> affine;
  const double *mean, *rstd;
  S* dx;  // may be grad_y
  WideOf<S> *dweight, *dbias;  // (C,); null where the parameter is
  WideOf<S> *dscale, *dshift;  // (B, C)
  ImageShape shape;
  std::int64_t groups;
  bool silu;
  int threads;
};

// scale, shift (B, C): GroupNorm of x is x * scale + shift. Pixels are x_stride floats apart.
struct GroupNormAffineArgs {
  const float* x;
  std::int64_t x_stride, batch, pixels, channels, groups;
  double eps;
  const float *weight, *bias;  // (C,)
  float *scale, *shift;
  int threads;
};

// y (B, H / 2, W / 2, C): averages of squares of act(x * scale + shift), x (B, H, W, C), H and W even.
// Pixels are x_stride and y_stride floats apart.
struct AveragePoolArgs {
  const float* x;
  std::int64_t x_stride, batch, height, width, channels;
  const float *scale, *shift;  // (B, C), or null for 1 and 0
  bool silu;
  float* y;
  std::int64_t y_stride;
  int threads;
};

// The rows of one operand of attention: row n of head h of sample b begins at
// at + b * batch + h * head + n * row, and its head_dim elements are consecutive.
template <class T>
struct HeadRows {
  T* at;
  std::int64_t batch, head, row;
};

struct AttentionShape {
  std::int64_t batch, heads, queries, keys, head_dim;
};


// out = softmax(scale q k^T) v;  lse (B, H, N) = log sum exp(scale q k^T)
template <class T>
struct AttentionArgs {
  HeadRows<const T> q, k, v;
  HeadRows<T> out;
  T* lse;
  AttentionShape shape;
  T scale;
  T* workspace;  // as attention_workspace tells; null: memory of its own
  int threads;
};

template <class T>
struct AttentionBackwardArgs {
  HeadRows<const T> grad_out, q, k, v, out;
  const T* lse;
  HeadRows<T> dq, dk, dv;
  AttentionShape shape;
  T scale;
  int threads;
};

template <class S>
struct GroupNormSiluKernels {
  void (*forward)(const GroupNormSiluArgs<S>&);
  void (*backward)(const GroupNormSiluBackwardArgs<S>&);
};

// What a network pass and its noise take.
struct KernelTable {
  const char* isa;
  void (*philox_uint32)(const PhiloxUint32Args&);
  void (*philox_normal)(const PhiloxNormalArgs&);
  void (*group_norm_affine)(const GroupNormAffineArgs&);
  std::int64_t (*attention_workspace)(const AttentionShape&, int threads);  // of float32
  void (*attention_float32)(const AttentionArgs<float>&);
  void (*pack_convolution)(const ConvolutionShape&, const ConvolutionWeights&, float* packed);
  void (*convolution_direct)(const ConvolutionArgs&, const ConvolutionPlan&);
  void (*convolution_winograd2)(const ConvolutionArgs&, const ConvolutionPlan&);
  void (*convolution_winograd4)(const ConvolutionArgs&, const ConvolutionPlan&);
};

// What trainings and the samplers of teachers take beside it.
struct TrainingKernelTable {
  void (*sampling_step)(const SamplingStepArgs&);
  void (*average_pool)(const AveragePoolArgs&);
  GroupNormSiluKernels<float> group_norm_silu_float32;
  GroupNormSiluKernels<double> group_norm_silu_float64;
  GroupNormSiluKernels<Float16> group_norm_silu_float16;
  GroupNormSiluKernels<BFloat16> group_norm_silu_bfloat16;
  void (*attention_float64)(const AttentionArgs<double>&);
  void (*attention_backward_float32)(const AttentionBackwardArgs<float>&);
  void (*attention_backward_float64)(const AttentionBackwardArgs<double>&);
  void (*convolution_wgrad)(const ConvolutionWgradArgs&, const ConvolutionWgradPlan&);
};

namespace portable {
extern const KernelTable table;
extern const TrainingKernelTable training_table;
}
namespace avx2 {
extern const KernelTable table;
extern const TrainingKernelTable training_table;
}
namespace avx512 {
extern const KernelTable table;
extern const TrainingKernelTable training_table;
}
// Sets that extend others by dot products of bytes.
namespace avxvnni {
void convolution_int8(const ConvolutionArgs& args);
}
namespace neondot {
void convolution_int8(const ConvolutionArgs& args);
}
namespace avx512vnni {
void convolution_int8(const ConvolutionArgs& args);
}
namespace neon {
extern const KernelTable table;
extern const TrainingKernelTable training_table;
}
namespace wasm {
extern const KernelTable table;
}

}  // namespace advkd
