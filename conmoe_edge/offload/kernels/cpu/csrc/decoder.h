// A decoder layer for one token: attention and what stands around it, then experts and what stands around them.

#pragma once

#include "experts.h"
#include "latent.h"
#include "router.h"

namespace {

// The parts of a decoder layer around its attention and its experts. Norms without weight are none. With s the sum, and
// all bf16, every step rounded:
//   s = x + attended(attention(before(x))) * multiplier
//   s + given(experts(after(s))) * multiplier
struct Block {
  Attention attention;
  const Latent* latent;  // in place of `attention`, or null
  Norm before, attended, after, given;
  int64_t columns;
  float multiplier;
};

// What stands between a layer's attention and its experts: the sum behind the attention and its norm [columns], the
// router's logits [slots], gates and slots [chosen].
struct Between {
  uint16_t *sum, *normed;
  void *logits, *gates;
  int64_t* slots;
};

inline void normed(const Norm& norm, const uint16_t* x, uint16_t* out, int64_t columns) {
  if (norm.weight)
    rms_norm(norm, x, out, 1, true);
  else
    std::copy_n(x, columns, out);
}

// out = x + y * multiplier; out may be either of them.
inline void add_to(const uint16_t* x, const uint16_t* y, float multiplier, uint16_t* out, int64_t columns) {
  for (int64_t k = 0; k < columns; ++k) {
    const float other = multiplier == 1.0f ? from_bf16(y[k]) : rounded(from_bf16(y[k]) * multiplier);
    out[k] = to_bf16(from_bf16(x[k]) + other);
  }
}

// x to the sum behind attention, and its norm. Returns whether a form cannot be taken.
bool block(const Block& layer, const uint16_t* x, const Rotary& rotary, const Cached& cached, uint16_t* sum,
           uint16_t* norm) {
  normed(layer.before, x, norm, layer.columns);
  if (layer.latent ? latent_attention(*layer.latent, norm, rotary, cached, sum)
                   : attention(layer.attention, norm, rotary, cached, sum))
    return true;
  if (layer.attended.weight) rms_norm(layer.attended, sum, sum, 1, true);
  add_to(x, sum, layer.multiplier, sum, layer.columns);
  normed(layer.after, sum, norm, layer.columns);
  return false;
}

// From the sum and its norm in `between` to out: experts, or a dense layer, or the sum of both. Returns how many prototypes
// there were, or a code.
int64_t feed_forward(const Block& block, const Router* router, const Layer* layer, const Mlp* mlp, const Between& between,
                     uint16_t* out) {
  const int64_t columns = block.columns;
  const bool bare = !mlp && !block.given.weight && block.multiplier == 1.0f;
  Room<uint16_t> first(bare ? 0 : columns), second(mlp ? columns : 0);
  int64_t count = 0;
  if (router) {
    if (route(*router, between.normed, between.logits, between.gates, between.slots)) return FORM;
    count = routed(layer, between.slots, between.gates, router->narrow, router->chosen, between.normed,
                   bare ? between.sum : nullptr, bare ? out : first.data(), 1);
    if (count < 0 || bare) return count;
  }
  if (mlp) {
    if (dense(*mlp, between.normed, second.data())) return FORM;
    if (router)
      add_to(first.data(), second.data(), 1.0f, first.data(), columns);
    else
      std::copy_n(second.data(), columns, first.data());
  }
  if (block.given.weight) rms_norm(block.given, first.data(), first.data(), 1, true);
  add_to(between.sum, first.data(), block.multiplier, out, columns);
  return count;
}

}  // namespace
