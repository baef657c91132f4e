#include "python/cuda_bindings.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>

#include "cuda/philox.h"
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

// network: the address of a cudaGraph_t. sizes: batch, channels, pixels.
std::unique_ptr<cuda::SamplingLoop> make_loop(
    int device, std::uintptr_t network, std::uintptr_t loop, std::uintptr_t x_t,
    std::uintptr_t x_in, std::uintptr_t model_out, const std::string& type,
    std::uintptr_t time_embedding, std::int64_t time_embedding_bytes,
    const std::array<std::int64_t, 3>& sizes) {
  const cuda::StepBuffers buffers = {
      pointer<cuda::LoopState>(loop), pointer<float>(x_t), pointer<void>(x_in),
      pointer<const void>(model_out), element_type(type), pointer<void>(time_embedding),
      time_embedding_bytes, sizes[0], sizes[1], sizes[2]};
  const py::gil_scoped_release released;
  return std::make_unique<cuda::SamplingLoop>(device, reinterpret_cast<cudaGraph_t>(network),
                                              buffers);
}

void run(cuda::SamplingLoop& loop, std::int64_t steps, std::uint64_t seed, std::uint32_t purpose,
         float clip, std::uintptr_t image_index, std::uintptr_t rows,
         std::uintptr_t time_embedding, std::uintptr_t saved, bool saved_half, std::int64_t chunk,
         std::uintptr_t stream, const py::object& on_chunk) {
  const bool reports = !on_chunk.is_none();
  const py::gil_scoped_release released;
  loop.run({steps, seed, purpose, clip, pointer<const std::int64_t>(image_index),
            pointer<const cuda::StepRow>(rows), pointer<const void>(time_embedding),
            pointer<void>(saved), saved_half, chunk,
            [&](std::int64_t done) {
              const py::gil_scoped_acquire acquired;
              if (PyErr_CheckSignals() != 0) throw py::error_already_set();
              if (reports) on_chunk(done);
            }},
           reinterpret_cast<cudaStream_t>(stream));
}

// sizes: batch, channels, pixels.
void normals(std::uint64_t seed, std::uintptr_t image_index, std::uint32_t step,
             const std::array<std::int64_t, 3>& sizes, bool channels_last, std::uintptr_t out,
             int device, std::uintptr_t stream) {
  cuda::launch_normals({seed, step, pointer<const std::int64_t>(image_index), sizes[0], sizes[1],
                        sizes[2], channels_last, pointer<float>(out)},
                       device, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_cuda(py::module_& module) {
  module.attr("cuda_version") = std::to_string(CUDART_VERSION / 1000) + "." +
                                std::to_string(CUDART_VERSION % 1000 / 10);
  module.attr("cuda_archs") = ADVKD_CUDA_ARCHS;
  module.attr("cuda_loop_bytes") = sizeof(cuda::LoopState);
  module.def("cuda_unavailable", &cuda::unavailable,
             "Why there is no CUDA device to use; empty where there is one.");
  module.def("cuda_philox_normal", &normals, py::kw_only(), py::arg("seed"),
             py::arg("image_index"), py::arg("step"), py::arg("sizes"), py::arg("channels_last"),
             py::arg("out"), py::arg("device"), py::arg("stream"));
  // module_local, since the tests' emulation binds the same class beside this one.
  py::class_<cuda::SamplingLoop>(module, "CudaSamplingLoop", py::module_local())
      .def(py::init(&make_loop), py::kw_only(), py::arg("device"), py::arg("network"),
           py::arg("loop"), py::arg("x_t"), py::arg("x_in"), py::arg("model_out"), py::arg("type"),
           py::arg("time_embedding"), py::arg("time_embedding_bytes"), py::arg("sizes"))
      .def("run", &run, py::kw_only(), py::arg("steps"), py::arg("seed"), py::arg("purpose"),
           py::arg("clip"), py::arg("image_index"), py::arg("rows"), py::arg("time_embedding"),
           py::arg("saved"), py::arg("saved_half"), py::arg("chunk"), py::arg("stream"),
           py::arg("on_chunk").none(true));
}

}  // namespace advkd
