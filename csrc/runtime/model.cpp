#include "runtime/model.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "runtime/convolution_int8.h"
#include "runtime/dispatch.h"
#include "runtime/error.h"
#include "runtime/noise.h"
#include "runtime/plan_step.h"

namespace advkd {
namespace {

constexpr int kSampling = 1;  // the purpose, as in advkd/engine/noise.py
constexpr std::int64_t kMostWeights = 1 << 28;  // floats
constexpr std::size_t kLine = 64;               // bytes of a cache line

// Where every tensor lies in the packed weights, once for each form that operations read it in.
class Weights {
 public:
  explicit Weights(const ModelFile& file) : file_(file) {}

  // The offset of a tensor that is read as it is, of so many numbers.
  std::int64_t vector(const std::string& name, std::int64_t elements, const Fields& fields) {
    const FileTensor& found = tensor(name, fields);
    if (found.elements() != elements) {
      fields.fail("tensor '" + name.substr(0, 60) + "' has another size than it needs");
    }
    return place("v" + name, elements, {&found, Use::vector, {}, 0, 0});
  }

  // The offset of the weights of a convolution, (out_channels, in_channels, kernel, kernel).
  std::int64_t packed(const std::string& name, const ConvolutionShape& s, const Fields& fields) {
    return place("p" + name, packed_size(s), {&of_shape(name, s, fields), Use::packed, s, 0, 0});
  }

  // The same for products of int8 with an input that is rounded over a range, where this processor
  // gains by them, else -1.
  std::int64_t packed_int8(const std::string& name, std::int64_t range, const ConvolutionShape& s,
                           const Fields& fields) {
    const FileTensor& found = of_shape(name, s, fields);
    if (found.type != FileTensor::Type::int8) fields.fail("its weights are not int8");
    if (!fits_int8(s)) fields.fail("it has too many channels for int8");
    if (!kHasInt8 || int8_convolution() == nullptr) return -1;
    return place("i" + std::to_string(range) + " " + name, int8_packed_size(s),
                 {&found, Use::packed_int8, s, range, 0});
  }

  // The offset of a range: a row of the file's ranges.
  std::int64_t range(std::int64_t row, const Fields& fields) {
    const FileTensor& ranges = tensor(kRanges, fields);
    const bool has_row = file_.may_round && ranges.type == FileTensor::Type::float32 &&
                         ranges.shape.size() == 2 && row < ranges.shape[0] && ranges.shape[1] == 2;
    if (!has_row) fields.fail("there is no such x_range");
    return vector(kRanges, ranges.elements(), fields) + 2 * row;
  }

  std::vector<float> filled() const {
    std::vector<float> all(static_cast<std::size_t>(size_)), dense;
    for (const Part& part : parts_) {
      float* const to = all.data() + part.offset;
      if (part.use == Use::vector) {
        part.tensor->copy_to(to);
      } else if (kHasInt8 && part.use == Use::packed_int8) {
        pack_int8(part.shape, reinterpret_cast<const std::int8_t*>(part.tensor->at),
                  part.tensor->scales, levels(part.range), to);
      } else {
        const ConvolutionShape& s = part.shape;
        dense.resize(static_cast<std::size_t>(part.tensor->elements()));
        part.tensor->copy_to(dense.data());
        const std::int64_t taps = s.kernel * s.kernel;
        pack_weights(s, {dense.data(), s.in_channels * taps, taps, s.kernel, 1}, to);
      }
    }
    return all;
  }

 private:
  static constexpr const char* kRanges = "x_ranges";
  enum class Use { vector, packed, packed_int8 };

  // A tensor in one form.
  struct Part {
    const FileTensor* tensor;
    Use use;
    ConvolutionShape shape;  // of what is packed
    std::int64_t range;      // of packed_int8: a row
    std::int64_t offset;
  };

  const FileTensor& tensor(const std::string& name, const Fields& fields) const {
    const auto found = file_.tensors.find(name);
    if (found == file_.tensors.end()) {
      fields.fail("there is no tensor '" + name.substr(0, 60) + "'");
    }
    return found->second;
  }

  Levels levels(std::int64_t row) const {
    const unsigned char* const ranges = file_.tensors.at(kRanges).at;
    Levels levels;
    if (!levels.cover(float_at(ranges, 2 * row), float_at(ranges, 2 * row + 1))) {
      corrupt("an x_range is no range around 0");
    }
    return levels;
  }

