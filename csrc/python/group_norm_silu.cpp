// Arguments are plain numbers, since pybind11 takes longer to convert a sequence than a small
// kernel runs.
#include "python/bindings.h"
#include "python/pointer.h"
#include "runtime/training_kernels.h"

namespace py = pybind11;

namespace advkd {
namespace {

template <class S>
const GroupNormSiluKernels<S>& group_norm_silu_kernels();
template <>
const GroupNormSiluKernels<float>& group_norm_silu_kernels() {
  return training_kernels().group_norm_silu_float32;
}
template <>
const GroupNormSiluKernels<double>& group_norm_silu_kernels() {
  return training_kernels().group_norm_silu_float64;
}
template <>
const GroupNormSiluKernels<Float16>& group_norm_silu_kernels() {
  return training_kernels().group_norm_silu_float16;
}
template <>
const GroupNormSiluKernels<BFloat16>& group_norm_silu_kernels() {
  return training_kernels().group_norm_silu_bfloat16;
}

template <class T>
AffineParameters<T> affine_parameters(std::uintptr_t weight, std::uintptr_t bias,
                                      std::uintptr_t scale, std::uintptr_t shift) {
  return {pointer<const T>(weight), pointer<const T>(bias), pointer<const T>(scale),
          pointer<const T>(shift)};
}

template <class S>
void group_norm_silu(std::uintptr_t x, std::uintptr_t weight, std::uintptr_t bias,
                     std::uintptr_t scale, std::uintptr_t shift, std::uintptr_t y,
                     std::uintptr_t mean, std::uintptr_t rstd, std::int64_t batch,
                     std::int64_t channels, std::int64_t pixels, std::int64_t groups,
                     bool channels_last, double eps, bool silu, int threads) {
  const py::gil_scoped_release released;
  group_norm_silu_kernels<S>().forward(
      {pointer<const S>(x), affine_parameters<WideOf<S>>(weight, bias, scale, shift),
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
       affine_parameters<T>(weight, bias, scale, shift), pointer<const double>(mean),
       pointer<const double>(rstd), pointer<S>(dx), pointer<T>(dweight), pointer<T>(dbias),
       pointer<T>(dscale), pointer<T>(dshift), {batch, channels, pixels, channels_last}, groups,
       silu, threads});
}

}  // namespace

void bind_group_norm_silu(py::module_& module) {
  module.def("group_norm_silu_float32", &group_norm_silu<float>);
  module.def("group_norm_silu_float64", &group_norm_silu<double>);
  module.def("group_norm_silu_float16", &group_norm_silu<Float16>);
  module.def("group_norm_silu_bfloat16", &group_norm_silu<BFloat16>);
  module.def("group_norm_silu_backward_float32", &group_norm_silu_backward<float>);
  module.def("group_norm_silu_backward_float64", &group_norm_silu_backward<double>);
  module.def("group_norm_silu_backward_float16", &group_norm_silu_backward<Float16>);
  module.def("group_norm_silu_backward_bfloat16", &group_norm_silu_backward<BFloat16>);
}

}  // namespace advkd
