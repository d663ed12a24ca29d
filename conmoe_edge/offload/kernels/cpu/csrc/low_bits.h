// Weights in 4, 3 or 2 bits with a byte of scales for 32 columns: see checkpoint/format/low_bits.py.
//
// A vector of words is 8 rows, a word's bytes after a shift four neighbouring columns: what products of bytes take.

#pragma once

#include "activations.h"

namespace {

template <int WIDTH>
struct Low {
  static constexpr int64_t BITS = WIDTH;
  static constexpr int64_t GROUP = 32, HEAD = 4;
  static constexpr int32_t LAST = (1 << WIDTH) - 1;  // twice the middle that is subtracted
  using T = uint8_t;

#if CONMOE_INTEGERS

  // Columns 4 * step ... 4 * step + 3 of 8 rows, of the words that `w` begins with.
  template <int STEP>
  static __m256i columns_of(const uint8_t* w) {
    constexpr int PLANE = WIDTH == 4 ? 4 : 2, INSIDE = 8 / PLANE;
    const __m256i low = _mm256_loadu_si256((const __m256i*)(w + STEP / INSIDE * 4 * TILE));
    const __m256i mask = _mm256_set1_epi8((1 << PLANE) - 1);
    const __m256i found = _mm256_and_si256(_mm256_srli_epi32(low, PLANE * (STEP % INSIDE)), mask);
    if constexpr (WIDTH == 3) {
      const __m256i high = _mm256_loadu_si256((const __m256i*)(w + 8 * TILE));
      const __m256i moved = STEP < 2 ? _mm256_slli_epi32(high, STEP < 2 ? 2 - STEP : 0)
                                     : _mm256_srli_epi32(high, STEP < 2 ? 0 : STEP - 2);
      return _mm256_or_si256(found, _mm256_and_si256(moved, _mm256_set1_epi8(4)));
    }
    return found;
  }

  // 16 sums of two products of 8 rows; eight of them fit into 16 bits: 8 * 2 * 15 * 127.
  template <int... STEP>
  static __m256i octet(const uint8_t* w, const __m256i* x, std::integer_sequence<int, STEP...>) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    __m256i sums = _mm256_setzero_si256();
    ((sums = _mm256_dpbusd_epi32(sums, columns_of<STEP>(w), x[STEP])), ...);
    return sums;
#else
    __m256i pairs = _mm256_setzero_si256();
    ((pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(columns_of<STEP>(w), x[STEP]))), ...);
    return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#endif
  }

  // sums[r] = sum over the group's columns of the numbers of row r times q.
  static void sums_of(const uint8_t* w, const int8_t* q, int32_t* sums) {
    __m256i x[8];
    for (int step = 0; step < 8; ++step) {
      int32_t four;
      std::memcpy(&four, q + 4 * step, sizeof(four));
      x[step] = _mm256_set1_epi32(four);
    }
    for (int64_t row = 0; row < TILE; row += 8) {
      __builtin_prefetch(w + 4 * row * WIDTH / 4 + 4096);
      _mm256_storeu_si256((__m256i*)(sums + row), octet(w + 4 * row, x, std::make_integer_sequence<int, 8>{}));
    }
  }

  // The numbers of one row of a group, in the order of its columns.
  static void row_of(const uint8_t* w, int8_t* to) {
    for (int half = 0; half < 2; ++half) {
      int32_t words[2];
      if (WIDTH == 4) {
        std::memcpy(words, w + 2 * half * 4 * TILE, 4);
        std::memcpy(words + 1, w + (2 * half + 1) * 4 * TILE, 4);
      } else {
        std::memcpy(words, w + half * 4 * TILE, 4);
        words[1] = words[0];
      }
      const __m128i spread = _mm_setr_epi32(words[0], WIDTH == 4 ? words[0] : words[1], words[1], words[1]);
      const __m128i shifts = WIDTH == 4 ? _mm_setr_epi32(0, 4, 0, 4) : _mm_setr_epi32(0, 2, 4, 6);
      __m128i found = _mm_and_si128(_mm_srlv_epi32(spread, shifts), _mm_set1_epi8(WIDTH == 4 ? 15 : 3));
      if (WIDTH == 3) {
        int32_t word;
        std::memcpy(&word, w + 8 * TILE, 4);
        const __m128i high = _mm_srlv_epi32(_mm_set1_epi32(word), _mm_add_epi32(_mm_setr_epi32(0, 1, 2, 3), _mm_set1_epi32(4 * half)));
        found = _mm_or_si128(found, _mm_slli_epi32(_mm_and_si128(high, _mm_set1_epi8(1)), 2));
      }
      _mm_storeu_si128((__m128i*)(to + 16 * half), found);
    }
  }

#else

  static void row_of(const uint8_t* w, int8_t* to) {
    constexpr int PLANE = WIDTH == 4 ? 4 : 2, INSIDE = 8 / PLANE;
    for (int column = 0; column < GROUP; ++column) {
      const int step = column / 4, byte = column % 4;
      int number = w[step / INSIDE * 4 * TILE + byte] >> (PLANE * (step % INSIDE)) & ((1 << PLANE) - 1);
      if (WIDTH == 3) number |= (w[8 * TILE + byte] >> step & 1) << 2;
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
    for (int64_t i = 0; i < LANES; ++i) {
      low[i] = int8_t(here[i] & 15);
      high[i] = int8_t((here[i] >> 4) - 8);
    }
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
