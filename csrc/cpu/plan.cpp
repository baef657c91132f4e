#include "cpu/plan.h"

#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <utility>

#include "cpu/convolution.h"
#include "cpu/dispatch.h"
#include "cpu/thread_pool.h"

namespace advkd {
namespace {

constexpr std::size_t kHugePage = 2 << 20;

}  // namespace

void ask_for_huge_pages(void* at, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  const std::uintptr_t first = (reinterpret_cast<std::uintptr_t>(at) + kHugePage - 1) / kHugePage;
  const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(at) + bytes) / kHugePage;
  // A wish: where it is refused, pages are small.
  if (first < end) {
    madvise(reinterpret_cast<void*>(first * kHugePage), (end - first) * kHugePage, MADV_HUGEPAGE);
  }
#else
  (void)at;
  (void)bytes;
#endif
}

// Floats on a cache line's boundary, much of them on that of a huge page; not initialised.
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

constexpr std::int64_t kLargestSide = 1 << 14;
constexpr std::int64_t kLargestChannels = 1 << 20;
constexpr std::int64_t kLargestBatch = 1 << 20;
constexpr std::int64_t kLargestRow = 1 << 30;
constexpr int kMostThreads = 1 << 12;
constexpr std::int64_t kAlignment = 16;  // floats of a cache line
// Memory of as much in all waits for the next pass; more goes back to the system.
constexpr std::int64_t kKeptFloats = 64 << 20;

[[noreturn]] void corrupt(const std::string& what) {
  throw std::invalid_argument("corrupt plan: " + what);
}

std::int64_t product(std::int64_t a, std::int64_t b) {
  std::int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) corrupt("a size overflows");
  return result;
}

