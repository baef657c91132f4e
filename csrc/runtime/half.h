#pragma once

#include <cstdint>

namespace advkd {

// The bits of the nearest float16, ties to even; what is too large becomes infinite, NaN stays NaN.
std::uint16_t half_of(float value);

// The number that bits of float16 mean, which is exact.
float float_of_half(std::uint16_t bits);

}  // namespace advkd
