// A number that tells contents of memory apart; two contents share one by a chance of 2^-64.
#pragma once

#include <cstdint>

namespace advkd {

// Two sums of a run of words (Fletcher 1982), lane by lane: a change of any word changes the first,
// and words that change places change the second.
class Fingerprint {
 public:
  void add(const char* at, std::int64_t bytes);
  std::uint64_t value() const;

 private:
  static constexpr int kLanes = 8;
  void add(const std::uint64_t (&words)[kLanes]);

  std::uint64_t first_[kLanes] = {}, second_[kLanes] = {};
};

}  // namespace advkd