std::int64_t sum(std::int64_t a, std::int64_t b) {
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
  // Buffer 0 is never written to, which the check of the plan sees to.
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

  // `name` is the buffer, `name`_channel the first channel.
  Slice slice(const std::string& name, std::int64_t channels, std::int64_t pixels) {
    const std::int64_t last = static_cast<std::int64_t>(plan_.buffers.size()) - 1;
    const std::int64_t buffer = number(name, 0, last);
    const PlanBuffer& b = plan_.buffers[static_cast<std::size_t>(buffer)];
    if (b.pixels != pixels) fail(name + " has other pixels than the operation");
    if (channels > b.channels) fail(name + " has fewer channels than the operation");
    const std::int64_t first = number(name + "_channel", 0, b.channels - channels);
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

  // The offset of `size` numbers in the row.
  std::int64_t row(const std::string& name, std::int64_t size) {
    if (size > plan_.row) fail(name + " needs more numbers than the row has");
    return number(name, 0, plan_.row - size);
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

}  // namespace

class PlanStep {
 public:
  virtual ~PlanStep() = default;
  virtual void run(const Places& places) const = 0;
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

namespace {

// y = (conv(act(x * x_scale + x_shift)) + bias + residual) * factor
class ConvolutionStep final : public PlanStep {
 public:
  explicit ConvolutionStep(Fields& fields) {
    shape_.batch = 1;
    shape_.height = fields.number("height", 1, kLargestSide);
    shape_.width = fields.number("width", 1, kLargestSide);
    shape_.in_channels = fields.channels("in_channels");
    shape_.out_channels = fields.channels("out_channels");
    shape_.kernel = static_cast<int>(fields.number("kernel", 1, 3));
    shape_.stride = static_cast<int>(fields.number("stride", 1, 2));
    shape_.pad_before = static_cast<int>(fields.number("pad_before", 0, 2));
    shape_.pad_after = static_cast<int>(fields.number("pad_after", 0, 2));
    shape_.upsample = fields.number("upsample", 0, 1) == 1;
    algorithm_ = static_cast<ConvolutionAlgorithm>(fields.number("algorithm", 0, 2));
    const bool winograd = algorithm_ != ConvolutionAlgorithm::direct;
    if (!supported(shape_) || (winograd && (shape_.kernel != 3 || shape_.stride != 1))) {
      fields.fail("no kernel serves such a convolution");
    }
    const std::int64_t pixels = shape_.out_height() * shape_.out_width();
    x_ = reads(fields.slice("x", shape_.in_channels, shape_.height * shape_.width));
    y_ = writes(fields.slice("y", shape_.out_channels, pixels));
    silu_ = fields.number("silu", 0, 1) == 1;
    affine_ = fields.has("x_scale");
    if (affine_) {
      x_scale_ = reads(fields.vector("x_scale", shape_.in_channels));
      x_shift_ = reads(fields.vector("x_shift", shape_.in_channels));
    }
    packed_ = fields.weights("packed", packed_size(shape_));
    take_bias(fields);
    has_residual_ = fields.has("residual");
    if (has_residual_) residual_ = reads(fields.slice("residual", shape_.out_channels, pixels));
    scale_ = static_cast<float>(fields.factor());
  }

  std::int64_t workspace(std::int64_t batch, int threads) const override {
    ConvolutionShape shape = shape_;
    shape.batch = batch;
    return workspace_size(shape, algorithm_, threads);
  }

  void run(const Places& at) const override {
    ConvolutionArgs args = {};
    args.shape = shape_;
    args.shape.batch = at.pass.batch;
    args.algorithm = algorithm_;
    args.x = at.input(x_);
    args.x_stride = x_.stride;
    args.x_scale = affine_ ? at.input(x_scale_) : nullptr;
    args.x_shift = affine_ ? at.input(x_shift_) : nullptr;
    args.x_silu = silu_;
    args.packed = packed_;
    args.bias = bias_;
    if (bias_in_row_) args.bias = at.pass.row + bias_row_;
    if (bias_in_buffer_) {
      args.bias = at.input(bias_slice_);
      args.bias_stride = bias_slice_.stride;
    }
    args.residual = has_residual_ ? at.input(residual_) : nullptr;
    args.residual_stride = residual_.stride;
    args.scale = scale_;
    args.y = at.output(y_);
    args.y_stride = y_.stride;
    args.workspace = at.workspace;
    args.threads = at.pass.threads;
    convolution(args);
  }

 private:
  // One of: weights, a part of the row, a vector of each image.
  void take_bias(Fields& fields) {
    const std::int64_t channels = shape_.out_channels;
    if (fields.has("bias")) bias_ = fields.weights("bias", channels);
    bias_in_row_ = fields.has("bias_row");
    if (bias_in_row_) bias_row_ = fields.row("bias_row", channels);
    bias_in_buffer_ = fields.has("bias_buffer");
    if (bias_in_buffer_) bias_slice_ = reads(fields.slice("bias_buffer", channels, 1));
    if ((bias_ != nullptr) + bias_in_row_ + bias_in_buffer_ > 1) fields.fail("it has two biases");
  }

  ConvolutionShape shape_;
  ConvolutionAlgorithm algorithm_;
  Slice x_, y_, x_scale_{}, x_shift_{}, residual_{}, bias_slice_{};
  bool silu_, affine_, has_residual_, bias_in_row_, bias_in_buffer_;
  const float* packed_;
  const float* bias_ = nullptr;
  std::int64_t bias_row_ = 0;
  float scale_;
};

// GroupNorm as the scale and shift of every channel, for the reader of x to apply.
class NormStep final : public PlanStep {
 public:
  explicit NormStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    groups_ = fields.number("groups", 1, channels);
    if (channels % groups_ != 0) fields.fail("its groups do not divide the channels");
    const std::int64_t pixels = fields.number("pixels", 1, kLargestSide * kLargestSide);
    x_ = reads(fields.slice("x", channels, pixels));
    scale_ = writes(fields.vector("scale", channels));
    shift_ = writes(fields.vector("shift", channels));
    weight_ = fields.weights("weight", channels);
    bias_ = fields.weights("bias", channels);
    eps_ = fields.factor();
    if (eps_ < 0) fields.fail("its eps is negative");
  }

  void run(const Places& at) const override {
    kernels().group_norm_affine({at.input(x_), x_.stride, at.pass.batch, x_.pixels, x_.channels,
                                 groups_, eps_, weight_, bias_, at.output(scale_),
                                 at.output(shift_), at.pass.threads});
  }

 private:
  Slice x_, scale_, shift_;
  std::int64_t groups_;
  const float *weight_, *bias_;
  double eps_;
};

// Self-attention; a pixel of qkv holds q, k and v of all heads.
class AttentionStep final : public PlanStep {
 public:
  explicit AttentionStep(Fields& fields) {
    heads_ = fields.channels("heads");
    head_dim_ = fields.channels("head_dim");
    const std::int64_t channels = product(heads_, head_dim_);
    const std::int64_t tokens = fields.number("pixels", 1, kLargestSide * kLargestSide);
    qkv_ = reads(fields.slice("qkv", product(3, channels), tokens));
    y_ = writes(fields.slice("y", channels, tokens));
    lse_ = writes(fields.vector("lse", product(heads_, tokens)));
    scale_ = static_cast<float>(fields.factor());
  }

  void run(const Places& at) const override {
    const std::int64_t channels = heads_ * head_dim_, tokens = qkv_.pixels;
    const auto part = [&](std::int64_t index) {
      return HeadRows<const float>{at.input(qkv_) + index * channels, tokens * qkv_.stride,
                                   head_dim_, qkv_.stride};
    };
    const HeadRows<float> out = {at.output(y_), tokens * y_.stride, head_dim_, y_.stride};
    kernels().attention_float32({part(0), part(1), part(2), out, at.output(lse_),
                                 {at.pass.batch, heads_, tokens, tokens, head_dim_},
                                 scale_, at.pass.threads});
  }

 private:
  Slice qkv_, y_, lse_;
  std::int64_t heads_, head_dim_;
  float scale_;
};

// Nearest doubling, for readers that cannot fold it in.
class UpsampleStep final : public PlanStep {
 public:
  explicit UpsampleStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    height_ = fields.number("height", 1, kLargestSide);
    width_ = fields.number("width", 1, kLargestSide);
    x_ = reads(fields.slice("x", channels, height_ * width_));
    y_ = writes(fields.slice("y", channels, 4 * height_ * width_));
  }

  void run(const Places& at) const override {
    const float* const x = at.input(x_);
    float* const y = at.output(y_);
    parallel_for(at.pass.batch * 2 * height_, at.pass.threads, [&](std::int64_t task) {
      const float* from = x + task / 2 * width_ * x_.stride;
      float* to = y + task * 2 * width_ * y_.stride;
      const std::size_t bytes = static_cast<std::size_t>(x_.channels) * sizeof(float);
      for (std::int64_t i = 0; i < width_; ++i, from += x_.stride) {
        for (int twice = 0; twice < 2; ++twice, to += y_.stride) std::memcpy(to, from, bytes);
      }
    });
  }

 private:
  Slice x_, y_;
  std::int64_t height_, width_;
};

// Squares of factor x factor pixels become one pixel with their channels, square by rows.
class SpaceToDepthStep final : public PlanStep {
 public:
  explicit SpaceToDepthStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    factor_ = fields.number("block", 1, 1 << 10);
    height_ = fields.number("height", 1, kLargestSide);
    width_ = fields.number("width", 1, kLargestSide);
    if (height_ % factor_ != 0 || width_ % factor_ != 0) fields.fail("its block does not divide");
    x_ = reads(fields.slice("x", channels, height_ * width_));
    const std::int64_t out = channels * factor_ * factor_;
    y_ = writes(fields.slice("y", out, height_ * width_ / (factor_ * factor_)));
  }

  void run(const Places& at) const override {
    const float* const x = at.input(x_);
    float* const y = at.output(y_);
    const std::int64_t c = x_.channels;
    const std::size_t bytes = static_cast<std::size_t>(c) * sizeof(float);
    parallel_for(at.pass.batch * height_, at.pass.threads, [&](std::int64_t row) {
      const std::int64_t out_row = row / factor_, i = row % factor_;
      for (std::int64_t column = 0; column < width_; ++column) {
        const std::int64_t out_pixel = out_row * (width_ / factor_) + column / factor_;
        const std::int64_t place = i * factor_ + column % factor_;
        std::memcpy(y + out_pixel * y_.stride + place * c, x + (row * width_ + column) * x_.stride,
                    bytes);
      }
    });
  }

 private:
  Slice x_, y_;
  std::int64_t factor_, height_, width_;
};

// A vector of weights, the same for every image.
class ConstantStep final : public PlanStep {
 public:
  explicit ConstantStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    y_ = writes(fields.vector("y", channels));
    values_ = fields.weights("values", channels);
  }

  void run(const Places& at) const override {
    float* const y = at.output(y_);
    for (std::int64_t b = 0; b < at.pass.batch; ++b) {
      std::copy_n(values_, y_.channels, y + b * y_.channels);
    }
  }

 private:
  Slice y_;
  const float* values_;
};

