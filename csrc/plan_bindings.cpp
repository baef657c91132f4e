#include "plan_bindings.h"

#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/convolution.h"
#include "cpu/plan.h"
#include "cpu/sampling_loop.h"
#include "pointer.h"

namespace py = pybind11;

namespace advkd {
namespace {

using BufferTuple = std::array<std::int64_t, 3>;
using OpTuple = std::tuple<std::string, std::map<std::string, std::int64_t>, double>;

std::unique_ptr<Plan> make_plan(const std::vector<BufferTuple>& buffers,
                                const std::vector<OpTuple>& ops, std::int64_t arena,
                                std::int64_t row, std::int64_t classes, std::int64_t batch,
                                std::uintptr_t weights, std::int64_t weights_size) {
  PlanData data = {{}, {}, arena, row, classes, batch, pointer<const float>(weights), weights_size};
  for (const BufferTuple& b : buffers) data.buffers.push_back({b[0], b[1], b[2]});
  for (const auto& [kind, numbers, factor] : ops) data.ops.push_back({kind, numbers, factor});
  return std::make_unique<Plan>(data);
}

void run(const Plan& plan, std::uintptr_t x, std::uintptr_t y, std::uintptr_t row,
         std::uintptr_t labels, std::int64_t images, int threads, bool nan_fill) {
  const py::gil_scoped_release released;
  const auto size = [&](std::size_t buffer) {
    return plan.data().buffers[buffer].pixels * plan.data().buffers[buffer].channels;
  };
  plan.run_parts(images, threads, [&](std::int64_t first, std::int64_t count, int part_threads) {
    const std::int64_t* const all = pointer<const std::int64_t>(labels);
    plan.run({pointer<const float>(x) + first * size(0), pointer<float>(y) + first * size(1),
              pointer<const float>(row), all == nullptr ? nullptr : all + first, count,
              part_threads},
             nan_fill);
  });
}

std::vector<double> profile(const Plan& plan, std::uintptr_t x, std::uintptr_t y,
                            std::uintptr_t row, std::uintptr_t labels, std::int64_t images,
                            int repeats) {
  const py::gil_scoped_release released;
  return plan.profile({pointer<const float>(x), pointer<float>(y), pointer<const float>(row),
                       pointer<const std::int64_t>(labels), images, 1},
                      repeats);
}

// Python's pending signals, Ctrl-C among them, raise here; only in its main thread.
void check_signals() {
  const py::gil_scoped_acquire acquired;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

void sample(const Plan& plan, std::uintptr_t coefficients, std::uintptr_t rows, std::int64_t steps,
            float clip, std::uint64_t seed, std::uintptr_t image_index, std::uintptr_t labels,
            std::int64_t images, const std::vector<std::int64_t>& kept, bool keep_denoised,
            std::uintptr_t out, bool half, std::int64_t image_stride, std::int64_t kept_stride,
            int threads, const py::object& on_pass, const py::object& on_step, bool nan_fill) {
  const bool told = !on_pass.is_none(), stepwise = !on_step.is_none();
  const py::gil_scoped_release released;
  SamplingLoopArgs args = {&plan, steps, pointer<const double>(coefficients),
                           pointer<const float>(rows), clip, seed, images,
                           pointer<const std::int64_t>(image_index),
                           pointer<const std::int64_t>(labels), kept, keep_denoised,
                           pointer<void>(out), half, image_stride, kept_stride, threads, nan_fill,
                           {}, {}};
  args.on_pass = [&] {
    check_signals();
    if (!told) return;
    const py::gil_scoped_acquire acquired;
    on_pass();
  };
  args.on_step = [&](std::int64_t done) {
    if (!stepwise) return;
    const py::gil_scoped_acquire acquired;
    on_step(done);
  };
  sampling_loop(args);
}

ConvolutionShape shape_of(const std::array<std::int64_t, 5>& sizes, int kernel, int stride,
                          int pad_before, int pad_after, bool upsample) {
  return {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], kernel, stride, pad_before, pad_after,
          upsample};
}

py::tuple convolution_plan(const std::array<std::int64_t, 5>& sizes, int kernel, int stride,
                           int pad_before, int pad_after, bool upsample, int threads) {
  const ConvolutionShape shape = shape_of(sizes, kernel, stride, pad_before, pad_after, upsample);
  if (!supported(shape)) throw std::invalid_argument("no kernel serves such a convolution");
  const ConvolutionAlgorithm algorithm = choose_algorithm(shape, threads);
  return py::make_tuple(static_cast<int>(algorithm), packed_size(shape));
}

// weight: (out, in, kernel, kernel), contiguous
void convolution_pack(const std::array<std::int64_t, 5>& sizes, int kernel, int stride,
                      int pad_before, int pad_after, bool upsample, std::uintptr_t weight,
                      std::uintptr_t packed) {
  const py::gil_scoped_release released;
  const ConvolutionShape shape = shape_of(sizes, kernel, stride, pad_before, pad_after, upsample);
  const std::int64_t area = static_cast<std::int64_t>(kernel) * kernel;
  pack_weights(shape, {pointer<const float>(weight), shape.in_channels * area, area, kernel, 1},
               pointer<float>(packed));
}

// Two sums of a run of words (Fletcher 1982), lane by lane: the first is changed by a change of any
// word, the second also where words change places.
class Fletcher {
 public:
  void add(const char* at, std::int64_t bytes) {
    std::int64_t i = 0;
    for (; i + kBlock <= bytes; i += kBlock) {
      std::uint64_t words[kLanes];
      std::memcpy(words, at + i, kBlock);
      for (int lane = 0; lane < kLanes; ++lane) {
        first_[lane] += words[lane];
        second_[lane] += first_[lane];
      }
    }
    std::uint64_t rest[kLanes] = {};
    std::memcpy(rest, at + i, static_cast<std::size_t>(bytes - i));
    for (int lane = 0; lane < kLanes; ++lane) {
      first_[lane] += rest[lane];
      second_[lane] += first_[lane];
    }
  }

