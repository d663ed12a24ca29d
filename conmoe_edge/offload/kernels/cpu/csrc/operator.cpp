// The functions that Python calls: weights times few rows of activations, gated experts and whole layers for one token.
//
// One token makes every weight count once, so the only thing that matters is to read them at the speed of the memory.
// Each function runs one loop over all the matrices it is given, the experts of a token together, on as many threads as
// its first argument says (pool.h). Activations come and go in bf16 or fp32 and are fp32 in between.
//
// Plain C interface, no library but that of the language: it is called through ctypes. What Python gives is checked
// there; here only null addresses and sizes below zero are refused. Every function returns 0 or a count, or one of the
// codes below; then nothing has been written, but for what a comment says.

#include <cstddef>

#include "decoder.h"
#include "many_rows.h"

namespace {

template <class Run>
auto guarded(int64_t threads, bool right, Run run) -> decltype(run()) {
  using Result = decltype(run());
  if (!right) return Result(ARGUMENT);
  const Allowed allowed(threads);
  try {
    return run();
  } catch (...) {  // of our own code only std::bad_alloc; nothing may pass into Python
    return Result(MEMORY);
  }
}

bool turns(const void* cos, const void* sin, int64_t width) { return width == 0 || (cos && sin && width > 0); }

template <class... Addresses>
bool given(Addresses... addresses) {
  return (... && (addresses != nullptr));
}

}  // namespace

