// The functions that Python calls: weights times few rows of activations, gated experts and whole layers for one token.
//
// One token makes every weight count once, so the only thing that matters is to read them at the speed of the memory.
// Each function runs one parallel region over all the matrices it is given: the experts of a token together.
// Activations come and go in bf16 or fp32 and are fp32 in between.
//
// Plain C interface, no library but OpenMP: it is compiled in a second and called through ctypes. What Python gives is
// checked there; here only null addresses and sizes below zero are refused. Every function returns 0 or a count, or one
// of the codes below; then nothing has been written, but for what a comment says.

#include <cstddef>

#include "router.h"

namespace {

// As in bindings.py: a form that cannot be taken, a prototype that is not in memory, a null address or a size below
// zero, no memory.
const int64_t FORM = -1, ABSENT = -2, ARGUMENT = -3, MEMORY = -4;

template <class Run>
auto guarded(bool right, Run run) -> decltype(run()) {
  using Result = decltype(run());
  if (!right) return Result(ARGUMENT);
  try {
    return run();
  } catch (...) {  // of our own code only std::bad_alloc; nothing may pass into Python
    return Result(MEMORY);
  }
}

template <class... Addresses>
bool given(Addresses... addresses) {
  return (... && (addresses != nullptr));
}

}  // namespace

extern "C" {

// y[i, t] = W_i x[i, t] for i < count and t < tokens. x: [count, tokens, columns], or [tokens, columns] for all
// matrices with x_stride 0; y: [count, tokens, rows]; both bf16 where `narrow`, else fp32.
int conmoe_few_rows(int kind, int64_t count, const void* const* values, const void* const* scales, const void* x,
                    int64_t x_stride, int64_t tokens, void* y, int64_t rows, int64_t columns, int64_t group,
                    int narrow) {
  const bool right = given(values, scales, x, y) && count >= 0 && tokens >= 0 && rows > 0 && columns > 0 && group >= 0;
  return guarded(right, [&] {
    const Source source(x, narrow, (x_stride ? count : 1) * tokens * columns);
    const Target target{y, narrow != 0};
    const bool failed =
        products(kind, count, values, scales, source.values, x_stride == 0, tokens, target, rows, columns, group);
    return failed ? int(FORM) : 0;
  });
}

// y[i] = D_i (silu(G_i x) * U_i x), fp32 [count, columns], for one token x [columns] (bf16 where `narrow`). up_values
// hold [G_i; U_i]: [2 * widths[i], columns] in groups of up_group; down_values D_i: [columns, widths[i]] in groups of
// down_groups[i].
int conmoe_gated_experts(int up_kind, int down_kind, int64_t count, const void* const* up_values,
                         const void* const* up_scales, const void* const* down_values, const void* const* down_scales,
                         const void* x, float* y, const int64_t* widths, int64_t columns, int64_t up_group,
                         const int64_t* down_groups, int narrow) {
  const bool right = given(up_values, up_scales, down_values, down_scales, x, y, widths, down_groups) && count > 0 &&
                     columns > 0 && up_group >= 0;
  return guarded(right, [&] {
    const Source source(x, narrow, columns);
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (widths[i] <= 0) return int(ARGUMENT);
      total += widths[i];
    }
    Room<float> inner(total);
    std::vector<float*> h;
    for (int64_t i = 0, start = 0; i < count; start += widths[i++]) h.push_back(inner.data() + start);
    const bool failed =
        gated(up_kind, count, up_values, up_scales, source.values, widths, h.data(), columns, up_group) ||
        downward(down_kind, count, down_values, down_scales, h.data(), widths, y, columns, down_groups);
    return failed ? int(FORM) : 0;
  });
}

// out = sum over i of weights[i] * y[i] + sum over j of gates[j] * constants[j], in this order; y: fp32 [count, columns],
// constants: addresses of fp32 [columns] each; out bf16 where `narrow`.
int conmoe_combine(int64_t count, const float* y, const float* weights, int64_t extra, const float* const* constants,
                   const float* gates, void* out, int64_t columns, int narrow) {
  return guarded(given(out) && count >= 0 && extra >= 0 && columns > 0, [&] {
    const Target target{out, narrow != 0};
    std::vector<float> total(size_t(columns), 0.0f);
    const auto add = [&](const float* row, float weight) {
      for (int64_t k = 0; k < columns; ++k) total[size_t(k)] += weight * row[k];
    };
    for (int64_t i = 0; i < count; ++i) add(y + i * columns, weights[i]);
    for (int64_t j = 0; j < extra; ++j) add(constants[j], gates[j]);
    for (int64_t k = 0; k < columns; ++k) target.put(k, total[size_t(k)]);
    return 0;
  });
}

