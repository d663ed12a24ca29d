// Activations in 8 bits, and what products with them have in common.

#pragma once

#include <algorithm>
#include <limits>

#include "elementwise.h"

namespace {

constexpr int64_t TILE = 64;  // rows of a tile of the forms that have them

// One token: [columns] whole numbers of -127..127, and for every block of columns a scale, the sum of its numbers, and
// the sum of the activations themselves.
struct Token {
  const int8_t* q;
  const float* scale;
  const int32_t* whole;
  const float* sum;
};

// Sixteen numbers rounded to the nearest whole ones of a byte, ties to even; their sum.
#if CONMOE_AVX512
inline int32_t to_bytes(Lanes x, int8_t* to) {
  const __m512i whole = _mm512_cvtps_epi32(x.v);
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(whole));
  return _mm512_reduce_add_epi32(whole);
}
#elif CONMOE_AVX2
inline int32_t to_bytes(Lanes x, int8_t* to) {
  const __m256i a = _mm256_cvtps_epi32(x.a), b = _mm256_cvtps_epi32(x.b), both = _mm256_add_epi32(a, b);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
  _mm_storeu_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
#endif

// A block of activations [width] as whole numbers `to`; `room` is for as many floats. One that holds infinity or NaN has
// the scale NaN.
struct Rounded {
  float scale, sum;
  int32_t whole;

  Rounded() = default;
  Rounded(const float* x, int8_t* to, int64_t width, float* room) {
    uint32_t largest = 0;  // fp32 numbers without their signs are ordered as whole numbers are
    for (int64_t k = 0; k < width; ++k) largest = std::max(largest, to_bits(x[k]) & 0x7fffffffu);
    const float most = from_bits(largest);
    const bool finite = largest < 0x7f800000u;
    const Lanes factor = all(finite && most > 1e-30f ? 127.0f / most : 0.0f);
    whole = 0;
    int64_t k = 0;
#if CONMOE_AVX512 || CONMOE_AVX2
    for (; finite && k + LANES <= width; k += LANES) whole += to_bytes(fma(load(x + k), factor, zero()), to + k);
#endif
    if (finite)
      std::copy(x + k, x + width, room);
    else
      std::fill_n(room, width, 0.0f);
    const int64_t rest = width - k;
    for_each(room, room, rest, [=](Lanes v, Lanes) { return nearest(fma(v, factor, zero())); });
    for (int64_t i = 0; i < rest; ++i) {
      const auto number = int32_t(room[i]);
      to[k + i] = int8_t(number);
      whole += number;
    }
    scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
    sum = sum_of(x, width);
  }
};

// `count` tokens of `columns` in blocks of `block`.
struct Bytes {
  int64_t columns, blocks;
  Room<int8_t> q;
  Room<float> scale, sum, rounded;
  Room<int32_t> whole;

  Bytes(const float* x, int64_t count, int64_t columns, int64_t block)
      : columns(columns),
        blocks((columns + block - 1) / block),
        q(count * columns),
        scale(count * blocks),
        sum(count * blocks),
        rounded(block),
        whole(count * blocks) {
    for (int64_t token = 0; token < count; ++token)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = token * columns + b * block, place = token * blocks + b;
        const int64_t width = columns - b * block < block ? columns - b * block : block;
        const Rounded made(x + first, q.data() + first, width, rounded.data());
        scale[place] = made.scale;
        whole[place] = made.whole;
        sum[place] = made.sum;
      }
  }

  Token token(int64_t index) const {
    const int64_t at = index * blocks;
    return {q.data() + index * columns, scale.data() + at, whole.data() + at, sum.data() + at};
  }
};

}  // namespace