extern "C" {

// What this was compiled for, as levels.py calls it: the code that was taken, not what the compiler was told.
const char* conmoe_level() {
#if CONMOE_WIDE_BYTES
  return "avx512-vnni";
#elif CONMOE_AVX512
  return "avx512";
#elif CONMOE_AVX2 && defined(__AVXVNNI__)
  return "avx-vnni";
#elif CONMOE_AVX2
  return "avx2";
#elif CONMOE_NEON && defined(__ARM_FEATURE_DOTPROD)
  return "dotprod";
#elif CONMOE_NEON
  return "neon";
#else
  return "plain";
#endif
}

// y[i, t] = W_i x[i, t] for i < count and t < tokens. x: [count, tokens, columns], or [tokens, columns] for all
// matrices with x_stride 0; y: [count, tokens, rows]; both bf16 where `narrow`, else fp32.
int conmoe_few_rows(int64_t threads, int kind, int64_t count, const void* const* values, const void* const* scales,
                    const void* x, int64_t x_stride, int64_t tokens, void* y, int64_t rows, int64_t columns,
                    int64_t group, int narrow) {
  const bool right = given(values, scales, x, y) && count >= 0 && tokens >= 0 && rows > 0 && columns > 0 && group >= 0;
  return guarded(threads, right, [&] {
    const Source source(x, narrow, (x_stride ? count : 1) * tokens * columns);
    const Target target{y, narrow != 0};
    const bool failed =
        products(kind, count, values, scales, source.values, x_stride == 0, tokens, target, rows, columns, group);
    return failed ? int(FORM) : 0;
  });
}

// y[i] = D_i gate(G_i x, U_i x), fp32 [count, columns], for one token x [columns] (bf16 where `narrow`). up_values hold
// the rows of G_i and U_i as the gate says: [2 * widths[i], columns] in groups of up_group; down_values D_i: [columns,
// widths[i]] in groups of down_groups[i]. Biases bf16, null where there are none, or where one has none.
int conmoe_gated_experts(int64_t threads, int up_kind, int down_kind, int64_t count, const void* const* up_values,
                         const void* const* up_scales, const void* const* down_values, const void* const* down_scales,
                         const void* x, float* y, const int64_t* widths, int64_t columns, int64_t up_group,
                         const int64_t* down_groups, int narrow, const uint16_t* const* up_bias,
                         const uint16_t* const* down_bias, const Gate* gate) {
  const bool right = given(up_values, up_scales, down_values, down_scales, x, y, widths, down_groups, gate) &&
                     count > 0 && columns > 0 && up_group >= 0;
  return guarded(threads, right, [&] {
    const Source source(x, narrow, columns);
    const Gated ups{count, up_values, up_scales, up_bias, widths, *gate};
    const Down downs{down_values, down_scales, down_bias, down_groups};
    const Askers askers = Askers::one(count);
    return int(gated_experts(up_kind, down_kind, ups, downs, askers, source.values, 1, y, columns, up_group));
  });
}

// out = sum over i of weights[i] * y[i] + sum over j of gates[j] * constants[j], in this order; y: fp32 [count, columns],
// constants: addresses of fp32 [columns] each; out bf16 where `narrow`.
int conmoe_combine(int64_t threads, int64_t count, const float* y, const float* weights, int64_t extra,
                   const float* const* constants, const float* gates, void* out, int64_t columns, int narrow) {
  return guarded(threads, given(out) && count >= 0 && extra >= 0 && columns > 0, [&] {
    std::vector<const float*> rows;
    for (int64_t i = 0; i < count; ++i) rows.push_back(y + i * columns);
    Room<float> total(columns);
    combine(count, rows.data(), weights, extra, constants, gates, total.data(), Target{out, narrow != 0}, columns);
    return 0;
  });
}

// `routed` in experts.h.
int64_t conmoe_layer(int64_t threads, const Layer* layer, const int64_t* slots, const void* gates, int narrow_gates,
                     int64_t k, const void* x, const void* residual, void* out, int narrow) {
  return guarded(threads, given(layer, slots, gates, x, out) && k >= 0, [&] {
    return routed(layer, 1, slots, gates, narrow_gates, k, x, residual, out, narrow);
  });
}

// `dense` in experts.h: x and out bf16.
int conmoe_dense(int64_t threads, const Mlp* mlp, const uint16_t* x, uint16_t* out) {
  return guarded(threads, given(mlp, x, out), [&] { return dense(*mlp, 1, x, out) ? int(FORM) : 0; });
}

// Rows of x through `norm`: [rows, norm.columns], bf16 where `narrow`, else fp32.
int conmoe_rms_norm(int64_t threads, const Norm* norm, const void* x, void* out, int64_t rows, int narrow) {
  return guarded(threads, given(norm, x, out) && rows >= 0, [&] {
    rms_norm(*norm, x, out, rows, narrow != 0);
    return 0;
  });
}

// out = softmax(q K^T * scaling) V of one new token: q [groups, each, columns] and out [groups, each, width] in bf16, K_i
// [length, columns] and V_i [length, width] of every group in bf16; scores and sums are fp32.
int conmoe_attend(int64_t threads, int64_t groups, const void* const* keys, const void* const* values, const void* q,
                  int64_t each, void* out, int64_t length, int64_t columns, int64_t width, float scaling) {
  const bool right = given(keys, values, q, out) && groups > 0 && each > 0 && length > 0 && columns > 0 && width > 0;
  return guarded(threads, right, [&] {
    attend(groups, keys, values, q, each, out, length, RowForm{columns, false}, RowForm{width, false}, scaling);
    return 0;
  });
}

// A layer's attention for one new token: x [columns of q] to out [rows of o], both bf16. cos and sin: of its position, for
// the first `rotary` numbers of a head (attention.h). keys and values: the first head's rows of a cache that holds `held`
// tokens and has room for another, heads `key_step` and `value_step` numbers apart: bf16, or where it is `packed` rows of
// bytes (kv_rows.h); the new token's are written there.
int conmoe_attention(int64_t threads, const Attention* layer, const uint16_t* x, const void* cos, const void* sin,
                     int64_t rotary, void* keys, void* values, int64_t key_step, int64_t value_step, int64_t held,
                     int packed, uint16_t* out) {
  return guarded(threads, given(layer, x, keys, values, out) && held >= 0 && turns(cos, sin, rotary), [&] {
    const Standing standing{Rotary{cos, sin, rotary, NOT}, Cached{keys, values, key_step, value_step, held, packed != 0}};
    return attention(*layer, 1, x, &standing, out) ? int(FORM) : 0;
  });
}

// The same with compressed keys and values (latent.h), whose cache has one head.
int conmoe_latent(int64_t threads, const Latent* layer, const uint16_t* x, const void* cos, const void* sin,
                  int64_t rotary, void* keys, void* values, int64_t key_step, int64_t value_step, int64_t held,
                  int packed, uint16_t* out) {
  return guarded(threads, given(layer, x, keys, values, out) && held >= 0 && turns(cos, sin, rotary), [&] {
    const Standing standing{Rotary{cos, sin, rotary, NOT}, Cached{keys, values, key_step, value_step, held, packed != 0}};
    return latent_attention(*layer, 1, x, &standing, out) ? int(FORM) : 0;
  });
}

// Attention with what stands around it: x to the sum behind it and that through the norm `after`, all bf16.
int conmoe_block(int64_t threads, const Block* layer, const uint16_t* x, const void* cos, const void* sin,
                 int64_t rotary, void* keys, void* values, int64_t key_step, int64_t value_step, int64_t held,
                 int packed, uint16_t* sum, uint16_t* normed) {
  return guarded(threads, given(layer, x, keys, values, sum, normed) && held >= 0 && turns(cos, sin, rotary), [&] {
    const Standing standing{Rotary{cos, sin, rotary, NOT}, Cached{keys, values, key_step, value_step, held, packed != 0}};
    return block(*layer, 1, x, &standing, sum, normed) ? int(FORM) : 0;
  });
}

// A router for one token: x bf16, logits fp32 where they are `exact`, else bf16, gates bf16 where it is `narrow`, else fp32.
int conmoe_route(int64_t threads, const Router* router, const uint16_t* x, void* logits, void* gates, int64_t* slots) {
  return guarded(threads, given(router, x, logits, gates, slots),
                 [&] { return route(*router, 1, x, logits, gates, slots) ? int(FORM) : 0; });
}

// The second half of a decoder layer for one token: from the sum behind its attention (or what stands there) to out, both
// bf16. `router` and `layer` are null where there are no experts, `mlp` where there is no dense part. Returns how many
// prototypes there were, or a code; what was written into `between` is there in any case.
int64_t conmoe_feed_forward(int64_t threads, const Block* around, const Router* router, const Layer* layer,
                            const Mlp* mlp, const uint16_t* sum, const Between* between, uint16_t* out) {
  return guarded(threads, given(around, sum, between, out) && (mlp || router) && !router == !layer, [&] {
    std::copy_n(sum, around->columns, between->sum);
    normed(around->after, 1, sum, between->normed, around->columns);
    return feed_forward(*around, router, layer, mlp, 1, *between, out);
  });
}

// A whole decoder layer for one token, x to out: `conmoe_block`, then as `conmoe_feed_forward`.
int64_t conmoe_decoder(int64_t threads, const Block* around, const Router* router, const Layer* layer, const Mlp* mlp,
                       const uint16_t* x, const void* cos, const void* sin, int64_t rotary, void* keys, void* values,
                       int64_t key_step, int64_t value_step, int64_t held, int packed, const Between* between,
                       uint16_t* out) {
  const bool right = given(around, x, keys, values, between, out) && (mlp || router) && !router == !layer && held >= 0 &&
                     turns(cos, sin, rotary);
  return guarded(threads, right, [&] {
    const Standing standing{Rotary{cos, sin, rotary, NOT}, Cached{keys, values, key_step, value_step, held, packed != 0}};
    if (block(*around, 1, x, &standing, between->sum, between->normed)) return FORM;
    return feed_forward(*around, router, layer, mlp, 1, *between, out);
  });
}

// ---- one token each of several answers -------------------------------------------------------------------------------

// As `conmoe_decoder` for rows of x [tokens, columns] and as many places, which are tokens of different answers: each row
// of out, of the caches and of `between` has the bits that it has alone. Returns how many different prototypes there were.
int64_t conmoe_decoder_together(int64_t threads, const Block* around, const Router* router, const Layer* layer,
                                const Mlp* mlp, int64_t tokens, const uint16_t* x, const Place* places,
                                const Between* between, uint16_t* out) {
  bool right = given(around, x, places, between, out) && (mlp || router) && !router == !layer && tokens > 0;
  for (int64_t token = 0; right && token < tokens; ++token) {
    const Place& place = places[token];
    right = given(place.keys, place.values) && place.held >= 0 && turns(place.cos, place.sin, place.rotary);
  }
  return guarded(threads, right, [&] {
    std::vector<Standing> standing;
    for (int64_t token = 0; token < tokens; ++token) standing.push_back(places[token].standing());
    if (block(*around, tokens, x, standing.data(), between->sum, between->normed)) return FORM;
    return feed_forward(*around, router, layer, mlp, tokens, *between, out);
  });
}

// What several tokens ask of experts: as `conmoe_gated_experts`, for `tokens` rows of x. Those that ask expert i are
// asking[starts[i]] to asking[starts[i + 1] - 1]; y: fp32, a row for each of them, in that order.
int conmoe_gated_together(int64_t threads, int up_kind, int down_kind, int64_t count, const void* const* up_values,
                          const void* const* up_scales, const void* const* down_values, const void* const* down_scales,
                          const void* x, int64_t tokens, const int64_t* starts, const int64_t* asking, float* y,
                          const int64_t* widths, int64_t columns, int64_t up_group, const int64_t* down_groups,
                          int narrow, const uint16_t* const* up_bias, const uint16_t* const* down_bias,
                          const Gate* gate) {
  bool right = given(up_values, up_scales, down_values, down_scales, x, starts, asking, y, widths, down_groups, gate) &&
               count > 0 && tokens > 0 && columns > 0 && up_group >= 0 && *starts == 0;
  for (int64_t i = 0; right && i < count; ++i) right = starts[i] < starts[i + 1];
  for (int64_t p = 0; right && p < starts[count]; ++p) right = asking[p] >= 0 && asking[p] < tokens;
  return guarded(threads, right, [&] {
    const Source source(x, narrow, tokens * columns);
    const Gated ups{count, up_values, up_scales, up_bias, widths, *gate};
    const Down downs{down_values, down_scales, down_bias, down_groups};
    Askers askers;
    askers.starts.assign(starts, starts + count + 1);
    askers.tokens.assign(asking, asking + starts[count]);
    return int(gated_experts(up_kind, down_kind, ups, downs, askers, source.values, tokens, y, columns, up_group));
  });
}

// Rows of x [tokens, columns] through a dense layer: bf16.
int conmoe_dense_together(int64_t threads, const Mlp* mlp, int64_t tokens, const uint16_t* x, uint16_t* out) {
  return guarded(threads, given(mlp, x, out) && tokens > 0, [&] { return dense(*mlp, tokens, x, out) ? int(FORM) : 0; });
}

// The weights [rows, columns] as fp32, or as bf16 where `out` is `narrow`.
int conmoe_expand(int64_t threads, int kind, const void* values, const void* scales, void* out, int narrow,
                  int64_t rows, int64_t columns, int64_t group) {
  const bool right = given(values, out) && rows >= 0 && columns > 0 && group >= 0;
  return guarded(threads, right, [&] {
    const auto* steps = static_cast<const uint16_t*>(scales);
    if (tiled(kind)) {
      if (rows % TILE || group % LANES || !grouped(kind, columns, group)) return int(FORM);
      in_tiles(kind, [&](auto form) {
        expand_tiles<decltype(form)>(values, scales, out, narrow, rows, columns, group);
      });
      return 0;
    }
    const bool known = in_rows(kind, [&](auto form) {
      using Form = decltype(form);
      expand_rows<Form>(static_cast<const typename Form::T*>(values), steps, out, narrow, rows, columns);
    });
    return known ? 0 : int(FORM);
  });
}

// y[t] = W x[t] for many tokens: x [tokens, columns] and y [tokens, rows], both bf16 where `narrow`, else fp32.
int conmoe_many_rows(int64_t threads, int kind, const void* values, const void* scales, const void* x, int64_t tokens,
                     void* y, int64_t rows, int64_t columns, int64_t group, int narrow) {
  const bool right = given(values, scales, x, y) && tokens >= 0 && rows > 0 && columns > 0 && group >= 0;
  return guarded(threads, right, [&] {
    if (!strips_take(kind, rows, columns, group)) return int(FORM);
    many_rows(kind, Stored{values, scales, rows, columns, group}, Rows{x, narrow != 0, columns}, tokens,
              Target{y, narrow != 0});
    return 0;
  });
}

// out[rows[j]] += weights[j] * D_i gate(G_i x[rows[j]], U_i x[rows[j]]) for starts[i] <= j < starts[i + 1] and i < count, in
// this order. x [tokens, columns] (bf16 where `narrow`, else fp32), out fp32 [tokens, columns]; `few` as of `many_experts`
// in many_rows.h, the others as of conmoe_gated_experts.
int conmoe_many_experts(int64_t threads, int up_kind, int down_kind, int64_t count, const void* const* up_values,
                        const void* const* up_scales, const void* const* down_values, const void* const* down_scales,
                        const void* x, float* out, const int64_t* widths, int64_t columns, int64_t up_group,
                        const int64_t* down_groups, int narrow, const uint16_t* const* up_bias,
                        const uint16_t* const* down_bias, const Gate* gate, int64_t tokens, const int64_t* starts,
                        const int64_t* rows, const float* weights, int64_t few) {
  const bool right = given(up_values, up_scales, down_values, down_scales, x, out, widths, down_groups, gate, starts, rows,
                           weights) && count >= 0 && tokens >= 0 && columns > 0 && up_group >= 0;
  return guarded(threads, right, [&] {
    const Gated ups{count, up_values, up_scales, up_bias, widths, *gate};
    const Routed all{ups, Down{down_values, down_scales, down_bias, down_groups}, starts, rows, weights};
    return int(many_experts(up_kind, down_kind, all, few, Rows{x, narrow != 0, columns}, tokens, up_group, out, columns));
  });
}

// `byte_products` in many_rows.h.
int64_t conmoe_byte_products(int64_t threads, int64_t rounds) {
  return guarded(threads, rounds >= 0, [&] { return byte_products<Quads>(rounds); });
}
}
