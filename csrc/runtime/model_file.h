// A student's file: safetensors whose metadata hold its plans (docs/file-format.md). Reading trusts
// nothing: what is read is checked before memory for it is taken.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "runtime/plan.h"

namespace advkd {

// One of float32 numbers that lie at bytes of any address.
float float_at(const unsigned char* bytes, std::int64_t index);

// A tensor within the file's bytes, which are aligned to nothing.
struct FileTensor {
  enum class Type { float16, float32, int8 };

  Type type;
  std::vector<std::int64_t> shape;
  const unsigned char* at;
  const unsigned char* scales = nullptr;  // of int8: float32, one for each of shape[0] channels

  std::int64_t elements() const;
  void copy_to(float* to) const;
};

// An operation whose weights are still names of tensors.
struct FileOp {
  PlanOp op;
  std::map<std::string, std::string> weights;  // what the operation reads -> the tensor
};

// The plan of a student that leaves by one of its heads.
struct FileHead {
  std::int64_t size;  // pixels of a side of its images
  std::int64_t arena;
  std::vector<PlanBuffer> buffers;
  std::vector<FileOp> ops;
};

struct ModelFile {
  bool may_round;  // whether its version knows x_range
  std::int64_t size, channels, classes;
  std::vector<std::string> class_names;  // empty, or one for each class
  std::vector<FileHead> heads;
  std::map<std::string, FileTensor> tensors;
};

// Reads a file's bytes, which the result points into. Refuses one that is damaged, of another
// version, or absurd; whether its plans may run is checked where they are made.
ModelFile read_model_file(const unsigned char* bytes, std::size_t size);

}  // namespace advkd