// The vector that tells an image's class, plus a part of the row.
class EmbedStep final : public PlanStep {
 public:
  explicit EmbedStep(Fields& fields) {
    const std::int64_t channels = fields.channels("channels");
    y_ = writes(fields.vector("y", channels));
    if (fields.plan().classes < 1) fields.fail("the plan has no classes");
    table_ = fields.weights("table", product(fields.plan().classes, channels));
    in_row_ = fields.has("row");
    if (in_row_) row_ = fields.row("row", channels);
  }

  void run(const Places& at) const override {
    float* y = at.output(y_);
    for (std::int64_t b = 0; b < at.pass.batch; ++b, y += y_.channels) {
      const float* const embedded = table_ + at.pass.labels[b] * y_.channels;
      for (std::int64_t c = 0; c < y_.channels; ++c) {
        y[c] = embedded[c] + (in_row_ ? at.pass.row[row_ + c] : 0.0f);
      }
    }
  }

 private:
  Slice y_;
  const float* table_;
  bool in_row_;
  std::int64_t row_ = 0;
};

template <class Step>
std::unique_ptr<PlanStep> made(Fields& fields) {
  return std::make_unique<Step>(fields);
}

std::unique_ptr<PlanStep> step_of(const PlanOp& op, std::size_t index, const PlanData& plan) {
  static const std::map<std::string, std::unique_ptr<PlanStep> (*)(Fields&)> makers = {
      {"convolution", made<ConvolutionStep>},  {"norm", made<NormStep>},
      {"attention", made<AttentionStep>},      {"upsample", made<UpsampleStep>},
      {"space_to_depth", made<SpaceToDepthStep>}, {"constant", made<ConstantStep>},
      {"embed", made<EmbedStep>},
  };
  Fields fields(op, index, plan);
  const auto maker = makers.find(op.kind);
  if (maker == makers.end()) fields.fail("there is no such kind");
  auto step = maker->second(fields);
  fields.finish();
  return step;
}

