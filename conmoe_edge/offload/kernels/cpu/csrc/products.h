// Products of stored weights and few rows of activations, and weights expanded to fp32 or bf16.
//
// Stored forms: see checkpoint/quantise.py. With plain weights products and sums are fp32. With weights in 8 or 4 bits
// the activations are rounded to 8 bits as well, in blocks of 32 columns (int4: of a group) with a scale each, and a
// block is summed in whole numbers: turning weights into fp32 takes longer than the memory takes to bring them.
// A sum runs over the columns in an order that depends on nothing but their number, so a token's result is the same
// bits whatever the number of matrices, tokens or threads.

#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "low_bits.h"
#include "pool.h"

namespace {

constexpr int64_t ROWS = 4;         // rows of a matrix in a block, or pages of shorter ones
constexpr int64_t PARTS = 4;        // vectors of a row that are summed side by side
constexpr int64_t PAGE = 4096;      // bytes; what a processor reads ahead ends with a page, and in a page is one stream
constexpr int64_t MOST = 64;        // rows of a block, at most
constexpr int64_t TOKENS = 4;       // that a row is multiplied with at once
constexpr int64_t NEAR = 16;        // rows that stay in the first cache while all tokens pass over them
constexpr int64_t BLOCK = 32;       // columns of activations in 8 bits that share a scale, beside int8 weights
constexpr int64_t MANY = 1 << 15;   // numbers that are worth a second thread
constexpr int64_t CHUNK = 1 << 18;  // bytes of weights that a thread takes at a time, and below which one does it all

enum Kind { BF16 = 0, FP16 = 1, FP32 = 2, INT8 = 3, INT4 = 4, MXFP4 = 5, Q4 = 6, Q3 = 7, Q2 = 8, Q6 = 9,
            GRID_FP16 = 10, GRID_FP16_ZEROS = 11, GRID_BF16 = 12, GRID_BF16_ZEROS = 13 };

// ---- matrices whose rows lie one after another ---------------------------------------------------------------------

template <class Form>
struct Plain;
struct Whole;

struct Bf16 {
  using Way = Plain<Bf16>;
  using T = uint16_t;
  static Lanes lanes(const T* w) { return load(w); }
  static float one(T w) { return from_bf16(w); }
};
struct Fp16 {
  using Way = Plain<Fp16>;
  using T = uint16_t;
  static Lanes lanes(const T* w) { return load_half(w); }
  static float one(T w) { return from_fp16(w); }
};
struct Fp32 {
  using Way = Plain<Fp32>;
  using T = float;
  static Lanes lanes(const T* w) { return load(w); }
  static float one(T w) { return w; }
};
struct Int8 {
  using Way = Whole;
  using T = int8_t;
  static Lanes lanes(const T* w) { return load(w); }
  static float one(T w) { return float(w); }
};

// One row times `COUNT` tokens, `PARTS` vectors at once: it is read in one stream, which is what processors read ahead
// best. A token's sum is the same bits whatever their number.
template <class Form, int64_t COUNT>
inline void dot_row(const typename Form::T* w, int64_t columns, const float* const* x, float* sums) {
  Lanes total[COUNT][PARTS];
  for (auto& parts : total)
    for (Lanes& one : parts) one = zero();
  int64_t k = 0;
  for (; k + PARTS * LANES <= columns; k += PARTS * LANES)
    for (int64_t p = 0; p < PARTS; ++p) {
      const Lanes value = Form::lanes(w + k + p * LANES);
      for (int64_t t = 0; t < COUNT; ++t) total[t][p] = fma(value, load(x[t] + k + p * LANES), total[t][p]);
    }
  for (; k + LANES <= columns; k += LANES) {
    const Lanes value = Form::lanes(w + k);
    for (int64_t t = 0; t < COUNT; ++t) total[t][0] = fma(value, load(x[t] + k), total[t][0]);
  }
  for (int64_t t = 0; t < COUNT; ++t) {
    float rest = 0;
    // Rounded once, also where a compiler would take a product and a sum in one copy of this and not in another.
    for (int64_t j = k; j < columns; ++j) rest = std::fma(Form::one(w[j]), x[t][j], rest);
    sums[t] = sum(add(add(total[t][0], total[t][1]), add(total[t][2], total[t][3]))) + rest;
  }
}

// `COUNT` rows that lie `step` numbers apart, times one token.
template <class Form, int64_t COUNT>
inline void dot(const typename Form::T* w, int64_t step, int64_t columns, const float* x, float* sums) {
  for (int64_t r = 0; r < COUNT; ++r) dot_row<Form, 1>(w + r * step, columns, &x, sums + r);
}

// One row times `count` tokens, at most `TOKENS`: the same bits. It is turned into fp32 once where the sums fit into
// registers, else twice.
template <class Form>
inline void dot_tokens(const typename Form::T* w, int64_t columns, const float* const* x, int64_t count, float* sums) {
#if CONMOE_AVX512
  if (count == 4) return dot_row<Form, 4>(w, columns, x, sums);
  if (count == 3) return dot_row<Form, 3>(w, columns, x, sums);
#endif
  int64_t t = 0;
  for (; t + 2 <= count; t += 2) dot_row<Form, 2>(w, columns, x + t, sums + t);
  if (t < count) dot_row<Form, 1>(w, columns, x + t, sums + t);
}

// Tokens in fp32, one after another.
struct Floats {
  const float* x;
  int64_t columns;
  Floats(const float* x, int64_t, int64_t columns, int64_t) : x(x), columns(columns) {}
  const float* token(int64_t index) const { return x + index * columns; }
};

#if CONMOE_INTEGERS

// 32 weights times 32 activations, in eight sums.
inline __m256i products_of(__m256i w, __m256i x) {
  const __m256i size = _mm256_abs_epi8(w), signs = _mm256_sign_epi8(x, w);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(_mm256_setzero_si256(), size, signs);
#else
  return _mm256_madd_epi16(_mm256_maddubs_epi16(size, signs), _mm256_set1_epi16(1));
#endif
}

// A block of a row of int8 times that of a token, added up.
inline void add_block(const int8_t* w, Token x, int64_t k, __m256& to) {
  const __m256i part =
      products_of(_mm256_loadu_si256((const __m256i*)(w + k)), _mm256_loadu_si256((const __m256i*)(x.q + k)));
  to = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), _mm256_set1_ps(x.scale[k / BLOCK]), to);
}

