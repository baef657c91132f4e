// The Python module advkd._C. It knows no torch: advkd/ops hands it addresses, shapes and the
// thread count, and has checked all of them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"
#include "plan_bindings.h"
#include "pointer.h"
#ifdef ADVKD_HAVE_CUDA
#include "cuda_bindings.h"
#endif

namespace py = pybind11;

#ifdef __clang__
#define ADVKD_COMPILER __VERSION__
#else
#define ADVKD_COMPILER "GCC " __VERSION__
#endif

namespace advkd {
namespace {

NoiseSource noise_source(std::uint64_t seed, std::uintptr_t image_index, std::uint32_t step) {
  return {seed, pointer<const std::int64_t>(image_index), step};
}

void philox_uint32(std::uint64_t seed, std::uintptr_t image_index, std::uint32_t step,
                   std::int64_t batch, std::int64_t count, std::uint32_t first_block,
                   std::uintptr_t out, int threads) {
  const py::gil_scoped_release released;
  kernels().philox_uint32({noise_source(seed, image_index, step), batch, count,
                           first_block, pointer<std::int64_t>(out), threads});
}

void philox_normal(std::uint64_t seed, std::uintptr_t image_index, std::uint32_t step,
                   std::int64_t batch, std::int64_t channels, std::int64_t pixels,
                   bool channels_last, std::uintptr_t out, int threads) {
  const py::gil_scoped_release released;
  kernels().philox_normal({noise_source(seed, image_index, step),
                           {batch, channels, pixels, channels_last},
                           pointer<float>(out),
                           threads});
}

void sampling_step(std::uintptr_t x_t, std::uintptr_t model_out, std::uintptr_t x_prev,
                   std::uintptr_t x0_hat, std::int64_t batch, std::int64_t channels,
                   std::int64_t pixels, bool channels_last, float a_x, float a_m, float c_0,
                   float c_x, float c_m, float sigma, float clip, std::uint64_t seed,
                   std::uintptr_t image_index, std::uint32_t step, int threads) {
  const py::gil_scoped_release released;
  kernels().sampling_step({pointer<const float>(x_t), pointer<const float>(model_out),
                           pointer<float>(x_prev), pointer<float>(x0_hat),
                           {batch, channels, pixels, channels_last},
                           a_x, a_m, c_0, c_x, c_m, sigma, clip,
                           noise_source(seed, image_index, step), threads});
}

template <class S>
const GroupNormSiluKernels<S>& group_norm_silu_kernels();
template <>
const GroupNormSiluKernels<float>& group_norm_silu_kernels() {
  return kernels().group_norm_silu_float32;
}
template <>
const GroupNormSiluKernels<double>& group_norm_silu_kernels() {
  return kernels().group_norm_silu_float64;
}
template <>
const GroupNormSiluKernels<Float16>& group_norm_silu_kernels() {
  return kernels().group_norm_silu_float16;
}
template <>
const GroupNormSiluKernels<BFloat16>& group_norm_silu_kernels() {
  return kernels().group_norm_silu_bfloat16;
}

// Addresses are 0 where there is no such tensor. Plain numbers, since sequences take long to convert.
template <class S>
void group_norm_silu(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias,
                     std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t y,
                     std::uintptr_t mean, std::uintptr_t rstd, std::int64_t batch,
                     std::int64_t channels, std::int64_t pixels, std::int64_t groups,
                     bool channels_last, double eps, bool silu, int threads) {
  using T = WideOf<S>;
  const py::gil_scoped_release released;
  group_norm_silu_kernels<S>().forward(
      {pointer<const S>(x),
       {pointer<const T>(weight), pointer<const T>(bias), pointer<const T>(scale),
        pointer<const T>(shift)},
       pointer<S>(y), pointer<double>(mean), pointer<double>(rstd),
       {batch, channels, pixels, channels_last}, groups, eps, silu, threads});
}

template <class S>
void group_norm_silu_backward(std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t weight,
                              std::uintptr_t bias, std::uintptr_t scale, std::uintptr_t shift,
                              std::uintptr_t mean, std::uintptr_t rstd, std::uintptr_t dx,
                              std::uintptr_t dweight, std::uintptr_t dbias, std::uintptr_t dscale,
                              std::uintptr_t dshift, std::int64_t batch, std::int64_t channels,
                              std::int64_t pixels, std::int64_t groups, bool channels_last,
                              bool silu, int threads) {
  using T = WideOf<S>;
  const py::gil_scoped_release released;
  group_norm_silu_kernels<S>().backward(
      {pointer<const S>(grad_y), pointer<const S>(x),
       {pointer<const T>(weight), pointer<const T>(bias), pointer<const T>(scale),
        pointer<const T>(shift)},
       pointer<const double>(mean), pointer<const double>(rstd), pointer<S>(dx),
       pointer<T>(dweight), pointer<T>(dbias), pointer<T>(dscale), pointer<T>(dshift),
       {batch, channels, pixels, channels_last}, groups, silu, threads});
}

void copy_float32(std::uintptr_t from, std::uintptr_t to, std::int64_t count, int threads) {
  const py::gil_scoped_release released;
  kernels().copy_float32({pointer<const float>(from), pointer<float>(to), count, threads});
}

// (address, strides of sample, head and row)
using Operand = std::array<std::int64_t, 4>;

template <class T>
HeadRows<T> head_rows(const Operand& operand) {
  return {pointer<T>(static_cast<std::uintptr_t>(operand[0])), operand[1], operand[2], operand[3]};
}

AttentionShape attention_shape(const std::array<std::int64_t, 5>& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

template <class T>
void attention(const Operand& q, const Operand& k, const Operand& v, const Operand& out,
               std::uintptr_t lse, const std::array<std::int64_t, 5>& sizes, double scale,
               int threads) {
  const py::gil_scoped_release released;
  const AttentionArgs<T> args = {
      head_rows<const T>(q), head_rows<const T>(k), head_rows<const T>(v), head_rows<T>(out),
      pointer<T>(lse), attention_shape(sizes), static_cast<T>(scale), threads};
  if constexpr (sizeof(T) == sizeof(float)) {
    kernels().attention_float32(args);
  } else {
    kernels().attention_float64(args);
  }
}

template <class T>
void attention_backward(const Operand& grad_out, const Operand& q, const Operand& k,
                        const Operand& v, const Operand& out, std::uintptr_t lse,
                        const Operand& dq, const Operand& dk, const Operand& dv,
                        const std::array<std::int64_t, 5>& sizes, double scale, int threads) {
  const py::gil_scoped_release released;
  const AttentionBackwardArgs<T> args = {
      head_rows<const T>(grad_out), head_rows<const T>(q), head_rows<const T>(k),
      head_rows<const T>(v), head_rows<const T>(out), pointer<const T>(lse), head_rows<T>(dq),
      head_rows<T>(dk), head_rows<T>(dv), attention_shape(sizes), static_cast<T>(scale), threads};
  if constexpr (sizeof(T) == sizeof(float)) {
    kernels().attention_backward_float32(args);
  } else {
    kernels().attention_backward_float64(args);
  }
}

// (batch, height, width, channels in, channels out) of a 3 x 3 convolution that keeps the size
using Conv3x3Sizes = std::array<std::int64_t, 5>;

ConvolutionShape conv3x3_shape(const Conv3x3Sizes& sizes) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], 3, 1, 1, 1, false};
}