  const FileTensor& of_shape(const std::string& name, const ConvolutionShape& s,
                             const Fields& fields) const {
    const FileTensor& found = tensor(name, fields);
    const std::vector<std::int64_t> shape = {s.out_channels, s.in_channels, s.kernel, s.kernel};
    if (found.shape != shape) {
      fields.fail("tensor '" + name.substr(0, 60) + "' has another shape than its weights");
    }
    return found;
  }

  // `form` tells parts from each other.
  std::int64_t place(const std::string& form, std::int64_t size, const Part& part) {
    const auto [at, is_new] = offsets_.emplace(form, size_);
    if (is_new) {
      parts_.push_back(part);
      parts_.back().offset = size_;
      size_ += (size + kAlignment - 1) / kAlignment * kAlignment;
      if (size_ > kMostWeights) refuse("the model has more than 1 GiB of weights");
    }
    return at->second;
  }

  const ModelFile& file_;
  std::map<std::string, std::int64_t> offsets_;  // by the form
  std::vector<Part> parts_;
  std::int64_t size_ = 0;
};

// Numbers that each kind of operation reads of a tensor as it is, by the name of the weight.
std::int64_t elements_of(const std::string& name, const PlanOp& op, std::int64_t classes,
                         Fields& fields) {
  if (op.kind == "convolution" && name == "bias") return fields.channels("out_channels");
  if (op.kind == "norm" && (name == "weight" || name == "bias")) return fields.channels("channels");
  if (op.kind == "constant" && name == "values") return fields.channels("channels");
  if (op.kind == "embed" && name == "table")return product(classes, fields.channels("channels"));
  fields.fail("no operation of that kind has a weight '" + name.substr(0, 60) + "'");
}

// The weights of a convolution, as int8 where its input is to be rounded and this processor gains by
// it. Elsewhere float32 multiplies the same numbers.
void resolve_convolution(const std::string& tensor, Weights& weights, PlanOp& op, Fields& fields) {
  const ConvolutionShape shape = convolution_shape(fields);
  if (fields.has("x_range")) {
    const std::int64_t range = fields.number("x_range", 0, kMostWeights);
    op.numbers["x_range"] = weights.range(range, fields);
    const std::int64_t int8 = weights.packed_int8(tensor, range, shape, fields);
    if (int8 >= 0) {
      op.numbers["int8"] = int8;
      return;
    }
  }
  op.numbers["packed"] = weights.packed(tensor, shape, fields);
}

// The operations with their weights' offsets; the algorithms of convolutions are not chosen yet.
void resolve(const FileHead& head, Weights& weights, PlanData& plan) {
  for (const FileOp& file_op : head.ops) {
    const std::size_t index = plan.ops.size();
    plan.ops.push_back(file_op.op);
    PlanOp& op = plan.ops.back();
    if (op.numbers.count("algorithm") != 0) refuse("a model file names no algorithms");
    Fields fields(file_op.op, index, plan);
    for (const auto& [name, tensor] : file_op.weights) {
      if (op.numbers.count(name) != 0) fields.fail("it has '" + name.substr(0, 60) + "' twice");
      if (op.kind == "convolution" && name == "packed") {
        resolve_convolution(tensor, weights, op, fields);
      } else {
        const std::int64_t elements = elements_of(name, op, plan.classes, fields);
        op.numbers[name] = weights.vector(tensor, elements, fields);
      }
    }
    // An offset that stands in the file would be one into weights that it does not know.
    for (const char* const name : {"packed", "int8", "bias", "weight", "values", "table"}) {
      if (file_op.op.numbers.count(name) != 0) fields.fail("its weights are no tensors");
    }
  }
}

std::unique_ptr<Plan> plan_of(PlanData data, std::int64_t batch) {
  data.batch = batch;
  for (std::size_t i = 0; i < data.ops.size(); ++i) {
    PlanOp& op = data.ops[i];
    if (op.kind != "convolution" || op.numbers.count("int8") != 0) continue;
    Fields fields(op, i, data);
    ConvolutionShape shape = convolution_shape(fields);
    shape.batch = batch;
    op.numbers["algorithm"] = static_cast<std::int64_t>(choose_algorithm(shape, 1));
  }
  return std::make_unique<Plan>(data);
}

// The image that goes in and the one that comes out are what the file says.
void check_ends(const PlanData& plan, const ModelFile& file, const FileHead& head) {
  if (plan.buffers.size() < 2) corrupt("it has no input and output");
  const PlanBuffer &in = plan.buffers[0], &out = plan.buffers[1];
  if (in.pixels != file.size * file.size || in.channels != file.channels ||
      out.pixels != head.size * head.size || out.channels != file.channels) {
    corrupt("its images are of another size than the model's");
  }
}

// Parts of a workspace, each on a cache line's boundary.
class Cutter {
 public:
  explicit Cutter(void* workspace) : at_(reinterpret_cast<std::uintptr_t>(workspace)) {}

