// The products of the convolutions, apart from what they are used for, as they take long to
// compile.
#include "cpu/convolution_product.h"

namespace advkd::ADVKD_ISA {
namespace {

struct Store {
  float* to;
  std::int64_t step;

  Store at(std::int64_t panel) const { return {to + panel * kPanel, step}; }

  template <int kRows, int kPanels>
  void operator()(std::int64_t row, const Accumulators<kRows, kPanels>& accumulators) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kPanels * kPanelVectors; ++v) {
        store(to + (row + r) * step + v * kWidth, accumulators.part[r][v]);
      }
    }
  }
};

}  // namespace

void multiply_rows(const PreparedRows& a, const Panels& b, float* to) {
  const AOperand<kPanel, 1> a_operand = {a.at, a.segments, a.segment_count};
  multiply(a_operand, b, a.rows, Store{to, b.count * kPanel});
}

}  // namespace advkd::ADVKD_ISA
