// Where noise comes from: one stream of Philox numbers for each image, with the seed as key and the
// counter (element / 4, step word, image index).
#pragma once

#include <cstdint>

namespace advkd {

struct NoiseSource {
  std::uint64_t seed;
  const std::int64_t* image_index;  // (B,)
  std::uint32_t step;               // the step word
};

// Steps have the words 0, 1, ...; x_T and labels have these.
constexpr std::uint32_t kXTStep = 0xFFFFFFFF, kLabelStep = 0xFFFFFFFE;
constexpr std::int64_t kMostSteps = 1 << 23;

// What noise is for stands in the bits of the step word that no step reaches, so that no two
// purposes ever share a word. As in advkd/engine/noise.py.
constexpr int kPurposeShift = 24;
constexpr int kMostPurposes = 128;

constexpr std::uint32_t step_word(std::uint32_t step, int purpose) {
  return step ^ static_cast<std::uint32_t>(purpose) << kPurposeShift;
}

}  // namespace advkd
