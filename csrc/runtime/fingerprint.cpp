#include "runtime/fingerprint.h"

#include <cstring>
#include <initializer_list>

namespace advkd {

void Fingerprint::add(const char* at, std::int64_t bytes) {
  constexpr std::int64_t kBlock = kPairs * sizeof(Pair);
  // Copies, which stay in registers.
  Pair first[kPairs], second[kPairs];
  for (int p = 0; p < kPairs; ++p) first[p] = first_[p], second[p] = second_[p];
  const auto add_block = [&](const char* from) {
    for (int p = 0; p < kPairs; ++p) {
      Pair words;
      std::memcpy(&words, from + p * sizeof words, sizeof words);
      first[p] += words;
      second[p] += first[p];
    }
  };
  std::int64_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) add_block(at + i);
  char rest[kBlock] = {};
  std::memcpy(rest, at + i, static_cast<std::size_t>(bytes - i));
  add_block(rest);
  for (int p = 0; p < kPairs; ++p) first_[p] = first[p], second_[p] = second[p];
}

std::uint64_t Fingerprint::value() const {
  std::uint64_t all = 0;
  for (int lane = 0; lane < 2 * kPairs; ++lane) {
    for (const std::uint64_t sum : {first_[lane / 2][lane % 2], second_[lane / 2][lane % 2]}) {
      all = (all ^ sum) * 0xD6E8FEB86659FD93u;
      all ^= all >> 32;
    }
  }
  return all;
}

}  // namespace advkd
