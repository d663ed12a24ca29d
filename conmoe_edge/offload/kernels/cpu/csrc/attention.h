// Attention of one new token, or of one new token each of several answers, and what stands around it: norms and rotary
// positions.

#pragma once

#include <cmath>

#include "kv_rows.h"

namespace {

// x over the root of its mean square, times a weight (bf16 where `narrow`, else fp32). `plus_one` adds 1 to the weight;
// `early` rounds to the format of x before the weight is applied. `centred`: the mean is taken off x first, and `shift`, as
// the weight is, is added at the end.
struct Norm {
  const void* weight;
  const void* shift;
  int64_t columns;
  float epsilon;
  int32_t narrow, plus_one, early, centred;
};

// A row of x through a `centred` norm.
inline void layer_norm(const Norm& norm, const float* x, const float* weight, const float* shift, int64_t place,
                       Target target) {
  const int64_t columns = norm.columns;
  Room<float> far(columns), squares(columns);
  const float mean = sum_of(x, columns) / float(columns);
  for (int64_t k = 0; k < columns; ++k) {
    far[k] = x[k] - mean;
    squares[k] = far[k] * far[k];
  }
  const float scale = 1.0f / std::sqrt(sum_of(squares.data(), columns) / float(columns) + norm.epsilon);
  for (int64_t k = 0; k < columns; ++k) target.put(place + k, far[k] * scale * weight[k] + shift[k]);
}

// Rows of x to rows of out, which may be the same; bf16 where `narrow`, else fp32.
void rms_norm(const Norm& norm, const void* x, void* out, int64_t rows, bool narrow) {
  const int64_t columns = norm.columns;
  const Source source(x, narrow, rows * columns), factors(norm.weight, norm.narrow != 0, columns);
  const Source shifts(norm.centred ? norm.shift : norm.weight, norm.narrow != 0, norm.centred ? columns : 0);
  const Target target{out, narrow};
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = source.values + row * columns;
    if (norm.centred) {
      layer_norm(norm, from, factors.values, shifts.values, row * columns, target);
      continue;
    }
    float sums[LANES] = {0};
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES)
      for (int64_t i = 0; i < LANES; ++i) sums[i] += from[k + i] * from[k + i];
    float total = 0;
    for (; k < columns; ++k) total = std::fma(from[k], from[k], total);  // as in `dot_row`
    for (const float one : sums) total += one;
    const float scale = 1.0f / std::sqrt(total / float(columns) + norm.epsilon);
    for (k = 0; k < columns; ++k) {
      float value = from[k] * scale;
      if (norm.early && narrow) value = from_bf16(to_bf16(value));
      target.put(row * columns + k, value * (factors.values[k] + (norm.plus_one ? 1.0f : 0.0f)));
    }
  }
}

void attend(int64_t groups, const void* const* keys, const void* const* values, const void* q, int64_t each, void* out,
            int64_t length, RowForm key, RowForm value, float scaling) {
  const Source query(q, true, groups * each * key.width);
  Room<float> scores(groups * each * length);
  row_scores(groups, keys, key, query.values, each, scores.data(), length);
  const int64_t rows = groups * each;
  shared_loop(rows, evenly(rows, rows * length > MANY),
              [&](int64_t row, int64_t) { softmax(scores.data() + row * length, length, scaling); });
  row_sums(groups, values, value, scores.data(), each, Target{out, true}, length);
}

inline float rounded(float value) { return from_bf16(to_bf16(value)); }

// A linear layer; bias bf16 [rows], or null.
struct Linear {
  int64_t kind, rows, columns, group;
  const void* values;
  const void* scales;
  const uint16_t* bias;
  bool like(const Linear& other) const {
    return kind == other.kind && rows == other.rows && columns == other.columns && group == other.group;
  }
};

// y = W x + b of `count` layers for `tokens` rows of x, rounded to bf16 once: for each token its layers one after another.
// Returns 0, or 1 where a form cannot be taken. Neighbours of one form are one product.
int linears(const Linear* layers, int64_t count, int64_t tokens, const uint16_t* x, uint16_t* y) {
  const Source source(x, true, tokens * layers->columns);
  int64_t width = 0, before = 0;
  for (int64_t i = 0; i < count; ++i) width += layers[i].rows;
  for (int64_t first = 0, next; first < count; first = next) {
    const Linear& one = layers[first];
    std::vector<const void*> values, scales;
    for (next = first; next < count && layers[next].like(one); ++next) {
      values.push_back(layers[next].values);
      scales.push_back(layers[next].scales);
    }
    const int64_t many = next - first;
    Room<float> wide(many * tokens * one.rows);
    if (products(int(one.kind), many, values.data(), scales.data(), source.values, true, tokens,
                 Target{wide.data(), false}, one.rows, one.columns, one.group))
      return 1;
    for (int64_t i = 0; i < many; ++i, before += one.rows)
      for (int64_t token = 0; token < tokens; ++token) {
        const uint16_t* const bias = layers[first + i].bias;
        const float* const from = wide.data() + (i * tokens + token) * one.rows;
        uint16_t* const to = y + token * width + before;
        for (int64_t r = 0; r < one.rows; ++r) to[r] = to_bf16(from[r] + (bias ? from_bf16(bias[r]) : 0.0f));
      }
  }
  return 0;
}

