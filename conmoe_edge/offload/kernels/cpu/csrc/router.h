// The router of a layer, token by token.

#pragma once

#include "attention.h"

namespace {

// SOFTMAX and SIGMOID of the logits are scores, of which the greatest are chosen. TOP_SOFTMAX chooses by the logits, and
// the gates are the softmax of those chosen. SPARSEMIXER is the choice of two of Phi-3.5-MoE (arXiv:2404.14219), without
// its noise: each gate is the share of its logit in the softmax of those that are near to it.
enum Scores { SOFTMAX = 0, SIGMOID = 1, TOP_SOFTMAX = 2, SPARSEMIXER = 3 };

// In this order: logits; scores; `correction` is added, for the choice alone; of `groups` of neighbouring slots the `kept`
// best are left, by their greatest or, with `pairs`, by the sum of their two greatest; the `chosen` greatest. Their scores
// are the gates, `normed` divided by their sum, to which `epsilon` is added and which is `least` at least; then times
// `scaling`.
struct Router {
  Linear linear;
  const float* correction;  // [rows], or null
  int64_t chosen, groups, kept;
  float scaling, epsilon, least, threshold;  // threshold: how near, for SPARSEMIXER
  int32_t scores, pairs, normed;
  int32_t narrow;    // gates are rounded to bf16 at the end, else fp32
  int32_t exact;     // logits are fp32, else rounded to bf16
  int32_t stepwise;  // every step behind the logits is rounded to bf16
};

// The greatest that is not taken; of equal ones the first. -1 where all are taken.
inline int64_t best_of(const float* x, const char* taken, int64_t count) {
  int64_t best = -1;
  for (int64_t i = 0; i < count; ++i)
    if (!taken[i] && (best < 0 || x[i] > x[best])) best = i;
  return best;
}

// Marks the slots of all groups but the `kept` best as taken.
void leave_groups(const Router& router, const float* x, char* taken) {
  const int64_t groups = router.groups, size = router.linear.rows / groups;
  std::vector<float> best;
  for (int64_t group = 0; group < groups; ++group) {
    const float* const from = x + group * size;
    std::vector<char> seen(size_t(size), 0);
    const int64_t first = best_of(from, seen.data(), size);
    seen[size_t(first)] = 1;
    const int64_t second = router.pairs ? best_of(from, seen.data(), size) : -1;
    best.push_back(second < 0 ? from[first] : from[first] + from[second]);
  }
  std::vector<char> left(size_t(groups), 0);
  for (int64_t i = 0; i < router.kept; ++i) left[size_t(best_of(best.data(), left.data(), groups))] = 1;
  for (int64_t i = 0; i < router.linear.rows; ++i) taken[i] = !left[size_t(i / size)];
}

// Two slots and their gates; every step is rounded to bf16, as it is where each is an operation of its own.
void sparsemixer(const float* x, int64_t count, float threshold, int64_t* slots, float* gates) {
  std::vector<char> taken(size_t(count), 0);
  for (int64_t choice = 0; choice < 2; ++choice) {
    const int64_t best = best_of(x, taken.data(), count);
    const float top = x[best];
    float total = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (taken[size_t(i)]) continue;
      const float far = rounded(rounded(top - x[i]) / std::max(std::fabs(x[i]), top));
      if (!(far > threshold)) total += std::exp(x[i] - top);
    }
    slots[choice] = best;
    gates[choice] = rounded(1.0f / total);
    taken[size_t(best)] = 1;
  }
}

// The scores of the slots from their logits, in their place.
void score(const Router& router, float* p) {
  const int64_t count = router.linear.rows;
  if (router.scores == SIGMOID) {
    for (int64_t i = 0; i < count; ++i) {
      p[i] = 1.0f / (1.0f + std::exp(-p[i]));
      if (router.stepwise) p[i] = rounded(p[i]);
    }
  } else if (router.scores == SOFTMAX) {
    float top = -std::numeric_limits<float>::infinity(), total = 0;
    for (int64_t i = 0; i < count; ++i) top = std::max(top, p[i]);
    for (int64_t i = 0; i < count; ++i) total += p[i] = std::exp(p[i] - top);
    for (int64_t i = 0; i < count; ++i) p[i] /= total;
  }
}

// Of scores (or logits) the chosen slots and what becomes their gates.
void choose(const Router& router, const float* p, int64_t* slots, float* gates) {
  const int64_t count = router.linear.rows, chosen = router.chosen;
  if (router.scores == SPARSEMIXER) return sparsemixer(p, count, router.threshold, slots, gates);
  std::vector<float> wanted(p, p + count);
  if (router.correction)
    for (int64_t i = 0; i < count; ++i) wanted[size_t(i)] += router.correction[i];
  std::vector<char> taken(size_t(count), 0);
  if (router.groups > 1) leave_groups(router, wanted.data(), taken.data());
  for (int64_t i = 0; i < chosen; ++i) {
    slots[i] = best_of(wanted.data(), taken.data(), count);
    taken[size_t(slots[i])] = 1;
    gates[i] = p[slots[i]];
  }
  if (router.scores != TOP_SOFTMAX) return;
  float total = 0;
  for (int64_t i = chosen; i-- > 0;) gates[i] = std::exp(gates[i] - gates[0]);
  for (int64_t i = 0; i < chosen; ++i) total += gates[i];
  for (int64_t i = 0; i < chosen; ++i) gates[i] /= total;
}

// Rows of x to rows of logits [rows] (fp32 where they are `exact`, else bf16), and the chosen slots with their gates (bf16
// or fp32), the greatest first and of equal ones the first. Returns whether a form cannot be taken.
bool route(const Router& router, int64_t tokens, const uint16_t* x, void* logits, void* gates, int64_t* slots) {
  const Linear& linear = router.linear;
  const int64_t count = linear.rows, chosen = router.chosen;
  const Source source(x, true, tokens * linear.columns);
  Room<float> all(tokens * count);
  std::vector<float> found(size_t(chosen), 0.0f);
  if (products(int(linear.kind), 1, &linear.values, &linear.scales, source.values, true, tokens,
               Target{all.data(), false}, count, linear.columns, linear.group))
    return true;
  const Target seen{logits, !router.exact}, target{gates, router.narrow != 0};
  for (int64_t token = 0; token < tokens; ++token) {
    float* const p = all.data() + token * count;
    for (int64_t i = 0; i < count; ++i) {
      if (linear.bias) p[i] += from_bf16(linear.bias[i]);
      if (!router.exact) p[i] = rounded(p[i]);
      seen.put(token * count + i, p[i]);
    }
    score(router, p);
    choose(router, p, slots + token * chosen, found.data());
    const auto step = [&](float value) { return router.stepwise ? rounded(value) : value; };
    if (router.normed) {
      float sum = 0;
      for (const float one : found) sum += one;
      sum = step(step(sum) + router.epsilon);
      if (sum < router.least) sum = router.least;
      for (float& one : found) one = step(one / sum);
    }
    for (int64_t i = 0; i < chosen; ++i) target.put(token * chosen + i, step(found[size_t(i)] * router.scaling));
  }
  return false;
}

}  // namespace
