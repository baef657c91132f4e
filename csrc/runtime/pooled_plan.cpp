#include "runtime/pooled_plan.h"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

#include "runtime/error.h"
#include "runtime/plan_step.h"
#include "runtime/thread_pool.h"

namespace advkd {
namespace {

constexpr std::size_t kHugePage = 2 << 20;
// Floats of memory that wait for the next pass, at most; more goes back to the system.
constexpr std::int64_t kUnusedFloats = 64 << 20;

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

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

PooledPlan::PooledPlan(const PlanData& data) : plan_(data) {}

PooledPlan::~PooledPlan() = default;

std::int64_t PooledPlan::bytes(std::int64_t batch, int threads) const {
  return plan_.floats(batch, threads) * static_cast<std::int64_t>(sizeof(float));
}

std::unique_ptr<Memory> PooledPlan::take(std::int64_t floats) const {
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

void PooledPlan::give_back(std::unique_ptr<Memory> memory) const {
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

void PooledPlan::run(const PlanPass& pass, bool nan_fill) const {
  plan_.check(pass);
  if (pass.batch == 0) return;
  auto memory = take(plan_.floats(pass.batch, pass.threads));
  if (nan_fill) {
    std::fill_n(memory->data(), memory->size(), std::numeric_limits<float>::quiet_NaN());
  }
  plan_.run(pass, memory->data());
  give_back(std::move(memory));
}

std::vector<double> PooledPlan::profile(const PlanPass& pass, int repeats) const {
  plan_.check(pass);
  PlanPass alone = pass;
  alone.threads = 1;
  const Memory memory(plan_.floats(pass.batch, 1));
  const Places places = plan_.places(alone, memory.data());
  const auto& steps = plan_.steps();
  std::vector<double> least(steps.size(), std::numeric_limits<double>::infinity());
  for (int repeat = 0; repeat < repeats; ++repeat) {
    for (std::size_t i = 0; i < steps.size(); ++i) {
      const double before = thread_seconds();
      steps[i]->run(places);
      least[i] = std::min(least[i], thread_seconds() - before);
    }
  }
  return least;
}

void PooledPlan::run_parts(
    std::int64_t images, int threads,
    const std::function<void(std::int64_t first, std::int64_t count, int threads)>& run_part)
    const {
  constexpr std::int64_t kFewImages = 4;  // for each thread; fewer share their operations
  check_threads(threads);
  if (images < 0) refuse("the number of images is negative");
  const std::int64_t most = plan_.images_of_a_part();
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
