// Rows of keys and values in a cache: numbers in bf16, or in 8 bits with a step for every 32 (model/kv_rows.py has the
// form). A row in 8 bits reads as the numbers that its expansion into bf16 has, so sums over both are the same bits.

#pragma once

#include "products.h"

namespace {

// Sums of `row_scores` that are made at once: with what they add up they take the processor's registers.
#if CONMOE_AVX512
constexpr int64_t SUMS = 8;
#else
constexpr int64_t SUMS = 4;
#endif

// What a kind of row is, of `width` numbers.
struct RowForm {
  int64_t width;
  bool packed;
  int64_t nbytes() const { return packed ? width + (width + BLOCK - 1) / BLOCK : 2 * width; }
};

// bf16 numbers to whole numbers and steps; to the nearest, ties to even. A block with NaN or infinity gets step 255.
inline void pack_row(const uint16_t* numbers, int64_t width, uint8_t* row) {
  constexpr float WHOLE = 12582912.0f;  // 1.5 * 2^23: a sum with it has no fraction
  for (int64_t start = 0; start < width; start += BLOCK) {
    const int64_t count = std::min(BLOCK, width - start);
    const uint16_t* const from = numbers + start;
    uint32_t greatest = 0;
    for (int64_t k = 0; k < count; ++k) greatest = std::max(greatest, uint32_t(from[k] & 0x7fff));
    const uint32_t exponent = greatest >> 7, step = exponent == 255 ? 255 : exponent > 6 ? exponent - 6 : 1;
    row[width + start / BLOCK] = uint8_t(step);
    if (step == 255) {
      std::fill_n(row + start, count, uint8_t(0));
      continue;
    }
    const float inverse = from_bits((254 - step) << 23);
    for (int64_t k = 0; k < count; ++k) {
      const float whole = from_bf16(from[k]) * inverse + WHOLE - WHOLE;
      row[start + k] = uint8_t(int8_t(std::min(127.0f, std::max(-127.0f, whole))));
    }
  }
}

// A row in 8 bits as fp32. The step of a block without numbers reads as infinity, which makes NaN of its zeros.
inline void expand_row(const uint8_t* row, int64_t width, float* to) {
  const auto* const numbers = reinterpret_cast<const int8_t*>(row);
  for (int64_t start = 0; start < width; start += BLOCK) {
    const float step = from_bits(uint32_t(row[width + start / BLOCK]) << 23);
    const int64_t stop = std::min(start + BLOCK, width);
    int64_t k = start;
    for (; k + LANES <= stop; k += LANES) store(to + k, fma(load(numbers + k), all(step), zero()));
    for (; k < stop; ++k) to[k] = float(numbers[k]) * step;
  }
}

// Rows as the products take them: in bf16 where they lie, in 8 bits expanded beside.
struct Bf16Rows {
  using Form = Bf16;
  const void* const* first;
  RowForm form;
  const uint16_t* at(int64_t which, int64_t row, int64_t, float*) const {
    return static_cast<const uint16_t*>(first[which]) + row * form.width;
  }
  int64_t room(int64_t) const { return 0; }
};
struct PackedRows {
  using Form = Fp32;
  const void* const* first;
  RowForm form;
  const float* at(int64_t which, int64_t row, int64_t count, float* room) const {
    const uint8_t* from = static_cast<const uint8_t*>(first[which]) + row * form.nbytes();
    for (int64_t r = 0; r < count; ++r, from += form.nbytes()) {
      __builtin_prefetch(from + PAGE);
      expand_row(from, form.width, room + r * form.width);
    }
    return room;
  }
  int64_t room(int64_t count) const { return count * form.width; }
};

// COUNT rows of `columns` numbers times TIMES tokens, as far as single vectors: `totals` has those of a row's tokens one
// after another. The same numbers as in `dot_row`, whose vectors of a sum are made one after another here, so that those
// of several sums fit into registers.
template <class Form, int64_t COUNT, int64_t TIMES>
inline void add_products(const typename Form::T* w, int64_t columns, const float* const* x, Lanes* totals) {
  constexpr int64_t STRIDE = PARTS * LANES;
  const int64_t whole = columns / STRIDE * STRIDE, last = columns / LANES * LANES;
  Lanes parts[PARTS][COUNT * TIMES];
  for (int64_t part = 0; part < (whole ? PARTS : 1); ++part) {
    Lanes total[COUNT * TIMES];
#pragma GCC unroll 8
    for (int64_t i = 0; i < COUNT * TIMES; ++i) total[i] = zero();
    const auto add_one = [&](int64_t k) {
#pragma GCC unroll 8
      for (int64_t r = 0; r < COUNT; ++r) {
        const Lanes value = Form::lanes(w + r * columns + k);
#pragma GCC unroll 8
        for (int64_t t = 0; t < TIMES; ++t) total[r * TIMES + t] = fma(value, load(x[t] + k), total[r * TIMES + t]);
      }
    };
    for (int64_t k = part * LANES; k < whole; k += STRIDE) add_one(k);
    for (int64_t k = part ? last : whole; k < last; k += LANES) add_one(k);
#pragma GCC unroll 8
    for (int64_t i = 0; i < COUNT * TIMES; ++i) parts[part][i] = total[i];
  }
  for (int64_t i = 0; i < COUNT * TIMES; ++i)
    totals[i] = whole ? add(add(parts[0][i], parts[1][i]), add(parts[2][i], parts[3][i])) : parts[0][i];
}

// scores[t, r] of `height` rows, at most NEAR, and TIMES tokens; a token's scores are `length` apart.
template <class Form, int64_t TIMES>
void scores_of_rows(const typename Form::T* w, int64_t height, int64_t columns, const float* x, float* scores,
                    int64_t length) {
  constexpr int64_t AT_ONCE = SUMS / TIMES;
  const int64_t last = columns / LANES * LANES;
  const float* inputs[TIMES];
  for (int64_t t = 0; t < TIMES; ++t) inputs[t] = x + t * columns;
  Lanes totals[NEAR * TIMES];
  float sums[NEAR * TIMES];
  int64_t row = 0;
  for (; row + AT_ONCE <= height; row += AT_ONCE)
    add_products<Form, AT_ONCE, TIMES>(w + row * columns, columns, inputs, totals + row * TIMES);
  for (; row < height; ++row) add_products<Form, 1, TIMES>(w + row * columns, columns, inputs, totals + row * TIMES);
  sums_of(totals, height * TIMES, sums);
  for (int64_t t = 0; t < TIMES; ++t)
    for (row = 0; row < height; ++row) {
      float rest = 0;
      for (int64_t j = last; j < columns; ++j) rest = std::fma(Form::one(w[row * columns + j]), inputs[t][j], rest);
      scores[t * length + row] = sums[row * TIMES + t] + rest;
    }
}

template <class Rows>
void scores_of(int64_t count, const Rows& rows, const float* x, int64_t tokens, float* scores, int64_t length,
               int64_t columns) {
  using Form = typename Rows::Form;
  const int64_t blocks = (length + NEAR - 1) / NEAR;
  RoomOfThreads rooms(rows.room(NEAR));
  const int64_t at_once = evenly(count * blocks, count * length * columns > MANY);
  shared_loop(count * blocks, at_once, [&](int64_t number, int64_t thread) {
    const int64_t which = number / blocks, first = number % blocks * NEAR, height = std::min(NEAR, length - first);
    const auto* const w = rows.at(which, first, height, rooms.own(thread));
    const float* const input = x + which * tokens * columns;
    float* const to = scores + which * tokens * length + first;
    int64_t token = 0;
    for (; token + 2 <= tokens; token += 2)
      scores_of_rows<Form, 2>(w, height, columns, input + token * columns, to + token * length, length);
    if (token < tokens)
      scores_of_rows<Form, 1>(w, height, columns, input + token * columns, to + token * length, length);
  });
}

// scores[i, t, r] = row r of i times x[i, t], in fp32: what `products` gives for the rows in bf16.
void row_scores(int64_t count, const void* const* rows, RowForm form, const float* x, int64_t tokens, float* scores,
                int64_t length) {
  if (form.packed)
    scores_of(count, PackedRows{rows, form}, x, tokens, scores, length, form.width);
  else
    scores_of(count, Bf16Rows{rows, form}, x, tokens, scores, length, form.width);
}

// y[i, t] = sum over r of p[i, t, r] times row r of i.
void row_sums(int64_t count, const void* const* rows, RowForm form, const float* p, int64_t tokens, Target y,
              int64_t length) {
  if (form.packed)
    weighted(count, PackedRows{rows, form}, p, tokens, y, length, form.width);
  else
    weighted(count, Bf16Rows{rows, form}, p, tokens, y, length, form.width);
}

// Where a layer's keys and values lie: `held` tokens of every head, with room for one more; heads are `key_step` and
// `value_step` numbers apart, bytes where the rows are `packed`.
struct Cached {
  void* keys;
  void* values;
  int64_t key_step, value_step, held;
  bool packed;

  RowForm form(int64_t width) const { return {width, packed}; }
  uint8_t* key(int64_t head, int64_t token, int64_t width) const { return row(keys, head * key_step, token, width); }
  uint8_t* value(int64_t head, int64_t token, int64_t width) const { return row(values, head * value_step, token, width); }
  // The new token's row, behind those that are held.
  void put(uint8_t* row, const uint16_t* numbers, int64_t width) const {
    if (packed)
      pack_row(numbers, width, row);
    else
      std::memcpy(row, numbers, size_t(2 * width));
  }

 private:
  uint8_t* row(void* first, int64_t before, int64_t token, int64_t width) const {
    return static_cast<uint8_t*>(first) + before * (packed ? 1 : 2) + token * form(width).nbytes();
  }
};

}  // namespace
