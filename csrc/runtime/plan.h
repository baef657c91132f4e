// A network as plain data: operations on buffers of one arena, and packed weights. advkd/engine
// writes it; here it is checked, so that a corrupt plan is refused, and run.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
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

struct Places;
class PlanStep;

class Plan {
 public:
  // Refuses a plan that would read or write what it must not.
  explicit Plan(const PlanData& data);
  ~Plan();

  const PlanData& data() const { return data_; }

  // Floats of the memory that a pass of so many images takes: arena and workspace.
  std::int64_t floats(std::int64_t batch, int threads) const;

  // Images of a pass at most, or fewer where a core's caches or a little memory serve no more.
  std::int64_t images_of_a_part() const;

  // Refuses a pass of too many images or threads, without what it needs, or with unknown labels.
  void check(const PlanPass& pass) const;

  // One pass that has been checked. `memory` has floats(pass.batch, pass.threads) floats.
  void run(const PlanPass& pass, float* memory) const;

  // Where the buffers of a pass lie in its memory, and its operations, to run them one by one.
  Places places(const PlanPass& pass, float* memory) const;
  const std::vector<std::unique_ptr<PlanStep>>& steps() const { return steps_; }

 private:
  PlanData data_;
  std::vector<std::unique_ptr<PlanStep>> steps_;
};

// Refuses a number of threads that no pass can have.
void check_threads(int threads);

}  // namespace advkd