void check_sizes(const PlanData& plan) {
  if (plan.buffers.size() < 2) corrupt("it has no input and output");
  if (plan.arena < 0 || plan.row < 0 || plan.classes < 0 || plan.weights_size < 0) {
    corrupt("a size is negative");
  }
  if (plan.row > kLargestRow || plan.classes > kLargestRow) corrupt("a size is out of bounds");
  if (plan.batch < 1 || plan.batch > kLargestBatch) corrupt("its batch is out of bounds");
  product(plan.arena, product(kLargestBatch, sizeof(float)));
  for (std::size_t i = 0; i < plan.buffers.size(); ++i) {
    const PlanBuffer& b = plan.buffers[i];
    const std::string name = "buffer " + std::to_string(i);
    if (b.pixels < 1 || b.pixels > kLargestSide * kLargestSide || b.channels < 1 ||
        b.channels > kLargestSide * kLargestSide) {
      corrupt(name + " has an impossible shape");
    }
    const std::int64_t size = product(b.pixels, b.channels);
    if (i < 2) {
      if (b.offset != 0) corrupt(name + " has an offset");
    } else if (b.offset < 0 || b.offset % kAlignment != 0 || sum(b.offset, size) > plan.arena) {
      corrupt(name + " does not lie in the arena");
    }
  }
}

