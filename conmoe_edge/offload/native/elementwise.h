// Functions of every number of a row, written so that a compiler makes vectors of them: without branches, sums in lanes.

#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"

namespace {

// The nearest whole number, ties to even, of one that is below 2^22: a number of 1.5 * 2^23 has no room for a fraction.
inline float nearest(float x) {
  constexpr float ROOM = 12582912.0f;
  return (x + ROOM) - ROOM;
}

// exp of a number that is not above 0, to a few units in the last place; below 2^-126 it is that.
inline float exp_below(float x) {
  const float t = x * 1.44269504f > -126.0f ? x * 1.44269504f : -126.0f;
  const float whole = nearest(t), f = t - whole;
  float p = 1.5403530e-4f;  // 2^f for |f| <= 1/2, its Taylor series
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * from_bits(uint32_t(int32_t(whole) + 127) << 23);
}

inline float silu(float x) {
  const float e = exp_below(-std::fabs(x));
  return (x < 0 ? x * e : x) / (1.0f + e);
}

// In lanes, so the order is always the same.
inline float sum_of(const float* x, int64_t count) {
  float sums[LANES] = {0}, total = 0;
  const int64_t whole = count - count % LANES;
  for (int64_t k = 0; k < whole; k += LANES)
#pragma omp simd
    for (int64_t i = 0; i < LANES; ++i) sums[i] += x[k + i];
  for (int64_t k = whole; k < count; ++k) total += x[k];
  for (const float one : sums) total += one;
  return total;
}

// The softmax of `scaling` times `count` numbers, in their place.
inline void softmax(float* x, int64_t count, float scaling) {
  float top = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : top)
  for (int64_t k = 0; k < count; ++k) {
    x[k] *= scaling;
    top = top > x[k] ? top : x[k];
  }
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) x[k] = exp_below(x[k] - top);
  const float total = sum_of(x, count);
  for (int64_t k = 0; k < count; ++k) x[k] /= total;
}

}  // namespace
