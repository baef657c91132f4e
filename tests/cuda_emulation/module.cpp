// The Python module cuda_emulation: what advkd._C has of CUDA, on the fake runtime, and its controls.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "controls.h"
#include "cuda/runtime.h"
#include "python/cuda_bindings.h"
#include "toy_network.h"

namespace py = pybind11;

namespace {

using namespace advkd;

// Captures one pass of the toy network.
std::uintptr_t toy_network(std::uintptr_t x_in, std::uintptr_t model_out, int type,
                           std::uintptr_t time_embedding, std::int64_t elements) {
  cuda::StepBuffers buffers = {};
  buffers.x_in = reinterpret_cast<void*>(x_in);
  buffers.model_out = reinterpret_cast<const void*>(model_out);
  buffers.type = static_cast<cuda::ElementType>(type);
  buffers.time_embedding = reinterpret_cast<void*>(time_embedding);
  buffers.batch = buffers.channels = 1;
  buffers.pixels = elements;
  return reinterpret_cast<std::uintptr_t>(cuda::captured_toy_network(buffers));
}

// A graph whose one node calls a Python function: a network that is torch's, on the CPU.
std::uintptr_t python_network(const py::function& function) {
  cudaGraph_t graph;
  cuda::check(cudaGraphCreate(&graph, 0), "cudaGraphCreate");
  emulation::add_host_node(graph, [function = std::make_shared<py::function>(function)] {
    const py::gil_scoped_acquire acquired;
    (*function)();
  });
  return reinterpret_cast<std::uintptr_t>(graph);
}

}  // namespace

PYBIND11_MODULE(cuda_emulation, module) {
  advkd::bind_cuda(module);
  module.def("toy_network", &toy_network);
  module.def("python_network", &python_network);
  module.def("destroy_graph", [](std::uintptr_t graph) {
    cudaGraphDestroy(reinterpret_cast<cudaGraph_t>(graph));
  });
  module.def("new_stream", [] {
    cudaStream_t stream;
    cuda::check(cudaStreamCreateWithFlags(&stream, 0), "cudaStreamCreateWithFlags");
    return reinterpret_cast<std::uintptr_t>(stream);
  });
  module.def("destroy_stream", [](std::uintptr_t stream) {
    cudaStreamDestroy(reinterpret_cast<cudaStream_t>(stream));
  });
  module.def("sum", [](std::uintptr_t x, std::uintptr_t y, bool barrier) {
    cuda::launch_sum(reinterpret_cast<const float*>(x), reinterpret_cast<float*>(y), barrier,
                     nullptr);
  });
  module.def("synchronize", [] { cuda::check(cudaStreamSynchronize(nullptr), "cudaStreamSynchronize"); });
  module.def("set_order", &emulation::set_order);
  module.def("fail_call", &emulation::fail_call);
  module.def("calls", &emulation::calls);
  module.def("failed", &emulation::failed);
  module.def("set_devices", &emulation::set_devices);
  module.def("set_device", &emulation::set_device);
  module.def("device", &emulation::device);
  module.def("launches", &emulation::launches);
  module.def("live_objects", &emulation::live_objects);
  module.def("pending", &emulation::pending);
  module.def("allocate", [](std::size_t bytes, std::size_t align) {
    return reinterpret_cast<std::uintptr_t>(emulation::allocate_guarded(bytes, align));
  });
  module.def("free", [](std::uintptr_t at) {
    emulation::free_guarded(reinterpret_cast<void*>(at));
  });
  module.def("view", [](std::uintptr_t at, py::ssize_t bytes) {
    return py::memoryview::from_memory(reinterpret_cast<void*>(at), bytes);
  });
}
