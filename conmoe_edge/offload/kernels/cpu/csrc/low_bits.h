// Weights in 6, 4, 3 or 2 bits with a byte of scales for 32 columns: see checkpoint/format/low_bits.py.
//
// A vector of words is 8 or 16 rows, a word's bytes after a shift four neighbouring columns: what products of bytes take.

#pragma once

#include "activations.h"

namespace {

// Vectors of words, a row each. `add_products` adds up products of four bytes of every word. With VNNI its sums have 32
// bits, so that numbers in the upper halves of bytes are multiplied where they lie and add up apart, 16 times too large.
// With AVX2 alone sums have 16 bits, which hold eight times four numbers of at most 15: 8 * 2 * 15 * 127.
#if CONMOE_INTEGERS

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Words {
  using T = __m512i;
  using Sums = __m512i;
  static constexpr int64_t ROWS = 16;
  static T load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static T four(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof(word));
    return _mm512_set1_epi32(word);
  }
  static Sums none() { return _mm512_setzero_si512(); }
  // To the right, or to the left where that is below 0.
  template <int SHIFT>
  static T shift(T x) {
    if constexpr (SHIFT > 0) return _mm512_srli_epi32(x, SHIFT);
    if constexpr (SHIFT < 0) return _mm512_slli_epi32(x, -SHIFT);
    return x;
  }
  // Bytes times 2, which processors have more room for than for a shift.
  static T twice(T x) { return _mm512_add_epi8(x, x); }
  // Of each byte the bits of MASK of `a`, and the others of `b`.
  template <int MASK>
  static T choose(T a, T b) { return _mm512_ternarylogic_epi32(_mm512_set1_epi8(MASK), a, b, 0xca); }
  template <int MASK>
  static T lower(T x) { return _mm512_and_si512(x, _mm512_set1_epi8(MASK)); }
  template <int MASK>
  static T upper(T x) { return _mm512_and_si512(x, _mm512_set1_epi8(char(MASK << 4))); }
  static Sums add_products(Sums sums, T w, T x) { return _mm512_dpbusd_epi32(sums, w, x); }
  static Sums finish(Sums lower, Sums upper) { return _mm512_add_epi32(lower, _mm512_srai_epi32(upper, 4)); }
  static void store(int32_t* to, Sums sums) { _mm512_storeu_si512(to, sums); }
};
#else
struct Words {
  using T = __m256i;
  using Sums = __m256i;
  static constexpr int64_t ROWS = 8;
  static T load(const uint8_t* from) { return _mm256_loadu_si256((const T*)from); }
  static T four(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof(word));
    return _mm256_set1_epi32(word);
  }
  static Sums none() { return _mm256_setzero_si256(); }
  template <int SHIFT>
  static T shift(T x) {
    if constexpr (SHIFT > 0) return _mm256_srli_epi32(x, SHIFT);
    if constexpr (SHIFT < 0) return _mm256_slli_epi32(x, -SHIFT);
    return x;
  }
  static T twice(T x) { return _mm256_add_epi8(x, x); }
  template <int MASK>
  static T choose(T a, T b) {
    return _mm256_or_si256(_mm256_and_si256(a, _mm256_set1_epi8(MASK)), _mm256_andnot_si256(_mm256_set1_epi8(MASK), b));
  }
  template <int MASK>
  static T lower(T x) { return _mm256_and_si256(x, _mm256_set1_epi8(MASK)); }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  template <int MASK>
  static T upper(T x) { return _mm256_and_si256(x, _mm256_set1_epi8(char(MASK << 4))); }
  static Sums add_products(Sums sums, T w, T x) { return _mm256_dpbusd_epi32(sums, w, x); }
  static Sums finish(Sums lower, Sums upper) { return _mm256_add_epi32(lower, _mm256_srai_epi32(upper, 4)); }
#else
  template <int MASK>
  static T upper(T x) { return _mm256_and_si256(_mm256_srli_epi32(x, 4), _mm256_set1_epi8(MASK)); }
  static Sums add_products(Sums sums, T w, T x) { return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x)); }
  static Sums finish(Sums lower, Sums upper) { return _mm256_madd_epi16(_mm256_add_epi16(lower, upper), _mm256_set1_epi16(1)); }
#endif
  static void store(int32_t* to, Sums sums) { _mm256_storeu_si256((Sums*)to, sums); }
};
#endif

