// Convolutions: conv3x3 of training, and what lowering asks of the engine's.
#include "runtime/convolution_int8.h"

#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "python/bindings.h"
#include "python/pointer.h"

namespace py = pybind11;

namespace advkd {
namespace {

// (batch, height, width, channels in, channels out)
using Sizes = std::array<std::int64_t, 5>;

ConvolutionShape convolution_shape(const Sizes& sizes, int kernel, int stride, int pad_before,
                                   int pad_after, bool upsample) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], kernel, stride, pad_before, pad_after,
          upsample};
}

ConvolutionShape conv3x3_shape(const Sizes& sizes) {
  return convolution_shape(sizes, 3, 1, 1, 1, false);
}

// The calling thread's memory on a cache line's boundary, reused from call to call: fresh pages
// would cost as much as a small convolution.
float* thread_memory(std::int64_t size) {
  constexpr std::size_t kLine = 16;
  thread_local std::vector<float> memory;
  if (memory.size() < static_cast<std::size_t>(size) + kLine) {
    memory = std::vector<float>(static_cast<std::size_t>(size) + kLine);
  }
  const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
  return memory.data() + (kLine - address / sizeof(float) % kLine) % kLine;
}

// weight_strides: of (out, in, row, column). transposed: the convolution that dgrad is.
void conv3x3(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t weights,
             const std::array<std::int64_t, 4>& weight_strides, bool transposed,
             std::uintptr_t bias, std::uintptr_t y, std::int64_t y_stride, const Sizes& sizes,
             int threads) {
  const py::gil_scoped_release released;
  const ConvolutionShape shape = conv3x3_shape(sizes);
  const ConvolutionAlgorithm algorithm = choose_algorithm(shape, threads);
  ConvolutionWeights from = {pointer<const float>(weights), weight_strides[0], weight_strides[1],
                             weight_strides[2], weight_strides[3]};
  if (transposed) from = from.transposed(shape.kernel);
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

// dweights: (out, 3, 3, in), dense
void conv3x3_gradient(std::uintptr_t x, std::int64_t x_stride, std::uintptr_t grad_y,
                      std::int64_t grad_y_stride, std::uintptr_t dweights, std::uintptr_t dbias,
                      const Sizes& sizes, int threads) {
  const py::gil_scoped_release released;
  const ConvolutionShape shape = conv3x3_shape(sizes);
  convolution_wgrad({shape, pointer<const float>(x), x_stride, pointer<const float>(grad_y),
                     grad_y_stride, pointer<float>(dweights), pointer<float>(dbias),
                     thread_memory(wgrad_workspace_size(shape, threads)), threads});
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
