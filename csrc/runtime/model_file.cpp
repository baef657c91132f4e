#include "runtime/model_file.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <utility>

#include "runtime/error.h"
#include "runtime/half.h"
#include "runtime/json.h"

namespace advkd {
namespace {

constexpr std::size_t kLengthBytes = 8;
constexpr std::uint64_t kLongestHeader = 1 << 20;
constexpr std::size_t kMostHeads = 64, kMostOps = 4096, kMostBuffers = 4096;
constexpr std::int64_t kMostClasses = 1 << 20, kMostChannels = 1 << 10, kLargestImage = 1 << 13;
constexpr std::int64_t kLargest = std::int64_t{1} << 40;  // of numbers that later checks bound
constexpr const char *kPlain = "1", *kRounded = "2";  // versions; x_range is new in the second

[[noreturn]] void damaged(const std::string& what) { refuse("the model file is damaged: " + what); }

// Typed members of an object, each refused where it is missing or of another kind.
class Members {
 public:
  Members(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (object.kind != Json::Kind::object) damaged(where_ + " is no object");
  }

  const Json& of_kind(const char* name, Json::Kind kind) const {
    const Json* const found = object_.find(name);
    if (found == nullptr || found->kind != kind) damaged(where_ + " has no proper '" + name + "'");
    return *found;
  }

  std::int64_t number(const char* name, std::int64_t low, std::int64_t high) const {
    return bounded(of_kind(name, Json::Kind::integer), name, low, high);
  }

  const std::vector<Json>& list(const char* name, std::size_t most) const {
    const Json& found = of_kind(name, Json::Kind::array);
    if (found.items.size() > most) damaged(where_ + " has too many '" + name + "'");
    return found.items;
  }

  std::int64_t bounded(const Json& value, const std::string& name, std::int64_t low,
                       std::int64_t high) const {
    if (value.kind != Json::Kind::integer || value.integer < low || value.integer > high) {
      damaged("'" + name + "' of " + where_ + " is out of bounds");
    }
    return value.integer;
  }