// What is left of a row from column k on, and all of it together.
inline void rest_of_bytes(const int8_t* w, int64_t columns, int64_t k, Token x, __m256* total, float* sums) {
  for (; k + BLOCK <= columns; k += BLOCK) add_block(w, x, k, total[0]);
  int32_t rest = 0;
  for (int64_t j = k; j < columns; ++j) rest += int32_t(w[j]) * x.q[j];
  const __m256 all = _mm256_add_ps(_mm256_add_ps(total[0], total[1]), _mm256_add_ps(total[2], total[3]));
  *sums = sum_of(all) + (k < columns ? float(rest) * x.scale[k / BLOCK] : 0.0f);
}

// A row of int8 times one token.
inline void dot_bytes(const int8_t* w, int64_t columns, Token x, float* sums) {
  __m256 total[PARTS];
  for (__m256& one : total) one = _mm256_setzero_ps();
  int64_t k = 0;
  for (; k + PARTS * BLOCK <= columns; k += PARTS * BLOCK)
    for (int64_t p = 0; p < PARTS; ++p) add_block(w, x, k + p * BLOCK, total[p]);
  rest_of_bytes(w, columns, k, x, total, sums);
}

#else

inline void dot_bytes(const int8_t* w, int64_t columns, Token x, float* sums) {
  float total = 0;
  for (int64_t start = 0; start < columns; start += BLOCK) {
    const int64_t stop = start + BLOCK < columns ? start + BLOCK : columns;
    int32_t part = 0;
    for (int64_t k = start; k < stop; ++k) part += int32_t(w[k]) * x.q[k];
    total += float(part) * x.scale[start / BLOCK];
  }
  *sums = total;
}

#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define CONMOE_WIDE_BYTES 1

// Tokens in 8 bits for several rows at once. With 128 added, weights have no sign: `less` is what that adds to the sum of
// every four neighbours, below zero; `factors` has the scale of a block for each of its eight sums.
struct WideBytes : Bytes {
  struct Row {
    Token token;
    const int32_t* less;
    const float* factors;
  };
  static constexpr int64_t FOUR = 4, SUMS = BLOCK / FOUR;
  int64_t fours;
  Room<int32_t> less;
  Room<float> factors;

  WideBytes(const float* x, int64_t count, int64_t columns, int64_t block)
      : Bytes(x, count, columns, block),
        fours(columns / FOUR),
        less(count > 1 ? count * fours : 0),
        factors(count > 1 ? count * blocks * SUMS : 0) {
    for (int64_t i = 0; count > 1 && i < count * blocks; ++i)
      std::fill_n(factors.data() + i * SUMS, SUMS, scale.data()[i]);
    for (int64_t token = 0; count > 1 && token < count; ++token)
      for (int64_t i = 0; i < fours; ++i) {
        const int8_t* const from = q.data() + token * columns + i * FOUR;
        less[token * fours + i] = -128 * (int32_t(from[0]) + from[1] + from[2] + from[3]);
      }
  }
  Row token(int64_t index) const {
    return {Bytes::token(index), less.data() + index * fours, factors.data() + index * blocks * SUMS};
  }
};

// `HIGH` rows times `COUNT` tokens, two blocks in a vector: sums[t * step + r], the same bits as of `dot_bytes`.
template <int64_t HIGH, int64_t COUNT>
inline void dot_wide(const int8_t* w, int64_t columns, const WideBytes::Row* x, float* sums, int64_t step) {
  constexpr int64_t ALL = HIGH * COUNT;
  __m512 first[ALL], second[ALL];  // of blocks 0 and 1, and of 2 and 3
  const int8_t* q[COUNT];
  const int32_t* less[COUNT];
  const float* factors[COUNT];
#pragma GCC unroll 4
  for (int64_t i = 0; i < ALL; ++i) first[i] = second[i] = _mm512_setzero_ps();
#pragma GCC unroll 4
  for (int64_t t = 0; t < COUNT; ++t) q[t] = x[t].token.q, less[t] = x[t].less, factors[t] = x[t].factors;
  const __m512i signs = _mm512_set1_epi8(char(0x80));
  const auto two_blocks = [&](int64_t at, __m512* total) {
    __m512i rows[HIGH];
#pragma GCC unroll 4
    for (int64_t r = 0; r < HIGH; ++r) rows[r] = _mm512_xor_si512(_mm512_loadu_si512(w + r * columns + at), signs);
#pragma GCC unroll 4
    for (int64_t t = 0; t < COUNT; ++t) {
      const __m512i bytes = _mm512_loadu_si512(q[t] + at), below = _mm512_loadu_si512(less[t] + at / 4);
      const __m512 by = _mm512_loadu_ps(factors[t] + at / 4);
#pragma GCC unroll 4
      for (int64_t r = 0; r < HIGH; ++r)
        total[t * HIGH + r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(below, rows[r], bytes)), by,
                                              total[t * HIGH + r]);
    }
  };
  int64_t k = 0;
  for (; k + 4 * BLOCK <= columns; k += 4 * BLOCK) {
    two_blocks(k, first);
    two_blocks(k + 2 * BLOCK, second);
  }
  const auto upper = [](__m512 both) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(both), 1)); };
#pragma GCC unroll 4
  for (int64_t i = 0; i < ALL; ++i) {
    __m256 parts[4] = {_mm512_castps512_ps256(first[i]), upper(first[i]), _mm512_castps512_ps256(second[i]),
                       upper(second[i])};
    rest_of_bytes(w + i % HIGH * columns, columns, k, x[i / HIGH].token, parts, sums + i / HIGH * step + i % HIGH);
  }
}

#endif

// ---- products -------------------------------------------------------------------------------------------------------

// What the products of a form with fp32 activations, and of int8 with those in 8 bits, have different.
template <class Form>
struct Plain {
  using T = typename Form::T;
  using Input = Floats;
  using Row = const float*;
  static void times(const T* w, int64_t columns, Row x, float* sums) { dot_row<Form, 1>(w, columns, &x, sums); }
  // sums[t * step + r]
  static void several(const T* w, int64_t columns, const Row* x, int64_t count, int64_t height, float* sums, int64_t step) {
    for (int64_t r = 0; r < height; ++r) {
      float found[TOKENS];
      dot_tokens<Form>(w + r * columns, columns, x, count, found);
      for (int64_t t = 0; t < count; ++t) sums[t * step + r] = found[t];
    }
  }
};
struct Whole {
  using T = int8_t;
#if CONMOE_WIDE_BYTES
  using Input = WideBytes;
  using Row = WideBytes::Row;
  static void times(const T* w, int64_t columns, Row x, float* sums) { dot_bytes(w, columns, x.token, sums); }
  static void several(const T* w, int64_t columns, const Row* x, int64_t count, int64_t height, float* sums, int64_t step) {
    int64_t r = 0;
    for (; r + 2 <= height; r += 2) some<2>(w + r * columns, columns, x, count, sums + r, step);
    if (r < height) some<1>(w + r * columns, columns, x, count, sums + r, step);
  }

