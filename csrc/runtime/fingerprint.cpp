#include "runtime/fingerprint.h"

#include <cstring>
#include <initializer_list>

namespace advkd {

void Fingerprint::add(const char* at, std::int64_t bytes) {
  constexpr std::int64_t kBlock = kLanes * sizeof(std::uint64_t);
  std::int64_t i = 0;
  for (; i + kBlock <= bytes; i += kBlock) {
    std::uint64_t words[kLanes];
    std::memcpy(words, at + i, kBlock);
    add(words);
  }
  std::uint64_t rest[kLanes] = {};
  std::memcpy(rest, at + i, static_cast<std::size_t>(bytes - i));
  add(rest);
}

void Fingerprint::add(const std::uint64_t (&words)[kLanes]) {
  for (int lane = 0; lane < kLanes; ++lane) {
    first_[lane] += words[lane];
    second_[lane] += first_[lane];
  }
}

std::uint64_t Fingerprint::value() const {
  std::uint64_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    for (const std::uint64_t sum : {first_[lane], second_[lane]}) {
      all = (all ^ sum) * 0xD6E8FEB86659FD93u;
      all ^= all >> 32;
    }
  }
  return all;
}

}  // namespace advkd