// Memory of the calling thread, kept from call to call: fresh pages would cost as much as a small
// convolution.
float* thread_memory(std::int64_t size) {
  constexpr std::size_t kLine = 16;
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<std::size_t>(size) + kLine) {
    memory = std::vector<float>(static_cast<std::size_t>(size) + kLine);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (kLine - address / sizeof(float) % kLine) % kLine;
}

double conv3x3_speedup(const Conv3x3Sizes& sizes) { return speedup_in_training(conv3x3_shape(sizes)); }

// weight_strides: of (out, in, row, column). turned: convolves with the kernel turned round.
void conv3x3(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t weights,
             const std::array<std::int64_t, 4>& weight_strides, bool turned, std::uintptr_t bias,
             std::uintptr_t y, std::int64_t y_stride, const Conv3x3Sizes& sizes, int threads) {
  const py::gil_scoped_release released;
  const ConvolutionShape shape = conv3x3_shape(sizes);
  const ConvolutionAlgorithm algorithm = choose_algorithm(shape, threads);
  ConvolutionWeights from = {pointer<const float>(weights), weight_strides[0], weight_strides[1],
                             weight_strides[2], weight_strides[3]};
  if (turned) from = from.turned(shape.kernel);
  const std::int64_t packed_floats = (packed_size(shape) + 15) / 16 * 16;
  float* const packed =
      thread_memory(packed_floats + workspace_size(shape, algorithm, threads));
  pack_weights(shape, from, packed);
  ConvolutionArgs args = {};
  args.shape = shape;
  args.algorithm = algorithm;
  args.x = pointer<const float>(x);
  args.x_stride = x_stride;
  args.packed = packed;
  args.bias = pointer<const float>(bias);
  args.scale = 1.0f;
  args.y = pointer<float>(y);
  args.y_stride = y_stride;
  args.workspace = packed + packed_floats;
  args.threads = threads;
  convolution(args);
}

