// Weights of the stored forms expanded into strips (strips.h).

#pragma once

#include "strips.h"

namespace {

// A matrix in the form in which it is stored.
struct Stored {
  const void* values;
  const void* scales;
  int64_t rows, columns, group;
};

// Of each form: OFFSET, what is subtracted from its numbers in strips; SCALES, ZEROS, SAFE and BY as `Sums` and
// `Part` take them; `slice`, which writes some columns of 64 rows, or of as many as there are from `row` on; `ahead`, which
// has the memory bring the lines `i`... `stop` - 1, of LINES, of what `slice` writes.
template <class Form>
struct Strips;

// SAFE of a form whose products have no sign: so many fit into 16 bits, where there are such sums.
constexpr int64_t short_quads(int64_t most) { return Quads::SHORT ? most : 0; }

#if CONMOE_INTEGERS

// Eight rows of 32 bytes, `step` apart, to eight times four bytes of every row, LINE apart.
inline void turn(const int8_t* from, int64_t step, int8_t* to) {
  __m256i a[8], b[8];
  for (int64_t r = 0; r < 8; ++r) a[r] = _mm256_loadu_si256((const __m256i*)(from + r * step));
  for (int64_t r = 0; r < 8; r += 2) {
    b[r] = _mm256_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm256_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int64_t r = 0; r < 8; r += 4)
    for (int64_t i = 0; i < 2; ++i) {
      a[r + 2 * i] = _mm256_unpacklo_epi64(b[r + i], b[r + 2 + i]);
      a[r + 2 * i + 1] = _mm256_unpackhi_epi64(b[r + i], b[r + 2 + i]);
    }
  const __m256i higher = _mm256_set1_epi8(char(HIGHER));
  for (int64_t i = 0; i < 4; ++i) {
    const __m256i low = _mm256_permute2x128_si256(a[i], a[i + 4], 0x20), high = _mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    _mm256_storeu_si256((__m256i*)(to + i * LINE), _mm256_xor_si256(low, higher));
    _mm256_storeu_si256((__m256i*)(to + (i + 4) * LINE), _mm256_xor_si256(high, higher));
  }
}

#endif

template <>
struct Strips<Int8> {
  static constexpr int64_t LINES = PANEL * SLICE / LINE;
  static constexpr int32_t OFFSET = int32_t(HIGHER);
  static constexpr bool SCALES = false, ZEROS = false;
  static constexpr int64_t SAFE = 0;  // with a sign two products fill 16 bits
  static constexpr int16_t BY = 1;

  static void ahead(const Stored& w, int64_t row, int64_t from, int64_t i, int64_t stop) {
    for (; i < stop; ++i) {
      const int64_t line = i / (SLICE / LINE), at = from + i % (SLICE / LINE) * LINE;
      __builtin_prefetch(static_cast<const int8_t*>(w.values) + (row + line) * w.columns + at, 0, 2);
    }
  }

  static void slice(const Stored& from, int64_t row, int64_t first, const Panel& to) {
    const int64_t step = from.columns, columns = std::min(step - first, to.columns);
    const auto* w = static_cast<const int8_t*>(from.values) + row * step + first;
    const auto* steps = static_cast<const uint16_t*>(from.scales) + row;
    const int64_t height = std::min(PANEL, from.rows - row), whole = columns - columns % BLOCK;
    for (int64_t r = 0; r < PANEL; ++r) *(to.scales(r / STRIP, 0) + r % STRIP) = r < height ? from_bf16(steps[r]) : 0.0f;
    int64_t done = 0;
#if CONMOE_INTEGERS
    for (; done + 8 <= height; done += 8)
      for (int64_t k = 0; k < whole; k += BLOCK)
        turn(w + done * step + k, step, to.bytes(done / STRIP, k / QUAD) + done % STRIP * QUAD);
#endif
    for (int64_t r = 0; r < PANEL; ++r)
      for (int64_t k = r < done ? whole : 0; k < to.columns; ++k) {
        const int32_t number = r < height && k < columns ? w[r * step + k] : 0;
        to.bytes(r / STRIP, k / QUAD)[r % STRIP * QUAD + k % QUAD] = int8_t(number + HIGHER);
      }
  }
};

// Numbers of few bits: twice a number less LAST, as an odd number. Where sums have 16 bits they are doubled afterwards.
template <int WIDTH>
struct Strips<Low<WIDTH>> {
  using Form = Low<WIDTH>;
  static constexpr int64_t LINES = PANEL * SLICE * WIDTH / 8 / LINE;
  static constexpr int32_t OFFSET = Form::LAST;
  static constexpr bool SCALES = true, ZEROS = true;
  static constexpr int64_t SAFE = short_quads(WIDTH == 6 ? 2 : 8);
  static constexpr int16_t BY = Quads::SHORT ? 2 : 1;
  static constexpr int64_t TIMES = Quads::SHORT ? 1 : 2;

