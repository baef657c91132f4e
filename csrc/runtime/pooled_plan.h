// A plan with memory for its passes, for any number of images and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "runtime/plan.h"

namespace advkd {

class Memory;

// Asks the system to back untouched memory by huge pages, where it has them.
void ask_for_huge_pages(void* at, std::size_t bytes);

class PooledPlan {
 public:
  // As Plan's.
  explicit PooledPlan(const PlanData& data);
  ~PooledPlan();

  const PlanData& data() const { return plan_.data(); }

  // Bytes of the memory that a pass of so many images takes.
  std::int64_t bytes(std::int64_t batch, int threads) const;

  // One pass of at most `batch` images. `nan_fill` fills its memory with NaN first, for tests.
  void run(const PlanPass& pass, bool nan_fill = false) const;

  // Seconds of CPU time that each operation takes on this thread, the least of `repeats` passes.
  std::vector<double> profile(const PlanPass& pass, int repeats) const;

  // Any number of images, in parts of at most `batch`, or of fewer that a cache holds. Where images
  // are many, the threads take one part each, so that there is no barrier within a pass; else they
  // share every part.
  void run_parts(std::int64_t images, int threads,
                 const std::function<void(std::int64_t first, std::int64_t count, int threads)>&
                     run_part) const;

 private:
  std::unique_ptr<Memory> take(std::int64_t floats) const;
  void give_back(std::unique_ptr<Memory> memory) const;

  const Plan plan_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Memory>> unused_;
};

}  // namespace advkd