// How numbers of a head turn with each other. Halves: the first half with the second. Pairs: neighbours; SPLIT puts the
// first of each into the first half and the second into the second, PAIRS leaves them where they are. HALVES and SPLIT
// take angles in bf16 and round every step, as it is where each is an operation of its own; the wide ones take fp32 and
// round once.
enum Turn { HALVES = 0, SPLIT = 1, PAIRS_WIDE = 2, HALVES_WIDE = 3, NOT = 4 };

// The angles of a position, for the first `width` numbers of a head: [width], or for pairs at least [width / 2].
struct Rotary {
  const void* cos;
  const void* sin;
  int64_t width;
  int64_t how;

  // One head, in its place.
  void turn(uint16_t* head) const {
    if (how == HALVES) {
      halves(head);
    } else if (how == SPLIT) {
      Room<uint16_t> pairs(width);
      std::copy_n(head, width, pairs.data());
      split(pairs.data(), head);
    } else if (how == PAIRS_WIDE) {
      pairs_wide(head);
    } else if (how == HALVES_WIDE) {
      halves_wide(head);
    }
  }

 private:
  template <class T>
  const T* cosines() const { return static_cast<const T*>(cos); }
  template <class T>
  const T* sines() const { return static_cast<const T*>(sin); }

  void halves(uint16_t* head) const {
    const int64_t half = width / 2;
    const uint16_t *const c = cosines<uint16_t>(), *const s = sines<uint16_t>();
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = from_bf16(head[i]), b = from_bf16(head[i + half]);
      const float first = rounded(a * from_bf16(c[i])), other = rounded(-b * from_bf16(s[i]));
      const float second = rounded(b * from_bf16(c[i + half])), another = rounded(a * from_bf16(s[i + half]));
      head[i] = to_bf16(first + other);
      head[i + half] = to_bf16(second + another);
    }
  }

  void split(const uint16_t* pairs, uint16_t* head) const {
    const int64_t half = width / 2;
    const uint16_t *const c = cosines<uint16_t>(), *const s = sines<uint16_t>();
    for (int64_t i = 0; i < half; ++i) {
      const float a = from_bf16(pairs[2 * i]), b = from_bf16(pairs[2 * i + 1]);
      const float cosine = from_bf16(c[i]), sine = from_bf16(s[i]);
      head[i] = to_bf16(rounded(a * cosine) - rounded(b * sine));
      head[i + half] = to_bf16(rounded(b * cosine) + rounded(a * sine));
    }
  }

  void pairs_wide(uint16_t* head) const {
    const float *const c = cosines<float>(), *const s = sines<float>();
    for (int64_t i = 0; i < width / 2; ++i) {
      const float a = from_bf16(head[2 * i]), b = from_bf16(head[2 * i + 1]);
      head[2 * i] = to_bf16(a * c[i] - b * s[i]);
      head[2 * i + 1] = to_bf16(b * c[i] + a * s[i]);
    }
  }

  void halves_wide(uint16_t* head) const {
    const int64_t half = width / 2;
    const float *const c = cosines<float>(), *const s = sines<float>();
    for (int64_t i = 0; i < half; ++i) {
      const float a = from_bf16(head[i]), b = from_bf16(head[i + half]);
      head[i] = to_bf16(a * c[i] - b * s[i]);
      head[i + half] = to_bf16(b * c[i + half] + a * s[i + half]);
    }
  }
};

// A layer's attention. Norms of queries and keys are over whole rows or over heads, as their columns say; a norm without
// weight is none. `doubled`: the rows of queries are twice as many, for each head those of its query and those of a gate.
// `gate`: a layer for the gates, without values none. What attention gives is times the sigmoid of a gate.
struct Attention {
  Linear inputs[3];  // to queries, keys, values
  Linear output, gate;
  Norm norms[2];  // of queries, keys
  int64_t heads, groups, width, value_width;
  int64_t window;         // how many tokens are looked at, the new one among them; 0 for all
  const uint16_t* sinks;  // bf16 [heads], logits without values; or null
  float scaling, value_scale;
  int32_t turn, late, doubled, eager;  // late: norms come after the turn; eager: as below
};