 private:
  template <int64_t HIGH>
  static void some(const T* w, int64_t columns, const Row* x, int64_t count, float* sums, int64_t step) {
    int64_t t = 0;
    for (; t + 2 <= count; t += 2) dot_wide<HIGH, 2>(w, columns, x + t, sums + t * step, step);
    if (t < count) dot_wide<HIGH, 1>(w, columns, x + t, sums + t * step, step);
  }
#else
  using Input = Bytes;
  using Row = Token;
  static void times(const T* w, int64_t columns, Row x, float* sums) { dot_bytes(w, columns, x, sums); }
  static void several(const T* w, int64_t columns, const Row* x, int64_t count, int64_t height, float* sums, int64_t step) {
    for (int64_t r = 0; r < height; ++r)
      for (int64_t t = 0; t < count; ++t) dot_bytes(w + r * columns, columns, x[t], sums + t * step + r);
  }
#endif
};

// Rows that a thread takes as a block.
template <class Way>
int64_t block_rows(int64_t columns) {
  const int64_t row = std::max<int64_t>(1, columns * int64_t(sizeof(typename Way::T)));
  return std::min(ROWS * ((PAGE + row - 1) / row), MOST);
}

// How many blocks a thread takes at once, of so many numbers each.
template <class Way>
int64_t blocks_at_once(int64_t numbers) {
  return CHUNK / std::max<int64_t>(1, numbers * int64_t(sizeof(typename Way::T))) + 1;
}

// The rows of a block times `count` tokens, at most `TOKENS`, scaled. A token's sums are `step` numbers apart.
template <class Way>
inline void block_of_rows(const typename Way::T* w, const uint16_t* scale, int64_t columns, const typename Way::Row* x,
                          int64_t count, int64_t height, float* sums, int64_t step) {
  if (count == 1) {
    for (int64_t r = 0; r < height; ++r) Way::times(w + r * columns, columns, *x, sums + r);
  } else {
    Way::several(w, columns, x, count, height, sums, step);
  }
  if (!scale) return;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < height; ++r) sums[t * step + r] *= from_bf16(scale[r]);
}

template <class Way>
void rows_kind(int64_t count, const void* const* values, const void* const* scales, const typename Way::Input& x,
               bool shared, int64_t tokens, Target y, int64_t rows, int64_t columns) {
  const int64_t high = block_rows<Way>(columns), at_once = blocks_at_once<Way>(high * columns);
  const int64_t blocks = (rows + high - 1) / high, all_blocks = blocks * count;
  shared_loop(all_blocks, at_once, [&](int64_t block, int64_t) {
    const int64_t which = block / blocks, row = block % blocks * high, height = std::min(rows - row, high);
    const auto* w = static_cast<const typename Way::T*>(values[which]) + row * columns;
    const auto* scale = static_cast<const uint16_t*>(scales[which]);
    for (int64_t token = 0; token < tokens; token += TOKENS) {
      const int64_t some = std::min(TOKENS, tokens - token), first = (shared ? 0 : which * tokens) + token;
      typename Way::Row inputs[TOKENS];
      float sums[TOKENS][MOST];
      for (int64_t t = 0; t < some; ++t) inputs[t] = x.token(first + t);
      block_of_rows<Way>(w, scale ? scale + row : nullptr, columns, inputs, some, height, sums[0], MOST);
      for (int64_t t = 0; t < some; ++t)
        for (int64_t r = 0; r < height; ++r) y.put((which * tokens + token + t) * rows + row + r, sums[t][r]);
    }
  });
}

// Blocks of rows of several matrices of different heights, one after another.
struct Blocks {
  std::vector<int64_t> before;  // blocks of the matrices before each, and of all

  Blocks(int64_t count, const int64_t* heights, int64_t size) : before(size_t(count) + 1, 0) {
    for (int64_t i = 0; i < count; ++i) before[size_t(i + 1)] = before[size_t(i)] + (heights[i] + size - 1) / size;
  }
  int64_t all() const { return before.back(); }
  // The matrix of a block; `block` becomes its number there.
  int64_t find(int64_t* block) const {
    const int64_t which = std::upper_bound(before.begin(), before.end(), *block) - before.begin() - 1;
    *block -= before[size_t(which)];
    return which;
  }
};

// The gate rows and the other rows of `count` experts, 2 * widths[i] rows each, and their biases: null where there are
// none, or where an expert has none.
struct Gated {
  int64_t count;
  const void* const* values;
  const void* const* scales;
  const uint16_t* const* bias;
  const int64_t* widths;
  Gate gate;
  const uint16_t* bias_of(int64_t which) const { return bias ? bias[which] : nullptr; }
};

// 2 * count numbers that take turns: the first of each pair come before the second ones.
inline void apart(float* x, int64_t count) {
  float seconds[MOST];
  for (int64_t r = 0; r < count; ++r) {
    seconds[r] = x[2 * r + 1];
    x[r] = x[2 * r];
  }
  std::copy_n(seconds, count, x + count);
}

// Which tokens each of several experts is asked by: those of expert i are tokens[starts[i]] to tokens[starts[i + 1] - 1].
// A place in `tokens` is one answer: what is computed lies in the order of these places.
struct Askers {
  std::vector<int64_t> starts{0}, tokens;

  // One token that asks all of `count` experts.
  static Askers one(int64_t count) {
    Askers made;
    for (int64_t i = 0; i < count; ++i) made.starts.push_back(i + 1);
    made.tokens.assign(size_t(count), 0);
    return made;
  }
  int64_t first(int64_t expert) const { return starts[size_t(expert)]; }
  int64_t last(int64_t expert) const { return starts[size_t(expert + 1)]; }
  int64_t token(int64_t place) const { return tokens[size_t(place)]; }
  int64_t places() const { return starts.back(); }
  // The expert of every place.
  std::vector<int64_t> experts() const {
    std::vector<int64_t> found;
    for (size_t i = 0; i + 1 < starts.size(); ++i) found.insert(found.end(), size_t(starts[i + 1] - starts[i]), int64_t(i));
    return found;
  }
};

