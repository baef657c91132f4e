// A student's images in one call: labels, noise, network passes by a plan, and pixels.
#pragma once

#include <cstdint>

#include "runtime/pooled_plan.h"

namespace advkd {

struct StudentImagesArgs {
  const PooledPlan* plan;
  std::uint64_t seed;
  int purpose;                 // of the noise; see runtime/noise.h
  std::int64_t first, images;  // numbers of the images
  const std::int64_t* labels;  // (images,), null: drawn from the seed where there are classes
  float* out;                  // (images, C, P), in [-1, 1]
  int threads;
};

// An image's bits depend on the plan, the seed, the purpose and the image's number, not on the
// batch or the threads. Refuses a teacher's plan, and labels that are no classes.
void student_images(const StudentImagesArgs& args);

}  // namespace advkd
