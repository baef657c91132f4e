#include "runtime/plan.h"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include "runtime/plan_step.h"
#include "runtime/thread_pool.h"

namespace advkd {
namespace {

constexpr std::size_t kHugePage = 2 << 20;

}  // namespace

void ask_for_huge_pages(void* at, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(at) + kHugePage - 1) / kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(at) + bytes) / kHugePage;
  // Only a hint: where it is refused, pages are small.
  if (first < end) {
    madvise(reinterpret_cast<void*>(first * kHugePage), (end - first) * kHugePage, MADV_HUGEPAGE);
  }
#else
  (void)at;
  (void)bytes;
#endif
}

// Uninitialized floats on a cache line's boundary, or on a huge page's where there are many.
class Memory {
 public:
  explicit Memory(std::int64_t size)
      : size_(size),
        bytes_(static_cast<std::size_t>(size) * sizeof(float)),
        boundary_(bytes_ < 2 * kHugePage ? 64 : kHugePage),
        data_(static_cast<float*>(::operator new(bytes_, std::align_val_t{boundary_}))) {
    if (boundary_ == kHugePage) ask_for_huge_pages(data_, bytes_);
  }
  ~Memory() { ::operator delete(data_, std::align_val_t{boundary_}); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  std::int64_t size() const { return size_; }
  float* data() const { return data_; }

 private:
  const std::int64_t size_;
  const std::size_t bytes_, boundary_;
  float* const data_;
};

namespace {

constexpr int kMostThreads = 1 << 12;
// Floats of memory that wait for the next pass, at most; more goes back to the system.
constexpr std::int64_t kUnusedFloats = 64 << 20;

void check_threads(int threads) {
  if (threads < 1 || threads > kMostThreads) {
    throw std::invalid_argument("threads=" + std::to_string(threads) + " is not between 1 and " +
                                std::to_string(kMostThreads));
  }
}

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

std::int64_t aligned(std::int64_t floats) {
  return (floats + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

Plan::Plan(const PlanData& data) : data_(data) {
  check_sizes(data_);
  for (std::size_t i = 0; i < data_.ops.size(); ++i) {
    steps_.push_back(step_of(data_.ops[i], i, data_));
  }
  check_flow(data_, steps_);
}

Plan::~Plan() = default;

std::int64_t Plan::bytes(std::int64_t batch, int threads) const {
  check_threads(threads);
  std::int64_t workspace = 0;
  for (const auto& step : steps_) workspace = std::max(workspace, step->workspace(batch, threads));
  const auto size = static_cast<std::int64_t>(sizeof(float));
  return product(sum(aligned(product(data_.arena, batch)), workspace), size);
}

std::unique_ptr<Memory> Plan::take(std::int64_t floats) const {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& memory : unused_) {
      if (memory->size() < floats) continue;
      std::swap(memory, unused_.back());
      auto found = std::move(unused_.back());
      unused_.pop_back();
      return found;
    }
  }
  return std::make_unique<Memory>(floats);
}

void Plan::give_back(std::unique_ptr<Memory> memory) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  unused_.push_back(std::move(memory));
  std::int64_t floats = 0;
  for (const auto& each : unused_) floats += each->size();
  // The longest unused goes first: it may be too small for what is asked for now.
  while (floats > kUnusedFloats) {
    floats -= unused_.front()->size();
    unused_.erase(unused_.begin());
  }
}

void Plan::check(const PlanPass& pass) const {
  check_threads(pass.threads);
  if (pass.batch < 0 || pass.batch > data_.batch) {
    throw std::invalid_argument("a pass of " + std::to_string(pass.batch) + " images, but the " +
                                "plan is for at most " + std::to_string(data_.batch));
  }
  if (data_.conditioning > 0 && pass.conditioning == nullptr) {
    throw std::invalid_argument("the plan needs a conditioning");
  }
  if (data_.classes > 0) {
    if (pass.labels == nullptr) throw std::invalid_argument("the plan needs labels");
    for (std::int64_t b = 0; b < pass.batch; ++b) {
      if (pass.labels[b] < 0 || pass.labels[b] >= data_.classes) {
        throw std::invalid_argument("label " + std::to_string(pass.labels[b]) +
                                    " is not one of 0 .. " + std::to_string(data_.classes - 1));
      }
    }
  }
}

void Plan::run(const PlanPass& pass, bool nan_fill) const {
  check(pass);
  if (pass.batch == 0) return;
  const std::int64_t floats =
      bytes(pass.batch, pass.threads) / static_cast<std::int64_t>(sizeof(float));
  auto memory = take(floats);
  if (nan_fill) {
    std::fill_n(memory->data(), memory->size(), std::numeric_limits<float>::quiet_NaN());
  }
  const Places places = {data_, pass, memory->data(),
                         memory->data() + aligned(data_.arena * pass.batch)};
  for (const auto& step : steps_) step->run(places);
  give_back(std::move(memory));
}

std::vector<double> Plan::profile(const PlanPass& pass, int repeats) const {
  check(pass);
  const Memory memory(bytes(pass.batch, 1) / static_cast<std::int64_t>(sizeof(float)));
  PlanPass alone = pass;
  alone.threads = 1;
  const Places places = {data_, alone, memory.data(),
                         memory.data() + aligned(data_.arena * pass.batch)};
  std::vector<double> least(steps_.size(), std::numeric_limits<double>::infinity());
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      const double before = thread_seconds();
      steps_[i]->run(places);
      least[i] = std::min(least[i], thread_seconds() - before);
    }
  }
  return least;
}

void Plan::run_parts(
    std::int64_t images, int threads,
    const std::function<void(std::int64_t first, std::int64_t count, int threads)>& run_part)
    const {
  // Fewer images than this in a part would read the weights too often.
  constexpr std::int64_t kFewImages = 4;
  // Floats of an arena that a core's caches serve well.
  constexpr std::int64_t kCachedFloats = 1 << 20;
  check_threads(threads);
  if (images < 0) throw std::invalid_argument("the number of images is negative");
  const std::int64_t cached = kCachedFloats / std::max<std::int64_t>(1, data_.arena);
  const std::int64_t most = cached < kFewImages ? data_.batch : std::min(data_.batch, cached);
  std::int64_t parts = (images + most - 1) / most;
  const bool apart = threads > 1 && images >= kFewImages * threads;
  if (apart) parts = (parts + threads - 1) / threads * threads;
  const std::int64_t size = parts == 0 ? 0 : (images + parts - 1) / parts;
  parts = size == 0 ? 0 : (images + size - 1) / size;
  parallel_for(parts, apart ? threads : 1, [&](std::int64_t part) {
    const std::int64_t first = part * size;
    run_part(first, std::min(size, images - first), apart ? 1 : threads);
  });
}

}  // namespace advkd