// h = what the gate of an expert makes of `height` of its rows from `row` on: `both` has first those of the gate and then
// the others, or, where they take turns, one half of all and the next; in `both` they are changed.
inline void gate_rows(const Gated& experts, int64_t which, int64_t row, int64_t height, float* both, float* h) {
  const uint16_t* const bias = experts.bias_of(which);
  const int64_t step = experts.gate.interleaved ? 2 : 1;
  const int64_t start = step * row, next = step == 2 ? start + height : experts.widths[which] + row;
  if (bias)
    for (int64_t r = 0; r < height; ++r) {
      both[r] += from_bf16(bias[start + r]);
      both[height + r] += from_bf16(bias[next + r]);
    }
  if (step == 2) apart(both, height);
  gate(both, both + height, height, experts.gate);
  std::copy_n(both + height, height, h + row);
}

// h_p[j] = what the gate makes of both rows j of an expert times a token, for every place p: as many numbers as the
// expert is wide.
template <class Way>
void gated_rows(const Gated& experts, const Askers& askers, const typename Way::Input& x, float* const* h,
                int64_t columns) {
  const int64_t count = experts.count;
  const int64_t* const widths = experts.widths;
  const int64_t high = block_rows<Way>(columns), at_once = blocks_at_once<Way>(2 * high * columns);
  const Blocks blocks(count, widths, high);
  shared_loop(blocks.all(), at_once, [&](int64_t number, int64_t) {
    int64_t block = number;
    const int64_t which = blocks.find(&block), row = block * high, width = widths[which];
    const auto* w = static_cast<const typename Way::T*>(experts.values[which]);
    const auto* scale = static_cast<const uint16_t*>(experts.scales[which]);
    const int64_t height = std::min(width - row, high), step = experts.gate.interleaved ? 2 : 1;
    // Two runs of rows: of the gate and of the other, or, where they take turns, one half of all and the next.
    const int64_t start = step * row, next = step == 2 ? start + height : width + row;
    for (int64_t place = askers.first(which); place < askers.last(which); place += TOKENS) {
      const int64_t some = std::min(TOKENS, askers.last(which) - place);
      typename Way::Row inputs[TOKENS];
      float both[TOKENS][2 * MOST];
      for (int64_t t = 0; t < some; ++t) inputs[t] = x.token(askers.token(place + t));
      block_of_rows<Way>(w + start * columns, scale ? scale + start : nullptr, columns, inputs, some, height, both[0],
                         2 * MOST);
      block_of_rows<Way>(w + next * columns, scale ? scale + next : nullptr, columns, inputs, some, height,
                         both[0] + height, 2 * MOST);
      for (int64_t t = 0; t < some; ++t) gate_rows(experts, which, row, height, both[t], h[place + t]);
    }
  });
}

// y[p] = W x_p for every place p of the experts, [places, rows]; x[i] has the inputs of expert i, columns[i] numbers each.
template <class Way>
void down_rows(int64_t count, const void* const* values, const void* const* scales, const Askers& askers,
               const std::vector<typename Way::Input>& x, const int64_t* columns, float* y, int64_t rows) {
  const int64_t widest = *std::max_element(columns, columns + count);
  const int64_t high = block_rows<Way>(widest), at_once = blocks_at_once<Way>(high * widest);
  const int64_t blocks = (rows + high - 1) / high, all_blocks = blocks * count;
  shared_loop(all_blocks, at_once, [&](int64_t block, int64_t) {
    const int64_t which = block / blocks, row = block % blocks * high, height = std::min(rows - row, high);
    const auto* w = static_cast<const typename Way::T*>(values[which]) + row * columns[which];
    const auto* scale = static_cast<const uint16_t*>(scales[which]);
    const int64_t first = askers.first(which), asking = askers.last(which) - first;
    for (int64_t token = 0; token < asking; token += TOKENS) {
      const int64_t some = std::min(TOKENS, asking - token);
      typename Way::Row inputs[TOKENS];
      for (int64_t t = 0; t < some; ++t) inputs[t] = x[size_t(which)].token(token + t);
      block_of_rows<Way>(w, scale ? scale + row : nullptr, columns[which], inputs, some, height,
                         y + (first + token) * rows + row, rows);
    }
  });
}

// y[t] += sum over r < rows of p[t, r] * W[r] for `COUNT` tokens in `WIDE` times 16 columns at once. Tokens are `step`
// numbers apart in p and `columns` in y. Columns before `k` are done.
template <class Form, int64_t COUNT, int64_t WIDE>
void add_weighted(const typename Form::T* w, const float* p, int64_t step, float* y, int64_t rows, int64_t columns,
                  int64_t k = 0) {
  for (; k + WIDE * LANES <= columns; k += WIDE * LANES) {
    Lanes total[COUNT][WIDE];
    for (int64_t t = 0; t < COUNT; ++t)
      for (int64_t j = 0; j < WIDE; ++j) total[t][j] = load(y + t * columns + k + j * LANES);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < WIDE; ++j) {
        const typename Form::T* place = w + r * columns + k + j * LANES;
        __builtin_prefetch(place + rows * columns);
        const Lanes value = Form::lanes(place);
        for (int64_t t = 0; t < COUNT; ++t) total[t][j] = fma(value, all(p[t * step + r]), total[t][j]);
      }
    for (int64_t t = 0; t < COUNT; ++t)
      for (int64_t j = 0; j < WIDE; ++j) store(y + t * columns + k + j * LANES, total[t][j]);
  }
  // What is left of the columns, the same sums: by single vectors, then one by one.
  if constexpr (WIDE > 1) {
    if (k < columns) add_weighted<Form, COUNT, 1>(w, p, step, y, rows, columns, k);
    return;
  }
  for (int64_t t = 0; t < COUNT; ++t)
    for (int64_t j = k; j < columns; ++j)
      for (int64_t r = 0; r < rows; ++r) {
        float& to = y[t * columns + j];
        to = std::fma(Form::one(w[r * columns + j]), p[t * step + r], to);  // as in `dot_row`
      }
}

