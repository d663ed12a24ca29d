// Gated experts for a token, or for one token each of several answers: those of a layer that its router has chosen, and
// dense ones. What several tokens ask for is read once; each token's sums are those that it has alone.

#pragma once

#include "attention.h"

namespace {

// What functions return that give a count otherwise, as in bindings.py: a form that cannot be taken, a prototype that is
// not in memory, a null address or a size below zero, no memory.
const int64_t FORM = -1, ABSENT = -2, ARGUMENT = -3, MEMORY = -4;

// Where the matrices of each prototype lie, by their numbers; null where it is not in memory now. Biases are null where it
// has none.
struct Prototypes {
  const void* const* up_values;
  const void* const* up_scales;
  const void* const* down_values;
  const void* const* down_scales;
  const int64_t* widths;
  const int64_t* groups;  // of the columns of down matrices
  const uint16_t* const* up_bias;
  const uint16_t* const* down_bias;
  const int64_t* up_kinds;
  const int64_t* down_kinds;
  const int64_t* up_groups;
};

// A layer's slots: `target` is the prototype that stands behind each, -1 for none.
struct Layer {
  int64_t slots, columns;
  const Prototypes* prototypes;
  const int64_t* target;
  const float* factor;            // of each slot, or null
  const float* const* constants;  // of each slot, null where it has none; or null
  int64_t* asked;                 // room for as many numbers as there are slots
  Gate gate;
};

// Down matrices, as `Gated` has the others; groups of the columns of each.
struct Down {
  const void* const* values;
  const void* const* scales;
  const uint16_t* const* bias;
  const int64_t* groups;
};

// y[p] = D_i gate(G_i x, U_i x), fp32 [places, columns], for every place p of expert i and the token x of that place, of
// `tokens` rows. Returns 0, or another code.
int64_t gated_experts(int up_kind, int down_kind, const Gated& ups, const Down& downs, const Askers& askers,
                      const float* x, int64_t tokens, float* y, int64_t columns, int64_t up_group) {
  const std::vector<int64_t> owners = askers.experts();
  int64_t total = 0;
  for (const int64_t which : owners) {
    if (ups.widths[which] <= 0) return ARGUMENT;
    total += ups.widths[which];
  }
  Room<float> inner(total);
  std::vector<float*> h;
  for (size_t p = 0, start = 0; p < owners.size(); start += size_t(ups.widths[owners[p++]])) h.push_back(inner.data() + start);
  if (gated(up_kind, ups, askers, x, tokens, h.data(), columns, up_group) ||
      downward(down_kind, ups.count, downs.values, downs.scales, askers, h.data(), ups.widths, y, columns, downs.groups))
    return FORM;
  for (size_t p = 0; downs.bias && p < owners.size(); ++p) {
    const uint16_t* const bias = downs.bias[owners[p]];
    for (int64_t k = 0; bias && k < columns; ++k) y[int64_t(p) * columns + k] += from_bf16(bias[k]);
  }
  return 0;
}

// out = sum over i of weights[i] * rows[i] + sum over j of gates[j] * constants[j], in this order; `total` is room for as
// many numbers.
void combine(int64_t count, const float* const* rows, const float* weights, int64_t extra, const float* const* constants,
             const float* gates, float* total, Target out, int64_t columns) {
  std::fill_n(total, columns, 0.0f);
  const auto add = [&](const float* row, float weight) {
    for (int64_t k = 0; k < columns; ++k) total[k] += weight * row[k];
  };
  for (int64_t i = 0; i < count; ++i) add(rows[i], weights[i]);
  for (int64_t j = 0; j < extra; ++j) add(constants[j], gates[j]);
  for (int64_t k = 0; k < columns; ++k) out.put(k, total[k]);
}

// y[p] = the prototype chosen[i] on x, fp32 [places, columns], for every place p of i and the token of that place: those
// of one form in one go, in the order in which forms come. Returns 0, or another code.
int64_t prototypes(const Prototypes& all, const std::vector<int64_t>& chosen, const Askers& askers, const Gate& gate,
                   const float* x, int64_t tokens, float* y, int64_t columns) {
  std::vector<bool> done(chosen.size(), false);
  for (size_t first = 0; first < chosen.size(); ++first) {
    if (done[first]) continue;
    const int64_t up = all.up_kinds[chosen[first]], down = all.down_kinds[chosen[first]];
    const int64_t group = all.up_groups[chosen[first]];
    std::vector<const void*> tables[4];
    std::vector<const uint16_t*> biases[2];
    std::vector<int64_t> widths, groups, places;
    Askers mine;
    const void* const* const sources[4] = {all.up_values, all.up_scales, all.down_values, all.down_scales};
    for (size_t i = first; i < chosen.size(); ++i) {
      const int64_t number = chosen[i];
      if (done[i] || all.up_kinds[number] != up || all.down_kinds[number] != down || all.up_groups[number] != group) continue;
      done[i] = true;
      for (int64_t place = askers.first(int64_t(i)); place < askers.last(int64_t(i)); ++place) {
        places.push_back(place);
        mine.tokens.push_back(askers.token(place));
      }
      mine.starts.push_back(int64_t(places.size()));
      for (int j = 0; j < 4; ++j) tables[j].push_back(sources[j][number]);
      biases[0].push_back(all.up_bias[number]);
      biases[1].push_back(all.down_bias[number]);
      widths.push_back(all.widths[number]);
      groups.push_back(all.groups[number]);
    }
    const auto count = int64_t(widths.size()), answers = int64_t(places.size());
    const Gated ups{count, tables[0].data(), tables[1].data(), biases[0].data(), widths.data(), gate};
    const Down downs{tables[2].data(), tables[3].data(), biases[1].data(), groups.data()};
    const bool whole = answers == askers.places();
    Room<float> some(whole ? 0 : answers * columns);
    float* const out = whole ? y : some.data();
    const int64_t code = gated_experts(int(up), int(down), ups, downs, mine, x, tokens, out, columns, group);
    if (code) return code;
    for (int64_t p = 0; !whole && p < answers; ++p)
      std::copy_n(out + p * columns, columns, y + places[size_t(p)] * columns);
  }
  return 0;
}

// What the router of a token has chosen: prototypes in the order of their numbers, and constants in that of the slots.
// What meets on a prototype is added first, in fp64 and in the order of the slots.
struct Choice {
  std::vector<int64_t> numbers;
  std::vector<float> weights, shares;
  std::vector<const float*> constants;

