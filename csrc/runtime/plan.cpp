#include "runtime/plan.h"

#include <algorithm>

#include "runtime/error.h"
#include "runtime/plan_step.h"

namespace advkd {
namespace {

constexpr int kMostThreads = 1 << 12;

std::int64_t aligned(std::int64_t floats) {
  return (floats + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

void check_threads(int threads) {
  if (threads < 1 || threads > kMostThreads) {
    refuse("threads=" + std::to_string(threads) + " is not between 1 and " +
           std::to_string(kMostThreads));
  }
}

Plan::Plan(const PlanData& data) : data_(data) {
  check_sizes(data_);
  for (std::size_t i = 0; i < data_.ops.size(); ++i) {
    steps_.push_back(step_of(data_.ops[i], i, data_));
  }
  check_flow(data_, steps_);
}

Plan::~Plan() = default;

std::int64_t Plan::floats(std::int64_t batch, int threads) const {
  check_threads(threads);
  std::int64_t workspace = 0;
  for (const auto& step : steps_) workspace = std::max(workspace, step->workspace(batch, threads));
  const std::int64_t size = sum(aligned(product(data_.arena, batch)), workspace);
  product(size, sizeof(float));  // its bytes can be counted, too
  return size;
}

std::int64_t Plan::images_of_a_part() const {
  // Fewer images than this would read the weights too often.
  constexpr std::int64_t kFewestImages = 4;
  // Floats of an arena that a core's caches serve well; and, where they serve too few images, of
  // one that memory should serve: twice as many images would save 1% of a pass.
  constexpr std::int64_t kCachedFloats = 1 << 20, kMostFloats = 12 << 20;
  const std::int64_t arena = std::max<std::int64_t>(1, data_.arena), cached = kCachedFloats / arena;
  const std::int64_t most = cached < kFewestImages ? kMostFloats / arena : cached;
  return std::min(data_.batch, std::max(kFewestImages, most));
}

void Plan::check(const PlanPass& pass) const {
  check_threads(pass.threads);
  if (pass.batch < 0 || pass.batch > data_.batch) {
    refuse("a pass of " + std::to_string(pass.batch) + " images, but the plan is for at most " +
           std::to_string(data_.batch));
  }
  if (data_.conditioning > 0 && pass.conditioning == nullptr) {
    refuse("the plan needs a conditioning");
  }
  if (data_.classes == 0) return;
  if (pass.labels == nullptr) refuse("the plan needs labels");
  for (std::int64_t b = 0; b < pass.batch; ++b) {
    if (pass.labels[b] < 0 || pass.labels[b] >= data_.classes) {
      refuse("label " + std::to_string(pass.labels[b]) + " is not one of 0 .. " +
             std::to_string(data_.classes - 1));
    }
  }
}

Places Plan::places(const PlanPass& pass, float* memory) const {
  return {data_, pass, memory, memory + aligned(data_.arena * pass.batch)};
}

void Plan::run(const PlanPass& pass, float* memory) const {
  const Places at = places(pass, memory);
  for (const auto& step : steps_) step->run(at);
}

}  // namespace advkd