#elif CONMOE_NEON

// Numbers and activations both have a sign here. Without products of four bytes it is two halves that are added at the end.
struct Words {
  using T = uint8x16_t;
  static constexpr int64_t ROWS = 4;
  static T load(const uint8_t* from) { return vld1q_u8(from); }
  static T four(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof(word));
    return vreinterpretq_u8_s32(vdupq_n_s32(word));
  }
  template <int SHIFT>
  static T shift(T x) {
    if constexpr (SHIFT > 0) return vshrq_n_u8(x, SHIFT);
    if constexpr (SHIFT < 0) return vshlq_n_u8(x, -SHIFT);
    return x;
  }
  static T twice(T x) { return vaddq_u8(x, x); }
  template <int MASK>
  static T choose(T a, T b) { return vbslq_u8(vdupq_n_u8(MASK), a, b); }
  template <int MASK>
  static T lower(T x) { return vandq_u8(x, vdupq_n_u8(MASK)); }
  template <int MASK>
  static T upper(T x) { return vandq_u8(vshrq_n_u8(x, 4), vdupq_n_u8(MASK)); }
#if defined(__ARM_FEATURE_DOTPROD)
  using Sums = int32x4_t;
  static Sums none() { return vdupq_n_s32(0); }
  static Sums add_products(Sums sums, T w, T x) { return vdotq_s32(sums, vreinterpretq_s8_u8(w), vreinterpretq_s8_u8(x)); }
  static int32x4_t finish(Sums lower, Sums upper) { return vaddq_s32(lower, upper); }
#else
  struct Sums {
    int32x4_t first, second;
  };
  static Sums none() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static Sums add_products(Sums sums, T w, T x) {
    const int8x16_t a = vreinterpretq_s8_u8(w), b = vreinterpretq_s8_u8(x);
    return {vpadalq_s16(sums.first, vmull_s8(vget_low_s8(a), vget_low_s8(b))),
            vpadalq_s16(sums.second, vmull_s8(vget_high_s8(a), vget_high_s8(b)))};
  }
  static int32x4_t finish(Sums lower, Sums upper) {
    return vpaddq_s32(vaddq_s32(lower.first, upper.first), vaddq_s32(lower.second, upper.second));
  }
#endif
  static void store(int32_t* to, int32x4_t sums) { vst1q_s32(to, sums); }
};

#endif

template <int WIDTH>
struct Low {
  static constexpr int64_t BITS = WIDTH;
  static constexpr bool SEVERAL = true;  // tokens at once, by `times`
  static constexpr int64_t GROUP = 32, HEAD = 4;
  static constexpr int32_t LAST = (1 << WIDTH) - 1;  // twice the middle that is subtracted
  static constexpr int64_t AHEAD = 8;            // groups: scales lie too far apart for what a processor reads ahead itself
  using T = uint8_t;

#if CONMOE_INTEGERS || CONMOE_NEON

  // Gives the words of a vector of rows to `use`, whose first two arguments say which four columns (4 * STEP ... 4 * STEP + 3)
  // have their numbers in the lower halves of the bytes, and which in the upper ones. Other bits of the halves are anything.
  template <class V, class Use>
  static void pairs_of(const uint8_t* w, Use use) {
    constexpr int64_t NEXT = 4 * TILE;
    if constexpr (WIDTH == 4) {
      for (int word = 0; word < 4; ++word) use(2 * word, 2 * word + 1, V::load(w + word * NEXT));
    } else if constexpr (WIDTH == 2) {
      for (int word = 0; word < 2; ++word) {
        const auto both = V::load(w + word * NEXT);
        use(4 * word, 4 * word + 2, both);
        use(4 * word + 1, 4 * word + 3, V::template shift<2>(both));
      }
    } else {
      const auto first = V::load(w), second = V::load(w + NEXT), high = V::load(w + 2 * NEXT);
      const auto even = V::template choose<15>(first, V::template shift<-4>(second));  // steps 0, 1, 4, 5
      const auto odd = V::template choose<15>(V::template shift<4>(first), second);    // steps 2, 3, 6, 7
      const auto twice = V::twice(high);
      use(0, 4, V::template choose<0x44>(V::twice(twice), even));
      use(1, 5, V::template choose<0x44>(twice, V::template shift<2>(even)));
      use(2, 6, V::template choose<0x44>(high, odd));
      use(3, 7, V::template choose<0x44>(V::template shift<1>(high), V::template shift<2>(odd)));
    }
  }

