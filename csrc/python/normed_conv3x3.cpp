// GroupNorm-SiLU and the 3 x 3 convolution behind it as one operation of training. What lies between
// the two is made where it is read, in the forward pass and again for the gradient of the weights,
// and stored nowhere.
#include "python/convolution.h"

#include <pybind11/stl.h>

#include "python/bindings.h"
#include "python/pointer.h"
#include "runtime/training_kernels.h"

namespace py = pybind11;

namespace advkd {
namespace {

// The norm of x (B, H, W, C), dense, all float32.
struct Norm {
  const float *x, *weight, *bias;
  std::int64_t groups;
  double *mean, *rstd;  // (B, groups)
  ImageShape shape;

  Norm(std::uintptr_t x_at, std::uintptr_t weight_at, std::uintptr_t bias_at, std::int64_t group_count,
       std::uintptr_t statistics, const Sizes& sizes)
      : x(pointer<const float>(x_at)),
        weight(pointer<const float>(weight_at)),
        bias(pointer<const float>(bias_at)),
        groups(group_count),
        mean(pointer<double>(statistics)),
        rstd(mean + sizes[0] * group_count),
        shape{sizes[0], sizes[3], sizes[1] * sizes[2], true} {}

  std::int64_t maps() const { return in_cache_lines(shape.batch * shape.channels); }

  void measure(double eps, int threads) const {
    training_kernels().group_norm_silu_float32.forward(
        {x, {weight, bias, nullptr, nullptr}, nullptr, mean, rstd, shape, groups, eps, true, threads});
  }

  // scale, shift (B, C): the norm is x * scale + shift.
  void set_maps(float* scale, float* shift) const {
    const std::int64_t width = shape.channels / groups;
    for (std::int64_t i = 0; i < shape.batch * shape.channels; ++i) {
      const std::int64_t c = i % shape.channels, group = i / shape.channels * groups + c / width;
      const double factor = rstd[group] * static_cast<double>(weight[c]);
      scale[i] = static_cast<float>(factor);
      shift[i] = static_cast<float>(static_cast<double>(bias[c]) - mean[group] * factor);
    }
  }
};

// (B, C_out): bias + addend.
void add_bias(const float* bias, const float* addend, std::int64_t batch, std::int64_t channels,
              float* to) {
  for (std::int64_t i = 0; i < batch * channels; ++i) {
    to[i] = addend[i] + (bias == nullptr ? 0.0f : bias[i % channels]);
  }
}

// statistics: mean and 1/deviation, (2, B, groups) float64, are written. addend (B, C_out), residual
// and bias may be null.
void normed_conv3x3(std::uintptr_t x, std::uintptr_t norm_weight, std::uintptr_t norm_bias,
                    std::int64_t groups, double eps, std::uintptr_t statistics,
                    std::uintptr_t weight, const WeightStrides& strides, std::uintptr_t bias,
                    std::uintptr_t addend, std::uintptr_t residual, std::uintptr_t y,
                    const Sizes& sizes, int threads) {
  const py::gil_scoped_release released;
  const Norm norm(x, norm_weight, norm_bias, groups, statistics, sizes);
  norm.measure(eps, threads);
  ConvolutionArgs args = {};
  args.shape = conv3x3_shape(sizes);
  const std::int64_t channels = args.shape.out_channels;
  const std::int64_t biases = addend == 0 ? 0 : in_cache_lines(args.shape.batch * channels);
  float* const scale =
      thread_memory(2 * norm.maps() + biases + convolve_memory(args.shape, threads));
  float *const shift = scale + norm.maps(), *const of_images = shift + norm.maps();
  norm.set_maps(scale, shift);
  args.x = norm.x;
  args.x_stride = args.shape.in_channels;
  args.x_scale = scale;
  args.x_shift = shift;
  args.x_silu = true;
  args.bias = pointer<const float>(bias);
  if (addend != 0) {
    add_bias(args.bias, pointer<const float>(addend), args.shape.batch, channels, of_images);
    args.bias = of_images;
    args.bias_stride = channels;
  }
  args.residual = pointer<const float>(residual);
  args.residual_stride = channels;
  args.scale = 1.0f;
  args.y = pointer<float>(y);
  args.y_stride = channels;
  convolve(args, weights_at(weight, strides), of_images + biases, threads);
}

// The gradients of x and of the norm's parameters. dx first holds that of what was convolved.
void normed_conv3x3_dgrad(std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t norm_weight,
                          std::uintptr_t norm_bias, std::int64_t groups, std::uintptr_t statistics,
                          std::uintptr_t weight, const WeightStrides& strides, std::uintptr_t dx,
                          std::uintptr_t dnorm_weight, std::uintptr_t dnorm_bias,
                          const Sizes& sizes, int threads) {
  const py::gil_scoped_release released;
  const Norm norm(x, norm_weight, norm_bias, groups, statistics, sizes);
  ConvolutionArgs args = {};
  args.shape = conv3x3_shape({sizes[0], sizes[1], sizes[2], sizes[4], sizes[3]});
  args.x = pointer<const float>(grad_y);
  args.x_stride = args.shape.in_channels;
  args.scale = 1.0f;
  args.y = pointer<float>(dx);
  args.y_stride = args.shape.out_channels;
  convolve(args, weights_at(weight, strides).transposed(args.shape.kernel),
           thread_memory(convolve_memory(args.shape, threads)), threads);
  training_kernels().group_norm_silu_float32.backward(
      {args.y, norm.x, {norm.weight, norm.bias, nullptr, nullptr}, norm.mean, norm.rstd, args.y,
       pointer<float>(dnorm_weight), pointer<float>(dnorm_bias), nullptr, nullptr, norm.shape,
       groups, true, threads});
}

// dweights: (out, 3, 3, in), dense
void normed_conv3x3_wgrad(std::uintptr_t grad_y, std::uintptr_t x, std::uintptr_t norm_weight,
                          std::uintptr_t norm_bias, std::int64_t groups, std::uintptr_t statistics,
                          std::uintptr_t dweights, std::uintptr_t dbias, const Sizes& sizes,
                          int threads) {
  const py::gil_scoped_release released;
  const Norm norm(x, norm_weight, norm_bias, groups, statistics, sizes);
  ConvolutionWgradArgs args = {};
  args.shape = conv3x3_shape(sizes);
  float* const scale = thread_memory(2 * norm.maps() + wgrad_workspace_size(args.shape, threads));
  float* const shift = scale + norm.maps();
  norm.set_maps(scale, shift);
  args.x = norm.x;
  args.x_stride = args.shape.in_channels;
  args.x_scale = scale;
  args.x_shift = shift;
  args.x_silu = true;
  args.grad_y = pointer<const float>(grad_y);
  args.grad_y_stride = args.shape.out_channels;
  args.dweights = pointer<float>(dweights);
  args.dbias = pointer<float>(dbias);
  args.workspace = shift + norm.maps();
  args.threads = threads;
  convolution_wgrad(args);
}

}  // namespace

void bind_normed_conv3x3(py::module_& module) {
  module.def("normed_conv3x3", &normed_conv3x3);
  module.def("normed_conv3x3_dgrad", &normed_conv3x3_dgrad);
  module.def("normed_conv3x3_wgrad", &normed_conv3x3_wgrad);
}

}  // namespace advkd
