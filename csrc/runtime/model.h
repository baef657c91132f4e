// A student in memory: its packed weights, and the plans of its heads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "runtime/model_file.h"
#include "runtime/plan.h"

namespace advkd {

// Images of a pass at most, and up to how many in all the algorithms for one image are taken; as in
// advkd/engine/cpu.py, so that the bits are the same.
constexpr std::int64_t kManyImages = 16, kFewImages = 3;

struct ModelHead {
  std::int64_t size;                // pixels of a side of its images
  std::unique_ptr<Plan> few, many;  // with algorithms for 1 image and for kManyImages

  const Plan& plan_for(std::int64_t images) const { return images <= kFewImages ? *few : *many; }
};

struct Generation {
  std::uint64_t seed;
  std::int64_t first, count;   // numbers of the images
  const std::int64_t* labels;  // (count,), null: drawn from the seed where there are classes
  std::int64_t together;       // images of a pass, at most kManyImages
  std::size_t head;
};

class Model {
 public:
  // Refuses plans that would read or write what they must not, and weights that do not fit them.
  explicit Model(const ModelFile& file);

  std::int64_t size() const { return size_; }
  std::int64_t channels() const { return channels_; }
  std::int64_t classes() const { return classes_; }
  const std::vector<std::string>& class_names() const { return class_names_; }
  const std::vector<ModelHead>& heads() const { return heads_; }
  std::int64_t weights() const { return static_cast<std::int64_t>(weights_.size()); }

  // Images of a pass of so many in all, where the caller does not say: as many as a cache serves.
  std::int64_t usual_together(std::size_t head, std::int64_t images) const;

  // Bytes of the workspace of a generation.
  std::int64_t workspace(const Generation& what) const;

  // Generates the images in order, on this thread, and calls take(first, count, images) with those
  // of each pass, (count, size, size, channels) about [-1, 1]. Neither allocates nor throws; what is
  // asked for must have been checked.
  template <class Take>
  void generate(const Generation& what, void* workspace, const Take& take) const {
    for (std::int64_t first = 0; first < what.count; first += what.together) {
      const std::int64_t left = what.count - first;
      const std::int64_t count = left < what.together ? left : what.together;
      take(first, count, run_pass(what, first, count, workspace));
    }
  }

 private:
  const float* run_pass(const Generation& what, std::int64_t first, std::int64_t count,
                        void* workspace) const;
  void take_labels(const Generation& what, std::int64_t first, std::int64_t count,
                   const std::int64_t* index, std::int64_t* labels) const;

  std::int64_t size_, channels_, classes_;
  std::vector<std::string> class_names_;
  std::vector<float> weights_;
  std::vector<ModelHead> heads_;
};

}  // namespace advkd
