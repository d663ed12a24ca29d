// A decoder layer for one token, or for one token each of several answers: attention and what stands around it, then
// experts and what stands around them.

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
// router's logits [slots], gates and slots [chosen]; of several tokens one after another.
struct Between {
  uint16_t *sum, *normed;
  void *logits, *gates;
  int64_t* slots;
};

// Where a token of an answer stands, and its answer's cache, as Python gives them.
struct Place {
  const void* cos;
  const void* sin;
  int64_t rotary;
  void* keys;
  void* values;
  int64_t key_step, value_step, held, packed;
  Standing standing() const {
    return {Rotary{cos, sin, rotary, NOT}, Cached{keys, values, key_step, value_step, held, packed != 0}};
  }
};

inline void normed(const Norm& norm, int64_t tokens, const uint16_t* x, uint16_t* out, int64_t columns) {
  if (norm.weight)
    rms_norm(norm, x, out, tokens, true);
  else
    std::copy_n(x, tokens * columns, out);
}

// out = x + y * multiplier; out may be either of them.
inline void add_to(const uint16_t* x, const uint16_t* y, float multiplier, uint16_t* out, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const float other = multiplier == 1.0f ? from_bf16(y[k]) : rounded(from_bf16(y[k]) * multiplier);
    out[k] = to_bf16(from_bf16(x[k]) + other);
  }
}

// Rows of x to the sums behind attention, and their norms. Returns whether a form cannot be taken.
bool block(const Block& layer, int64_t tokens, const uint16_t* x, const Standing* standing, uint16_t* sum,
           uint16_t* norm) {
  normed(layer.before, tokens, x, norm, layer.columns);
  if (layer.latent ? latent_attention(*layer.latent, tokens, norm, standing, sum)
                   : attention(layer.attention, tokens, norm, standing, sum))
    return true;
  if (layer.attended.weight) rms_norm(layer.attended, sum, sum, tokens, true);
  add_to(x, sum, layer.multiplier, sum, tokens * layer.columns);
  normed(layer.after, tokens, sum, norm, layer.columns);
  return false;
}

// From the sums and their norms in `between` to out: experts, or a dense layer, or the sum of both. Returns how many
// prototypes there were, or a code.
int64_t feed_forward(const Block& block, const Router* router, const Layer* layer, const Mlp* mlp, int64_t tokens,
                     const Between& between, uint16_t* out) {
  const int64_t count = tokens * block.columns;
  const bool bare = !mlp && !block.given.weight && block.multiplier == 1.0f;
  Room<uint16_t> first(bare ? 0 : count), second(mlp ? count : 0);
  int64_t found = 0;
  if (router) {
    if (route(*router, tokens, between.normed, between.logits, between.gates, between.slots)) return FORM;
    found = routed(layer, tokens, between.slots, between.gates, router->narrow, router->chosen, between.normed,
                   bare ? between.sum : nullptr, bare ? out : first.data(), 1);
    if (found < 0 || bare) return found;
  }
  if (mlp) {
    if (dense(*mlp, tokens, between.normed, second.data())) return FORM;
    if (router)
      add_to(first.data(), second.data(), 1.0f, first.data(), count);
    else
      std::copy_n(second.data(), count, first.data());
  }
  if (block.given.weight) rms_norm(block.given, first.data(), first.data(), tokens, true);
  add_to(between.sum, first.data(), block.multiplier, out, count);
  return found;
}

}  // namespace