// So many numbers for every thread of a shared loop. It is made outside of one, so that it fails before anything is done.
class RoomOfThreads {
 public:
  explicit RoomOfThreads(int64_t count) : count(count), numbers(count * threads_allowed) {}
  float* own(int64_t thread) { return numbers.data() + count * thread; }

 private:
  int64_t count;
  Room<float> numbers;
};

// y[i, t] = sum over r of p[i, t, r] * W_i[r]: the rows of a matrix added up, as attention does with its values. Rows are
// summed in parts of a fixed size, so that a long cache has work for all threads. `values.at` has some rows of a matrix in
// its form, perhaps expanded into a `room` of floats (kv_rows.h).
template <class Values>
void weighted(int64_t count, const Values& values, const float* p, int64_t tokens, Target y, int64_t rows,
              int64_t columns) {
  using Form = typename Values::Form;
  constexpr int64_t PART = 512;
  const int64_t parts = (rows + PART - 1) / PART, size = tokens * columns;
  std::vector<float> sums(size_t(count * parts * size), 0.0f);
  RoomOfThreads rooms(values.room(NEAR));
  const int64_t at_once = evenly(count * parts, count * rows * columns > MANY);
  shared_loop(count * parts, at_once, [&](int64_t number, int64_t thread) {
    const int64_t which = number / parts, first = number % parts * PART, last = std::min(rows, first + PART);
    float* const room = rooms.own(thread);
    const float* weights = p + which * tokens * rows;
    float* const to = sums.data() + number * size;
    for (int64_t row = first; row < last; row += NEAR) {
      const int64_t height = std::min(NEAR, last - row);
      const typename Form::T* const w = values.at(which, row, height, room);
      int64_t token = 0;
      for (; token + TOKENS <= tokens; token += TOKENS)
        add_weighted<Form, TOKENS, 1>(w, weights + token * rows + row, rows, to + token * columns, height,
                                      columns);
      for (; token + 2 <= tokens; token += 2)
        add_weighted<Form, 2, 4>(w, weights + token * rows + row, rows, to + token * columns, height, columns);
      for (; token < tokens; ++token)
        add_weighted<Form, 1, 8>(w, weights + token * rows + row, rows, to + token * columns, height, columns);
    }
  });
  for (int64_t which = 0; which < count; ++which)
    for (int64_t i = 0; i < size; ++i) {
      float total = 0;
      for (int64_t part = 0; part < parts; ++part) total += sums[size_t((which * parts + part) * size + i)];
      y.put(which * size + i, total);
    }
}

// ---- int4 and mxfp4 in tiles of 64 rows ------------------------------------------------------------------------------
//
// A half-byte stands for a whole number above -OFFSET: of int4 for itself - 8, of mxfp4 for twice its value. The products
// of SAFE columns fit into 16 bits: SAFE / 2 pairs of at most 2 * (the largest number + OFFSET) * 127. `Pair` has the
// scale of a row in a group, with the zero of int4; mxfp4 has none.

struct Int4 {
  static constexpr int32_t OFFSET = 8;
  static constexpr int64_t SAFE = 16, PAIR = 2;
  using T = uint16_t;
  static int32_t above(uint8_t half) { return half; }
#if CONMOE_INTEGERS
  static __m256i above(__m256i halves) { return halves; }
#endif
  static Lanes add_group(Lanes total, Lanes whole, Lanes factor, Lanes inputs, const T* here) {
    Lanes scale, shift;
    load_pairs(here, scale, shift);
    total = fma(fma(whole, factor, zero()), scale, total);
    return fma(shift, inputs, total);
  }
  static Lanes value(Lanes number, const T* here) {  // of a number as it is: `load_nibbles` subtracts 8
    Lanes scale, shift;
    load_pairs(here, scale, shift);
    return fma(number, scale, shift);
  }
  static void numbers(const uint8_t* w, Lanes& low, Lanes& high) { load_nibbles(w, low, high); }
};

// Numbers as int4 with scales as the checkpoint has them, alone or with a zero point; grids.py has the form. Products are
// not rounded to the format of the scales here, weights that are expanded are.
template <bool FP16, bool ZEROS>
struct Grid : Int4 {
  static constexpr int64_t PAIR = ZEROS ? 2 : 1;
  static void load_scales(const T* here, Lanes& scale, Lanes& zero_point) {
    if constexpr (ZEROS) {
      FP16 ? load_half_pairs(here, scale, zero_point) : load_pairs(here, scale, zero_point);
      zero_point = add(zero_point, all(-float(OFFSET)));
    } else {
      scale = FP16 ? load_half(here) : load(here);
      zero_point = zero();
    }
  }
  static Lanes add_group(Lanes total, Lanes whole, Lanes factor, Lanes inputs, const T* here) {
    Lanes scale, shift;
    load_scales(here, scale, shift);
    Lanes sum = fma(whole, factor, zero());
    if constexpr (ZEROS) sum = fma(fma(shift, all(-1.0f), zero()), inputs, sum);
    return fma(sum, scale, total);
  }
  static Lanes value(Lanes number, const T* here) {
    Lanes scale, shift;
    load_scales(here, scale, shift);
    float wide[LANES];
    store(wide, fma(fma(shift, all(-1.0f), number), scale, zero()));
    for (float& one : wide) one = FP16 ? from_fp16(to_fp16(one)) : from_bf16(to_bf16(one));
    return load(wide);
  }
};

struct Mxfp4 {
  static constexpr int32_t OFFSET = 12;
  static constexpr int64_t SAFE = 8, PAIR = 1;
  using T = uint8_t;
  static constexpr uint8_t ABOVE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
  static int32_t above(uint8_t half) { return ABOVE[half]; }
#if CONMOE_INTEGERS
  static __m256i above(__m256i halves) {
    const __m128i table = _mm_loadu_si128((const __m128i*)ABOVE);
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), halves);
  }
#endif
  static Lanes add_group(Lanes total, Lanes whole, Lanes factor, Lanes, const T* here) {
    return fma(fma(fma(whole, all(0.5f), zero()), factor, zero()), load_exponents(here), total);
  }
  static Lanes value(Lanes number, const T* here) { return fma(number, load_exponents(here), zero()); }
  static void numbers(const uint8_t* w, Lanes& low, Lanes& high) {
    float wide[2][LANES];
    for (int64_t i = 0; i < LANES; ++i) {
      wide[0][i] = 0.5f * float(above(uint8_t(w[i] & 15)) - OFFSET);
      wide[1][i] = 0.5f * float(above(uint8_t(w[i] >> 4)) - OFFSET);
    }
    low = load(wide[0]);
    high = load(wide[1]);
  }
};
constexpr uint8_t Mxfp4::ABOVE[16];