  template <class T>
  T* take(std::int64_t count) {
    at_ = (at_ + kLine - 1) / kLine * kLine;
    T* const part = reinterpret_cast<T*>(at_);
    at_ += static_cast<std::uintptr_t>(count) * sizeof(T);
    return part;
  }

 private:
  std::uintptr_t at_;
};

std::int64_t floats_of(const PlanBuffer& buffer) { return buffer.pixels * buffer.channels; }

}  // namespace

Model::Model(const ModelFile& file)
    : size_(file.size),
      channels_(file.channels),
      classes_(file.classes),
      class_names_(file.class_names) {
  Weights weights(file);
  std::vector<PlanData> plans;
  for (const FileHead& head : file.heads) {
    plans.push_back({head.buffers, {}, head.arena, 0, file.classes, 1, nullptr, 0});
    check_sizes(plans.back());
    check_ends(plans.back(), file, head);
    resolve(head, weights, plans.back());
  }
  weights_ = weights.filled();
  for (std::size_t i = 0; i < plans.size(); ++i) {
    plans[i].weights = weights_.data();
    plans[i].weights_size = static_cast<std::int64_t>(weights_.size());
    heads_.push_back({file.heads[i].size, plan_of(plans[i], 1), plan_of(plans[i], kManyImages)});
    for (const std::int64_t images : {kFewImages, kManyImages}) {
      // Whether the workspace of the largest pass can be counted at all.
      const std::int64_t size = workspace({0, 0, images, nullptr, images, i});
      const bool is_counted = static_cast<std::int64_t>(static_cast<std::size_t>(size)) == size;
      if (!is_counted) corrupt("its activations do not fit into memory");
    }
  }
}

std::int64_t Model::usual_together(std::size_t head, std::int64_t images) const {
  const Plan& plan = heads_[head].plan_for(images);
  const std::int64_t most = plan.images_of_a_part();
  return images < most ? images : most;
}

std::int64_t Model::workspace(const Generation& what) const {
  const Plan& plan = heads_[what.head].plan_for(what.count);
  const std::int64_t images = std::min(what.together, plan.data().batch);
  const auto& buffers = plan.data().buffers;
  const std::int64_t ends = sum(floats_of(buffers[0]), floats_of(buffers[1]));
  const std::int64_t floats = sum(product(ends, images), plan.floats(images, 1));
  constexpr std::int64_t kNumbers = 2;  // of an image: its number and its label
  const std::int64_t numbers = kNumbers * images * static_cast<std::int64_t>(sizeof(std::int64_t));
  constexpr std::int64_t kParts = 5;
  return sum(product(floats, sizeof(float)), numbers + kParts * static_cast<std::int64_t>(kLine));
}

const float* Model::run_pass(const Generation& what, std::int64_t first, std::int64_t count,
                             void* workspace) const {
  const Plan& plan = heads_[what.head].plan_for(what.count);
  const PlanBuffer &in = plan.data().buffers[0], &out = plan.data().buffers[1];
  Cutter cutter(workspace);
  std::int64_t* const index = cutter.take<std::int64_t>(count);
  std::int64_t* const labels = cutter.take<std::int64_t>(count);
  float* const x = cutter.take<float>(floats_of(in) * count);
  float* const y = cutter.take<float>(floats_of(out) * count);
  float* const memory = cutter.take<float>(0);  // all that is left, which `workspace` has counted
  for (std::int64_t i = 0; i < count; ++i) index[i] = what.first + first + i;
  kernels().philox_normal({{what.seed, index, step_word(kXTStep, kSampling)},
                           {count, in.channels, in.pixels, true}, x, 1});
  if (classes_ > 0) take_labels(what, first, count, index, labels);
  plan.run({x, y, nullptr, classes_ > 0 ? labels : nullptr, count, 1}, memory);
  return y;
}

void Model::take_labels(const Generation& what, std::int64_t first, std::int64_t count,
                        const std::int64_t* index, std::int64_t* labels) const {
  if (what.labels != nullptr) {
    std::copy_n(what.labels + first, count, labels);
    return;
  }
  kernels().philox_uint32({{what.seed, index, step_word(kLabelStep, kSampling)}, count, 1, 0,
                           labels, 1});
  // The first word of each image's stream, scaled to the classes.
  for (std::int64_t i = 0; i < count; ++i) labels[i] = labels[i] * classes_ >> 32;
}

}  // namespace advkd
