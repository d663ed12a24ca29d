// Attention of one new token, and what stands around it: norms and rotary positions.

#pragma once

#include <cmath>

#include "products.h"

namespace {

// x over the root of its mean square, times a weight (bf16 where `narrow`, else fp32). `plus_one` adds 1 to the weight;
// `early` rounds to the format of x before the weight is applied.
struct Norm {
  const void* weight;
  int64_t columns;
  float epsilon;
  int32_t narrow, plus_one, early;
};

// Rows of x to rows of out, which may be the same; bf16 where `narrow`, else fp32.
void rms_norm(const Norm& norm, const void* x, void* out, int64_t rows, bool narrow) {
  const int64_t columns = norm.columns;
  const Source source(x, narrow, rows * columns), factors(norm.weight, norm.narrow != 0, columns);
  const Target target{out, narrow};
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = source.values + row * columns;
    float sums[LANES] = {0};
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES)
      for (int64_t i = 0; i < LANES; ++i) sums[i] += from[k + i] * from[k + i];
    float total = 0;
    for (; k < columns; ++k) total += from[k] * from[k];
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
            int64_t length, int64_t columns, int64_t width, float scaling) {
  const Source query(q, true, groups * each * columns);
  Room<float> scores(groups * each * length);
  const std::vector<const void*> none(size_t(groups), nullptr);
  products(BF16, groups, keys, none.data(), query.values, false, each, Target{scores.data(), false}, length, columns, 0);
  const int64_t rows = groups * each;
#pragma omp parallel for schedule(static) if (rows * length > MANY)
  for (int64_t row = 0; row < rows; ++row) softmax(scores.data() + row * length, length, scaling);
  weighted<Bf16>(groups, values, scores.data(), each, Target{out, true}, length, width);
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

// y = W x + b of `count` layers for one x, one after another, rounded to bf16 once. Returns 0, or 1 where a form cannot be
// taken. Neighbours of one form are one product.
int linears(const Linear* layers, int64_t count, const uint16_t* x, uint16_t* y) {
  const Source source(x, true, layers->columns);
  for (int64_t first = 0, next; first < count; first = next) {
    const Linear& one = layers[first];
    std::vector<const void*> values, scales;
    for (next = first; next < count && layers[next].like(one); ++next) {
      values.push_back(layers[next].values);
      scales.push_back(layers[next].scales);
    }
    const int64_t many = next - first;
    Room<float> wide(many * one.rows);
    if (products(int(one.kind), many, values.data(), scales.data(), source.values, true, 1, Target{wide.data(), false},
                 one.rows, one.columns, one.group))
      return 1;
    for (int64_t i = 0; i < many; ++i)
      for (int64_t r = 0; r < one.rows; ++r) {
        const uint16_t* bias = layers[first + i].bias;
        *y++ = to_bf16(wide[i * one.rows + r] + (bias ? from_bf16(bias[r]) : 0.0f));
      }
  }
  return 0;
}

// The angles of a position, for the first `width` numbers of a head: its first half turns with its second.
struct Rotary {
  const uint16_t* cos;
  const uint16_t* sin;
  int64_t width;

  // One head, in its place; every step is rounded, as it is where each is an operation of its own.
  void turn(uint16_t* head) const {
    const int64_t half = width / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float a = from_bf16(head[i]), b = from_bf16(head[i + half]);
      const float first = rounded(a * from_bf16(cos[i])), other = rounded(-b * from_bf16(sin[i]));
      const float second = rounded(b * from_bf16(cos[i + half])), another = rounded(a * from_bf16(sin[i + half]));
      head[i] = to_bf16(first + other);
      head[i + half] = to_bf16(second + another);
    }
  }
};

// Where a layer's keys and values lie: `held` tokens of every head, with room for one more.
struct Cached {
  uint16_t* keys;
  uint16_t* values;
  int64_t key_step, value_step, held;
};

// A layer's attention. Norms of queries and keys are over whole rows or over heads, as their columns say; a norm without
// weight is none.
struct Attention {
  Linear inputs[3];  // to queries, keys, values
  Linear output;
  Norm norms[2];  // of queries, keys
  int64_t heads, groups, width;
  float scaling;
};

// What one new token's activations pass before a layer's experts: a norm, attention, and after its sum with what came in
// another norm.
struct Block {
  Attention attention;
  Norm before, after;
};

int attention(const Attention& layer, const uint16_t* x, const Rotary& rotary, const Cached& cached, uint16_t* out) {
  const int64_t width = layer.width, groups = layer.groups;
  const int64_t sizes[2] = {layer.heads * width, groups * width};
  Room<uint16_t> states(sizes[0] + 2 * sizes[1]), mixed(sizes[0]);
  if (linears(layer.inputs, 3, x, states.data())) return 1;
  uint16_t* const query = states.data();
  uint16_t* const key = query + sizes[0];
  uint16_t* const value = key + sizes[1];
  for (int which = 0; which < 2; ++which) {
    uint16_t* const rows = which ? key : query;
    const Norm& norm = layer.norms[which];
    if (norm.weight) rms_norm(norm, rows, rows, sizes[which] / norm.columns, true);
    for (int64_t start = 0; start < sizes[which]; start += width) rotary.turn(rows + start);
  }
  std::vector<const void*> keys, values;
  for (int64_t group = 0; group < groups; ++group) {
    uint16_t* const first = cached.keys + group * cached.key_step;
    uint16_t* const second = cached.values + group * cached.value_step;
    std::copy_n(key + group * width, width, first + cached.held * width);
    std::copy_n(value + group * width, width, second + cached.held * width);
    keys.push_back(first);
    values.push_back(second);
  }
  attend(groups, keys.data(), values.data(), query, layer.heads / groups, mixed.data(), cached.held + 1, width, width,
         layer.scaling);
  return linears(&layer.output, 1, mixed.data(), out);
}

// x to sum = x + attention(before(x)) and normed = after(sum), all bf16.
int block(const Block& layer, const uint16_t* x, const Rotary& rotary, const Cached& cached, uint16_t* sum,
          uint16_t* normed) {
  rms_norm(layer.before, x, normed, 1, true);
  const int failed = attention(layer.attention, normed, rotary, cached, sum);
  if (failed) return failed;
  for (int64_t k = 0; k < layer.before.columns; ++k) sum[k] = to_bf16(from_bf16(x[k]) + from_bf16(sum[k]));
  rms_norm(layer.after, sum, normed, 1, true);
  return 0;
}

}  // namespace
