// Matrix products A B whose tiles stay in registers until the caller finishes them.
//
// Vectors lie along the columns of B, which are either columns of rows in memory or lanes of a
// packed copy; each element of A is broadcast. A packed copy of an (m, n) matrix is
// [ceil(n / kLanes)][m][kLanes]: what a tile reads is consecutive, whatever n is.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

template <class T>
constexpr int kLanesOf = kWidth * static_cast<int>(sizeof(float)) / static_cast<int>(sizeof(T));

template <class T>
struct VectorTraits {
  typedef T type __attribute__((vector_size(kWidth * sizeof(float))));
};

template <class T>
using VectorOf = typename VectorTraits<T>::type;

template <class T>
inline VectorOf<T> load_vector(const T* from) {
  VectorOf<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <class T>
inline void store_vector(T* to, VectorOf<T> v) {
  std::memcpy(to, &v, sizeof v);
}

// The first n lanes from memory, the others 0.
template <class T>
inline VectorOf<T> load_first(const T* from, std::int64_t n) {
  if (n >= kLanesOf<T>) return load_vector(from);
  VectorOf<T> v = {};
  std::memcpy(&v, from, static_cast<std::size_t>(n) * sizeof(T));
  return v;
}

template <class T>
inline void store_first(T* to, VectorOf<T> v, std::int64_t n) {
  if (n >= kLanesOf<T>) return store_vector(to, v);
  std::memcpy(to, &v, static_cast<std::size_t>(n) * sizeof(T));
}

// An A operand says where its element (row, k) lies. This one is a matrix by rows.
template <class T>
struct ByRows {
  static constexpr bool kSegmented = false;
  const T* at;
  std::int64_t stride;

  const T* start(std::int64_t row) const { return at + row * stride; }
  std::int64_t row_step() const { return stride; }
  static constexpr std::int64_t step() { return 1; }
  std::int64_t segment_step() const { return 0; }
};

// A packed (m, n) matrix, its m rows being the rows; k runs over the lanes of one block, then of
// the next. `block` is m * kLanes.
template <class T>
struct PackedRows {
  static constexpr bool kSegmented = true;
  const T* at;
  std::int64_t block;

  const T* start(std::int64_t row) const { return at + row * kLanesOf<T>; }
  static constexpr std::int64_t row_step() { return kLanesOf<T>; }
  static constexpr std::int64_t step() { return 1; }
  std::int64_t segment_step() const { return block - kLanesOf<T>; }
};

// The same transposed: its lanes are the rows, and k runs over m.
template <class T>
struct PackedColumns {
  static constexpr bool kSegmented = false;
  const T* at;
  std::int64_t block;

  const T* start(std::int64_t row) const {
    return at + row / kLanesOf<T> * block + row % kLanesOf<T>;
  }
  static constexpr std::int64_t row_step() { return 1; }
  static constexpr std::int64_t step() { return kLanesOf<T>; }
  std::int64_t segment_step() const { return 0; }
};

// The B operand: vector v of row k lies at + k * step + v * vector_step.
template <class T>
struct BOperand {
  const T* at;
  std::int64_t step, vector_step;
};

// Rows and vectors of a tile: as many accumulators as fill the registers, beside a vector of each
// column and a broadcast element. A row must not straddle two blocks of PackedColumns, so rows
// divide the lanes.
template <class T>
constexpr int kTileRows = kWidth == 16 ? 8 : (kLanesOf<T> < 4 ? kLanesOf<T> : 4);
constexpr int kTileVectors = 3;

template <class T, int kRows, int kVectors>
struct Tile {
  VectorOf<T> part[kRows][kVectors];
};

// Adds `count` columns of A times as many rows of B, and moves a and b behind them.
template <int kRows, int kVectors, class T>
inline void add_products(Tile<T, kRows, kVectors>& tile, const T*& a, std::int64_t row_step,
                         std::int64_t step, const T*& b, const BOperand<T>& b_operand,
                         std::int64_t count) {
  for (std::int64_t k = 0; k < count; ++k, a += step, b += b_operand.step) {
    VectorOf<T> column[kVectors];
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) column[v] = load_vector(b + v * b_operand.vector_step);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const T element = a[r * row_step];
#pragma GCC unroll 3
      for (int v = 0; v < kVectors; ++v) tile.part[r][v] += column[v] * element;
    }
  }
}

template <int kRows, int kVectors, class T, class A>
inline Tile<T, kRows, kVectors> product_tile(const A& a_operand, const BOperand<T>& b_operand,
                                             std::int64_t row, std::int64_t vector,
                                             std::int64_t inner) {
  Tile<T, kRows, kVectors> tile;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 3
    for (int v = 0; v < kVectors; ++v) tile.part[r][v] = VectorOf<T>{};
  }
  const T* a = a_operand.start(row);
  const T* b = b_operand.at + vector * b_operand.vector_step;
  const std::int64_t row_step = a_operand.row_step(), step = a_operand.step();
  if constexpr (A::kSegmented) {
    constexpr std::int64_t run = kLanesOf<T>;
    std::int64_t done = 0;
    for (; done + run <= inner; done += run, a += a_operand.segment_step()) {
      add_products<kRows, kVectors>(tile, a, row_step, step, b, b_operand, run);
    }
    inner -= done;
  }
  add_products<kRows, kVectors>(tile, a, row_step, step, b, b_operand, inner);
  return tile;
}