// sums[r] = sum over k < count of (above(w[r, k]) - OFFSET) q[k], for the 64 rows of a tile; count is even. `offset` is
// OFFSET times the sum of q.
#if CONMOE_INTEGERS

// Rows 0..7 and 16..23, or 8..15 and 24..31, of half a tile: added where they belong.
inline void spread(__m256i part, __m256i* first, __m256i* second) {
  *first = _mm256_add_epi32(*first, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(part)));
  *second = _mm256_add_epi32(*second, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(part, 1)));
}

template <class Form>
inline void tile_sums(const uint8_t* w, const int8_t* q, int64_t count, int32_t offset, int32_t* sums) {
  constexpr int64_t SAFE = Form::SAFE;
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i total[8];
  for (__m256i& one : total) one = _mm256_set1_epi32(-offset);
  for (int64_t start = 0; start < count; start += SAFE) {
    const int64_t stop = start + SAFE < count ? start + SAFE : count;
    __m256i part[4];
    for (__m256i& one : part) one = _mm256_setzero_si256();
    for (int64_t k = start; k < stop; k += 2) {
      const uint8_t* bytes = w + k * (TILE / 2);
      int16_t two;
      std::memcpy(&two, q + k, sizeof(two));
      const __m256i x = _mm256_set1_epi16(two);
      const __m256i a = _mm256_loadu_si256((const __m256i*)bytes);
      const __m256i b = _mm256_loadu_si256((const __m256i*)(bytes + TILE / 2));
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      const auto times = [&](__m256i weights) { return _mm256_maddubs_epi16(Form::above(_mm256_and_si256(weights, mask)), x); };
      part[0] = _mm256_add_epi16(part[0], times(low));
      part[1] = _mm256_add_epi16(part[1], times(high));
      part[2] = _mm256_add_epi16(part[2], times(_mm256_srli_epi16(low, 4)));
      part[3] = _mm256_add_epi16(part[3], times(_mm256_srli_epi16(high, 4)));
    }
    for (int64_t half = 0; half < 2; ++half) {
      spread(part[2 * half], total + 4 * half, total + 4 * half + 2);
      spread(part[2 * half + 1], total + 4 * half + 1, total + 4 * half + 3);
    }
  }
  for (int64_t j = 0; j < 8; ++j) _mm256_storeu_si256((__m256i*)(sums + 8 * j), total[j]);
}

#else

template <class Form>
inline void tile_sums(const uint8_t* w, const int8_t* q, int64_t count, int32_t offset, int32_t* sums) {
  for (int64_t r = 0; r < TILE; ++r) sums[r] = -offset;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t r = 0; r < TILE / 2; ++r) {
      sums[r] += Form::above(uint8_t(w[k * (TILE / 2) + r] & 15)) * q[k];
      sums[r + TILE / 2] += Form::above(uint8_t(w[k * (TILE / 2) + r] >> 4)) * q[k];
    }
}

#endif

// The 64 rows of a tile, the first of which is `row` of the matrix's `rows`, times one token in blocks of a group.
template <class Form>
inline void halves_tile(const uint8_t* w, const typename Form::T* scales, int64_t row, int64_t rows, int64_t columns,
                        int64_t group, Token x, float* sums) {
  const typename Form::T* pairs = scales + row * Form::PAIR;
  Lanes total[4] = {zero(), zero(), zero(), zero()};
  for (int64_t start = 0; start < columns; start += group) {
    const int64_t block = start / group;
    int32_t whole[TILE];
    tile_sums<Form>(w + start * (TILE / 2), x.q + start, group, Form::OFFSET * x.whole[block], whole);
    const Lanes factor = all(x.scale[block]), inputs = all(x.sum[block]);
    const typename Form::T* here = pairs + block * rows * Form::PAIR;
    for (int64_t j = 0; j < 4; ++j)
      total[j] = Form::add_group(total[j], load(whole + j * LANES), factor, inputs, here + j * LANES * Form::PAIR);
  }
  for (int64_t j = 0; j < 4; ++j) store(sums + j * LANES, total[j]);
}

// Where a tile's rows begin.
template <class Form>
inline const uint8_t* tile_at(const void* values, int64_t row, int64_t columns) {
  return static_cast<const uint8_t*>(values) + row * columns * Form::BITS / 8;
}

// Tiles that a thread takes at once.
template <class Form>
inline int64_t tiles_at_once(int64_t columns) {
  return CHUNK / (TILE * columns * Form::BITS / 8) + 1;
}

// The 64 rows of a tile times `count` tokens: [count, 64]. A token's sums are the same bits whatever their number.
template <class Form>
void tile_of_tokens(const uint8_t* w, const typename Form::T* scales, int64_t row, int64_t rows, int64_t columns,
                    int64_t group, const Token* x, int64_t count, float* sums) {
  int64_t t = 0;
  if constexpr (Form::SEVERAL)  // two at once: the sums of more do not fit into registers
    for (; t + 2 <= count; t += 2)
      Form::template times<2>(w, scales, row, rows, columns, group, x + t, sums + t * TILE);
  for (; t < count; ++t) Form::tile(w, scales, row, rows, columns, group, x[t], sums + t * TILE);
}

template <class Form>
void tiles(int64_t count, const void* const* values, const void* const* scales, const Bytes& x, bool shared,
           int64_t tokens, Target y, int64_t rows, int64_t columns, int64_t group) {
  const int64_t blocks = rows / TILE, all_blocks = blocks * count;
  const int64_t at_once = tiles_at_once<Form>(columns);
  shared_loop(all_blocks, at_once, [&](int64_t block, int64_t) {
    const int64_t which = block / blocks, row = block % blocks * TILE;
    const auto* w = tile_at<Form>(values[which], row, columns);
    const auto* steps = static_cast<const typename Form::T*>(scales[which]);
    for (int64_t token = 0; token < tokens; token += TOKENS) {
      const int64_t some = std::min(TOKENS, tokens - token), first = (shared ? 0 : which * tokens) + token;
      Token inputs[TOKENS];
      float sums[TOKENS * TILE];
      for (int64_t t = 0; t < some; ++t) inputs[t] = x.token(first + t);
      tile_of_tokens<Form>(w, steps, row, rows, columns, group, inputs, some, sums);
      for (int64_t t = 0; t < some; ++t)
        for (int64_t r = 0; r < TILE; ++r) y.put((which * tokens + token + t) * rows + row + r, sums[t * TILE + r]);
    }
  });
}

