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

// A block of activations [width] as whole numbers `to`; `room` is for as many floats. One that holds infinity or NaN has
// the scale NaN.
struct Rounded {
  float scale, sum;
  int32_t whole;

  Rounded(const float* x, int8_t* to, int64_t width, float* room) {
    uint32_t largest = 0;  // fp32 numbers without their signs are ordered as whole numbers are
    for (int64_t k = 0; k < width; ++k) largest = std::max(largest, to_bits(x[k]) & 0x7fffffffu);
    const float most = from_bits(largest);
    const bool finite = largest < 0x7f800000u;
    const Lanes factor = all(finite && most > 1e-30f ? 127.0f / most : 0.0f);
    if (finite)
      std::copy_n(x, width, room);
    else
      std::fill_n(room, width, 0.0f);
    for_each(room, room, width, [=](Lanes v, Lanes) { return nearest(fma(v, factor, zero())); });
    whole = 0;
    for (int64_t k = 0; k < width; ++k) {
      const auto number = int32_t(room[k]);
      to[k] = int8_t(number);
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