 private:
  const Json& object_;
  const std::string where_;
};

// Names come from the file; an error quotes no more of one than fits a line.
std::string quoted(const std::string& name) { return "'" + name.substr(0, 60) + "'"; }

FileTensor read_tensor(const Json& entry, const std::string& name, const unsigned char* data,
                       std::int64_t size, std::pair<std::int64_t, std::int64_t>& range) {
  const Members members(entry, "tensor " + quoted(name));
  FileTensor tensor;
  const std::string& type = members.of_kind("dtype", Json::Kind::text).text;
  std::int64_t bytes = 0;
  if (type == "F32") {
    tensor.type = FileTensor::Type::float32;
    bytes = 4;
  } else if (type == "F16") {
    tensor.type = FileTensor::Type::float16;
    bytes = 2;
  } else if (type == "I8") {
    tensor.type = FileTensor::Type::int8;
    bytes = 1;
  } else {
    damaged("tensor " + quoted(name) + " is neither F32 nor F16 nor I8");
  }
  for (const Json& side : members.list("shape", 8)) {
    tensor.shape.push_back(members.bounded(side, "shape", 1, kLargest));
    // No overflow: the product so far is at most the file's size.
    if (tensor.shape.back() > size / bytes) damaged("tensor " + quoted(name) + " is too large");
    bytes *= tensor.shape.back();
  }
  const std::vector<Json>& offsets = members.list("data_offsets", 2);
  if (offsets.size() != 2) damaged("tensor " + quoted(name) + " has no two offsets");
  range.first = members.bounded(offsets[0], "data_offsets", 0, size);
  range.second = members.bounded(offsets[1], "data_offsets", 0, size);
  if (range.second - range.first != bytes) {
    damaged("tensor " + quoted(name) + " has other bytes than its shape");
  }
  tensor.at = data + range.first;
  return tensor;
}

// The tensors, which fill the data from end to end without overlap.
void read_tensors(const Json& header, const unsigned char* data, std::int64_t size,
                  ModelFile& model) {
  std::vector<std::pair<std::int64_t, std::int64_t>> ranges;
  for (const auto& [name, entry] : header.members) {
    if (name == "__metadata__") continue;
    ranges.emplace_back();
    model.tensors.emplace(name, read_tensor(entry, name, data, size, ranges.back()));
  }
  std::sort(ranges.begin(), ranges.end());
  std::int64_t end = 0;
  for (const auto& range : ranges) {
    if (range.first != end) damaged("its tensors overlap or leave a gap");
    end = range.second;
  }
  if (end != size) damaged("bytes follow its last tensor, or are missing");
}

// Finds the scales of the tensors of int8, which are tensors themselves.
void find_scales(ModelFile& model) {
  for (auto& [name, tensor] : model.tensors) {
    if (tensor.type != FileTensor::Type::int8) continue;
    const auto found = model.tensors.find(name + ".scale");
    const bool fits = found != model.tensors.end() && !tensor.shape.empty() &&
                      found->second.type == FileTensor::Type::float32 &&
                      found->second.shape == std::vector<std::int64_t>{tensor.shape[0]};
    if (!fits) damaged("tensor " + quoted(name) + " has no scale for each channel");
    tensor.scales = found->second.at;
    for (std::int64_t i = 0; i < tensor.shape[0]; ++i) {
      const float scale = float_at(tensor.scales, i);
      const bool proper = scale > 0.0f && std::isfinite(scale);
      if (!proper) damaged("tensor " + quoted(name) + " has a scale that is none");
    }
  }
}

FileOp read_op(const Json& entry, const std::string& where) {
  const Members members(entry, where);
  FileOp file_op;
  file_op.op.kind = members.of_kind("kind", Json::Kind::text).text;
  for (const auto& [name, value] : members.of_kind("numbers", Json::Kind::object).members) {
    file_op.op.numbers[name] = members.bounded(value, name, 0, kLargest);
  }
  for (const auto& [name, tensor] : members.of_kind("weights", Json::Kind::object).members) {
    if (tensor.kind != Json::Kind::text) damaged("a weight of " + where + " is no tensor's name");
    file_op.weights[name] = tensor.text;
  }
  const Json* const factor = entry.find("factor");
  const bool number = factor != nullptr && (factor->kind == Json::Kind::integer ||
                                            factor->kind == Json::Kind::real);
  if (!number) damaged(where + " has no proper 'factor'");
  file_op.op.factor = factor->real;
  return file_op;
}

FileHead read_head(const Json& entry, std::size_t index) {
  const std::string where = "head " + std::to_string(index + 1);
  const Members members(entry, where);
  FileHead head;
  head.size = members.number("size", 1, kLargestImage);
  head.arena = members.number("arena", 0, kLargest);
  for (const Json& buffer : members.list("buffers", kMostBuffers)) {
    if (buffer.kind != Json::Kind::array || buffer.items.size() != 3) {
      damaged("a buffer of " + where + " is not three numbers");
    }
    const auto number = [&](std::size_t i) {
      return members.bounded(buffer.items[i], "buffers", 0, kLargest);
    };
    head.buffers.push_back({number(0), number(1), number(2)});
  }
  for (const Json& op : members.list("ops", kMostOps)) {
    const std::string name = "operation " + std::to_string(head.ops.size()) + " of " + where;
    head.ops.push_back(read_op(op, name));
  }
  return head;
}

void read_class_names(const Json& plan, ModelFile& model) {
  const Json* const names = plan.find("class_names");
  if (names == nullptr || names->kind == Json::Kind::null) return;
  const bool fits = names->kind == Json::Kind::array &&
                    names->items.size() == static_cast<std::size_t>(model.classes);
  if (!fits) damaged("it has not one name for each class");
  for (const Json& name : names->items) {
    if (name.kind != Json::Kind::text) damaged("the name of a class is no text");
    // A C string would end at a zero.
    if (name.text.find('\0') != std::string::npos) damaged("the name of a class has a zero in it");
    model.class_names.push_back(name.text);
  }
}

void read_plan(const Json& plan, ModelFile& model) {
  const Members members(plan, "its plan");
  model.size = members.number("size", 1, kLargestImage);
  model.channels = members.number("channels", 1, kMostChannels);
  model.classes = members.number("classes", 0, kMostClasses);
  read_class_names(plan, model);
  const std::vector<Json>& heads = members.list("heads", kMostHeads);
  if (heads.empty()) damaged("it has no heads");
  for (std::size_t i = 0; i < heads.size(); ++i) model.heads.push_back(read_head(heads[i], i));
}

std::uint64_t little_endian(const unsigned char* bytes) {
  std::uint64_t value = 0;
  for (int i = kLengthBytes - 1; i >= 0; --i) value = value << 8 | bytes[i];
  return value;
}

}  // namespace

float float_at(const unsigned char* bytes, std::int64_t index) {
  float value;
  std::memcpy(&value, bytes + index * static_cast<std::int64_t>(sizeof value), sizeof value);
  return value;
}

std::int64_t FileTensor::elements() const {
  std::int64_t count = 1;
  for (const std::int64_t side : shape) count *= side;
  return count;
}

void FileTensor::copy_to(float* to) const {
  const std::int64_t count = elements();
  if (type == Type::float32) {
    std::memcpy(to, at, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  if (type == Type::int8) {
    const std::int64_t inner = count / shape[0];
    for (std::int64_t i = 0; i < count; ++i) {
      to[i] = static_cast<float>(static_cast<std::int8_t>(at[i])) * float_at(scales, i / inner);
    }
    return;
  }
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = float_of_half(static_cast<std::uint16_t>(at[2 * i] | at[2 * i + 1] << 8));
  }
}

ModelFile read_model_file(const unsigned char* bytes, std::size_t size) {
  if (size < kLengthBytes) refuse("this is no model file: it is too short");
  const std::uint64_t length = little_endian(bytes);
  if (length > kLongestHeader || length > size - kLengthBytes) {
    refuse("this is no model file, or only a part of one");
  }
  const char* const text = reinterpret_cast<const char*>(bytes) + kLengthBytes;
  const Json header = parse_json({text, static_cast<std::size_t>(length)});
  const Json* const metadata = header.find("__metadata__");
  const Json* const version = metadata == nullptr ? nullptr : metadata->find("advkd");
  const Json* const plan = metadata == nullptr ? nullptr : metadata->find("plan");
  if (version == nullptr || plan == nullptr || plan->kind != Json::Kind::text) {
    refuse("these are tensors without a plan: advkd export --format advkd writes a model file");
  }
  if (version->text != kPlain && version->text != kRounded) {
    refuse("the model file is of version " + quoted(version->text) +
           ", and only '1' and '2' are known here");
  }
  ModelFile model;
  model.may_round = version->text == kRounded;
  const std::size_t begin = kLengthBytes + static_cast<std::size_t>(length);
  read_tensors(header, bytes + begin, static_cast<std::int64_t>(size - begin), model);
  find_scales(model);
  read_plan(parse_json(plan->text), model);
  return model;
}

}  // namespace advkd