// A tile may have rows of the gate and others: all rows first, then what they make.
template <class Form>
void gated_tiles(const Gated& experts, const Askers& askers, const Bytes& x, float* const* h, int64_t columns,
                 int64_t group) {
  const int64_t count = experts.count;
  const int64_t* const widths = experts.widths;
  // A thread stays in one place for some tiles: where it begins, nothing was read ahead.
  const int64_t strip = TILE * tiles_at_once<Form>(columns);
  const std::vector<int64_t> owners = askers.experts();
  std::vector<int64_t> heights, before{0}, answered;
  for (int64_t i = 0; i < count; ++i) heights.push_back(2 * widths[i]);
  for (const int64_t which : owners) {
    before.push_back(before.back() + heights[size_t(which)]);
    answered.push_back(widths[which]);
  }
  Room<float> rows(before.back());
  const Blocks strips(count, heights.data(), strip), halves(askers.places(), answered.data(), TILE);
  shared_loop(strips.all(), 1, [&](int64_t number, int64_t) {
    int64_t place = number;
    const int64_t which = strips.find(&place), height = heights[size_t(which)], start = place * strip;
    const int64_t stop = height - start < strip ? height : start + strip;
    const auto* steps = static_cast<const typename Form::T*>(experts.scales[which]);
    for (int64_t row = start; row < stop; row += TILE) {
      const uint8_t* const w = tile_at<Form>(experts.values[which], row, columns);
      for (int64_t at = askers.first(which); at < askers.last(which); at += TOKENS) {
        const int64_t some = std::min(TOKENS, askers.last(which) - at);
        Token inputs[TOKENS];
        float sums[TOKENS * TILE];
        for (int64_t t = 0; t < some; ++t) inputs[t] = x.token(askers.token(at + t));
        tile_of_tokens<Form>(w, steps, row, height, columns, group, inputs, some, sums);
        for (int64_t t = 0; t < some; ++t)
          std::copy_n(sums + t * TILE, TILE, rows.data() + before[size_t(at + t)] + row);
      }
    }
  });
  shared_loop(halves.all(), evenly(halves.all(), strips.all() > 1), [&](int64_t number, int64_t) {
    int64_t block = number;
    const int64_t place = halves.find(&block), which = owners[size_t(place)], width = widths[which];
    const int64_t start = block * TILE, stop = width - start < TILE ? width : start + TILE, height = stop - start;
    const float* const from = rows.data() + before[size_t(place)];
    const int64_t step = experts.gate.interleaved ? 2 : 1;
    const int64_t first = step * start, next = step == 2 ? first + height : width + start;
    float both[2 * TILE];
    std::copy_n(from + first, height, both);
    std::copy_n(from + next, height, both + height);
    gate_rows(experts, which, start, height, both, h[place]);
  });
}

template <class Form>
void down_tiles(int64_t count, const void* const* values, const void* const* scales, const Askers& askers,
                const std::vector<Bytes>& x, const int64_t* columns, float* y, int64_t rows, const int64_t* groups) {
  const int64_t blocks = rows / TILE, all_blocks = blocks * count;
  const int64_t at_once = tiles_at_once<Form>(*std::max_element(columns, columns + count));
  shared_loop(all_blocks, at_once, [&](int64_t block, int64_t) {
    const int64_t which = block / blocks, row = block % blocks * TILE;
    const uint8_t* const w = tile_at<Form>(values[which], row, columns[which]);
    const auto* steps = static_cast<const typename Form::T*>(scales[which]);
    const int64_t first = askers.first(which), asking = askers.last(which) - first;
    for (int64_t token = 0; token < asking; token += TOKENS) {
      const int64_t some = std::min(TOKENS, asking - token);
      Token inputs[TOKENS];
      float sums[TOKENS * TILE];
      for (int64_t t = 0; t < some; ++t) inputs[t] = x[size_t(which)].token(token + t);
      tile_of_tokens<Form>(w, steps, row, rows, columns[which], groups[which], inputs, some, sums);
      for (int64_t t = 0; t < some; ++t) std::copy_n(sums + t * TILE, TILE, y + (first + token + t) * rows + row);
    }
  });
}

// The weights of a tile, fp32, where rows lie `columns` apart.
template <class Form>
void expand_halves(const uint8_t* w, const typename Form::T* scales, int64_t row, int64_t rows, int64_t columns,
                   int64_t group, float* out) {
  for (int64_t start = 0; start < columns; start += LANES) {  // a square of 64 x 16, turned in the cache
    float square[LANES][TILE];
    const typename Form::T* here = scales + (start / group * rows + row) * Form::PAIR;
    for (int64_t k = 0; k < LANES; ++k)
      for (int64_t half = 0; half < 2; ++half) {
        Lanes low, high;
        Form::numbers(w + (start + k) * (TILE / 2) + half * LANES, low, high);
        store(square[k] + half * LANES, Form::value(low, here + half * LANES * Form::PAIR));
        store(square[k] + (half + 2) * LANES, Form::value(high, here + (half + 2) * LANES * Form::PAIR));
      }
    for (int64_t r = 0; r < TILE; ++r)
      for (int64_t k = 0; k < LANES; ++k) out[r * columns + start + k] = square[k][r];
  }
}

// Calls `fill(row, to)` for runs of `each` rows of a matrix, which writes them as fp32, rows lying `columns` apart; they
// end in `out`, as fp32 or, where it is narrow, rounded to bf16.
template <class Fill>
void expanded(void* out, bool narrow, int64_t rows, int64_t columns, int64_t each, Fill fill) {
  RoomOfThreads room(narrow ? each * columns : 0);
  const int64_t runs = (rows + each - 1) / each;
  shared_loop(runs, evenly(runs, true), [&](int64_t number, int64_t thread) {
    const int64_t row = number * each;
    if (!narrow) {
      fill(row, static_cast<float*>(out) + row * columns);
      return;
    }
    float* const wide = room.own(thread);
    fill(row, wide);
    uint16_t* const to = static_cast<uint16_t*>(out) + row * columns;
    for (int64_t k = 0; k < each * columns; ++k) to[k] = to_bf16(wide[k]);
  });
}