  Choice(const Layer& layer, const int64_t* slots, const void* gates, bool narrow, int64_t first, int64_t k) {
    std::vector<double> sums;
    for (int64_t i = first; i < first + k; ++i) {
      const int64_t slot = slots[i];
      if (slot < 0 || slot >= layer.slots) continue;
      const float gate = narrow ? from_bf16(static_cast<const uint16_t*>(gates)[i]) : static_cast<const float*>(gates)[i];
      if (layer.constants && layer.constants[slot]) {
        constants.push_back(layer.constants[slot]);
        shares.push_back(gate);
      }
      const int64_t target = layer.target[slot];
      if (target < 0) continue;
      const double weight = double(gate) * (layer.factor ? double(layer.factor[slot]) : 1.0);
      const auto place = std::lower_bound(numbers.begin(), numbers.end(), target);
      const auto at = place - numbers.begin();
      if (place != numbers.end() && *place == target) {
        sums[size_t(at)] += weight;
      } else {
        numbers.insert(place, target);
        sums.insert(sums.begin() + at, weight);
      }
    }
    for (const double sum : sums) weights.push_back(float(sum));
  }
};

// The routed experts' output of `tokens` tokens, `slots` and `gates` [tokens, k] as their router gave them (gates bf16
// where `narrow_gates`, else fp32), x and out [tokens, columns] (bf16 where `narrow`). Where `residual` is not null, the
// rounded output is added to it. Returns how many prototypes there were, over all tokens, each once; their numbers are in
// `asked` then, in their order. Or a code.
int64_t routed(const Layer* layer, int64_t tokens, const int64_t* slots, const void* gates, int narrow_gates, int64_t k,
               const void* x, const void* residual, void* out, int narrow) {
  std::vector<Choice> choices;
  std::vector<std::pair<int64_t, int64_t>> pairs;  // prototype, token
  for (int64_t token = 0; token < tokens; ++token) {
    choices.emplace_back(*layer, slots, gates, narrow_gates != 0, token * k, k);
    for (const int64_t number : choices.back().numbers) pairs.emplace_back(number, token);
  }
  if (tokens > 1) std::sort(pairs.begin(), pairs.end());
  std::vector<int64_t> chosen;
  std::vector<std::vector<const float*>> rows(static_cast<size_t>(tokens));
  Askers askers;
  const Prototypes& all = *layer->prototypes;
  const int64_t columns = layer->columns;
  Room<float> y(int64_t(pairs.size()) * columns), totals(tokens * columns);
  for (const auto& [number, token] : pairs) {
    if (chosen.empty() || chosen.back() != number) {
      if (!all.up_values[number]) return ABSENT;
      chosen.push_back(number);
      askers.starts.push_back(askers.starts.back());
    }
    rows[size_t(token)].push_back(y.data() + askers.places() * columns);
    askers.tokens.push_back(token);
    ++askers.starts.back();
  }
  if (!chosen.empty()) {
    const Source source(x, narrow, tokens * columns);
    const int64_t code = prototypes(all, chosen, askers, layer->gate, source.values, tokens, y.data(), columns);
    if (code) return code;
  }
  std::copy(chosen.begin(), chosen.end(), layer->asked);
  const Source before(residual ? residual : out, narrow, residual ? tokens * columns : 0);
  const Target target{out, narrow != 0};
  shared_loop(tokens, evenly(tokens, tokens > 1), [&](int64_t token, int64_t) {
    const Choice& choice = choices[size_t(token)];
    const int64_t start = token * columns;
    combine(int64_t(choice.numbers.size()), rows[size_t(token)].data(), choice.weights.data(),
            int64_t(choice.constants.size()), choice.constants.data(), choice.shares.data(), totals.data() + start,
            target.from(start), columns);
    if (!residual) return;
    for (int64_t i = start; i < start + columns; ++i) target.put(i, before.values[i] + target.get(i));
  });
  return int64_t(chosen.size());
}

// A dense gated layer: inputs are its gate and its other half. With `gate`, a layer of one row, the output is times the
// sigmoid of that row; without values it is none.
struct Mlp {
  Linear inputs[2];
  Linear output, gate;
};

// D (silu(G x) * U x) for `tokens` tokens, bf16; every step is rounded, as it is where each is an operation of its own.
// Returns whether a form cannot be taken.
bool dense(const Mlp& mlp, int64_t tokens, const uint16_t* x, uint16_t* out) {
  const int64_t width = mlp.inputs[0].rows, columns = mlp.output.rows;
  Room<uint16_t> both(tokens * 2 * width), rows(tokens * width), logits(mlp.gate.values ? tokens : 0);
  Room<float> first(width), gates(width);
  if (linears(mlp.inputs, 2, tokens, x, both.data())) return true;
  for (int64_t token = 0; token < tokens; ++token) {
    const uint16_t* const from = both.data() + token * 2 * width;
    uint16_t* const to = rows.data() + token * width;
    for (int64_t i = 0; i < width; ++i) first[i] = from_bf16(from[i]);
    std::fill_n(gates.data(), width, 1.0f);
    gate(first.data(), gates.data(), width, Gate{0, 0, 0});
    for (int64_t i = 0; i < width; ++i) to[i] = to_bf16(rounded(gates[i]) * from_bf16(from[width + i]));
  }
  if (linears(&mlp.output, 1, tokens, rows.data(), out)) return true;
  if (!mlp.gate.values) return false;
  if (linears(&mlp.gate, 1, tokens, x, logits.data())) return true;
  for (int64_t token = 0; token < tokens; ++token) {
    const float share = rounded(1.0f / (1.0f + std::exp(-from_bf16(logits[token]))));
    uint16_t* const to = out + token * columns;
    for (int64_t k = 0; k < columns; ++k) to[k] = to_bf16(share * from_bf16(to[k]));
  }
  return false;
}

}  // namespace
