// A network as plain data: operations on buffers of one arena, and packed weights. advkd/engine
// writes it; here it is checked, so that a corrupt plan is an exception, and run.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace advkd {

// (B, pixels, channels) floats at offset * B of the arena. Buffer 0 is the input and buffer 1 the
// output; these two lie in the caller's memory.
struct PlanBuffer {
  std::int64_t offset, pixels, channels;
};

struct PlanOp {
  std::string kind;
  std::map<std::string, std::int64_t> numbers;
  double factor;  // eps of a norm; the scale of a convolution's result, of attention's scores
};

struct PlanData {
  std::vector<PlanBuffer> buffers;
  std::vector<PlanOp> ops;
  std::int64_t arena;         // floats for each image
  std::int64_t conditioning;  // floats that depend on the time, the same for all images of a pass
  std::int64_t classes;       // labels lie in [0, classes)
  std::int64_t batch;         // images of a pass at most
  const float* weights;       // outlive the plan
  std::int64_t weights_size;
};

// What one pass reads and writes.
struct PlanPass {
  const float* x;              // (batch, pixels, channels) of buffer 0
  float* y;                    // the same of buffer 1
  const float* conditioning;   // (conditioning,)
  const std::int64_t* labels;  // (batch,), null without classes
  std::int64_t batch;
  int threads;
};

class Memory;
class PlanStep;

// Asks the system to back untouched memory by huge pages, where it has them.
void ask_for_huge_pages(void* at, std::size_t bytes);

class Plan {
 public:
  // Throws std::invalid_argument for a plan that would read or write what it must not.
  explicit Plan(const PlanData& data);
  ~Plan();

  const PlanData& data() const { return data_; }

  // Bytes of the memory that a pass of so many images takes: arena and workspace.
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
  void check(const PlanPass& pass) const;
  std::unique_ptr<Memory> take(std::int64_t floats) const;
  void give_back(std::unique_ptr<Memory> memory) const;

  PlanData data_;
  std::vector<std::unique_ptr<PlanStep>> steps_;
  mutable std::mutex mutex_;
  mutable std::vector<std::unique_ptr<Memory>> unused_;
};

}  // namespace advkd
