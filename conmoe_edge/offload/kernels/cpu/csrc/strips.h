// Weights and activations in bytes as products of many tokens take them, and these products.
//
// Weights lie in strips of 16 rows: of four neighbouring columns 16 rows, four bytes each, then of the next four. That is
// what an instruction takes that adds up products of four bytes. Tokens lie in tiles of up to `Quads::TOKENS`: of four
// neighbouring columns the bytes of one token after those of the other. A tile times some rows stays in registers over
// all columns; sums are whole numbers inside a block of columns, then fp32 in the order of the blocks. So a token's
// result is the same bits in any company.

#pragma once

#include "products.h"

namespace {

constexpr int64_t STRIP = 16;  // rows
constexpr int64_t PANEL = 64;  // rows that are expanded at a time
constexpr int64_t SLICE = 512;  // columns of a panel that are expanded at a time, into the first cache
constexpr int64_t QUAD = 4;    // columns
constexpr int64_t UNROLLED = 8;  // quads: all groups are multiples of so many
constexpr int64_t LINE = 64;   // bytes of a line of the processor's caches, and of a strip's four columns

// Rows times tokens in vectors. `ROWS` rows of four columns are a vector of weights, `VECTORS` of them meet `TOKENS` tokens.
// UNSIGNED: weights are taken as numbers of 0..255, so those that have a sign are stored 128 higher. SHORT: beside weights
// without a sign `add_short` sums in 16 bits, and `widen` adds the pairs, times 1 or 2; so many products fit as
// `short_quads` (expand_strips.h) says.
#if CONMOE_INTEGERS

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Quads {
  static constexpr int64_t ROWS = 16, VECTORS = 2, TOKENS = 6;
  static constexpr bool UNSIGNED = true, SHORT = false;
  using Bytes4 = __m512i;
  using Sum = __m512i;
  using Floats = __m512;
  static Bytes4 load(const int8_t* from) { return _mm512_loadu_si512(from); }
  static Bytes4 four(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof(word));
    return _mm512_set1_epi32(word);
  }
  static Sum start(int32_t value) { return _mm512_set1_epi32(value); }
  static Sum add(Sum sum, Bytes4 w, Bytes4 x) { return _mm512_dpbusd_epi32(sum, w, x); }
  static Floats floats(Sum sum) { return _mm512_cvtepi32_ps(sum); }
  static Floats load(const float* from) { return _mm512_loadu_ps(from); }
  static Floats all(float value) { return _mm512_set1_ps(value); }
  static Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static void store(float* to, Floats a) { _mm512_storeu_ps(to, a); }
};
#else
struct Quads {
  static constexpr int64_t ROWS = 8, VECTORS = 2, TOKENS = 3;
  using Bytes4 = __m256i;
  using Sum = __m256i;
  using Floats = __m256;
  static Bytes4 load(const int8_t* from) { return _mm256_loadu_si256((const __m256i*)from); }
  static Bytes4 four(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof(word));
    return _mm256_set1_epi32(word);
  }
  static Sum start(int32_t value) { return _mm256_set1_epi32(value); }
#if defined(__AVXVNNI__)
  static constexpr bool UNSIGNED = true, SHORT = false;
  static Sum add(Sum sum, Bytes4 w, Bytes4 x) { return _mm256_dpbusd_avx_epi32(sum, w, x); }
#else
  static constexpr bool UNSIGNED = false, SHORT = true;
  // With weights of any sign two products fill 16 bits already.
  static Sum add(Sum sum, Bytes4 w, Bytes4 x) {
    return widen(sum, _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)), 1);
  }
  static Sum add_short(Sum sum, Bytes4 w, Bytes4 x) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
  static Sum widen(Sum sum, Sum part, int16_t by) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(by)));
  }
#endif
  static Floats floats(Sum sum) { return _mm256_cvtepi32_ps(sum); }
  static Floats load(const float* from) { return _mm256_loadu_ps(from); }
  static Floats all(float value) { return _mm256_set1_ps(value); }
  static Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
#if defined(__FMA__)
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#else
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_add_ps(_mm256_mul_ps(a, b), c); }
#endif
  static void store(float* to, Floats a) { _mm256_storeu_ps(to, a); }
};
#endif

