#pragma once

#include <cstdint>

namespace advkd {

// The bits of the nearest float16, ties to even; what is too large becomes infinite, NaN stays NaN.
std::uint16_t half_of(float value);

}  // namespace advkd
