#include "runtime/fingerprint.h"

#include <cstring>
#include <initializer_list>

namespace advkd {

inline void Fingerprint::Sums::add_block(const char* at) {
  for (int p = 0; p < kPairs; ++p) {
    Pair words;
    std::memcpy(&words, at + p * sizeof words, sizeof words);
    first[p] += words;
    second[p] += first[p];
  }
}

void Fingerprint::add(const char* at, std::int64_t bytes) {
  constexpr std::int64_t kAhead = 1024;  // bytes; reading past the end asks for nothing
  const std::int64_t half = bytes / kPlaces / kBlock * kBlock;
  Sums low = sums_[0], high = sums_[1];  // copies, which stay in registers
  for (std::int64_t i = 0; i < half; i += kBlock) {
    __builtin_prefetch(at + i + kAhead);
    __builtin_prefetch(at + half + i + kAhead);
    low.add_block(at + i);
    high.add_block(at + half + i);
  }
  std::int64_t i = kPlaces * half;
  for (; i + kBlock <= bytes; i += kBlock) low.add_block(at + i);
  char rest[kBlock] = {};
  std::memcpy(rest, at + i, static_cast<std::size_t>(bytes - i));
  low.add_block(rest);
  sums_[0] = low, sums_[1] = high;
}

std::uint64_t Fingerprint::value() const {
  std::uint64_t all = 0;
  for (const Sums& sums : sums_) {
    for (int lane = 0; lane < 2 * kPairs; ++lane) {
      const int pair = lane / 2, half = lane % 2;
      for (const std::uint64_t sum : {sums.first[pair][half], sums.second[pair][half]}) {
        all = (all ^ sum) * 0xD6E8FEB86659FD93u;
        all ^= all >> 32;
      }
    }
  }
  return all;
}

}  // namespace advkd