// grad_weights: (out, 3, 3, in), dense
void conv3x3_gradient(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t grad_y,
                      std::int64_t grad_y_stride, std::uintptr_t grad_weights,
                      std::uintptr_t grad_bias, const Conv3x3Sizes& sizes, int threads) {
  const py::gil_scoped_release released;
  const ConvolutionShape shape = conv3x3_shape(sizes);
  convolution_gradient({shape, pointer<const float>(x), x_stride, pointer<const float>(grad_y),
                        grad_y_stride, pointer<float>(grad_weights), pointer<float>(grad_bias),
                        thread_memory(gradient_workspace_size(shape, threads)), threads});
}

// Runs a Python function as tasks on the pool; the tests use it to try the pool itself.
void run_tasks(std::int64_t tasks, int threads, const py::function& function) {
  const py::gil_scoped_release released;
  parallel_for(tasks, threads, [&](std::int64_t task) {
    const py::gil_scoped_acquire acquired;
    function(task);
  });
}

}  // namespace
}  // namespace advkd

PYBIND11_MODULE(_C, module) {
  using namespace advkd;
  module.doc() = "Fused kernels of advkd; called through advkd.ops.";
  module.attr("version") = ADVKD_VERSION;
  module.attr("compiler") = ADVKD_COMPILER;
  module.def("isa", [] { return std::string(kernels().isa); },
             "The instruction set whose kernels are in use.");
  module.def("isas", &runnable_isas, "The instruction sets that run here, best first.");
  module.def("set_isa", &set_isa, "Uses the kernels of another instruction set from now on.");
  module.def("philox_uint32", &philox_uint32);
  module.def("philox_normal", &philox_normal);
  module.def("sampling_step", &sampling_step);
  module.def("group_norm_silu_float32", &group_norm_silu<float>);
  module.def("group_norm_silu_float64", &group_norm_silu<double>);
  module.def("group_norm_silu_float16", &group_norm_silu<Float16>);
  module.def("group_norm_silu_bfloat16", &group_norm_silu<BFloat16>);
  module.def("group_norm_silu_backward_float32", &group_norm_silu_backward<float>);
  module.def("group_norm_silu_backward_float64", &group_norm_silu_backward<double>);
  module.def("group_norm_silu_backward_float16", &group_norm_silu_backward<Float16>);
  module.def("group_norm_silu_backward_bfloat16", &group_norm_silu_backward<BFloat16>);
  module.def("copy_float32", &copy_float32,
             "Copies count float32 numbers by stores that pass the cache.");
  module.def("attention_float32", &attention<float>);
  module.def("attention_float64", &attention<double>);
  module.def("attention_backward_float32", &attention_backward<float>);
  module.def("attention_backward_float64", &attention_backward<double>);
  module.def("conv3x3", &conv3x3);
  module.def("conv3x3_gradient", &conv3x3_gradient);
  module.def("conv3x3_speedup", &conv3x3_speedup);
  module.def("run_tasks", &run_tasks);
  module.def("set_worth_sharing", &set_worth_sharing,
             "Sets from how many cycles on threads share an operation's work; returns what it was.");
  bind_plan(module);
#ifdef ADVKD_HAVE_CUDA
  bind_cuda(module);
#else
  module.attr("cuda_left_out") = ADVKD_CUDA_LEFT_OUT;
#endif
}
