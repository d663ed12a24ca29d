// Functions of every number of a row.

#pragma once

#include <algorithm>
#include <limits>

#include "lanes.h"

namespace {

// y[k] = function(x[k], y[k]) for lanes of numbers; what is left over at the end has lanes of its own, so that a number's
// result does not depend on its place.
template <class Function>
inline void for_each(const float* x, float* y, int64_t count, Function function) {
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) store(y + k, function(load(x + k), load(y + k)));
  if (k == count) return;
  float first[LANES] = {0}, second[LANES] = {0};
  std::copy(x + k, x + count, first);
  std::copy(y + k, y + count, second);
  store(second, function(load(first), load(second)));
  std::copy(second, second + count - k, y + k);
}

// In lanes, so the order is always the same.
inline float sum_of(const float* x, int64_t count) {
  Lanes total = zero();
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) total = add(total, load(x + k));
  float rest = 0;
  for (; k < count; ++k) rest += x[k];
  return sum(total) + rest;
}

inline float greatest(const float* x, int64_t count) {
  float found[LANES], top = -std::numeric_limits<float>::infinity();
  Lanes all_found = all(top);
  int64_t k = 0;
  for (; k + LANES <= count; k += LANES) all_found = most(all_found, load(x + k));
  store(found, all_found);
  for (const float one : found) top = std::max(top, one);
  for (; k < count; ++k) top = std::max(top, x[k]);
  return top;
}

// The nearest whole numbers, ties to even, of such below 2^22: beside 1.5 * 2^23 there is no room for a fraction.
inline Lanes nearest(Lanes x) { return add(add(x, all(12582912.0f)), all(-12582912.0f)); }

// To a few units in the last place; what is below exp(-87) or above exp(87) is that.
inline Lanes exp(Lanes x) {
  const Lanes t = fma(least(all(87.0f), most(all(-87.0f), x)), all(1.44269504f), zero());
  const Lanes whole = nearest(t), f = fma(whole, all(-1.0f), t);
  Lanes p = all(1.5403530e-4f);  // 2^f for |f| <= 1/2, its Taylor series
  for (const float next : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f, 6.9314718e-1f, 1.0f})
    p = fma(p, f, all(next));
  return fma(p, power_of_two(whole), zero());
}

// What an expert makes of its gate x and its other half y: silu(x) * y; or, with a `limit`, as gpt-oss does,
// min(x, limit) * sigmoid(alpha * min(x, limit)) * (y within +-limit + 1).
struct Gate {
  float alpha, limit;
  int32_t interleaved;  // rows of the two take turns, else those of x lie before those of y
};

// y = what `how` makes of x and y.
inline void gate(const float* x, float* y, int64_t count, const Gate& how) {
  if (how.limit > 0) {
    const Lanes alpha = all(-how.alpha), top = all(how.limit), bottom = all(-how.limit), one = all(1.0f);
    for_each(x, y, count, [=](Lanes v, Lanes other) {
      const Lanes cut = least(top, v), up = most(bottom, least(top, other));
      return fma(divide(cut, add(one, exp(fma(cut, alpha, zero())))), add(up, one), zero());
    });
    return;
  }
  for_each(x, y, count, [](Lanes v, Lanes factor) {
    return fma(divide(v, add(all(1.0f), exp(fma(v, all(-1.0f), zero())))), factor, zero());
  });
}

// The softmax of `scaling` times `count` numbers, in their place.
inline void softmax(float* x, int64_t count, float scaling) {
  const Lanes factor = all(scaling);
  for_each(x, x, count, [=](Lanes v, Lanes) { return fma(v, factor, zero()); });
  const Lanes top = all(-greatest(x, count));
  for_each(x, x, count, [=](Lanes v, Lanes) { return exp(add(v, top)); });
  const Lanes total = all(sum_of(x, count));
  for_each(x, x, count, [=](Lanes v, Lanes) { return divide(v, total); });
}

}  // namespace