  static const uint8_t* place(const Stored& w, int64_t row, int64_t first) {
    return static_cast<const uint8_t*>(w.values) + (row * w.columns + first * TILE) * WIDTH / 8;
  }
  static void ahead(const Stored& w, int64_t row, int64_t from, int64_t i, int64_t stop) {
    for (; i < stop; ++i) __builtin_prefetch(place(w, row, from) + i * LINE, 0, 2);
  }

  static void slice(const Stored& from, int64_t row, int64_t first, const Panel& to) {
    const uint8_t* w = place(from, row, first);
    const auto* const head = static_cast<const uint8_t*>(from.scales);
    const int64_t rows = from.rows, columns = to.columns;
    const uint8_t* here = head + (Form::HEAD + first / Form::GROUP) * rows + row;
    Lanes unit[4], low[4];
    for (int64_t strip = 0; strip < 4; ++strip) {
      Form::units(head + Form::HEAD * (row + strip * LANES), unit[strip], low[strip]);
      unit[strip] = fma(unit[strip], all(0.5f), zero());
      low[strip] = fma(low[strip], all(0.0625f), zero());
    }
    for (int64_t block = 0; block < columns / Form::GROUP; ++block, here += rows, w += TILE * Form::GROUP * WIDTH / 8) {
      __builtin_prefetch(here + Form::AHEAD * rows);
      for (int64_t strip = 0; strip < 4; ++strip) {
        Lanes s, z;
        load_steps(here + strip * LANES, s, z);
        store(to.scales(strip, block), fma(s, unit[strip], zero()));
        store(to.zeros(strip, block), fma(z, low[strip], zero()));
      }
      numbers(w, to, block * Form::GROUP / QUAD);
    }
  }

#if CONMOE_INTEGERS || CONMOE_NEON
  using V = Words;
  static typename V::T scaled(typename V::T x) { return TIMES == 2 ? V::twice(x) : x; }
  static void put(int8_t* to, typename V::T x) { std::memcpy(to, &x, sizeof(x)); }

  template <int BITS>
  static void planes(const uint8_t* w, const Panel& to, int64_t quad, bool more) {
    constexpr int LAST = (1 << BITS) - 1;
    for (int64_t row = 0; row < TILE; row += V::ROWS) {
      int8_t* const place = to.bytes(row / STRIP, quad) + row % STRIP * QUAD;
      const auto give = [&](int step, typename V::T numbers) {
        int8_t* const at = place + step * LINE;
        if (more) {  // the upper bits of numbers whose lower ones are there
          typename V::T there;
          std::memcpy(&there, at, sizeof(there));
          put(at, V::template choose<(TIMES == 2 ? 31 : 15)>(there, scaled(V::template shift<-4>(numbers))));
        } else {
          put(at, scaled(numbers));
        }
      };
      Low<BITS>::template pairs_of<V>(w + QUAD * row, [&](int first, int second, typename V::T both) {
        give(first, V::template lower<LAST>(both));
        give(second, V::template lower<LAST>(V::template shift<4>(both)));
      });
    }
  }

  static void numbers(const uint8_t* w, const Panel& to, int64_t quad) {
    if constexpr (WIDTH == 6) {
      planes<4>(w, to, quad, false);
      planes<2>(w + 4 * QUAD * TILE, to, quad, true);
    } else {
      planes<WIDTH>(w, to, quad, false);
    }
  }
#else
  static void numbers(const uint8_t* w, const Panel& to, int64_t quad) {
    for (int64_t row = 0; row < TILE; ++row) {
      int8_t found[Form::GROUP];
      Form::row_of(w + QUAD * row, found);
      for (int64_t k = 0; k < Form::GROUP; ++k)
        to.bytes(row / STRIP, quad + k / QUAD)[row % STRIP * QUAD + k % QUAD] = int8_t(TIMES * found[k]);
    }
  }
#endif
};

// What numbers of a form are multiplied with, less their offset, and what is added to each.
inline void units_of(const Int4&, const uint16_t* here, Lanes& scale, Lanes& shift) { load_pairs(here, scale, shift); }
template <bool FP16, bool ZEROS>
inline void units_of(const Grid<FP16, ZEROS>&, const uint16_t* here, Lanes& scale, Lanes& shift) {
  Lanes point;
  Grid<FP16, ZEROS>::load_scales(here, scale, point);
  shift = fma(fma(point, all(-1.0f), zero()), scale, zero());
}
inline void units_of(const Mxfp4&, const uint8_t* here, Lanes& scale, Lanes& shift) {
  scale = fma(load_exponents(here), all(0.5f), zero());
  shift = zero();
}

template <class Form>
constexpr bool has_zeros(const Form&) { return true; }
template <bool FP16>
constexpr bool has_zeros(const Grid<FP16, false>&) { return false; }
constexpr bool has_zeros(const Mxfp4&) { return false; }

template <class Form>
struct Strips<Halves<Form>> {
  static constexpr int64_t LINES = PANEL * SLICE / 2 / LINE;
  static constexpr int32_t OFFSET = Form::OFFSET;
  static constexpr bool SCALES = true, ZEROS = has_zeros(Form{});
  static constexpr int64_t SAFE = short_quads(std::is_same_v<Form, Mxfp4> ? 4 : 8);
  static constexpr int16_t BY = 1;