  // sums[t][r] = sum over the group's columns of the numbers of row r times q[t].
  template <int64_t COUNT>
  static void sums_of(const uint8_t* w, const int8_t* const* q, int32_t (*sums)[TILE]) {
    if constexpr (WIDTH == 6) {  // planes as those of 4 bits and of 2
      int32_t high[COUNT][TILE];
      Low<4>::template sums_of<COUNT>(w, q, sums);
      Low<2>::template sums_of<COUNT>(w + 4 * 4 * TILE, q, high);
      for (int t = 0; t < COUNT; ++t)
        for (int64_t row = 0; row < TILE; ++row) sums[t][row] += 16 * high[t][row];
      return;
    }
    using V = Words;
    for (int64_t row = 0; row < TILE; row += V::ROWS) {
      typename V::Sums lower[COUNT], upper[COUNT];
      for (int t = 0; t < COUNT; ++t) lower[t] = upper[t] = V::none();
      pairs_of<V>(w + 4 * row, [&](int first, int second, typename V::T both) {
        const auto low = V::template lower<LAST>(both), high = V::template upper<LAST>(both);
        for (int t = 0; t < COUNT; ++t) {
          lower[t] = V::add_products(lower[t], low, V::four(q[t] + 4 * first));
          upper[t] = V::add_products(upper[t], high, V::four(q[t] + 4 * second));
        }
      });
      for (int t = 0; t < COUNT; ++t) V::store(sums[t] + row, V::finish(lower[t], upper[t]));
    }
  }

#else

  template <int64_t COUNT>
  static void sums_of(const uint8_t* w, const int8_t* const* q, int32_t (*sums)[TILE]) {
    for (int64_t row = 0; row < TILE; ++row) {
      int8_t numbers[GROUP];
      row_of(w + 4 * row, numbers);
      for (int t = 0; t < COUNT; ++t) {
        sums[t][row] = 0;
        for (int64_t k = 0; k < GROUP; ++k) sums[t][row] += int32_t(numbers[k]) * q[t][k];
      }
    }
  }

#endif

#if CONMOE_INTEGERS

  // The numbers of one row of a group, in the order of its columns.
  static void row_of(const uint8_t* w, int8_t* to) {
    for (int half = 0; half < 2; ++half) {
      int32_t words[2];
      if (WIDTH >= 4) {
        std::memcpy(words, w + 2 * half * 4 * TILE, 4);
        std::memcpy(words + 1, w + (2 * half + 1) * 4 * TILE, 4);
      } else {
        std::memcpy(words, w + half * 4 * TILE, 4);
        words[1] = words[0];
      }
      const __m128i spread = _mm_setr_epi32(words[0], WIDTH >= 4 ? words[0] : words[1], words[1], words[1]);
      const __m128i shifts = WIDTH >= 4 ? _mm_setr_epi32(0, 4, 0, 4) : _mm_setr_epi32(0, 2, 4, 6);
      __m128i found = _mm_and_si128(_mm_srlv_epi32(spread, shifts), _mm_set1_epi8(WIDTH >= 4 ? 15 : 3));
      if (WIDTH == 3) {
        int32_t word;
        std::memcpy(&word, w + 8 * TILE, 4);
        const __m128i high = _mm_srlv_epi32(_mm_set1_epi32(word), _mm_add_epi32(_mm_setr_epi32(0, 1, 2, 3), _mm_set1_epi32(4 * half)));
        found = _mm_or_si128(found, _mm_slli_epi32(_mm_and_si128(high, _mm_set1_epi8(1)), 2));
      }
      if (WIDTH == 6) {
        int32_t word;
        std::memcpy(&word, w + (4 + half) * 4 * TILE, 4);
        const __m128i high = _mm_srlv_epi32(_mm_set1_epi32(word), _mm_setr_epi32(0, 2, 4, 6));
        found = _mm_or_si128(found, _mm_slli_epi32(_mm_and_si128(high, _mm_set1_epi8(3)), 4));
      }
      _mm_storeu_si128((__m128i*)(to + 16 * half), found);
    }
  }

#else