// Where the matrices of each prototype lie, by their numbers; null where it is not in memory now.
struct Prototypes {
  const void* const* up_values;
  const void* const* up_scales;
  const void* const* down_values;
  const void* const* down_scales;
  const int64_t* widths;
  const int64_t* groups;  // of the columns of down matrices
};

// A layer's slots: `target` is the prototype that stands behind each, -1 for none. The prototypes of a layer have one
// form, but for their widths and the groups that these allow.
struct Layer {
  int64_t up_kind, down_kind, slots, columns, up_group;
  const Prototypes* prototypes;
  const int64_t* target;
  const float* factor;            // of each slot, or null
  const float* const* constants;  // of each slot, null where it has none; or null
  int64_t* asked;                 // room for as many numbers as there are slots
};

// The routed experts' output of one token, `slots` and `gates` [k] as its router gave them (gates bf16 where
// `narrow_gates`, else fp32), x and out [columns] (bf16 where `narrow`). What meets on a prototype is added first, in
// fp64 and in the order of the slots. Where `residual` is not null, the rounded output is added to it. Returns how many
// prototypes there were, whose numbers are in `asked` then, in their order; ABSENT where one of them is not in memory,
// FORM where a form cannot be taken.
static int64_t experts(const Layer* layer, const int64_t* slots, const void* gates, int narrow_gates, int64_t k,
                       const void* x, const void* residual, void* out, int narrow) {
  std::vector<int64_t> chosen;
  std::vector<double> sums;
  std::vector<const float*> constants;
  std::vector<float> shares;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t slot = slots[i];
    if (slot < 0 || slot >= layer->slots) continue;
    const float gate =
        narrow_gates ? from_bf16(static_cast<const uint16_t*>(gates)[i]) : static_cast<const float*>(gates)[i];
    if (layer->constants && layer->constants[slot]) {
      constants.push_back(layer->constants[slot]);
      shares.push_back(gate);
    }
    const int64_t target = layer->target[slot];
    if (target < 0) continue;
    const double weight = double(gate) * (layer->factor ? double(layer->factor[slot]) : 1.0);
    const auto place = std::lower_bound(chosen.begin(), chosen.end(), target);
    const auto at = place - chosen.begin();
    if (place != chosen.end() && *place == target) {
      sums[size_t(at)] += weight;
    } else {
      chosen.insert(place, target);
      sums.insert(sums.begin() + at, weight);
    }
  }
  const Prototypes& all = *layer->prototypes;
  const auto count = int64_t(chosen.size());
  std::vector<const void*> tables[4];
  std::vector<int64_t> widths, groups;
  std::vector<float> weights;
  const void* const* const sources[4] = {all.up_values, all.up_scales, all.down_values, all.down_scales};
  for (int64_t i = 0; i < count; ++i) {
    const int64_t number = chosen[size_t(i)];
    if (!all.up_values[number]) return ABSENT;
    for (int j = 0; j < 4; ++j) tables[j].push_back(sources[j][number]);
    widths.push_back(all.widths[number]);
    groups.push_back(all.groups[number]);
    weights.push_back(float(sums[size_t(i)]));
  }
  Room<float> y(count * layer->columns);
  if (count && conmoe_gated_experts(int(layer->up_kind), int(layer->down_kind), count, tables[0].data(),
                                    tables[1].data(), tables[2].data(), tables[3].data(), x, y.data(), widths.data(),
                                    layer->columns, layer->up_group, groups.data(), narrow))
    return FORM;
  std::copy(chosen.begin(), chosen.end(), layer->asked);
  conmoe_combine(count, y.data(), weights.data(), int64_t(constants.size()), constants.data(), shares.data(), out,
                 layer->columns, narrow);
  if (residual) {
    const Source first(residual, narrow, layer->columns), second(out, narrow, layer->columns);
    const Target target{out, narrow != 0};
    for (int64_t i = 0; i < layer->columns; ++i) target.put(i, first.values[i] + second.values[i]);
  }
  return count;
}

int64_t conmoe_layer(const Layer* layer, const int64_t* slots, const void* gates, int narrow_gates, int64_t k,
                     const void* x, const void* residual, void* out, int narrow) {
  return guarded(given(layer, slots, gates, x, out) && k >= 0, [&] {
    return experts(layer, slots, gates, narrow_gates, k, x, residual, out, narrow);
  });
}

// Rows of x through `norm`: [rows, norm.columns], bf16 where `narrow`, else fp32.
int conmoe_rms_norm(const Norm* norm, const void* x, void* out, int64_t rows, int narrow) {
  return guarded(given(norm, x, out) && rows >= 0, [&] {
    rms_norm(*norm, x, out, rows, narrow != 0);
    return 0;
  });
}

