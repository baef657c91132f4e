// The transformations of Winograd's minimal filtering F(N x N, 3 x 3) (Lavin and Gray 2016), for the
// points 0, 1, -1 (and 2, -2 for N = 4) and infinity; each works on kWidth channels at once.
#pragma once

#include "cpu/vector.h"

namespace advkd::ADVKD_ISA {

// One-dimensional: from[i * from_step] are N + 2 inputs, N + 2 products or 3 weights.
template <int kOut>
struct Winograd;

template <>
struct Winograd<2> {
  static constexpr int kIn = 4;

  static inline __attribute__((always_inline)) void input(const Vector (&d)[4], Vector (&to)[4]) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[3] - d[1];
  }

  static inline __attribute__((always_inline)) void output(const Vector (&m)[4], Vector (&to)[2]) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] + m[3];
  }

  static inline __attribute__((always_inline)) void weights(const Vector (&g)[3], Vector (&to)[4]) {
    const Vector even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    to[0] = g[0];
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = g[2];
  }
};

template <>
struct Winograd<4> {
  static constexpr int kIn = 6;

  static inline __attribute__((always_inline)) void input(const Vector (&d)[6], Vector (&to)[6]) {
    const Vector a = d[4] - d[2] * 4.0f, b = d[3] - d[1] * 4.0f;
    const Vector c = d[4] - d[2], e = d[3] - d[1];
    to[0] = d[0] * 4.0f + (d[4] - d[2] * 5.0f);
    to[1] = a + b;
    to[2] = a - b;
    to[3] = c + e * 2.0f;
    to[4] = c - e * 2.0f;
    to[5] = d[1] * 4.0f + (d[5] - d[3] * 5.0f);
  }

  static inline __attribute__((always_inline)) void output(const Vector (&m)[6], Vector (&to)[4]) {
    const Vector near_sum = m[1] + m[2], near_difference = m[1] - m[2];
    const Vector far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    to[0] = m[0] + near_sum + far_sum;
    to[1] = far_difference * 2.0f + near_difference;
    to[2] = far_sum * 4.0f + near_sum;
    to[3] = far_difference * 8.0f + near_difference + m[5];
  }

  static inline __attribute__((always_inline)) void weights(const Vector (&g)[3], Vector (&to)[6]) {
    const Vector even = (g[0] + g[2]) * (-1.0f / 6.0f), odd = g[1] * (-1.0f / 6.0f);
    const Vector far_even = g[0] * (1.0f / 24.0f) + g[2] * (1.0f / 6.0f);
    const Vector far_odd = g[1] * (1.0f / 12.0f);
    to[0] = g[0] * 0.25f;
    to[1] = even + odd;
    to[2] = even - odd;
    to[3] = far_even + far_odd;
    to[4] = far_even - far_odd;
    to[5] = g[2];
  }
};

}  // namespace advkd::ADVKD_ISA
