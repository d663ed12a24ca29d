// Attention over compressed keys and values (DeepSeek-V2, arXiv:2405.04434, section 2.1), as in attention.h.

#pragma once

#include "attention.h"

namespace {

// Keys and values of all heads come out of one row of `rank` numbers, which is what the cache holds as a token's key; its
// value there is the part of the key that turns, `turned` numbers, the same for all heads. `expand` has for every head
// `still` rows of its key and `value_width` rows of its value.
//
// Nothing is expanded here: a head's query times its rows of `expand` meets the rows of the cache as they are, and what
// they add up to goes through the rows of the head's value. That is the same sum in another order.
struct Latent {
  Linear compress_query;  // without values there is none, and `query` takes x
  Linear query, compress, expand, output;
  Norm query_norm, norm;  // of the compressed query, of `rank`
  int64_t heads, still, turned, value_width, rank;
  float scaling;
  int32_t turn;
};

// y[r] of rows `first` to `first + count` of a matrix times x, fp32. `columns_too`: y[k] = the rows added up, times x[r].
template <class Form>
void some_rows(const Linear& linear, int64_t first, int64_t count, const float* x, float* y, bool columns_too) {
  const int64_t columns = linear.columns;
  const auto* w = static_cast<const typename Form::T*>(linear.values) + first * columns;
  const auto* scales = static_cast<const uint16_t*>(linear.scales);
  const auto scale = [&](int64_t r) { return scales ? from_bf16(scales[first + r]) : 1.0f; };
  if (!columns_too) {
    int64_t r = 0;
    for (; r + ROWS <= count; r += ROWS) dot<Form, ROWS>(w + r * columns, columns, columns, x, y + r);
    for (; r < count; ++r) dot<Form, 1>(w + r * columns, columns, columns, x, y + r);
    for (r = 0; r < count; ++r) y[r] *= scale(r);
    return;
  }
  Room<float> shares(count);
  for (int64_t r = 0; r < count; ++r) shares[r] = x[r] * scale(r);
  std::fill_n(y, columns, 0.0f);
  add_weighted<Form, 1, 8>(w, shares.data(), count, y, count, columns);
}

// From a token's query and its `state`, which are changed, to what its heads give. Returns whether a form cannot be taken.
bool latent_heads(const Latent& layer, Rotary rotary, const Cached& cached, uint16_t* query, uint16_t* state,
                  uint16_t* mixed) {
  const int64_t heads = layer.heads, still = layer.still, turned = layer.turned, rank = layer.rank;
  const int64_t width = still + turned, values_wide = layer.value_width, length = cached.held + 1;
  rms_norm(layer.norm, state, state, 1, true);
  rotary.how = layer.turn;
  rotary.turn(state + rank);
  for (int64_t head = 0; head < heads; ++head) rotary.turn(query + head * width + still);
  cached.put(cached.key(0, cached.held, rank), state, rank);
  cached.put(cached.value(0, cached.held, turned), state + rank, turned);

  Room<float> latent(heads * rank), angles(heads * turned), scores(heads * length), other(heads * length);
  Room<float> sums(heads * rank), values(heads * values_wide);
  const Source wide(query, true, heads * width);
  const int64_t each = still + values_wide;
  const bool known = in_rows(int(layer.expand.kind), [&](auto form) {
    using Form = decltype(form);
    shared_loop(heads, evenly(heads, heads * each * rank > MANY), [&](int64_t head, int64_t) {
      some_rows<Form>(layer.expand, head * each, still, wide.values + head * width, latent.data() + head * rank, true);
      std::copy_n(wide.values + head * width + still, turned, angles.data() + head * turned);
    });
    const void* const rows = cached.keys;
    const void* const parts = cached.values;
    row_scores(1, &rows, cached.form(rank), latent.data(), heads, scores.data(), length);
    row_scores(1, &parts, cached.form(turned), angles.data(), heads, other.data(), length);
    shared_loop(heads, evenly(heads, heads * length > MANY), [&](int64_t head, int64_t) {
      float* const row = scores.data() + head * length;
      for_each(other.data() + head * length, row, length, [](Lanes a, Lanes b) { return add(a, b); });
      softmax(row, length, layer.scaling);
    });
    row_sums(1, &rows, cached.form(rank), scores.data(), heads, Target{sums.data(), false}, length);
    shared_loop(heads, evenly(heads, heads * each * rank > MANY), [&](int64_t head, int64_t) {
      some_rows<Form>(layer.expand, head * each + still, values_wide, sums.data() + head * rank,
                      values.data() + head * values_wide, false);
    });
  });
  for (int64_t k = 0; known && k < heads * values_wide; ++k) mixed[k] = to_bf16(values[k]);
  return !known;
}

// One token each of several answers: rows of x to rows of out.
bool latent_attention(const Latent& layer, int64_t tokens, const uint16_t* x, const Standing* standing, uint16_t* out) {
  const int64_t asked = layer.heads * (layer.still + layer.turned), kept = layer.rank + layer.turned;
  const int64_t given = layer.heads * layer.value_width;
  Room<uint16_t> query(tokens * asked), state(tokens * kept), mixed(tokens * given);
  const uint16_t* asking = x;
  Room<uint16_t> small(layer.compress_query.values ? tokens * layer.compress_query.rows : 0);
  if (layer.compress_query.values) {
    if (linears(&layer.compress_query, 1, tokens, x, small.data())) return true;
    if (layer.query_norm.weight) rms_norm(layer.query_norm, small.data(), small.data(), tokens, true);
    asking = small.data();
  }
  if (linears(&layer.query, 1, tokens, asking, query.data()) || linears(&layer.compress, 1, tokens, x, state.data()))
    return true;
  std::atomic<bool> failed{false};
  for_tokens(tokens, [&](int64_t token) {
    if (latent_heads(layer, standing[token].rotary, standing[token].cached, query.data() + token * asked,
                     state.data() + token * kept, mixed.data() + token * given))
      failed = true;
  });
  return failed || linears(&layer.output, 1, tokens, mixed.data(), out) != 0;
}

}  // namespace
