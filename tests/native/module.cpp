// What only tests and benchmarks need of the extension's runtime, as the Python module native_tests.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "python/pointer.h"
#include "runtime/thread_pool.h"

namespace py = pybind11;

namespace {

// Runs a Python function as tasks on the pool.
void run_tasks(std::int64_t tasks, int threads, const py::function& function) {
  const py::gil_scoped_release released;
  advkd::parallel_for(tasks, threads, [&](std::int64_t task) {
    const py::gil_scoped_acquire acquired;
    function(task);
  });
}

// Stores pass the cache where the processor can, so that only what is copied moves.
void copy_part(const float* from, float* to, std::int64_t n) {
  std::int64_t i = 0;
#ifdef __SSE2__
  for (; i < n && reinterpret_cast<std::uintptr_t>(to + i) % 16 != 0; ++i) to[i] = from[i];
  for (; i + 4 <= n; i += 4) _mm_stream_ps(to + i, _mm_loadu_ps(from + i));
  _mm_sfence();
#endif
  std::memcpy(to + i, from + i, static_cast<std::size_t>(n - i) * sizeof(float));
}

void copy_float32(std::uintptr_t from, std::uintptr_t to, std::int64_t count, int threads) {
  constexpr std::int64_t kTaskElements = 1 << 16;
  const py::gil_scoped_release released;
  const float* const source = advkd::pointer<const float>(from);
  float* const target = advkd::pointer<float>(to);
  advkd::parallel_for((count + kTaskElements - 1) / kTaskElements, threads, [&](std::int64_t task) {
    const std::int64_t first = task * kTaskElements;
    copy_part(source + first, target + first, std::min(kTaskElements, count - first));
  });
}

}  // namespace

PYBIND11_MODULE(native_tests, module) {
  module.def("run_tasks", &run_tasks);
  module.def("copy_float32", &copy_float32);
}