#elif CONMOE_NEON

struct Quads {
  static constexpr int64_t ROWS = 4, VECTORS = 4, TOKENS = 3;
  static constexpr bool UNSIGNED = false, SHORT = false;
  using Bytes4 = int8x16_t;
  using Sum = int32x4_t;
  using Floats = float32x4_t;
  static Bytes4 load(const int8_t* from) { return vld1q_s8(from); }
  static Bytes4 four(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof(word));
    return vreinterpretq_s8_s32(vdupq_n_s32(word));
  }
  static Sum start(int32_t value) { return vdupq_n_s32(value); }
#if defined(__ARM_FEATURE_DOTPROD)
  static Sum add(Sum sum, Bytes4 w, Bytes4 x) { return vdotq_s32(sum, w, x); }
#else
  static Sum add(Sum sum, Bytes4 w, Bytes4 x) {
    const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(x)));
    const int32x4_t second = vpaddlq_s16(vmull_s8(vget_high_s8(w), vget_high_s8(x)));
    return vaddq_s32(sum, vpaddq_s32(first, second));
  }
#endif
  static Floats floats(Sum sum) { return vcvtq_f32_s32(sum); }
  static Floats load(const float* from) { return vld1q_f32(from); }
  static Floats all(float value) { return vdupq_n_f32(value); }
  static Floats times(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static void store(float* to, Floats a) { vst1q_f32(to, a); }
};

#else