// A function of its own, so that its loop has the registers for itself.
template <int kRows, int kVectors, class T, class A, class Finish>
__attribute__((noinline)) void make_tile(const A& a, const BOperand<T>& b, std::int64_t row,
                                         std::int64_t vector, std::int64_t inner,
                                         const Finish& finish) {
  finish(row, vector, product_tile<kRows, kVectors>(a, b, row, vector, inner));
}

// Rows [row, rows) of one panel of columns, in tiles of kRows rows, then of half as many, ...
template <int kRows, int kVectors, class T, class A, class Finish>
inline void multiply_panel(const A& a, const BOperand<T>& b, std::int64_t row, std::int64_t rows,
                           std::int64_t vector, std::int64_t inner, const Finish& finish) {
  for (; row + kRows <= rows; row += kRows) {
    make_tile<kRows, kVectors>(a, b, row, vector, inner, finish);
  }
  if constexpr (kRows > 1) {
    multiply_panel<kRows / 2, kVectors>(a, b, row, rows, vector, inner, finish);
  }
}

// Calls finish(row, vector, tile) with the tiles of A (rows, inner) times B (inner,
// vectors * kLanes), panel after panel.
template <class T, class A, class Finish>
void multiply(const A& a, const BOperand<T>& b, std::int64_t rows, std::int64_t vectors,
              std::int64_t inner, const Finish& finish) {
  constexpr int kRows = kTileRows<T>;
  for (std::int64_t v = 0; v < vectors;) {
    const std::int64_t rest = vectors - v;
    // Four are two and two, because a panel of one vector leaves arithmetic units idle.
    const int width = rest == 1 ? 1 : (rest == 2 || rest == 4 ? 2 : kTileVectors);
    if (width == 3) multiply_panel<kRows, 3>(a, b, 0, rows, v, inner, finish);
    if (width == 2) multiply_panel<kRows, 2>(a, b, 0, rows, v, inner, finish);
    if (width == 1) multiply_panel<kRows, 1>(a, b, 0, rows, v, inner, finish);
    v += width;
  }
}

// Lane l of the first or the second result of one butterfly of a transposition: the two vectors
// exchange the lanes in which bit kHalf differs.
template <int kHalf, bool kSecond>
constexpr int butterfly_lane(int lane, int lanes) {
  if (kSecond) return (lane & kHalf) != 0 ? lanes + lane : lane + kHalf;
  return (lane & kHalf) != 0 ? lanes + lane - kHalf : lane;
}

template <class T, int kHalf, bool kSecond, int... kLane>
inline VectorOf<T> butterfly(VectorOf<T> a, VectorOf<T> b, std::integer_sequence<int, kLane...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, butterfly_lane<kHalf, kSecond>(kLane, sizeof...(kLane))...);
#else
  typedef decltype(a < b) Lanes;  // integers as wide as T
  return __builtin_shuffle(a, b,
                           Lanes{butterfly_lane<kHalf, kSecond>(kLane, sizeof...(kLane))...});
#endif
}

template <class T, int kHalf>
inline void transpose_from(VectorOf<T> (&v)[kLanesOf<T>]) {
  constexpr int lanes = kLanesOf<T>;
  constexpr std::make_integer_sequence<int, lanes> sequence;
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
    if ((i & kHalf) != 0) continue;
    const VectorOf<T> a = v[i], b = v[i + kHalf];
    v[i] = butterfly<T, kHalf, false>(a, b, sequence);
    v[i + kHalf] = butterfly<T, kHalf, true>(a, b, sequence);
  }
  if constexpr (kHalf > 1) transpose_from<T, kHalf / 2>(v);
}

// Packs factor times the transpose of `rows` rows of `columns` elements: rows become lanes, and
// those beyond the last are copies of it.
template <class T>
void pack_transposed(const ByRows<T>& from, std::int64_t rows, std::int64_t columns, T factor,
                     T* to) {
  constexpr int lanes = kLanesOf<T>;
  for (std::int64_t r = 0; r < rows; r += lanes) {
    const T* row[lanes];
    for (int i = 0; i < lanes; ++i) row[i] = from.start(r + i < rows ? r + i : rows - 1);
    std::int64_t c = 0;
    VectorOf<T> block[lanes];
    for (; c + lanes <= columns; c += lanes, to += lanes * lanes) {
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) block[i] = load_vector(row[i] + c);
      transpose_from<T, lanes / 2>(block);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store_vector(to + i * lanes, block[i] * factor);
    }
    if (c == columns) continue;
    for (int i = 0; i < lanes; ++i) block[i] = load_first(row[i] + c, columns - c);
    transpose_from<T, lanes / 2>(block);
    for (; c < columns; ++c, to += lanes) store_vector(to, block[c % lanes] * factor);
  }
}

// Packs `rows` rows of `columns` elements; lanes beyond the last column are 0.
template <class T>
void pack(const ByRows<T>& from, std::int64_t rows, std::int64_t columns, T* to) {
  constexpr int lanes = kLanesOf<T>;
  // A few rows at a time: they are read through, and written in runs of whole cache lines.
  constexpr std::int64_t kRun = 8;
  for (std::int64_t first = 0; first < rows; first += kRun) {
    const std::int64_t end = first + kRun < rows ? first + kRun : rows;
    for (std::int64_t c = 0; c < columns; c += lanes) {
      for (std::int64_t r = first; r < end; ++r) {
        store_vector(to + c * rows + r * lanes, load_first(from.start(r) + c, columns - c));
      }
    }
  }
}

}  // namespace advkd::ADVKD_ISA
