// The noise source as Python hands it over.
#pragma once

#include "python/pointer.h"
#include "runtime/noise.h"

namespace advkd {

inline NoiseSource noise_source(std::uint64_t seed, std::uintptr_t image_index,
                                std::uint32_t step) {
  return {seed, pointer<const std::int64_t>(image_index), step};
}

}  // namespace advkd