struct Quads {
  static constexpr int64_t ROWS = 4, VECTORS = 4, TOKENS = 2;
  static constexpr bool UNSIGNED = false, SHORT = false;
  struct Bytes4 {
    int8_t v[16];
  };
  struct Sum {
    int32_t v[4];
  };
  struct Floats {
    float v[4];
  };
  static Bytes4 load(const int8_t* from) {
    Bytes4 found;
    std::memcpy(found.v, from, sizeof(found.v));
    return found;
  }
  static Bytes4 four(const int8_t* from) {
    Bytes4 found;
    for (int i = 0; i < 16; ++i) found.v[i] = from[i % 4];
    return found;
  }
  static Sum start(int32_t value) { return {{value, value, value, value}}; }
  static Sum add(Sum sum, const Bytes4& w, const Bytes4& x) {
    for (int i = 0; i < 16; ++i) sum.v[i / 4] += int32_t(w.v[i]) * x.v[i];
    return sum;
  }
  template <class Make>
  static Floats each(Make make) {
    return {{make(0), make(1), make(2), make(3)}};
  }
  static Floats floats(Sum sum) { return each([&](int i) { return float(sum.v[i]); }); }
  static Floats load(const float* from) { return each([=](int i) { return from[i]; }); }
  static Floats all(float value) { return each([=](int) { return value; }); }
  static Floats times(Floats a, Floats b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static Floats fma(Floats a, Floats b, Floats c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static void store(float* to, Floats a) { std::memcpy(to, a.v, sizeof(a.v)); }
};

#endif

constexpr int64_t HIGHER = Quads::UNSIGNED ? 128 : 0;  // that weights with a sign are stored

// Whole numbers of a multiple.
inline int64_t up_to(int64_t number, int64_t step) { return (number + step - 1) / step * step; }

// Strips of expanded weights, and what a number of a row in a block of columns is multiplied with: `scale`, and with the
// sum of the block's activations `zero`, 16 of each a block. A form whose rows have one scale has that in the first block.
struct Panel {
  int64_t columns, blocks;
  int8_t* q;
  float *scale, *zero;

  int8_t* bytes(int64_t strip, int64_t quad) const { return q + strip * columns * STRIP + quad * LINE; }
  float* scales(int64_t strip, int64_t block) const { return scale + (strip * blocks + block) * STRIP; }
  float* zeros(int64_t strip, int64_t block) const { return zero + (strip * blocks + block) * STRIP; }
  Panel from(int64_t strip) const {
    return {columns, blocks, bytes(strip, 0), scales(strip, 0), zeros(strip, 0)};
  }
  // Floats that `strips` strips take, with room to begin at a line.
  static int64_t size(int64_t strips, int64_t columns, int64_t blocks) {
    return strips * STRIP * (columns / 4 + 2 * blocks) + LINE / 4;
  }
  Panel(int64_t columns, int64_t blocks, int8_t* q, float* scale, float* zero)
      : columns(columns), blocks(blocks), q(q), scale(scale), zero(zero) {}
  Panel(float* room, int64_t strips, int64_t columns, int64_t blocks) : columns(columns), blocks(blocks) {
    const auto place = reinterpret_cast<uintptr_t>(room);
    room += (LINE - place % LINE) % LINE / sizeof(float);
    scale = room;
    zero = scale + strips * blocks * STRIP;
    q = reinterpret_cast<int8_t*>(zero + strips * blocks * STRIP);
  }
};

// A tile of tokens: bytes [columns / 4][count][4]; for every block and token the scale, minus the sum of the bytes times
// the form's offset, and the sum of the activations.
struct TokenTile {
  int64_t count;
  const int8_t* q;
  const float* scale;
  const int32_t* start;
  const float* sum;
};

// Some columns of a product, the first and the last of which may be among them; quads of a block, and what sums in 16 bits
// are multiplied with.
struct Part {
  bool first, last;
  int64_t quads;
  int16_t by;
};

// What a form has the products do: whether blocks of a row have scales of their own, and zeros; how many quads are summed in
// 16 bits, a divisor of UNROLLED, 0 where sums have 32.
template <bool SCALES, bool ZEROS, int64_t SAFE>
struct Sums {
  template <int64_t COUNT, class V>
  static void times(const Panel& w, int64_t row, const TokenTile& x, const Part& part, float* out, int64_t step) {
    typename V::Floats total[V::VECTORS][COUNT];
    for (int64_t v = 0; v < V::VECTORS; ++v)
      for (int64_t t = 0; t < COUNT; ++t)
        total[v][t] = part.first ? V::all(0.0f) : V::load(out + t * step + v * V::ROWS);
    const int64_t quads = part.quads;
    const int8_t* place[V::VECTORS];
    const float *scales[V::VECTORS], *zeros[V::VECTORS];
    for (int64_t v = 0; v < V::VECTORS; ++v) {
      const int64_t first = row + v * V::ROWS;
      place[v] = w.bytes(first / STRIP, 0) + first % STRIP * QUAD;
      scales[v] = w.scales(first / STRIP, 0) + first % STRIP;
      zeros[v] = w.zeros(first / STRIP, 0) + first % STRIP;
    }
    const int8_t* q = x.q;
    for (int64_t block = 0; block < w.blocks; ++block) {
      typename V::Sum sums[V::VECTORS][COUNT];
      for (auto& some : sums)
        for (int64_t t = 0; t < COUNT; ++t) some[t] = V::start(x.start[block * COUNT + t]);
      if constexpr (SAFE > 0) {
        for (int64_t from = 0; from < quads; from += SAFE) {
          typename V::Sum parts[V::VECTORS][COUNT];
          for (auto& some : parts)
            for (auto& one : some) one = V::start(0);
#pragma GCC unroll 2
          for (int64_t quad = 0; quad < SAFE; ++quad, q += COUNT * QUAD) {
            typename V::Bytes4 weights[V::VECTORS];
            for (int64_t v = 0; v < V::VECTORS; ++v) {
              weights[v] = V::load(place[v]);
              place[v] += LINE;
            }
            for (int64_t t = 0; t < COUNT; ++t) {
              const auto token = V::four(q + t * QUAD);
              for (int64_t v = 0; v < V::VECTORS; ++v) parts[v][t] = V::add_short(parts[v][t], weights[v], token);
            }
          }
          for (int64_t v = 0; v < V::VECTORS; ++v)
            for (int64_t t = 0; t < COUNT; ++t) sums[v][t] = V::widen(sums[v][t], parts[v][t], part.by);
        }
      } else {
        for (int64_t from = 0; from < quads; from += UNROLLED)
#pragma GCC unroll 8
        for (int64_t quad = 0; quad < UNROLLED; ++quad, q += COUNT * QUAD) {
          typename V::Bytes4 weights[V::VECTORS];
          for (int64_t v = 0; v < V::VECTORS; ++v) {
            weights[v] = V::load(place[v]);
            place[v] += LINE;
          }
          for (int64_t t = 0; t < COUNT; ++t) {
            const auto token = V::four(q + t * QUAD);
            for (int64_t v = 0; v < V::VECTORS; ++v) sums[v][t] = V::add(sums[v][t], weights[v], token);
          }
        }
      }
      for (int64_t v = 0; v < V::VECTORS; ++v)
        for (int64_t t = 0; t < COUNT; ++t) {
          auto found = V::floats(sums[v][t]);
          if constexpr (SCALES) found = V::times(found, V::load(scales[v] + block * STRIP));
          total[v][t] = V::fma(found, V::all(x.scale[block * COUNT + t]), total[v][t]);
          if constexpr (ZEROS)
            total[v][t] = V::fma(V::load(zeros[v] + block * STRIP), V::all(x.sum[block * COUNT + t]), total[v][t]);
        }
    }
    for (int64_t t = 0; t < COUNT; ++t)
      for (int64_t v = 0; v < V::VECTORS; ++v) {
        if (!SCALES && part.last) total[v][t] = V::times(total[v][t], V::load(scales[v]));
        V::store(out + t * step + v * V::ROWS, total[v][t]);
      }
  }

  // The first `height` rows times a tile, to [count, step].
  template <int64_t COUNT = Quads::TOKENS>
  static void tile(const Panel& w, int64_t height, const TokenTile& x, const Part& part, float* out, int64_t step) {
    if (x.count < COUNT) {
      if constexpr (COUNT > 1) tile<COUNT - 1>(w, height, x, part, out, step);
      return;
    }
    constexpr int64_t AT_ONCE = Quads::ROWS * Quads::VECTORS;
    for (int64_t row = 0; row < height; row += AT_ONCE) times<COUNT, Quads>(w, row, x, part, out + row, step);
  }
};

// Activations of many tokens in tiles. `columns` are filled up with zeros to whole blocks of `block`.
struct Packed {
  int64_t columns, block, blocks;
  Room<int8_t> q;
  Room<float> scale, sum;
  Room<int32_t> start;

  Packed(int64_t tokens, int64_t width, int64_t block)
      : columns(up_to(width, block)),
        block(block),
        blocks(columns / block),
        q(tokens * columns),
        scale(tokens * blocks),
        sum(tokens * blocks),
        start(tokens * blocks) {}

  // The tile whose first token is number `first`, from a column on.
  TokenTile tile(int64_t first, int64_t count, int64_t from) const {
    const int64_t at = first * blocks + from / block * count;
    return {count, q.data() + first * columns + from * count, scale.data() + at, start.data() + at, sum.data() + at};
  }

  // A block of the tile's token `t`, already rounded.
  void put_block(int64_t first, int64_t count, int64_t t, int64_t at, const int8_t* bytes, const Rounded& made,
                 int32_t offset) {
    int8_t* const to = q.data() + first * columns + at * block * count + t * QUAD;
    for (int64_t quad = 0; quad < block / QUAD; ++quad) std::memcpy(to + quad * count * QUAD, bytes + quad * QUAD, QUAD);
    const int64_t place = first * blocks + at * count + t;
    scale[place] = made.scale;
    sum[place] = made.sum;
    start[place] = -offset * made.whole;
  }

  // Rounds x [width], a whole number of blocks or the end of a row, of the tile's token `t` from `from` on.
  void put(int64_t first, int64_t count, int64_t t, const float* x, int64_t from, int64_t width, int32_t offset) {
    int8_t bytes[MOST_BLOCK];
    float room[MOST_BLOCK];
    for (int64_t k = 0; k < width; k += block) {
      const int64_t here = std::min(block, width - k);
      std::fill(bytes + here, bytes + block, int8_t(0));
      const Rounded made(x + k, bytes, here, room);
      put_block(first, count, t, (from + k) / block, bytes, made, offset);
    }
  }

  static constexpr int64_t MOST_BLOCK = 256;
};

}  // namespace
