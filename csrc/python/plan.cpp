#include "runtime/pooled_plan.h"

#include <pybind11/stl.h>

#include <array>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "python/bindings.h"
#include "python/pointer.h"
#include "runtime/sampling_loop.h"
#include "runtime/student_images.h"

namespace py = pybind11;

namespace advkd {
namespace {

// (offset, pixels, channels)
using BufferTuple = std::array<std::int64_t, 3>;
// (kind, numbers, factor)
using OpTuple = std::tuple<std::string, std::map<std::string, std::int64_t>, double>;

std::unique_ptr<PooledPlan> make_plan(const std::vector<BufferTuple>& buffers,
                                const std::vector<OpTuple>& ops, std::int64_t arena,
                                std::int64_t conditioning, std::int64_t classes,
                                std::int64_t batch, std::uintptr_t weights,
                                std::int64_t weights_size) {
  PlanData data = {{},      {},    arena, conditioning, classes,
                   batch, pointer<const float>(weights), weights_size};
  for (const BufferTuple& b : buffers) data.buffers.push_back({b[0], b[1], b[2]});
  for (const auto& [kind, numbers, factor] : ops) data.ops.push_back({kind, numbers, factor});
  return std::make_unique<PooledPlan>(data);
}

void run(const PooledPlan& plan, std::uintptr_t x, std::uintptr_t y, std::uintptr_t conditioning,
         std::uintptr_t labels, std::int64_t images, int threads, bool nan_fill) {
  const py::gil_scoped_release released;
  const auto size = [&](std::size_t buffer) {
    return plan.data().buffers[buffer].pixels * plan.data().buffers[buffer].channels;
  };
  plan.run_parts(images, threads, [&](std::int64_t first, std::int64_t count, int part_threads) {
    const std::int64_t* const all = pointer<const std::int64_t>(labels);
    plan.run({pointer<const float>(x) + first * size(0), pointer<float>(y) + first * size(1),
              pointer<const float>(conditioning), all == nullptr ? nullptr : all + first, count,
              part_threads},
             nan_fill);
  });
}

std::vector<double> profile(const PooledPlan& plan, std::uintptr_t x, std::uintptr_t y,
                            std::uintptr_t conditioning, std::uintptr_t labels,
                            std::int64_t images, int repeats) {
  const py::gil_scoped_release released;
  return plan.profile({pointer<const float>(x), pointer<float>(y),
                       pointer<const float>(conditioning), pointer<const std::int64_t>(labels),
                       images, 1},
                      repeats);
}

// Python's pending signals, Ctrl-C among them, raise here; only in its main thread.
void check_signals() {
  const py::gil_scoped_acquire acquired;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void sample(const PooledPlan& plan, std::uintptr_t coefficients, std::uintptr_t conditioning,
            std::int64_t steps, float clip, std::uint64_t seed, int purpose,
            std::uintptr_t image_index, std::uintptr_t labels, std::int64_t images,
            const std::vector<std::int64_t>& saved, bool save_denoised, std::uintptr_t out,
            bool half, std::int64_t image_stride, std::int64_t saved_stride, int threads,
            const py::object& on_pass, const py::object& on_step, bool nan_fill) {
  const bool calls_on_pass = !on_pass.is_none(), calls_on_step = !on_step.is_none();
  const py::gil_scoped_release released;
  SamplingLoopArgs args = {};
  args.plan = &plan;
  args.steps = steps;
  args.coefficients = pointer<const double>(coefficients);
  args.conditioning = pointer<const float>(conditioning);
  args.clip = clip;
  args.seed = seed;
  args.purpose = purpose;
  args.images = images;
  args.image_index = pointer<const std::int64_t>(image_index);
  args.labels = pointer<const std::int64_t>(labels);
  args.saved = saved;
  args.save_denoised = save_denoised;
  args.out = pointer<void>(out);
  args.half = half;
  args.image_stride = image_stride;
  args.saved_stride = saved_stride;
  args.threads = threads;
  args.nan_fill = nan_fill;
  args.on_pass = [&] {
    check_signals();
    if (!calls_on_pass) return;
    const py::gil_scoped_acquire acquired;
    on_pass();
  };
  args.on_step = [&](std::int64_t done) {
    if (!calls_on_step) return;
    const py::gil_scoped_acquire acquired;
    on_step(done);
  };
  sampling_loop(args);
}

void student_images_of(const PooledPlan& plan, std::uint64_t seed, int purpose,
                       std::int64_t first, std::int64_t images, std::uintptr_t labels,
                       std::uintptr_t out, int threads) {
  const py::gil_scoped_release released;
  student_images({&plan, seed, purpose, first, images, pointer<const std::int64_t>(labels),
                  pointer<float>(out), threads});
}

}  // namespace

void bind_plan(py::module_& module) {
  py::class_<PooledPlan>(module, "Plan")
      .def(py::init(&make_plan), py::kw_only(), py::arg("buffers"), py::arg("ops"),
           py::arg("arena"), py::arg("conditioning"), py::arg("classes"), py::arg("batch"),
           py::arg("weights"), py::arg("weights_size"))
      .def("bytes", &PooledPlan::bytes, py::arg("batch"), py::arg("threads"))
      .def("run", &run, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("conditioning"),
           py::arg("labels"), py::arg("images"), py::arg("threads"), py::arg("nan_fill"))
      .def("student_images", &student_images_of, py::kw_only(), py::arg("seed"),
           py::arg("purpose"), py::arg("first"), py::arg("images"), py::arg("labels"),
           py::arg("out"), py::arg("threads"))
      .def("profile", &profile, py::kw_only(), py::arg("x"), py::arg("y"),
           py::arg("conditioning"), py::arg("labels"), py::arg("images"), py::arg("repeats"))
      .def("sample", &sample, py::kw_only(), py::arg("coefficients"), py::arg("conditioning"),
           py::arg("steps"), py::arg("clip"), py::arg("seed"), py::arg("purpose"),
           py::arg("image_index"), py::arg("labels"), py::arg("images"), py::arg("saved"),
           py::arg("save_denoised"), py::arg("out"), py::arg("half"), py::arg("image_stride"),
           py::arg("saved_stride"), py::arg("threads"), py::arg("on_pass").none(true),
           py::arg("on_step").none(true), py::arg("nan_fill"));
  module.def("ask_for_huge_pages", [](std::uintptr_t at, std::size_t bytes) {
    ask_for_huge_pages(pointer<void>(at), bytes);
  });
}

}  // namespace advkd
