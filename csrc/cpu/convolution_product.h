// Products A B whose tiles stay in registers until the caller finishes them; as product.h, but for
// panels of a fixed width, whichever the instruction set, and for any number of rows.
#pragma once

#include "cpu/convolution_tile.h"

namespace advkd::ADVKD_ISA {

// The A operand: rows and, within segments, elements of a row lie a fixed number of floats apart.
template <int kRow, int kElement>
struct AOperand {
  static constexpr int kRowStep = kRow, kElementStep = kElement;
  const float* at;
  const Segment* segments;
  std::int64_t segment_count;
};

// Panels and rows of a register tile: as many accumulators as the registers hold beside the columns
// and a broadcast element.
constexpr int kMostPanels = kWidth == 16 ? 3 : 1;
constexpr int kNarrowRows = kWidth == 8 ? 6 : (kRegisters == 32 ? 5 : 3);
constexpr int kMostRows[] = {0, kWidth == 16 ? 16 : kNarrowRows, 12, 8};

template <int kRows, int kPanels>
struct Accumulators {
  Vector part[kRows][kPanels * kPanelVectors];
};

// Adds one column of A times one row of B.
template <int kRowStep, int kRows, int kPanels>
static inline __attribute__((always_inline)) void add_product(
    Accumulators<kRows, kPanels>& accumulators, const float* a, const float* b,
    std::int64_t panel_step) {
  constexpr int kVectors = kPanels * kPanelVectors;
  Vector column[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    column[v] = load(b + v / kPanelVectors * panel_step + v % kPanelVectors * kWidth);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const float element = a[r * kRowStep];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) accumulators.part[r][v] += column[v] * element;
  }
}

constexpr int kUnrolled = 4;

// A function of its own, so that its loop has the registers for itself.
template <int kRows, int kPanels, class A, class Finish>
__attribute__((noinline)) void multiply_tile(const A& a_operand, const Panels& b_operand,
                                             std::int64_t row, const Finish& finish) {
  Accumulators<kRows, kPanels> accumulators;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * kPanelVectors; ++v) accumulators.part[r][v] = Vector{};
  }
  const float* b = b_operand.at;
  const std::int64_t panel_step = b_operand.step;
  for (const Segment *s = a_operand.segments, *end = s + a_operand.segment_count; s != end; ++s) {
    const float* a = a_operand.at + row * A::kRowStep + s->offset;
    const float* const whole = b + s->count / kUnrolled * kUnrolled * kPanel;
    const float* const last = b + s->count * kPanel;
    while (b != whole) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnrolled; ++k, a += A::kElementStep, b += kPanel) {
        add_product<A::kRowStep>(accumulators, a, b, panel_step);
      }
    }
    for (; b != last; a += A::kElementStep, b += kPanel) {
      add_product<A::kRowStep>(accumulators, a, b, panel_step);
    }
  }
  finish(row, accumulators);
}

// The tile of `rows` <= kRows rows.
template <int kRows, int kPanels, class A, class Finish>
static inline void multiply_tile_of(std::int64_t rows, const A& a, const Panels& b,
                                    std::int64_t row, const Finish& finish) {
  if (rows == kRows) return multiply_tile<kRows, kPanels>(a, b, row, finish);
  if constexpr (kRows > 1) multiply_tile_of<kRows - 1, kPanels>(rows, a, b, row, finish);
}

template <int kPanels, class A, class Finish>
static inline void multiply_panels(const A& a, const Panels& b, std::int64_t rows,
                                   const Finish& finish) {
  constexpr int kMost = kMostRows[kPanels];
  // Tiles of equal height, give or take a row: a low one would wait for its own additions.
  const std::int64_t tiles = (rows + kMost - 1) / kMost;
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t row = t * rows / tiles, end = (t + 1) * rows / tiles;
    multiply_tile_of<kMost, kPanels>(end - row, a, b, row, finish);
  }
}

// Calls finish.at(panel)(row, accumulators) with the tiles of A B.
template <class A, class Finish>
static inline void multiply(const A& a, const Panels& b, std::int64_t rows,
                            const Finish& finish) {
  for (std::int64_t p = 0; p < b.count;) {
    const std::int64_t rest = b.count - p;
    // Four are two and two: a single panel loads an element for each product.
    const std::int64_t wide = kMostPanels == 1 || rest == 1 ? 1 : (rest == 2 || rest == 4 ? 2 : 3);
    const Panels from = {b.at + p * b.step, b.step, wide};
    if (wide == 1) multiply_panels<1>(a, from, rows, finish.at(p));
    if constexpr (kMostPanels > 1) {
      if (wide == 2) multiply_panels<2>(a, from, rows, finish.at(p));
      if (wide == 3) multiply_panels<3>(a, from, rows, finish.at(p));
    }
    p += wide;
  }
}

}  // namespace advkd::ADVKD_ISA
