#include "runtime/half.h"

#include <cstring>

namespace advkd {

std::uint16_t half_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000;
  const std::uint32_t magnitude = bits & 0x7FFFFFFF;
  if (magnitude > 0x7F800000) {
    return static_cast<std::uint16_t>(sign | 0x7E00 | (magnitude >> 13 & 0x1FF));
  }
  if (magnitude >= 0x477FF000) return static_cast<std::uint16_t>(sign | 0x7C00);
  if (magnitude < 0x38800000) {
    // Subnormal: adding 0.5 leaves the value in units of 2^-24, rounded, in the low bits.
    float small;
    std::memcpy(&small, &magnitude, sizeof small);
    small += 0.5f;
    std::memcpy(&bits, &small, sizeof bits);
    return static_cast<std::uint16_t>(sign | (bits - 0x3F000000));
  }
  const std::uint32_t odd = magnitude >> 13 & 1;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000 + 0xFFF + odd) >> 13));
}

float float_of_half(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7FFF;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000) << 16;
  std::uint32_t wide = magnitude << 13;
  float value;
  if (magnitude >= 0x7C00) {
    wide |= 0x7F800000;
    std::memcpy(&value, &wide, sizeof value);
  } else {
    // The exponent's bias goes from 15 to 127, for subnormal numbers too.
    std::memcpy(&value, &wide, sizeof value);
    value *= 0x1p112f;
  }
  std::memcpy(&wide, &value, sizeof wide);
  wide |= sign;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace advkd