  static void row_of(const uint8_t* w, int8_t* to) {
    constexpr int PLANE = WIDTH >= 4 ? 4 : 2, INSIDE = 8 / PLANE;
    for (int column = 0; column < GROUP; ++column) {
      const int step = column / 4, byte = column % 4;
      int number = w[step / INSIDE * 4 * TILE + byte] >> (PLANE * (step % INSIDE)) & ((1 << PLANE) - 1);
      if (WIDTH == 3) number |= (w[8 * TILE + byte] >> step & 1) << 2;
      if (WIDTH == 6) number |= (w[(4 + step / 4) * 4 * TILE + byte] >> 2 * (step % 4) & 3) << 4;
      to[column] = int8_t(number);
    }
  }

#endif

  // S and Z of 16 rows.
  static void units(const uint8_t* head, Lanes& scale, Lanes& zero) {
    uint16_t pairs[2 * LANES];
    std::memcpy(pairs, head, sizeof(pairs));
    load_pairs(pairs, scale, zero);
  }

  // The 64 rows of a tile, the first of which is `row` of the matrix's `rows`, times `COUNT` tokens: [COUNT, 64]. A
  // token's sums are the same bits whatever their number.
  template <int64_t COUNT>
  static void times(const uint8_t* w, const uint8_t* scales, int64_t row, int64_t rows, int64_t columns, int64_t,
                    const Token* x, float* sums) {
    Lanes stepped[COUNT][4], shifted[COUNT][4];
    for (int t = 0; t < COUNT; ++t)
      for (int64_t j = 0; j < 4; ++j) stepped[t][j] = shifted[t][j] = zero();
    const uint8_t* here = scales + HEAD * rows + row;
    for (int64_t block = 0; block < columns / GROUP; ++block, here += rows, w += TILE * GROUP * WIDTH / 8) {
      __builtin_prefetch(here + AHEAD * rows);
      int32_t whole[COUNT][TILE];
      const int8_t* q[COUNT];
      for (int t = 0; t < COUNT; ++t) q[t] = x[t].q + block * GROUP;
      sums_of<COUNT>(w, q, whole);
      for (int64_t j = 0; j < 4; ++j) {
        Lanes s, z;  // z times 16
        load_steps(here + j * LANES, s, z);
        for (int t = 0; t < COUNT; ++t) {
          const float factor = x[t].scale[block];
          const Lanes by = all(factor), middle = all(-0.5f * float(LAST) * float(x[t].whole[block]) * factor);
          stepped[t][j] = fma(fma(load(whole[t] + j * LANES), by, middle), s, stepped[t][j]);
          shifted[t][j] = fma(z, all(x[t].sum[block] * 0.0625f), shifted[t][j]);
        }
      }
    }
    for (int64_t j = 0; j < 4; ++j) {
      Lanes scale, zeros;
      units(scales + HEAD * (row + j * LANES), scale, zeros);
      for (int t = 0; t < COUNT; ++t)
        store(sums + t * TILE + j * LANES, fma(stepped[t][j], scale, fma(shifted[t][j], zeros, zero())));
    }
  }

  static void tile(const uint8_t* w, const uint8_t* scales, int64_t row, int64_t rows, int64_t columns, int64_t, Token x,
                   float* sums) {
    times<1>(w, scales, row, rows, columns, GROUP, &x, sums);
  }

  // The weights of a tile, fp32, where rows lie `columns` apart.
  static void expand(const uint8_t* w, const uint8_t* scales, int64_t row, int64_t rows, int64_t columns, int64_t,
                     float* out) {
    const uint8_t* here = scales + HEAD * rows + row;
    for (int64_t block = 0; block < columns / GROUP; ++block, here += rows, w += TILE * GROUP * WIDTH / 8)
      for (int64_t r = 0; r < TILE; ++r) {
        int8_t numbers[GROUP];
        row_of(w + 4 * r, numbers);
        uint16_t pair[2];
        std::memcpy(pair, scales + HEAD * (row + r), sizeof(pair));
        const float step = from_bf16(pair[0]) * float(here[r] & 15);
        const Lanes by = all(step), from = all(from_bf16(pair[1]) * float(int(here[r] >> 4) - 8)), middle = all(-0.5f * float(LAST));
        for (int64_t k = 0; k < GROUP; k += LANES)
          store(out + r * columns + block * GROUP + k, fma(add(load(numbers + k), middle), by, from));
      }
  }
};

}  // namespace
