// The products of the convolutions, apart from what they are used for, as they take long to compile.
#include "cpu/convolution_product.h"

namespace advkd::ADVKD_ISA {
namespace {

struct Store {
  float* to;
  std::int64_t step;

  Store at(std::int64_t panel) const { return {to + panel * kPanel, step}; }

  template <int kRows, int kPanels>
  void operator()(std::int64_t row, const Sums<kRows, kPanels>& sums) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kPanels * kPanelVectors; ++v) {
        store(to + (row + r) * step + v * kWidth, sums.part[r][v]);
      }
    }
  }
};

}  // namespace

void multiply_rows(const PreparedRows& left, const Panels& right, float* to) {
  const LeftFactor<kPanel, 1> factor = {left.at, left.segments, left.segment_count};
  multiply(factor, right, left.rows, Store{to, right.count * kPanel});
}

}  // namespace advkd::ADVKD_ISA
