// The router of a layer, for one token.

#pragma once

#include "attention.h"

namespace {

// Probabilities by softmax over all slots, of which the greatest are chosen. `normed` divides them by their sum; `narrow`
// rounds them to bf16 at the end.
struct Router {
  Linear linear;
  int64_t chosen;
  int32_t normed, narrow;
};

// x to logits [rows] in bf16, and the chosen slots with their gates (bf16 or fp32), the greatest first and of equal ones
// the first. Returns as `linears`.
int route(const Router& router, const uint16_t* x, uint16_t* logits, void* gates, int64_t* slots) {
  if (linears(&router.linear, 1, x, logits)) return 1;
  const int64_t count = router.linear.rows;
  std::vector<float> p(size_t(count), 0.0f);
  float top = -std::numeric_limits<float>::infinity(), total = 0;
  for (int64_t i = 0; i < count; ++i) top = std::max(top, from_bf16(logits[i]));
  for (int64_t i = 0; i < count; ++i) total += p[size_t(i)] = std::exp(from_bf16(logits[i]) - top);
  for (float& one : p) one /= total;
  const Target target{gates, router.narrow != 0};
  float sum = 0;
  std::vector<float> best(size_t(router.chosen), 0.0f);
  for (int64_t i = 0; i < router.chosen; ++i) {
    const auto found = std::max_element(p.begin(), p.end());  // the first of equal ones
    slots[i] = found - p.begin();
    sum += best[size_t(i)] = *found;
    *found = -1.0f;
  }
  for (int64_t i = 0; i < router.chosen; ++i) target.put(i, router.normed ? best[size_t(i)] / sum : best[size_t(i)]);
  return 0;
}

}  // namespace
