// Weights in 6, 4, 3 or 2 bits with a byte of scales for 32 columns: see checkpoint/format/low_bits.py.
//
// A vector of words is 8 or 16 rows, a word's bytes after a shift four neighbouring columns: what products of bytes take.

#pragma once

#include "activations.h"

namespace {

#if CONMOE_INTEGERS

// Vectors of words, a row each. `add_products` adds up products of four bytes of every word; eight of them fit into what
// it has for that, which is 16 bits without VNNI: 8 * 2 * 15 * 127. Of numbers of 6 bits two do: 2 * 2 * 63 * 127.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Words {
  using T = __m512i;
  static constexpr int64_t ROWS = 16;
  static T load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static T all(int32_t value) { return _mm512_set1_epi32(value); }
  static T none() { return _mm512_setzero_si512(); }
  static T either(T a, T b) { return _mm512_or_si512(a, b); }
  // A mask of each byte, after a shift to the right, or to the left where that is below 0.
  template <int SHIFT, int MASK>
  static T bits(T x) {
    if constexpr (SHIFT > 0) x = _mm512_srli_epi32(x, SHIFT);
    if constexpr (SHIFT < 0) x = _mm512_slli_epi32(x, -SHIFT);
    return _mm512_and_si512(x, _mm512_set1_epi8(MASK));
  }
  static T add_products(T sums, T w, T x) { return _mm512_dpbusd_epi32(sums, w, x); }
  static T finish(T sums) { return sums; }
  static T add(T a, T b) { return _mm512_add_epi32(a, b); }
  static void store(int32_t* to, T sums) { _mm512_storeu_si512(to, sums); }
};
#else
struct Words {
  using T = __m256i;
  static constexpr int64_t ROWS = 8;
  static T load(const uint8_t* from) { return _mm256_loadu_si256((const T*)from); }
  static T all(int32_t value) { return _mm256_set1_epi32(value); }
  static T none() { return _mm256_setzero_si256(); }
  static T either(T a, T b) { return _mm256_or_si256(a, b); }
  // A mask of each byte, after a shift to the right, or to the left where that is below 0.
  template <int SHIFT, int MASK>
  static T bits(T x) {
    if constexpr (SHIFT > 0) x = _mm256_srli_epi32(x, SHIFT);
    if constexpr (SHIFT < 0) x = _mm256_slli_epi32(x, -SHIFT);
    return _mm256_and_si256(x, _mm256_set1_epi8(MASK));
  }
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  static T add_products(T sums, T w, T x) { return _mm256_dpbusd_epi32(sums, w, x); }
  static T finish(T sums) { return sums; }
#else
  static T add_products(T sums, T w, T x) { return _mm256_add_epi16(sums, _mm256_maddubs_epi16(w, x)); }
  static T finish(T sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }
#endif
  static T add(T a, T b) { return _mm256_add_epi32(a, b); }
  static void store(int32_t* to, T sums) { _mm256_storeu_si256((T*)to, sums); }
};
#endif

#endif

template <int WIDTH>
struct Low {
  static constexpr int64_t BITS = WIDTH;
  static constexpr int64_t GROUP = 32, HEAD = 4;
  static constexpr int32_t LAST = (1 << WIDTH) - 1;  // twice the middle that is subtracted
  static constexpr int64_t AHEAD = 4096;         // bytes; one page, as processors read ahead within one only
  using T = uint8_t;

#if CONMOE_INTEGERS

  // Columns 4 * STEP ... 4 * STEP + 3 of the rows of one vector, of the words that `w` begins with.
  template <class V, int STEP>
  static typename V::T columns_of(const uint8_t* w) {
    constexpr int PLANE = WIDTH >= 4 ? 4 : 2, INSIDE = 8 / PLANE;
    const auto found = V::template bits<PLANE * (STEP % INSIDE), (1 << PLANE) - 1>(V::load(w + STEP / INSIDE * 4 * TILE));
    if constexpr (WIDTH == 3)
      return V::either(found, V::template bits<STEP - 2, 4>(V::load(w + 8 * TILE)));
    else if constexpr (WIDTH == 6)
      return V::either(found, V::template bits<2 * (STEP % 4) - 4, 48>(V::load(w + (4 + STEP / 4) * 4 * TILE)));
    else
      return found;
  }

