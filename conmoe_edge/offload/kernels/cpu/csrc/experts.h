// Gated experts for one token: those of a layer that its router has chosen, and dense ones.

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

// y[i] = D_i gate(G_i x, U_i x), fp32 [count, columns]. Returns 0, or another code.
int64_t gated_experts(int up_kind, int down_kind, const Gated& ups, const Down& downs, const float* x, float* y,
                      int64_t columns, int64_t up_group) {
  int64_t total = 0;
  for (int64_t i = 0; i < ups.count; ++i) {
    if (ups.widths[i] <= 0) return ARGUMENT;
    total += ups.widths[i];
  }
  Room<float> inner(total);
  std::vector<float*> h;
  for (int64_t i = 0, start = 0; i < ups.count; start += ups.widths[i++]) h.push_back(inner.data() + start);
  if (gated(up_kind, ups, x, h.data(), columns, up_group) ||
      downward(down_kind, ups.count, downs.values, downs.scales, h.data(), ups.widths, y, columns, downs.groups))
    return FORM;
  for (int64_t i = 0; downs.bias && i < ups.count; ++i)
    for (int64_t k = 0; downs.bias[i] && k < columns; ++k) y[i * columns + k] += from_bf16(downs.bias[i][k]);
  return 0;
}

// out = sum over i of weights[i] * y[i] + sum over j of gates[j] * constants[j], in this order.
void combine(int64_t count, const float* y, const float* weights, int64_t extra, const float* const* constants,
             const float* gates, Target out, int64_t columns) {
  std::vector<float> total(size_t(columns), 0.0f);
  const auto add = [&](const float* row, float weight) {
    for (int64_t k = 0; k < columns; ++k) total[size_t(k)] += weight * row[k];
  };
  for (int64_t i = 0; i < count; ++i) add(y + i * columns, weights[i]);
  for (int64_t j = 0; j < extra; ++j) add(constants[j], gates[j]);
  for (int64_t k = 0; k < columns; ++k) out.put(k, total[size_t(k)]);
}

// y[i] = the prototype chosen[i] on x, fp32 [chosen, columns]: those of one form in one go, in the order in which forms
// come. Returns 0, or another code.
int64_t prototypes(const Prototypes& all, const std::vector<int64_t>& chosen, const Gate& gate, const float* x, float* y,
                   int64_t columns) {
  std::vector<bool> done(chosen.size(), false);
  for (size_t first = 0; first < chosen.size(); ++first) {
    if (done[first]) continue;
    const int64_t up = all.up_kinds[chosen[first]], down = all.down_kinds[chosen[first]];
    const int64_t group = all.up_groups[chosen[first]];
    std::vector<size_t> places;
    std::vector<const void*> tables[4];
    std::vector<const uint16_t*> biases[2];
    std::vector<int64_t> widths, groups;
    const void* const* const sources[4] = {all.up_values, all.up_scales, all.down_values, all.down_scales};
    for (size_t i = first; i < chosen.size(); ++i) {
      const int64_t number = chosen[i];
      if (done[i] || all.up_kinds[number] != up || all.down_kinds[number] != down || all.up_groups[number] != group) continue;
      done[i] = true;
      places.push_back(i);
      for (int j = 0; j < 4; ++j) tables[j].push_back(sources[j][number]);
      biases[0].push_back(all.up_bias[number]);
      biases[1].push_back(all.down_bias[number]);
      widths.push_back(all.widths[number]);
      groups.push_back(all.groups[number]);
    }
    const auto count = int64_t(places.size());
    const Gated ups{count, tables[0].data(), tables[1].data(), biases[0].data(), widths.data(), gate};
    const Down downs{tables[2].data(), tables[3].data(), biases[1].data(), groups.data()};
    const bool whole = places.size() == chosen.size();
    Room<float> some(whole ? 0 : count * columns);
    float* const out = whole ? y : some.data();
    const int64_t code = gated_experts(int(up), int(down), ups, downs, x, out, columns, group);
    if (code) return code;
    for (int64_t i = 0; !whole && i < count; ++i)
      std::copy_n(out + i * columns, columns, y + int64_t(places[size_t(i)]) * columns);
  }
  return 0;
}

// The routed experts' output of one token, `slots` and `gates` [k] as its router gave them (gates bf16 where
// `narrow_gates`, else fp32), x and out [columns] (bf16 where `narrow`). What meets on a prototype is added first, in
// fp64 and in the order of the slots. Where `residual` is not null, the rounded output is added to it. Returns how many
// prototypes there were, whose numbers are in `asked` then, in their order; or a code.
int64_t routed(const Layer* layer, const int64_t* slots, const void* gates, int narrow_gates, int64_t k, const void* x,
               const void* residual, void* out, int narrow) {
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
  std::vector<float> weights;
  for (int64_t i = 0; i < count; ++i) {
    if (!all.up_values[chosen[size_t(i)]]) return ABSENT;
    weights.push_back(float(sums[size_t(i)]));
  }
  const int64_t columns = layer->columns;
  Room<float> y(count * columns);
  if (count) {
    const Source source(x, narrow, columns);
    const int64_t code = prototypes(all, chosen, layer->gate, source.values, y.data(), columns);
    if (code) return code;
  }
  std::copy(chosen.begin(), chosen.end(), layer->asked);
  const Target target{out, narrow != 0};
  combine(count, y.data(), weights.data(), int64_t(constants.size()), constants.data(), shares.data(), target, columns);
  if (residual) {
    const Source first(residual, narrow, columns), second(out, narrow, columns);
    for (int64_t i = 0; i < columns; ++i) target.put(i, first.values[i] + second.values[i]);
  }
  return count;
}

// A dense gated layer: inputs are its gate and its other half. With `gate`, a layer of one row, the output is times the
// sigmoid of that row; without values it is none.
struct Mlp {
  Linear inputs[2];
  Linear output, gate;
};

// D (silu(G x) * U x) for one token, bf16; every step is rounded, as it is where each is an operation of its own. Returns
// whether a form cannot be taken.
bool dense(const Mlp& mlp, const uint16_t* x, uint16_t* out) {
  const int64_t width = mlp.inputs[0].rows;
  Room<uint16_t> rows(2 * width);
  if (linears(mlp.inputs, 2, x, rows.data())) return true;
  const Source first(rows.data(), true, width);
  Room<float> gates(width);
  std::fill_n(gates.data(), width, 1.0f);
  gate(first.values, gates.data(), width, Gate{0, 0, 0});
  for (int64_t i = 0; i < width; ++i) rows[i] = to_bf16(rounded(gates[i]) * from_bf16(rows[width + i]));
  if (linears(&mlp.output, 1, rows.data(), out)) return true;
  if (!mlp.gate.values) return false;
  uint16_t logit;
  if (linears(&mlp.gate, 1, x, &logit)) return true;
  const float share = rounded(1.0f / (1.0f + std::exp(-from_bf16(logit))));
  for (int64_t k = 0; k < mlp.output.rows; ++k) out[k] = to_bf16(share * from_bf16(out[k]));
  return false;
}

}  // namespace
