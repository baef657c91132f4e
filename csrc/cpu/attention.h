// What the forward and the backward of attention share.
#pragma once

#include <cstdint>

#include "cpu/buffer.h"
#include "cpu/product.h"

namespace advkd::ADVKD_ISA {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

static inline std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

static inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// `length` in parts of at most `largest`, which is a multiple of the lanes; all but the last are
// equal and as short as the lanes allow.
template <class T>
struct Parts {
  std::int64_t length, size, count;

  Parts(std::int64_t whole, std::int64_t largest) : length(whole) {
    const std::int64_t even = divided_up(whole, divided_up(whole, largest));
    size = divided_up(even, kLanesOf<T>) * kLanesOf<T>;
    count = divided_up(whole, size);
  }

  std::int64_t size_of(std::int64_t part) const { return smaller(size, length - part * size); }
};

template <class T>
ByRows<T> rows_of(const HeadRows<const T>& operand, std::int64_t sample, std::int64_t head,
                  std::int64_t row = 0) {
  return {operand.at + sample * operand.batch + head * operand.head + row * operand.row,
          operand.row};
}

// Writable rows of an output.
template <class T>
struct OutRows {
  T* at;
  std::int64_t stride;
};

template <class T>
OutRows<T> out_rows_of(const HeadRows<T>& operand, std::int64_t sample, std::int64_t head,
                       std::int64_t row = 0) {
  return {operand.at + sample * operand.batch + head * operand.head + row * operand.row,
          operand.row};
}

// `rows` rows as the B operand of a product: packed into `buffer` where there are many, as rows
// far apart share few sets of the cache, or where the last vector would pass the row's end.
template <class T>
BOperand<T> b_operand(const ByRows<T>& from, std::int64_t rows, std::int64_t columns, T* buffer) {
  constexpr std::int64_t kFewRows = 64;
  if (rows <= kFewRows && columns % kLanesOf<T> == 0) return {from.at, from.stride, kLanesOf<T>};
  pack(from, rows, columns, buffer);
  return {buffer, kLanesOf<T>, rows * kLanesOf<T>};
}

}  // namespace advkd::ADVKD_ISA
