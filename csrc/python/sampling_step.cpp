#include "python/bindings.h"
#include "python/noise.h"
#include "runtime/training_kernels.h"

namespace py = pybind11;

namespace advkd {
namespace {

void sampling_step(std::uintptr_t x_t, std::uintptr_t model_out, std::uintptr_t x_prev,
                   std::uintptr_t x0_hat, std::int64_t batch, std::int64_t channels,
                   std::int64_t pixels, bool channels_last, float a_x, float a_m, float c_0,
                   float c_x, float c_m, float sigma, float clip, std::uint64_t seed,
                   std::uintptr_t image_index, std::uint32_t step, int threads) {
  const py::gil_scoped_release released;
  training_kernels().sampling_step({pointer<const float>(x_t), pointer<const float>(model_out),
                           pointer<float>(x_prev), pointer<float>(x0_hat),
                           {batch, channels, pixels, channels_last},
                           {a_x, a_m, c_0, c_x, c_m, sigma}, clip,
                           noise_source(seed, image_index, step), threads});
}

}  // namespace

void bind_sampling_step(py::module_& module) { module.def("sampling_step", &sampling_step); }

}  // namespace advkd
