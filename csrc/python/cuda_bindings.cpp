#include "python/cuda_bindings.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/group_norm_silu.h"
#include "cuda/sampling_loop.h"
#include "python/pointer.h"

namespace py = pybind11;

namespace advkd {
namespace {

cuda::ElementType element_type(const std::string& name) {
  if (name == "float32") return cuda::ElementType::kFloat32;
  if (name == "float16") return cuda::ElementType::kFloat16;
  if (name == "bfloat16") return cuda::ElementType::kBFloat16;
  throw std::invalid_argument("no CUDA kernel serves " + name);
}

// sizes: batch, channels, pixels
cuda::StepBuffers step_buffers(std::uintptr_t x_t, std::uintptr_t x_in, std::uintptr_t model_out,
                               const std::string& type, std::uintptr_t told,
                               std::int64_t told_bytes, const std::array<std::int64_t, 3>& sizes,
                               bool channels_last) {
  return {nullptr, pointer<float>(x_t), pointer<void>(x_in), pointer<const void>(model_out),
          element_type(type), pointer<void>(told), told_bytes, sizes[0], sizes[1], sizes[2],
          channels_last};
}

std::unique_ptr<cuda::SamplingLoop> make_loop(
    int device, std::uintptr_t network, std::uintptr_t x_t, std::uintptr_t x_in,
    std::uintptr_t model_out, const std::string& type, std::uintptr_t told,
    std::int64_t told_bytes, const std::array<std::int64_t, 3>& sizes, bool channels_last,
    bool on_device) {
  const cuda::StepBuffers buffers =
      step_buffers(x_t, x_in, model_out, type, told, told_bytes, sizes, channels_last);
  return std::make_unique<cuda::SamplingLoop>(device, reinterpret_cast<cudaGraph_t>(network),
                                              buffers, on_device);
}

void run(const cuda::SamplingLoop& loop, std::int64_t steps, std::uint64_t seed, float clip,
         std::uintptr_t image_index, std::uintptr_t rows, std::uintptr_t told, std::uintptr_t kept,
         bool kept_half, std::int64_t chunk, std::uintptr_t stream, const py::object& on_chunk) {
  const bool stepwise = !on_chunk.is_none();
  const py::gil_scoped_release released;
  loop.run({steps, seed, clip, pointer<const std::int64_t>(image_index),
            pointer<const cuda::StepRow>(rows), pointer<const void>(told), pointer<void>(kept),
            kept_half, chunk,
            [&](std::int64_t done) {
              const py::gil_scoped_acquire acquired;
              if (PyErr_CheckSignals() != 0) throw py::error_already_set();
              if (stepwise) on_chunk(done);
            }},
           reinterpret_cast<cudaStream_t>(stream));
}

// parameters: addresses of weight, bias, scale and shift, float32; 0 where there is none.
// sizes: batch, channels, pixels, groups
cuda::GroupNormSiluArgs group_norm_args(std::uintptr_t x, std::uintptr_t y, const std::string& type,
                                        const std::array<std::uintptr_t, 4>& parameters,
                                        const std::array<std::int64_t, 4>& sizes,
                                        bool channels_last, float eps, bool silu,
                                        std::uintptr_t workspace) {
  return {pointer<const void>(x), pointer<void>(y), element_type(type),
          pointer<const float>(parameters[0]), pointer<const float>(parameters[1]),
          pointer<const float>(parameters[2]), pointer<const float>(parameters[3]),
          sizes[0], sizes[1], sizes[2], sizes[3], channels_last, eps, silu,
          pointer<float>(workspace)};
}

void group_norm_silu(std::uintptr_t x, std::uintptr_t y, const std::string& type,
                     const std::array<std::uintptr_t, 4>& parameters,
                     const std::array<std::int64_t, 4>& sizes, bool channels_last, float eps,
                     bool silu, std::uintptr_t workspace, std::uintptr_t stream) {
  cuda::launch_group_norm_silu(
      group_norm_args(x, y, type, parameters, sizes, channels_last, eps, silu, workspace),
      reinterpret_cast<cudaStream_t>(stream));
}

std::int64_t group_norm_silu_workspace(std::uintptr_t x, std::uintptr_t y, const std::string& type,
                                       const std::array<std::int64_t, 4>& sizes,
                                       bool channels_last) {
  return cuda::group_norm_silu_workspace(
      group_norm_args(x, y, type, {}, sizes, channels_last, 0.0f, false, 0));
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." +
                                std::to_string(CUDART_VERSION % 1000 / 10);
  module.attr("cuda_archs") = ADVKD_CUDA_ARCHS;
  module.def("cuda_unavailable", &cuda::unavailable,
             "Why there is no CUDA device to use; empty where there is one.");
  module.def("cuda_device_loop_unavailable", &cuda::device_loop_unavailable,
             "Why a graph cannot loop on the device; empty where it can.");
  // module_local, since the tests' emulation binds the same class beside this one.
  py::class_<cuda::SamplingLoop>(module, "CudaSamplingLoop", py::module_local())
      .def(py::init(&make_loop), py::kw_only(), py::arg("device"), py::arg("network"),
           py::arg("x_t"), py::arg("x_in"), py::arg("model_out"), py::arg("type"), py::arg("told"),
           py::arg("told_bytes"), py::arg("sizes"), py::arg("channels_last"),
           py::arg("on_device"))
      .def("run", &run, py::kw_only(), py::arg("steps"), py::arg("seed"), py::arg("clip"),
           py::arg("image_index"), py::arg("rows"), py::arg("told"), py::arg("kept"),
           py::arg("kept_half"), py::arg("chunk"), py::arg("stream"),
           py::arg("on_chunk").none(true));
  module.def("cuda_group_norm_silu", &group_norm_silu);
  module.def("cuda_group_norm_silu_workspace", &group_norm_silu_workspace);
}

}  // namespace advkd