// `attend` with every step rounded to bf16, as it is where each is an operation of its own; sinks: [groups, each] or null.
void attend_eagerly(int64_t groups, const void* const* keys, const void* const* values, const void* q, int64_t each,
                    void* out, int64_t length, RowForm key, RowForm value, float scaling, const uint16_t* sinks) {
  const Source query(q, true, groups * each * key.width);
  Room<float> scores(groups * each * length);
  row_scores(groups, keys, key, query.values, each, scores.data(), length);
  const int64_t rows = groups * each;
  shared_loop(rows, evenly(rows, rows * length > MANY), [&](int64_t row, int64_t) {
    float* const x = scores.data() + row * length;
    for (int64_t k = 0; k < length; ++k) x[k] = rounded(rounded(x[k]) * scaling);
    const float sink = sinks ? from_bf16(sinks[row]) : -std::numeric_limits<float>::infinity();
    const float top = std::max(sink, greatest(x, length));
    for (int64_t k = 0; k < length; ++k) x[k] = rounded(x[k] - top);
    for_each(x, x, length, [](Lanes v, Lanes) { return exp(v); });
    const float total = sum_of(x, length) + (sinks ? std::exp(rounded(sink - top)) : 0.0f);
    for (int64_t k = 0; k < length; ++k) x[k] = rounded(x[k] / total);
  });
  row_sums(groups, values, value, scores.data(), each, Target{out, true}, length);
}

// x [count] times the sigmoids of as many gates; both steps are rounded.
void times_sigmoid(uint16_t* x, const uint16_t* gates, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    const float share = rounded(1.0f / (1.0f + std::exp(-from_bf16(gates[k]))));
    x[k] = to_bf16(from_bf16(x[k]) * share);
  }
}

// One token of an answer: where it stands, and the cache of that answer.
struct Standing {
  Rotary rotary;
  Cached cached;
};

// Runs `run(token)` for each of several tokens, on all threads where there is more than one.
template <class Run>
void for_tokens(int64_t tokens, Run run) {
  shared_loop(tokens, 1, [&](int64_t token, int64_t) { run(token); });
}

// From a token's queries, keys and values, which are changed, and its `gates`, to what its heads give.
void heads_of(const Attention& layer, Rotary rotary, const Cached& cached, uint16_t* query, uint16_t* gates,
              uint16_t* mixed) {
  const int64_t width = layer.width, values_wide = layer.value_width, heads = layer.heads, groups = layer.groups;
  const int64_t sizes[2] = {heads * width, groups * width}, mixed_size = heads * values_wide;
  uint16_t* const key = query + layer.inputs[0].rows;
  uint16_t* const value = key + sizes[1];
  if (layer.doubled)
    for (int64_t head = 0; head < heads; ++head) {
      std::copy_n(query + (2 * head + 1) * width, width, gates + head * width);
      std::copy_n(query + 2 * head * width, width, query + head * width);
    }
  rotary.how = layer.turn;
  for (int which = 0; which < 2; ++which) {
    uint16_t* const rows = which ? key : query;
    const Norm& norm = layer.norms[which];
    const auto normed = [&] {
      if (norm.weight) rms_norm(norm, rows, rows, sizes[which] / norm.columns, true);
    };
    if (!layer.late) normed();
    for (int64_t start = 0; start < sizes[which]; start += width) rotary.turn(rows + start);
    if (layer.late) normed();
  }
  if (layer.value_scale != 1.0f)
    for (int64_t k = 0; k < groups * values_wide; ++k) value[k] = to_bf16(from_bf16(value[k]) * layer.value_scale);
  const int64_t all = cached.held + 1, length = layer.window ? std::min(layer.window, all) : all, before = all - length;
  std::vector<const void*> keys, values;
  for (int64_t group = 0; group < groups; ++group) {
    cached.put(cached.key(group, cached.held, width), key + group * width, width);
    cached.put(cached.value(group, cached.held, values_wide), value + group * values_wide, values_wide);
    keys.push_back(cached.key(group, before, width));
    values.push_back(cached.value(group, before, values_wide));
  }
  const RowForm of_keys = cached.form(width), of_values = cached.form(values_wide);
  if (layer.eager)
    attend_eagerly(groups, keys.data(), values.data(), query, heads / groups, mixed, length, of_keys, of_values,
                   layer.scaling, layer.sinks);
  else
    attend(groups, keys.data(), values.data(), query, heads / groups, mixed, length, of_keys, of_values, layer.scaling);
  if (layer.doubled || layer.gate.values) times_sigmoid(mixed, gates, mixed_size);
}

// One token each of several answers: rows of x to rows of out.
int attention(const Attention& layer, int64_t tokens, const uint16_t* x, const Standing* standing, uint16_t* out) {
  const int64_t mixed_size = layer.heads * layer.value_width;
  const int64_t states_size = layer.inputs[0].rows + layer.groups * (layer.width + layer.value_width);
  const int64_t gates_size = layer.doubled || layer.gate.values ? mixed_size : 0;
  Room<uint16_t> states(tokens * states_size), mixed(tokens * mixed_size), gates(tokens * gates_size);
  if (linears(layer.inputs, 3, tokens, x, states.data())) return 1;
  if (layer.gate.values && linears(&layer.gate, 1, tokens, x, gates.data())) return 1;
  for_tokens(tokens, [&](int64_t token) {
    heads_of(layer, standing[token].rotary, standing[token].cached, states.data() + token * states_size,
             gates.data() + token * gates_size, mixed.data() + token * mixed_size);
  });
  return linears(&layer.output, 1, tokens, mixed.data(), out);
}

}  // namespace