  std::uint64_t result() const {
    std::uint64_t all = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      for (const std::uint64_t sum : {first_[lane], second_[lane]}) {
        all = (all ^ sum) * 0xD6E8FEB86659FD93u;
        all ^= all >> 32;
      }
    }
    return all;
  }

 private:
  static constexpr int kLanes = 8;
  static constexpr std::int64_t kBlock = 8 * kLanes;
  std::uint64_t first_[kLanes] = {}, second_[kLanes] = {};
};

// A number that tells contents apart; it stays the same only by a chance of 2^-64.
std::uint64_t fingerprint(const std::vector<std::pair<std::uintptr_t, std::int64_t>>& parts) {
  const py::gil_scoped_release released;
  Fletcher sums;
  for (const auto& [address, floats] : parts) {
    sums.add(pointer<const char>(address), floats * static_cast<std::int64_t>(sizeof(float)));
  }
  return sums.result();
}

}  // namespace

void bind_plan(py::module_& module) {
  py::class_<Plan>(module, "Plan")
      .def(py::init(&make_plan), py::kw_only(), py::arg("buffers"), py::arg("ops"),
           py::arg("arena"), py::arg("row"), py::arg("classes"), py::arg("batch"),
           py::arg("weights"), py::arg("weights_size"))
      .def("bytes", &Plan::bytes, py::arg("batch"), py::arg("threads"))
      .def("run", &run, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("row"),
           py::arg("labels"), py::arg("images"), py::arg("threads"), py::arg("nan_fill"))
      .def("profile", &profile, py::kw_only(), py::arg("x"), py::arg("y"), py::arg("row"),
           py::arg("labels"), py::arg("images"), py::arg("repeats"))
      .def("sample", &sample, py::kw_only(), py::arg("coefficients"), py::arg("rows"),
           py::arg("steps"), py::arg("clip"), py::arg("seed"), py::arg("image_index"),
           py::arg("labels"), py::arg("images"), py::arg("kept"), py::arg("keep_denoised"),
           py::arg("out"), py::arg("half"), py::arg("image_stride"), py::arg("kept_stride"),
           py::arg("threads"), py::arg("on_pass").none(true), py::arg("on_step").none(true),
           py::arg("nan_fill"));
  module.def("convolution_plan", &convolution_plan);
  module.def("convolution_pack", &convolution_pack);
  module.def("fingerprint", &fingerprint);
  module.def("ask_for_huge_pages", [](std::uintptr_t at, std::size_t bytes) {
    ask_for_huge_pages(pointer<void>(at), bytes);
  });
  module.def("half_of", &half_of);
}

}  // namespace advkd
