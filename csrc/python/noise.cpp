#include "python/noise.h"

#include "python/bindings.h"
#include "runtime/dispatch.h"

namespace py = pybind11;

namespace advkd {
namespace {

void philox_uint32(std::uint64_t seed, std::uintptr_t image_index, std::uint32_t step,
                   std::int64_t batch, std::int64_t count, std::uint32_t first_block,
                   std::uintptr_t out, int threads) {
  const py::gil_scoped_release released;
  kernels().philox_uint32({noise_source(seed, image_index, step), batch, count, first_block,
                           pointer<std::int64_t>(out), threads});
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

}  // namespace

void bind_noise(py::module_& module) {
  module.def("philox_uint32", &philox_uint32);
  module.def("philox_normal", &philox_normal);
}

}  // namespace advkd