// Channels of a buffer that have been written to, as disjoint ranges.
class Written {
 public:
  void add(std::int64_t first, std::int64_t end) {
    std::vector<std::pair<std::int64_t, std::int64_t>> kept;
    for (const auto& range : ranges_) {
      if (range.second < first || range.first > end) {
        kept.push_back(range);
      } else {
        first = std::min(first, range.first);
        end = std::max(end, range.second);
      }
    }
    kept.emplace_back(first, end);
    ranges_ = std::move(kept);
  }
  bool covers(std::int64_t first, std::int64_t end) const {
    return std::any_of(ranges_.begin(), ranges_.end(), [&](const auto& range) {
      return range.first <= first && end <= range.second;
    });
  }

 private:
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges_;
};

// The first and the last operation that a buffer takes part in.
struct Life {
  std::size_t first = std::numeric_limits<std::size_t>::max(), last = 0;
};

void check_one(const std::vector<Access>& accesses, const std::string& name) {
  for (std::size_t i = 0; i < accesses.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const Slice &a = accesses[i].slice, &b = accesses[j].slice;
      const bool apart = a.buffer != b.buffer || a.channel + a.channels <= b.channel ||
                         b.channel + b.channels <= a.channel;
      if (!apart && (accesses[i].writes || accesses[j].writes)) {
        corrupt(name + " writes to what it reads or writes");
      }
    }
  }
}

// Nothing is read before it is written, the input is left alone, the output becomes whole, and
// buffers that are in use at the same time lie apart.
void check_flow(const PlanData& plan, const std::vector<std::unique_ptr<PlanStep>>& steps) {
  std::vector<Written> written(plan.buffers.size());
  std::vector<Life> lives(plan.buffers.size());
  written[0].add(0, plan.buffers[0].channels);
  for (std::size_t i = 0; i < steps.size(); ++i) {
    const std::string name = "operation " + std::to_string(i);
    const std::vector<Access>& accesses = steps[i]->accesses();
    check_one(accesses, name);
    for (const Access& access : accesses) {
      const Slice& slice = access.slice;
      const std::size_t buffer = static_cast<std::size_t>(slice.buffer);
      Life& life = lives[buffer];
      life.first = std::min(life.first, i);
      life.last = i;
      if (!access.writes) {
        if (!written[buffer].covers(slice.channel, slice.channel + slice.channels)) {
          corrupt(name + " reads what nothing has written");
        }
      } else if (buffer == 0) {
        corrupt(name + " writes to the input");
      }
    }
    for (const Access& access : accesses) {
      const Slice& slice = access.slice;
      if (access.writes) {
        written[static_cast<std::size_t>(slice.buffer)].add(slice.channel,
                                                            slice.channel + slice.channels);
      }
    }
  }
  if (!written[1].covers(0, plan.buffers[1].channels)) corrupt("nothing writes the whole output");
  for (std::size_t i = 2; i < lives.size(); ++i) {
    for (std::size_t j = 2; j < i; ++j) {
      const PlanBuffer &a = plan.buffers[i], &b = plan.buffers[j];
      const bool together = lives[i].first <= lives[j].last && lives[j].first <= lives[i].last;
      const bool overlap = a.offset < b.offset + b.pixels * b.channels &&
                           b.offset < a.offset + a.pixels * a.channels;
      if (together && overlap) {
        corrupt("buffers " + std::to_string(j) + " and " + std::to_string(i) + " overlap");
      }
    }
  }
}

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
  std::int64_t kept = 0;
  for (const auto& each : unused_) kept += each->size();
  // The longest unused goes first: it may be too small for what is asked for now.
  while (kept > kKeptFloats) {
    kept -= unused_.front()->size();
    unused_.erase(unused_.begin());
  }
}

void Plan::check(const PlanPass& pass) const {
  check_threads(pass.threads);
  if (pass.batch < 0 || pass.batch > data_.batch) {
    throw std::invalid_argument("a pass of " + std::to_string(pass.batch) + " images, but the " +
                                "plan is for at most " + std::to_string(data_.batch));
  }
  if (data_.row > 0 && pass.row == nullptr) throw std::invalid_argument("the plan needs a row");
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

void Plan::run(const PlanPass& pass, bool poison) const {
  check(pass);
  if (pass.batch == 0) return;
  const std::int64_t floats =
      bytes(pass.batch, pass.threads) / static_cast<std::int64_t>(sizeof(float));
  auto memory = take(floats);
  if (poison) {
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
