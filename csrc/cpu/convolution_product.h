// Products whose tiles stay in registers until the caller finishes them; as product.h, but for
// panels of a fixed width, whichever the instruction set, and for rows of any number.
#pragma once

#include "cpu/convolution_tile.h"

namespace advkd::ADVKD_ISA {

// The left factor: rows and, within segments, elements of a row lie a fixed number of floats apart.
template <int kRow, int kElement>
struct LeftFactor {
  static constexpr int kRowStep = kRow, kElementStep = kElement;
  const float* at;
  const Segment* segments;
  std::int64_t segment_count;
};

// As many accumulators as the registers hold beside the columns and a broadcast element.
constexpr int kMostPanels = kWidth == 16 ? 3 : 1;
constexpr int kMostRows[] = {0, kWidth == 16 ? 16 : (kWidth == 8 ? 6 : 3), 12, 8};

template <int kRows, int kPanels>
struct Sums {
  Vector part[kRows][kPanels * kPanelVectors];
};

template <int kRowStep, int kRows, int kPanels>
static inline __attribute__((always_inline)) void add_product(Sums<kRows, kPanels>& sums,
                                                              const float* a, const float* b,
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
    for (int v = 0; v < kVectors; ++v) sums.part[r][v] += column[v] * element;
  }
}

constexpr int kUnrolled = 4;

// A function of its own, so that its loop has the registers for itself.
template <int kRows, int kPanels, class Left, class Finish>
__attribute__((noinline)) void make_sums(const Left& left, const Panels& right,
                                         std::int64_t row, const Finish& finish) {
  Sums<kRows, kPanels> sums;
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kPanels * kPanelVectors; ++v) sums.part[r][v] = Vector{};
  }
  const float* b = right.at;
  const std::int64_t panel_step = right.step;
  for (const Segment *s = left.segments, *end = s + left.segment_count; s != end; ++s) {
    const float* a = left.at + row * Left::kRowStep + s->offset;
    const float* const whole = b + s->count / kUnrolled * kUnrolled * kPanel;
    const float* const last = b + s->count * kPanel;
    while (b != whole) {
#pragma GCC unroll 4
      for (int k = 0; k < kUnrolled; ++k, a += Left::kElementStep, b += kPanel) {
        add_product<Left::kRowStep>(sums, a, b, panel_step);
      }
    }
    for (; b != last; a += Left::kElementStep, b += kPanel) {
      add_product<Left::kRowStep>(sums, a, b, panel_step);
    }
  }
  finish(row, sums);
}

template <int kRows, int kPanels, class Left, class Finish>
static inline void make_some_sums(std::int64_t rows, const Left& left, const Panels& right,
                                  std::int64_t row, const Finish& finish) {
  if (rows == kRows) return make_sums<kRows, kPanels>(left, right, row, finish);
  if constexpr (kRows > 1) make_some_sums<kRows - 1, kPanels>(rows, left, right, row, finish);
}

template <int kPanels, class Left, class Finish>
static inline void multiply_panels(const Left& left, const Panels& right, std::int64_t rows,
                                   const Finish& finish) {
  constexpr int kMost = kMostRows[kPanels];
  // Tiles of equal height, give or take a row: a low one would wait for its own additions.
  const std::int64_t tiles = (rows + kMost - 1) / kMost;
  for (std::int64_t t = 0; t < tiles; ++t) {
    const std::int64_t row = t * rows / tiles, end = (t + 1) * rows / tiles;
    make_some_sums<kMost, kPanels>(end - row, left, right, row, finish);
  }
}

// Calls finish.at(panel)(row, sums) with the tiles of left times right.
template <class Left, class Finish>
static inline void multiply(const Left& left, const Panels& right, std::int64_t rows,
                            const Finish& finish) {
  for (std::int64_t p = 0; p < right.count;) {
    const std::int64_t rest = right.count - p;
    // Four are two and two: a single panel loads an element for each product.
    const std::int64_t wide = kMostPanels == 1 || rest == 1 ? 1 : (rest == 2 || rest == 4 ? 2 : 3);
    const Panels from = {right.at + p * right.step, right.step, wide};
    if (wide == 1) multiply_panels<1>(left, from, rows, finish.at(p));
    if constexpr (kMostPanels > 1) {
      if (wide == 2) multiply_panels<2>(left, from, rows, finish.at(p));
      if (wide == 3) multiply_panels<3>(left, from, rows, finish.at(p));
    }
    p += wide;
  }
}

}  // namespace advkd::ADVKD_ISA
