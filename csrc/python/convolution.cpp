// Convolutions: conv3x3 of training, and what lowering asks of the engine's.
#include "python/convolution.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "python/bindings.h"
#include "python/pointer.h"
#include "runtime/convolution_int8.h"

namespace py = pybind11;

namespace advkd {
namespace {

ConvolutionShape convolution_shape(const Sizes& sizes, int kernel, int stride, int pad_before,
                                   int pad_after, bool upsample) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], kernel, stride, pad_before, pad_after,
          upsample};
}

}  // namespace

ConvolutionWeights weights_at(std::uintptr_t address, const WeightStrides& strides) {
  return {pointer<const float>(address), strides[0], strides[1], strides[2], strides[3]};
}

ConvolutionShape conv3x3_shape(const Sizes& sizes) {
  return convolution_shape(sizes, 3, 1, 1, 1, false);
}

float* thread_memory(std::int64_t size) {
  constexpr std::size_t kLine = 16;
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<std::size_t>(size) + kLine) {
    memory = std::vector<float>(static_cast<std::size_t>(size) + kLine);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (kLine - address / sizeof(float) % kLine) % kLine;
}

std::int64_t in_cache_lines(std::int64_t floats) { return (floats + 15) / 16 * 16; }

std::int64_t convolve_memory(const ConvolutionShape& shape, int threads) {
  const ConvolutionAlgorithm algorithm = choose_algorithm(shape, threads);
  return in_cache_lines(packed_size(shape)) + workspace_size(shape, algorithm, threads);
}

void convolve(ConvolutionArgs args, const ConvolutionWeights& weights, float* memory, int threads) {
  pack_weights(args.shape, weights, memory);
  args.algorithm = choose_algorithm(args.shape, threads);
  args.packed = memory;
  args.workspace = memory + in_cache_lines(packed_size(args.shape));
  args.threads = threads;
  convolution(args);
}

namespace {

// transposed: the convolution that dgrad is.
void conv3x3(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t weights,
             const WeightStrides& strides, bool transposed,
             std::uintptr_t bias, std::uintptr_t y, std::int64_t y_stride, const Sizes& sizes,
             int threads) {
  const py::gil_scoped_release released;
  ConvolutionArgs args = {};
  args.shape = conv3x3_shape(sizes);
  args.x = pointer<const float>(x);
  args.x_stride = x_stride;
  args.bias = pointer<const float>(bias);
  args.scale = 1.0f;
  args.y = pointer<float>(y);
  args.y_stride = y_stride;
  const ConvolutionWeights from = weights_at(weights, strides);
  convolve(args, transposed ? from.transposed(args.shape.kernel) : from,
           thread_memory(convolve_memory(args.shape, threads)), threads);
}

// dweights: (out, 3, 3, in), dense
void conv3x3_gradient(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t grad_y,
                      std::int64_t grad_y_stride, std::uintptr_t dweights, std::uintptr_t dbias,
                      const Sizes& sizes, int threads) {
  const py::gil_scoped_release released;
  ConvolutionWgradArgs args = {};
  args.shape = conv3x3_shape(sizes);
  args.x = pointer<const float>(x);
  args.x_stride = x_stride;
  args.grad_y = pointer<const float>(grad_y);
  args.grad_y_stride = grad_y_stride;
  args.dweights = pointer<float>(dweights);
  args.dbias = pointer<float>(dbias);
  args.workspace = thread_memory(wgrad_workspace_size(args.shape, threads));
  args.threads = threads;
  convolution_wgrad(args);
}

double conv3x3_speedup(const Sizes& sizes) { return speedup_in_training(conv3x3_shape(sizes)); }

py::tuple convolution_plan(const Sizes& sizes, int kernel, int stride, int pad_before,
                           int pad_after, bool upsample, int threads) {
  const ConvolutionShape shape =
      convolution_shape(sizes, kernel, stride, pad_before, pad_after, upsample);
  if (!supported(shape)) throw std::invalid_argument("no kernel serves such a convolution");
  const ConvolutionAlgorithm algorithm = choose_algorithm(shape, threads);
  return py::make_tuple(static_cast<int>(algorithm), packed_size(shape));
}

// weight: (out, in, kernel, kernel), contiguous
void convolution_pack(const Sizes& sizes, int kernel, int stride, int pad_before, int pad_after,
                      bool upsample, std::uintptr_t weight, std::uintptr_t packed) {
  const py::gil_scoped_release released;
  const ConvolutionShape shape =
      convolution_shape(sizes, kernel, stride, pad_before, pad_after, upsample);
  const std::int64_t area = static_cast<std::int64_t>(kernel) * kernel;
  pack_weights(shape, {pointer<const float>(weight), shape.in_channels * area, area, kernel, 1},
               pointer<float>(packed));
}

// weight: int8 (out, in, kernel, kernel), scales: (out,), both contiguous; x_range: low and high
void convolution_pack_int8(const Sizes& sizes, int kernel, int stride, int pad_before,
                           int pad_after, bool upsample, std::uintptr_t weight,
                           std::uintptr_t scales, std::array<float, 2> x_range,
                           std::uintptr_t packed) {
  const ConvolutionShape shape =
      convolution_shape(sizes, kernel, stride, pad_before, pad_after, upsample);
  Levels levels;
  if (!levels.cover(x_range[0], x_range[1])) throw std::invalid_argument("no range around 0");
  pack_int8(shape, pointer<const std::int8_t>(weight), pointer<const unsigned char>(scales), levels,
            pointer<float>(packed));
}

std::int64_t convolution_int8_size(const Sizes& sizes, int kernel, int stride, int pad_before,
                                   int pad_after, bool upsample) {
  return int8_packed_size(
      convolution_shape(sizes, kernel, stride, pad_before, pad_after, upsample));
}

}  // namespace

void bind_convolution(py::module_& module) {
  module.def("conv3x3", &conv3x3);
  module.def("conv3x3_gradient", &conv3x3_gradient);
  module.def("conv3x3_speedup", &conv3x3_speedup);
  module.def("convolution_plan", &convolution_plan,
             "The algorithm that should be fastest, and the number of floats of packed weights.");
  module.def("convolution_pack", &convolution_pack);
  module.def("convolution_pack_int8", &convolution_pack_int8);
  module.def("convolution_int8_size", &convolution_int8_size,
             "The number of floats of weights packed for products of int8.");
  module.def("has_int8_products", [] { return int8_convolution() != nullptr; },
             "Whether the instruction set in use has dot products of bytes on this processor.");
}

}  // namespace advkd