  // STEPS of them from FIRST on, which fit into what adds them up.
  template <class V, int FIRST, int... STEP>
  static typename V::T some_of(const uint8_t* w, const typename V::T* x, std::integer_sequence<int, STEP...>) {
    auto sums = V::none();
    ((sums = V::add_products(sums, columns_of<V, FIRST + STEP>(w), x[FIRST + STEP])), ...);
    return V::finish(sums);
  }

  template <class V>
  static typename V::T rows_of(const uint8_t* w, const typename V::T* x) {
    if constexpr (WIDTH == 6) {
      const auto two = std::make_integer_sequence<int, 2>{};
      const auto first = V::add(some_of<V, 0>(w, x, two), some_of<V, 2>(w, x, two));
      return V::add(first, V::add(some_of<V, 4>(w, x, two), some_of<V, 6>(w, x, two)));
    } else {
      return some_of<V, 0>(w, x, std::make_integer_sequence<int, 8>{});
    }
  }

  // sums[r] = sum over the group's columns of the numbers of row r times q.
  static void sums_of(const uint8_t* w, const int8_t* q, int32_t* sums) {
    using V = Words;
    typename V::T x[8];
    for (int step = 0; step < 8; ++step) {
      int32_t four;
      std::memcpy(&four, q + 4 * step, sizeof(four));
      x[step] = V::all(four);
    }
    for (int64_t line = 0; line < 4 * WIDTH; ++line) __builtin_prefetch(w + 64 * line + AHEAD);
    for (int64_t row = 0; row < TILE; row += V::ROWS)
      V::store(sums + row, rows_of<V>(w + 4 * row, x));
  }

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

  static void sums_of(const uint8_t* w, const int8_t* q, int32_t* sums) {
    for (int64_t row = 0; row < TILE; ++row) {
      int8_t numbers[GROUP];
      row_of(w + 4 * row, numbers);
      sums[row] = 0;
      for (int64_t k = 0; k < GROUP; ++k) sums[row] += int32_t(numbers[k]) * q[k];
    }
  }

#endif

  // s and z - 8 of 16 rows.
  static void steps(const uint8_t* here, Lanes& s, Lanes& z) {
    int8_t low[LANES], high[LANES];
#if CONMOE_INTEGERS
    const __m128i both = _mm_loadu_si128((const __m128i*)here), mask = _mm_set1_epi8(15);
    _mm_storeu_si128((__m128i*)low, _mm_and_si128(both, mask));
    _mm_storeu_si128((__m128i*)high, _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), mask), _mm_set1_epi8(8)));
#else
    for (int64_t i = 0; i < LANES; ++i) {
      low[i] = int8_t(here[i] & 15);
      high[i] = int8_t((here[i] >> 4) - 8);
    }
#endif
    s = load(low);
    z = load(high);
  }

  // S and Z of 16 rows.
  static void units(const uint8_t* head, Lanes& scale, Lanes& zero) {
    uint16_t pairs[2 * LANES];
    std::memcpy(pairs, head, sizeof(pairs));
    load_pairs(pairs, scale, zero);
  }

  // The 64 rows of a tile, the first of which is `row` of the matrix's `rows`, times one token.
  static void tile(const uint8_t* w, const uint8_t* scales, int64_t row, int64_t rows, int64_t columns, int64_t, Token x,
                   float* sums) {
    Lanes stepped[4] = {zero(), zero(), zero(), zero()}, shifted[4] = {zero(), zero(), zero(), zero()};
    const uint8_t* here = scales + HEAD * rows + row;
    for (int64_t block = 0; block < columns / GROUP; ++block, here += rows, w += TILE * GROUP * WIDTH / 8) {
      int32_t whole[TILE];
      sums_of(w, x.q + block * GROUP, whole);
      const float factor = x.scale[block];
      const Lanes by = all(factor), middle = all(-0.5f * float(LAST) * float(x.whole[block]) * factor), inputs = all(x.sum[block]);
      for (int64_t j = 0; j < 4; ++j) {
        Lanes s, z;
        steps(here + j * LANES, s, z);
        stepped[j] = fma(fma(load(whole + j * LANES), by, middle), s, stepped[j]);
        shifted[j] = fma(z, inputs, shifted[j]);
      }
    }
    for (int64_t j = 0; j < 4; ++j) {
      Lanes scale, zeros;
      units(scales + HEAD * (row + j * LANES), scale, zeros);
      store(sums + j * LANES, fma(stepped[j], scale, fma(shifted[j], zeros, zero())));
    }
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