  static const uint8_t* place(const Stored& w, int64_t row, int64_t first) {
    return static_cast<const uint8_t*>(w.values) + (row * w.columns + first * TILE) / 2;
  }
  static void ahead(const Stored& w, int64_t row, int64_t from, int64_t i, int64_t stop) {
    for (; i < stop; ++i) __builtin_prefetch(place(w, row, from) + i * LINE, 0, 2);
  }

  static void slice(const Stored& from, int64_t row, int64_t first, const Panel& to) {
    const uint8_t* w = place(from, row, first);
    const auto* here =
        static_cast<const typename Form::T*>(from.scales) + (first / from.group * from.rows + row) * Form::PAIR;
    for (int64_t block = 0; block < to.blocks; ++block, here += from.rows * Form::PAIR)
      for (int64_t strip = 0; strip < 4; ++strip) {
        Lanes scale, shift;
        units_of(Form{}, here + strip * LANES * Form::PAIR, scale, shift);
        store(to.scales(strip, block), scale);
        if constexpr (ZEROS) store(to.zeros(strip, block), shift);
      }
    for (int64_t quad = 0; quad < to.columns / QUAD; ++quad, w += QUAD * TILE / 2) four_columns(w, to, quad);
  }

#if CONMOE_INTEGERS
  static void put(int8_t* first, int8_t* second, __m256i x) {
    _mm_storeu_si128((__m128i*)first, _mm256_castsi256_si128(x));
    _mm_storeu_si128((__m128i*)second, _mm256_extracti128_si256(x, 1));
  }
  // 32 bytes of each column: of rows 0..31 the lower halves, of rows 32..63 the upper ones.
  static void four_columns(const uint8_t* w, const Panel& to, int64_t quad) {
    __m256i column[4], pairs[4], fours[4];
    for (int64_t k = 0; k < 4; ++k) column[k] = _mm256_loadu_si256((const __m256i*)(w + k * TILE / 2));
    for (int64_t k = 0; k < 2; ++k) {  // in each half of a vector: rows 0..7, rows 8..15
      pairs[2 * k] = _mm256_unpacklo_epi8(column[2 * k], column[2 * k + 1]);
      pairs[2 * k + 1] = _mm256_unpackhi_epi8(column[2 * k], column[2 * k + 1]);
    }
    for (int64_t k = 0; k < 2; ++k) {
      fours[2 * k] = _mm256_unpacklo_epi16(pairs[k], pairs[2 + k]);
      fours[2 * k + 1] = _mm256_unpackhi_epi16(pairs[k], pairs[2 + k]);
    }
    const __m256i mask = _mm256_set1_epi8(15);
    for (int64_t k = 0; k < 4; ++k) {
      const __m256i low = Form::above(_mm256_and_si256(fours[k], mask));
      const __m256i high = Form::above(_mm256_and_si256(_mm256_srli_epi16(fours[k], 4), mask));
      put(to.bytes(0, quad) + k * 16, to.bytes(1, quad) + k * 16, low);
      put(to.bytes(2, quad) + k * 16, to.bytes(3, quad) + k * 16, high);
    }
  }
#else
  static void four_columns(const uint8_t* w, const Panel& to, int64_t quad) {
    for (int64_t r = 0; r < TILE / 2; ++r)
      for (int64_t k = 0; k < QUAD; ++k) {
        const uint8_t both = w[k * TILE / 2 + r];
        to.bytes(r / STRIP, quad)[r % STRIP * QUAD + k] = int8_t(Form::above(uint8_t(both & 15)));
        to.bytes(2 + r / STRIP, quad)[r % STRIP * QUAD + k] = int8_t(Form::above(uint8_t(both >> 4)));
      }
  }
#endif
};

}  // namespace