// out = softmax(q K^T * scaling) V of one new token: q [groups, each, columns] and out [groups, each, width] in bf16, K_i
// [length, columns] and V_i [length, width] of every group in bf16; scores and sums are fp32.
int conmoe_attend(int64_t groups, const void* const* keys, const void* const* values, const void* q, int64_t each,
                  void* out, int64_t length, int64_t columns, int64_t width, float scaling) {
  const bool right = given(keys, values, q, out) && groups > 0 && each > 0 && length > 0 && columns > 0 && width > 0;
  return guarded(right, [&] {
    attend(groups, keys, values, q, each, out, length, columns, width, scaling);
    return 0;
  });
}

// A layer's attention for one new token: x [columns of q] to out [rows of o], both bf16. cos and sin: bf16 [rotary] of its
// position. keys and values: the first head's rows of a cache that holds `held` tokens and has room for another, bf16,
// heads `key_step` and `value_step` numbers apart; the new token's are written there.
int conmoe_attention(const Attention* layer, const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t rotary,
                     uint16_t* keys, uint16_t* values, int64_t key_step, int64_t value_step, int64_t held, uint16_t* out) {
  return guarded(given(layer, x, cos, sin, keys, values, out) && held >= 0 && rotary >= 0, [&] {
    const Cached cached{keys, values, key_step, value_step, held};
    return attention(*layer, x, Rotary{cos, sin, rotary}, cached, out) ? int(FORM) : 0;
  });
}

// The same with the norms around it: x to sum = x + attention and normed = its norm, all bf16.
int conmoe_block(const Block* layer, const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t rotary,
                 uint16_t* keys, uint16_t* values, int64_t key_step, int64_t value_step, int64_t held, uint16_t* sum,
                 uint16_t* normed) {
  return guarded(given(layer, x, cos, sin, keys, values, sum, normed) && held >= 0 && rotary >= 0, [&] {
    const Cached cached{keys, values, key_step, value_step, held};
    return block(*layer, x, Rotary{cos, sin, rotary}, cached, sum, normed) ? int(FORM) : 0;
  });
}

// A router for one token: x bf16, logits fp32 where they are `exact`, else bf16, gates bf16 where it is `narrow`, else fp32.
int conmoe_route(const Router* router, const uint16_t* x, void* logits, void* gates, int64_t* slots) {
  return guarded(given(router, x, logits, gates, slots),
                 [&] { return route(*router, x, logits, gates, slots) ? int(FORM) : 0; });
}

// What stands between a layer's attention and its experts: the sum behind the attention and its norm [columns], the
// router's logits [slots], gates and slots [chosen].
struct Between {
  uint16_t *sum, *normed;
  void *logits, *gates;
  int64_t* slots;
};

// A whole decoder layer for one token, x to out, both bf16: `conmoe_block`, `conmoe_route`, `conmoe_layer`. Returns as the
// last of them; what the first two have written into `between` is there in any case.
int64_t conmoe_decoder(const Block* before, const Router* router, const Layer* layer, const uint16_t* x,
                       const uint16_t* cos, const uint16_t* sin, int64_t rotary, uint16_t* keys, uint16_t* values,
                       int64_t key_step, int64_t value_step, int64_t held, const Between* between, uint16_t* out) {
  const bool right = given(before, router, layer, x, cos, sin, keys, values, between, out) && held >= 0 && rotary >= 0;
  return guarded(right, [&] {
    const Cached cached{keys, values, key_step, value_step, held};
    if (block(*before, x, Rotary{cos, sin, rotary}, cached, between->sum, between->normed)) return FORM;
    if (route(*router, between->normed, between->logits, between->gates, between->slots)) return FORM;
    return experts(layer, between->slots, between->gates, router->narrow, router->chosen, between->normed, between->sum,
                   out, 1);
  });
}

// The weights as fp32 [rows, columns].
int conmoe_expand(int kind, const void* values, const void* scales, float* out, int64_t rows, int64_t columns,
                  int64_t group) {
  const bool right = given(values, out) && rows >= 0 && columns > 0 && group >= 0;
  return guarded(right, [&] {
    const auto* steps = static_cast<const uint16_t*>(scales);
    if (kind == INT4) {
      if (rows % TILE || !group || group % LANES || columns % group) return int(FORM);
      expand_tiles(static_cast<const uint8_t*>(values), steps, out, rows, columns, group);
      return 0;
    }
    const bool known = in_rows(kind, [&](auto form) {
      using Form = decltype(form);
      expand_rows<Form>(static_cast<const typename Form::T*>(values), steps, out, rows, columns);
    });
    return known ? 0 : int(FORM);
  });
}
}
