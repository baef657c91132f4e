// A number that tells contents of memory apart; two contents share one by a chance of 2^-64.
#pragma once

#include <cstdint>

namespace advkd {

// Two sums of a run of words (Fletcher 1982), lane by lane: a change of any word changes the first,
// and words that change places change the second. A run is read at two places at once, since one
// alone does not keep the caches busy; each has sums of its own.
class Fingerprint {
 public:
  void add(const char* at, std::int64_t bytes);
  std::uint64_t value() const;

 private:
  // Vectors as every processor has them.
  typedef std::uint64_t Pair __attribute__((vector_size(2 * sizeof(std::uint64_t))));
  static constexpr int kPairs = 4, kPlaces = 2;
  struct Sums {
    Pair first[kPairs] = {}, second[kPairs] = {};

    void add_block(const char* at);
  };
  static constexpr std::int64_t kBlock = kPairs * sizeof(Pair);

  Sums sums_[kPlaces];
};

}  // namespace advkd
