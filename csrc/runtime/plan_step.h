// The parts of a plan's operations: their checked numbers, the slices of buffers that they read and
// write, and where these lie in a pass.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/convolution.h"
#include "runtime/error.h"
#include "runtime/plan.h"

namespace advkd {

constexpr std::int64_t kLargestSide = 1 << 14;
constexpr std::int64_t kLargestChannels = 1 << 20;
constexpr std::int64_t kAlignment = 16;  // floats of a cache line

[[noreturn]] inline void corrupt(const std::string& what) {
  refuse("corrupt plan: " + what);
}

inline std::int64_t product(std::int64_t a, std::int64_t b) {
  std::int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) corrupt("a size overflows");
  return result;
}

inline std::int64_t sum(std::int64_t a, std::int64_t b) {
  std::int64_t result;
  if (__builtin_add_overflow(a, b, &result)) corrupt("a size overflows");
  return result;
}

// Channels [channel, channel + channels) of every pixel of a buffer.
struct Slice {
  std::int64_t buffer, channel, channels;
  std::int64_t pixels, stride;  // of the buffer
};

struct Access {
  Slice slice;
  bool writes;
};

// Where the buffers of one pass lie.
struct Places {
  const PlanData& plan;
  const PlanPass& pass;
  float* arena;
  float* workspace;

  const float* input(const Slice& slice) const {
    return slice.buffer == 0 ? pass.x + slice.channel : output(slice);
  }
  // Buffer 0 is never written to: check_flow has made sure of that.
  float* output(const Slice& slice) const {
    if (slice.buffer == 1) return pass.y + slice.channel;
    return arena + plan.buffers[static_cast<std::size_t>(slice.buffer)].offset * pass.batch +
           slice.channel;
  }
};

// The numbers of one operation, each taken once and checked.
class Fields {
 public:
  Fields(const PlanOp& op, std::size_t index, const PlanData& plan)
      : op_(op), where_("operation " + std::to_string(index) + " (" + op.kind + ")"), plan_(plan) {}

  const PlanData& plan() const { return plan_; }
  double factor() const {
    if (!std::isfinite(op_.factor)) fail("its factor is not finite");
    return op_.factor;
  }

  [[noreturn]] void fail(const std::string& what) const { corrupt(where_ + ": " + what); }

  std::int64_t number(const std::string& name, std::int64_t low, std::int64_t high) {
    const auto found = op_.numbers.find(name);
    if (found == op_.numbers.end()) fail("it has no " + name);
    ++taken_;
    const std::int64_t value = found->second;
    if (value < low || value > high) {
      fail(name + "=" + std::to_string(value) + " is not between " + std::to_string(low) + " and " +
           std::to_string(high));
    }
    return value;
  }

  std::int64_t channels(const std::string& name) { return number(name, 1, kLargestChannels); }

  // `name` is the buffer, `name`_channel the first channel, 0 where it is left out.
  Slice slice(const std::string& name, std::int64_t channels, std::int64_t pixels) {
    const std::int64_t last = static_cast<std::int64_t>(plan_.buffers.size()) - 1;
    const std::int64_t buffer = number(name, 0, last);
    const PlanBuffer& b = plan_.buffers[static_cast<std::size_t>(buffer)];
    if (b.pixels != pixels) fail(name + " has other pixels than the operation");
    if (channels > b.channels) fail(name + " has fewer channels than the operation");
    const std::string offset = name + "_channel";
    const std::int64_t first = has(offset) ? number(offset, 0, b.channels - channels) : 0;
    return {buffer, first, channels, pixels, b.channels};
  }

  // A dense vector of each image.
  Slice vector(const std::string& name, std::int64_t channels) {
    const Slice found = slice(name, channels, 1);
    if (found.stride != channels) fail(name + " is not dense");
    return found;
  }

  bool has(const std::string& name) const { return op_.numbers.count(name) != 0; }

  // The offset of `size` weights.
  const float* weights(const std::string& name, std::int64_t size) {
    if (size > plan_.weights_size) fail(name + " needs more weights than there are");
    return plan_.weights + number(name, 0, plan_.weights_size - size);
  }

  // The offset of `size` floats of the conditioning.
  std::int64_t conditioning(const std::string& name, std::int64_t size) {
    if (size > plan_.conditioning) fail(name + " needs more floats than the conditioning has");
    return number(name, 0, plan_.conditioning - size);
  }

  void finish() const {
    if (taken_ != op_.numbers.size()) fail("it has numbers that are not known");
  }

 private:
  const PlanOp& op_;
  const std::string where_;
  const PlanData& plan_;
  std::size_t taken_ = 0;
};

// One operation, ready to run.
class PlanStep {
 public:
  virtual ~PlanStep() = default;
  // Every operation has its own. Not pure: the message for a call of a pure method would bring all
  // of printf into a browser's build.
  virtual void run(const Places&) const {}
  virtual std::int64_t workspace(std::int64_t, int) const { return 0; }
  const std::vector<Access>& accesses() const { return accesses_; }

 protected:
  Slice reads(const Slice& slice) {
    accesses_.push_back({slice, false});
    return slice;
  }
  Slice writes(const Slice& slice) {
    accesses_.push_back({slice, true});
    return slice;
  }

 private:
  std::vector<Access> accesses_;
};

// The shape of a convolution for one image; refuses one that no kernel serves.
ConvolutionShape convolution_shape(Fields& fields);

// The operation with the number `index` of a plan; refuses one that would read or write what it
// must not.
std::unique_ptr<PlanStep> step_of(const PlanOp& op, std::size_t index, const PlanData& plan);

// The same for operations of teachers alone, which builds for students leave out; null for others.
#ifdef ADVKD_TEACHERS
std::unique_ptr<PlanStep> teacher_step_of(const std::string& kind, Fields& fields);
#endif

// Refuses buffers that are impossible or do not lie in the arena.
void check_sizes(const PlanData& plan);

// Refuses a plan unless what is read has been written before, the input is left alone, the output
// becomes whole, and buffers that are in use at the same time lie apart.
void check_flow(const PlanData& plan, const std::vector<std::unique_ptr<PlanStep>>& steps);

}  // namespace advkd