template <class Form>
void expand_tiles(const void* values, const void* scales, void* out, bool narrow, int64_t rows, int64_t columns,
                  int64_t group) {
  expanded(out, narrow, rows, columns, TILE, [&](int64_t row, float* to) {
    Form::expand(tile_at<Form>(values, row, columns), static_cast<const typename Form::T*>(scales), row, rows, columns,
                 group, to);
  });
}

// The forms of half-bytes, with their tiles.
template <class Form>
struct Halves : Form {
  static constexpr int64_t BITS = 4;
  static constexpr bool SEVERAL = false;
  using T = typename Form::T;
  static void tile(const uint8_t* w, const T* scales, int64_t row, int64_t rows, int64_t columns, int64_t group, Token x,
                   float* sums) {
    halves_tile<Form>(w, scales, row, rows, columns, group, x, sums);
  }
  static void expand(const uint8_t* w, const T* scales, int64_t row, int64_t rows, int64_t columns, int64_t group,
                     float* out) {
    expand_halves<Form>(w, scales, row, rows, columns, group, out);
  }
};

template <class Form>
void expand_rows(const typename Form::T* values, const uint16_t* scales, void* out, bool narrow, int64_t rows,
                 int64_t columns) {
  expanded(out, narrow, rows, columns, 1, [&](int64_t row, float* to) {
    const float scale = scales ? from_bf16(scales[row]) : 1.0f;
    const typename Form::T* w = values + row * columns;
    const int64_t whole = columns - columns % LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
      const Lanes value = Form::lanes(w + k);
      store(to + k, scales ? fma(value, all(scale), zero()) : value);
    }
    for (int64_t k = whole; k < columns; ++k) to[k] = Form::one(w[k]) * scale;
  });
}


// Runs `run` with the form of `kind` where its rows lie one after another; whether there is one.
template <class Run>
bool in_rows(int kind, Run run) {
  switch (kind) {
    case BF16:
      run(Bf16{});
      return true;
    case FP16:
      run(Fp16{});
      return true;
    case FP32:
      run(Fp32{});
      return true;
    case INT8:
      run(Int8{});
      return true;
  }
  return false;
}

// Runs `run` with the form of `kind` where it lies in tiles; whether there is one.
template <class Run>
bool in_tiles(int kind, Run run) {
  switch (kind) {
    case INT4:
      run(Halves<Int4>{});
      return true;
    case MXFP4:
      run(Halves<Mxfp4>{});
      return true;
    case GRID_FP16:
      run(Halves<Grid<true, false>>{});
      return true;
    case GRID_FP16_ZEROS:
      run(Halves<Grid<true, true>>{});
      return true;
    case GRID_BF16:
      run(Halves<Grid<false, false>>{});
      return true;
    case GRID_BF16_ZEROS:
      run(Halves<Grid<false, true>>{});
      return true;
    case Q4:
      run(Low<4>{});
      return true;
    case Q3:
      run(Low<3>{});
      return true;
    case Q2:
      run(Low<2>{});
      return true;
    case Q6:
      run(Low<6>{});
      return true;
  }
  return false;
}

inline bool tiled(int kind) { return kind >= INT4 && kind <= GRID_BF16_ZEROS; }

// Whether columns are whole groups of a size that the tiles take.
inline bool grouped(int kind, int64_t columns, int64_t group) {
  return group > 0 && group % 2 == 0 && columns % group == 0 && (kind == INT4 || kind >= GRID_FP16 || group == BLOCK);
}

int products(int kind, int64_t count, const void* const* values, const void* const* scales, const float* x,
             bool shared, int64_t tokens, Target y, int64_t rows, int64_t columns, int64_t group) {
  const int64_t inputs = (shared ? 1 : count) * tokens;
  if (tiled(kind)) {
    if (rows % TILE || !grouped(kind, columns, group)) return 1;
    const Bytes input(x, inputs, columns, group);
    return !in_tiles(kind, [&](auto form) {
      tiles<decltype(form)>(count, values, scales, input, shared, tokens, y, rows, columns, group);
    });
  }
  return !in_rows(kind, [&](auto form) {
    using Way = typename decltype(form)::Way;
    const typename Way::Input input(x, inputs, columns, BLOCK);
    rows_kind<Way>(count, values, scales, input, shared, tokens, y, rows, columns);
  });
}

// `askers.tokens` are rows of x, of which there are `tokens`; h has room for every place.
int gated(int kind, const Gated& experts, const Askers& askers, const float* x, int64_t tokens, float* const* h,
          int64_t columns, int64_t group) {
  if (tiled(kind)) {
    for (int64_t i = 0; i < experts.count; ++i)
      if (2 * experts.widths[i] % TILE) return 1;
    if (!grouped(kind, columns, group)) return 1;
    const Bytes input(x, tokens, columns, group);
    return !in_tiles(kind, [&](auto form) { gated_tiles<decltype(form)>(experts, askers, input, h, columns, group); });
  }
  return !in_rows(kind, [&](auto form) {
    using Way = typename decltype(form)::Way;
    const typename Way::Input input(x, tokens, columns, BLOCK);
    gated_rows<Way>(experts, askers, input, h, columns);
  });
}

// y[p] = W_i h_p for every place p of expert i, fp32 [places, rows], for matrices of columns[i] columns in groups of
// groups[i]. An expert's h lie one after another, the first of them at h[its first place].
int downward(int kind, int64_t count, const void* const* values, const void* const* scales, const Askers& askers,
             float* const* h, const int64_t* columns, float* y, int64_t rows, const int64_t* groups) {
  if (tiled(kind)) {
    if (rows % TILE) return 1;
    std::vector<Bytes> inputs;
    for (int64_t i = 0; i < count; ++i) {
      if (!grouped(kind, columns[i], groups[i])) return 1;
      inputs.emplace_back(h[askers.first(i)], askers.last(i) - askers.first(i), columns[i], groups[i]);
    }
    return !in_tiles(kind, [&](auto form) {
      down_tiles<decltype(form)>(count, values, scales, askers, inputs, columns, y, rows, groups);
    });
  }
  return !in_rows(kind, [&](auto form) {
    using Way = typename decltype(form)::Way;
    std::vector<typename Way::Input> inputs;
    for (int64_t i = 0; i < count; ++i)
      inputs.emplace_back(h[askers.first(i)], askers.last(i) - askers.first(i), columns[i], BLOCK);
    down_rows<Way>(count, values, scales, askers, inputs, columns, y, rows);
  });
}

}  // namespace
