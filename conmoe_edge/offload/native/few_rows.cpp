// Weights times few rows of activations, gated experts for one token, and weights expanded to fp32.
//
// One token makes every weight count once, so the only thing that matters is to read them at the speed of the memory.
// Each function runs one parallel region over all the matrices it is given: the experts of a token together.
// Activations come and go in bf16 or fp32 and are fp32 in between.
//
// Stored forms: see checkpoint/quantise.py. Products and sums are fp32. A sum runs over the columns in 16 lanes whose
// order depends on nothing but the number of columns, so a token's result is the same bits whatever the number of
// matrices, tokens or threads.
//
// Plain C interface, no library but OpenMP: it is compiled in a second and called through ctypes.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define CONMOE_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define CONMOE_AVX2 1
#endif

namespace {

constexpr int64_t LANES = 16;
constexpr int64_t ROWS = 4;         // rows of a matrix that are summed at once
constexpr int64_t TILE = 64;        // rows of a tile of int4
constexpr int64_t CHUNK = 1 << 18;  // bytes of weights that a thread takes at a time, and below which one does it all

enum Kind { BF16 = 0, FP16 = 1, FP32 = 2, INT8 = 3, INT4 = 4 };

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline float from_bf16(uint16_t bits) { return from_bits(uint32_t(bits) << 16); }

inline float from_fp16(uint16_t bits) {
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | (fraction << 13));
  if (exponent) return from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
  const float value = float(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -value : value;
}

inline uint16_t to_bf16(float value) {  // to the nearest, ties to even, as torch does
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

// Where results go: fp32, or bf16.
struct Target {
  void* place;
  bool narrow;
  void put(int64_t index, float value) const {
    if (narrow)
      static_cast<uint16_t*>(place)[index] = to_bf16(value);
    else
      static_cast<float*>(place)[index] = value;
  }
};

// Activations in fp32: as they are, or widened into a buffer that lives as long as this.
struct Source {
  std::vector<float> buffer;
  const float* values;
  Source(const void* x, bool narrow, int64_t count) {
    if (!narrow) {
      values = static_cast<const float*>(x);
      return;
    }
    buffer.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) buffer[size_t(i)] = from_bf16(static_cast<const uint16_t*>(x)[i]);
    values = buffer.data();
  }
};

// ---- sixteen floats ------------------------------------------------------------------------------------------------

#if CONMOE_AVX512

struct Lanes {
  __m512 v;
};
inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes all(float value) { return {_mm512_set1_ps(value)}; }
inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline void store(float* to, Lanes a) { _mm512_storeu_ps(to, a.v); }
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a.v); }
inline Lanes load(const uint16_t* from) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Lanes load_half(const uint16_t* from) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from))}; }
inline Lanes load(const int8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from)))};
}
// The two half-bytes of 16 bytes as numbers -8..7, by a table: the permutation looks at four bits only.
inline void load_nibbles(const uint8_t* from, Lanes& low, Lanes& high) {
  const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  low.v = _mm512_permutexvar_ps(wide, table);
  high.v = _mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), table);
}
// 16 pairs of bf16: the first of each, the second of each.
inline void load_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  const __m512i pairs = _mm512_loadu_si512(from);
  first.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}

#elif CONMOE_AVX2

struct Lanes {
  __m256 a, b;
};
inline Lanes zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Lanes all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline Lanes add(Lanes x, Lanes y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Lanes fma(Lanes x, Lanes y, Lanes z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline void store(float* to, Lanes x) {
  _mm256_storeu_ps(to, x.a);
  _mm256_storeu_ps(to + 8, x.b);
}
inline __m256 up(__m128i words) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16)); }
inline Lanes load(const uint16_t* from) {
  return {up(_mm_loadu_si128((const __m128i*)from)), up(_mm_loadu_si128((const __m128i*)(from + 8)))};
}
inline Lanes load_half(const uint16_t* from) {
  float wide[LANES];
  for (int64_t i = 0; i < LANES; ++i) wide[i] = from_fp16(from[i]);
  return load(wide);
}
inline __m256 signed_bytes(const int8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
inline Lanes load(const int8_t* from) { return {signed_bytes(from), signed_bytes(from + 8)}; }
inline void load_nibbles(const uint8_t* from, Lanes& low, Lanes& high) {
  const __m256i mask = _mm256_set1_epi32(15), eight = _mm256_set1_epi32(8);
  const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)));
  low = {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(a, mask), eight)),
         _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(b, mask), eight))};
  high = {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(a, 4), eight)),
          _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(b, 4), eight))};
}
inline void load_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)from), b = _mm256_loadu_si256((const __m256i*)(from + 16));
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
}
inline float sum(Lanes x) {
  float wide[LANES], total = 0;
  store(wide, x);
  for (int64_t i = 0; i < 8; ++i) wide[i] += wide[i + 8];
  for (int64_t i = 0; i < 4; ++i) wide[i] += wide[i + 4];
  for (int64_t i = 0; i < 4; ++i) total += wide[i];
  return total;
}

#else

struct Lanes {
  float v[LANES];
};
template <class Make>
inline Lanes each(Make make) {
  Lanes x;
  for (int64_t i = 0; i < LANES; ++i) x.v[i] = make(i);
  return x;
}
inline Lanes zero() { return each([](int64_t) { return 0.0f; }); }
inline Lanes all(float value) { return each([=](int64_t) { return value; }); }
inline Lanes load(const float* from) { return each([=](int64_t i) { return from[i]; }); }
inline Lanes add(Lanes a, Lanes b) { return each([&](int64_t i) { return a.v[i] + b.v[i]; }); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return each([&](int64_t i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline void store(float* to, Lanes a) { std::memcpy(to, a.v, sizeof(a.v)); }
inline Lanes load(const uint16_t* from) { return each([=](int64_t i) { return from_bf16(from[i]); }); }
inline Lanes load_half(const uint16_t* from) { return each([=](int64_t i) { return from_fp16(from[i]); }); }
inline Lanes load(const int8_t* from) { return each([=](int64_t i) { return float(from[i]); }); }
inline void load_nibbles(const uint8_t* from, Lanes& low, Lanes& high) {
  low = each([=](int64_t i) { return float(int(from[i] & 15) - 8); });
  high = each([=](int64_t i) { return float(int(from[i] >> 4) - 8); });
}
inline void load_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  first = each([=](int64_t i) { return from_bf16(from[2 * i]); });
  second = each([=](int64_t i) { return from_bf16(from[2 * i + 1]); });
}
inline float sum(Lanes a) {
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}

#endif

// ---- matrices whose rows lie one after another ---------------------------------------------------------------------

struct Bf16 {
  using T = uint16_t;
  static Lanes lanes(const T* w) { return load(w); }
  static float one(T w) { return from_bf16(w); }
};
struct Fp16 {
  using T = uint16_t;
  static Lanes lanes(const T* w) { return load_half(w); }
  static float one(T w) { return from_fp16(w); }
};
struct Fp32 {
  using T = float;
  static Lanes lanes(const T* w) { return load(w); }
  static float one(T w) { return w; }
};
struct Int8 {
  using T = int8_t;
  static Lanes lanes(const T* w) { return load(w); }
  static float one(T w) { return float(w); }
};

// `COUNT` rows times one token.
template <class Form, int64_t COUNT>
inline void dot(const typename Form::T* w, int64_t columns, const float* x, float* sums) {
  Lanes total[COUNT];
  for (int64_t r = 0; r < COUNT; ++r) total[r] = zero();
  const int64_t whole = columns - columns % LANES;
  for (int64_t k = 0; k < whole; k += LANES) {
    const Lanes value = load(x + k);
    for (int64_t r = 0; r < COUNT; ++r) {
      const typename Form::T* row = w + r * columns + k;
      // Rows are often a page long, where the processor's own read-ahead ends.
      __builtin_prefetch(row + COUNT * columns);
      total[r] = fma(Form::lanes(row), value, total[r]);
    }
  }
  for (int64_t r = 0; r < COUNT; ++r) {
    float rest = 0;
    for (int64_t k = whole; k < columns; ++k) rest += Form::one(w[r * columns + k]) * x[k];
    sums[r] = sum(total[r]) + rest;
  }
}

// Up to `ROWS` rows times one token, scaled.
template <class Form>
inline void some_rows(const typename Form::T* w, const uint16_t* scale, int64_t columns, const float* x, int64_t height,
                      float* sums) {
  if (height == ROWS)
    dot<Form, ROWS>(w, columns, x, sums);
  else
    for (int64_t r = 0; r < height; ++r) dot<Form, 1>(w + r * columns, columns, x, sums + r);
  if (scale)
    for (int64_t r = 0; r < height; ++r) sums[r] *= from_bf16(scale[r]);
}

inline float silu(float value) { return value / (1.0f + std::exp(-value)); }

template <class Form>
void rows_kind(int64_t count, const void* const* values, const void* const* scales, const float* x, int64_t x_stride,
               int64_t tokens, Target y, int64_t rows, int64_t columns) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS, all_blocks = blocks * count;
  const int64_t at_once = CHUNK / int64_t(ROWS * columns * sizeof(typename Form::T)) + 1;
#pragma omp parallel for schedule(dynamic, at_once) if (all_blocks > at_once)
  for (int64_t block = 0; block < all_blocks; ++block) {
    const int64_t which = block / blocks, row = block % blocks * ROWS;
    const auto* w = static_cast<const typename Form::T*>(values[which]) + row * columns;
    const auto* scale = static_cast<const uint16_t*>(scales[which]);
    const int64_t height = rows - row < ROWS ? rows - row : ROWS;
    for (int64_t token = 0; token < tokens; ++token) {
      float sums[ROWS];
      some_rows<Form>(w, scale ? scale + row : nullptr, columns, x + which * x_stride + token * columns, height, sums);
      for (int64_t r = 0; r < height; ++r) y.put((which * tokens + token) * rows + row + r, sums[r]);
    }
  }
}

// h[i, j] = silu(gate_j x) * up_j x for `count` experts whose gate rows lie before their up rows: [count, width].
template <class Form>
void gated_rows(int64_t count, const void* const* values, const void* const* scales, const float* x, float* h,
                int64_t width, int64_t columns) {
  const int64_t blocks = (width + ROWS - 1) / ROWS, all_blocks = blocks * count;
  const int64_t at_once = CHUNK / int64_t(2 * ROWS * columns * sizeof(typename Form::T)) + 1;
#pragma omp parallel for schedule(dynamic, at_once) if (all_blocks > at_once)
  for (int64_t block = 0; block < all_blocks; ++block) {
    const int64_t which = block / blocks, row = block % blocks * ROWS;
    const auto* w = static_cast<const typename Form::T*>(values[which]);
    const auto* scale = static_cast<const uint16_t*>(scales[which]);
    const int64_t height = width - row < ROWS ? width - row : ROWS;
    float gate[ROWS], up[ROWS];
    some_rows<Form>(w + row * columns, scale ? scale + row : nullptr, columns, x, height, gate);
    some_rows<Form>(w + (width + row) * columns, scale ? scale + width + row : nullptr, columns, x, height, up);
    for (int64_t r = 0; r < height; ++r) h[which * width + row + r] = silu(gate[r]) * up[r];
  }
}

// y[i, t] = sum over r of p[i, t, r] * W_i[r]: the rows of a matrix added up, as attention does with its values.
template <class Form>
void weighted(int64_t count, const void* const* values, const float* p, int64_t tokens, Target y, int64_t rows,
              int64_t columns) {
  constexpr int64_t WIDE = 8;  // sums of 16 that run side by side
#pragma omp parallel for schedule(static) if (count > 1)
  for (int64_t which = 0; which < count; ++which) {
    const auto* w = static_cast<const typename Form::T*>(values[which]);
    for (int64_t token = 0; token < tokens; ++token) {
      const float* weight = p + (which * tokens + token) * rows;
      const int64_t out = (which * tokens + token) * columns;
      int64_t k = 0;
      for (; k + WIDE * LANES <= columns; k += WIDE * LANES) {
        Lanes total[WIDE];
        for (Lanes& one : total) one = zero();
        for (int64_t r = 0; r < rows; ++r) {
          const Lanes factor = all(weight[r]);
          for (int64_t j = 0; j < WIDE; ++j)
            total[j] = fma(Form::lanes(w + r * columns + k + j * LANES), factor, total[j]);
        }
        for (int64_t j = 0; j < WIDE; ++j) {
          float sums[LANES];
          store(sums, total[j]);
          for (int64_t i = 0; i < LANES; ++i) y.put(out + k + j * LANES + i, sums[i]);
        }
      }
      for (; k < columns; ++k) {
        float total = 0;
        for (int64_t r = 0; r < rows; ++r) total += Form::one(w[r * columns + k]) * weight[r];
        y.put(out + k, total);
      }
    }
  }
}

// ---- int4 in tiles of 64 rows --------------------------------------------------------------------------------------

// The 64 rows of a tile times one token. `pairs` are the tile's (scale, zero) of the first group.
inline void one_tile(const uint8_t* w, const uint16_t* pairs, int64_t rows, int64_t columns, int64_t group,
                     const float* in, float* sums) {
  Lanes total[4] = {zero(), zero(), zero(), zero()};
  for (int64_t start = 0; start < columns; start += group) {
    // Two sums for even and odd columns each, so that no addition waits for the one before it.
    Lanes part[8];
    for (Lanes& one : part) one = zero();
    float inputs = 0;
    for (int64_t k = start; k < start + group; k += 2) {
      const uint8_t* bytes = w + k * (TILE / 2);
      __builtin_prefetch(bytes + 4096);
      for (int64_t odd = 0; odd < 2; ++odd) {
        const Lanes value = all(in[k + odd]);
        inputs += in[k + odd];
        for (int64_t half = 0; half < 2; ++half) {
          Lanes low, high;
          load_nibbles(bytes + odd * (TILE / 2) + half * LANES, low, high);
          Lanes* some = part + odd * 4;
          some[half] = fma(low, value, some[half]);
          some[half + 2] = fma(high, value, some[half + 2]);
        }
      }
    }
    const uint16_t* here = pairs + start / group * rows * 2;
    for (int64_t j = 0; j < 4; ++j) {
      Lanes scale, shift;
      load_pairs(here + j * LANES * 2, scale, shift);
      total[j] = fma(add(part[j], part[j + 4]), scale, total[j]);
      total[j] = fma(shift, all(inputs), total[j]);
    }
  }
  for (int64_t j = 0; j < 4; ++j) store(sums + j * LANES, total[j]);
}

void tiles(int64_t count, const void* const* values, const void* const* scales, const float* x, int64_t x_stride,
           int64_t tokens, Target y, int64_t rows, int64_t columns, int64_t group) {
  const int64_t blocks = rows / TILE, all_blocks = blocks * count;
  const int64_t at_once = CHUNK / (TILE * columns / 2) + 1;
#pragma omp parallel for schedule(dynamic, at_once) if (all_blocks > at_once)
  for (int64_t block = 0; block < all_blocks; ++block) {
    const int64_t which = block / blocks, row = block % blocks * TILE;
    const auto* w = static_cast<const uint8_t*>(values[which]) + row * columns / 2;
    const auto* pairs = static_cast<const uint16_t*>(scales[which]) + row * 2;
    for (int64_t token = 0; token < tokens; ++token) {
      float sums[TILE];
      one_tile(w, pairs, rows, columns, group, x + which * x_stride + token * columns, sums);
      for (int64_t r = 0; r < TILE; ++r) y.put((which * tokens + token) * rows + row + r, sums[r]);
    }
  }
}

void gated_tiles(int64_t count, const void* const* values, const void* const* scales, const float* x, float* h,
                 int64_t width, int64_t columns, int64_t group) {
  const int64_t blocks = width / TILE, all_blocks = blocks * count;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t block = 0; block < all_blocks; ++block) {
    const int64_t which = block / blocks, row = block % blocks * TILE, second = width + row;
    const auto* w = static_cast<const uint8_t*>(values[which]);
    const auto* pairs = static_cast<const uint16_t*>(scales[which]);
    float gate[TILE], up[TILE];
    one_tile(w + row * columns / 2, pairs + row * 2, 2 * width, columns, group, x, gate);
    one_tile(w + second * columns / 2, pairs + second * 2, 2 * width, columns, group, x, up);
    for (int64_t r = 0; r < TILE; ++r) h[which * width + row + r] = silu(gate[r]) * up[r];
  }
}

void expand_tiles(const uint8_t* values, const uint16_t* scales, float* out, int64_t rows, int64_t columns,
                  int64_t group) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; row += TILE) {
    const uint8_t* w = values + row * columns / 2;
    for (int64_t start = 0; start < columns; start += LANES) {  // a square of 64 x 16, turned in the cache
      float square[LANES][TILE];
      const uint16_t* here = scales + (start / group * rows + row) * 2;
      Lanes scale[4], shift[4];
      for (int64_t j = 0; j < 4; ++j) load_pairs(here + j * LANES * 2, scale[j], shift[j]);
      for (int64_t k = 0; k < LANES; ++k)
        for (int64_t half = 0; half < 2; ++half) {
          Lanes low, high;
          load_nibbles(w + (start + k) * (TILE / 2) + half * LANES, low, high);
          store(square[k] + half * LANES, fma(low, scale[half], shift[half]));
          store(square[k] + (half + 2) * LANES, fma(high, scale[half + 2], shift[half + 2]));
        }
      for (int64_t r = 0; r < TILE; ++r)
        for (int64_t k = 0; k < LANES; ++k) out[(row + r) * columns + start + k] = square[k][r];
    }
  }
}

template <class Form>
void expand_rows(const typename Form::T* values, const uint16_t* scales, float* out, int64_t rows, int64_t columns) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float scale = scales ? from_bf16(scales[row]) : 1.0f;
    const typename Form::T* w = values + row * columns;
    float* to = out + row * columns;
    const int64_t whole = columns - columns % LANES;
    for (int64_t k = 0; k < whole; k += LANES) {
      const Lanes value = Form::lanes(w + k);
      store(to + k, scales ? fma(value, all(scale), zero()) : value);
    }
    for (int64_t k = whole; k < columns; ++k) to[k] = Form::one(w[k]) * scale;
  }
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

int products(int kind, int64_t count, const void* const* values, const void* const* scales, const float* x,
             int64_t x_stride, int64_t tokens, Target y, int64_t rows, int64_t columns, int64_t group) {
  if (kind == INT4) {
    if (rows % TILE || group % 2 || columns % group) return 1;
    tiles(count, values, scales, x, x_stride, tokens, y, rows, columns, group);
    return 0;
  }
  return !in_rows(kind, [&](auto form) {
    rows_kind<decltype(form)>(count, values, scales, x, x_stride, tokens, y, rows, columns);
  });
}

int gated(int kind, int64_t count, const void* const* values, const void* const* scales, const float* x, float* h,
          int64_t width, int64_t columns, int64_t group) {
  if (kind == INT4) {
    if (width % TILE || group % 2 || columns % group) return 1;
    gated_tiles(count, values, scales, x, h, width, columns, group);
    return 0;
  }
  return !in_rows(kind,
                  [&](auto form) { gated_rows<decltype(form)>(count, values, scales, x, h, width, columns); });
}

}  // namespace

extern "C" {

// y[i, t] = W_i x[i, t] for i < count and t < tokens. x: [count, tokens, columns], or [tokens, columns] for all
// matrices with x_stride 0; y: [count, tokens, rows]; both bf16 where `narrow`, else fp32. Returns 0, or 1 where the
// form cannot be taken.
int conmoe_few_rows(int kind, int64_t count, const void* const* values, const void* const* scales, const void* x,
                    int64_t x_stride, int64_t tokens, void* y, int64_t rows, int64_t columns, int64_t group,
                    int narrow) {
  const Source source(x, narrow, (x_stride ? count : 1) * tokens * columns);
  return products(kind, count, values, scales, source.values, x_stride, tokens, Target{y, narrow != 0}, rows, columns,
                  group);
}

// y[i] = D_i (silu(G_i x) * U_i x), fp32 [count, columns], for one token x [columns] (bf16 where `narrow`). up_values
// hold [G_i; U_i]: [2 * width, columns]; down_values D_i: [columns, width]. Returns as above.
int conmoe_gated_experts(int up_kind, int down_kind, int64_t count, const void* const* up_values,
                         const void* const* up_scales, const void* const* down_values, const void* const* down_scales,
                         const void* x, float* y, int64_t width, int64_t columns, int64_t up_group, int64_t down_group,
                         int narrow) {
  const Source source(x, narrow, columns);
  std::vector<float> inner(size_t(count * width));
  const int failed =
      gated(up_kind, count, up_values, up_scales, source.values, inner.data(), width, columns, up_group);
  if (failed) return failed;
  return products(down_kind, count, down_values, down_scales, inner.data(), width, 1, Target{y, false}, columns, width,
                  down_group);
}

// out = sum over i of weights[i] * y[i], in the order of i; y: fp32 [count, columns], out bf16 where `narrow`.
void conmoe_combine(int64_t count, const float* y, const float* weights, void* out, int64_t columns, int narrow) {
  const Target target{out, narrow != 0};
  for (int64_t k = 0; k < columns; ++k) {
    float total = 0;
    for (int64_t i = 0; i < count; ++i) total += weights[i] * y[i * columns + k];
    target.put(k, total);
  }
}

// y[i, t] = sum over r of p[i, t, r] * W_i[r]; p fp32 [count, tokens, rows], y [count, tokens, columns], bf16 where
// `narrow`. W_i are bf16 or fp32. Returns as above.
int conmoe_weighted_rows(int kind, int64_t count, const void* const* values, const float* p, int64_t tokens, void* y,
                         int64_t rows, int64_t columns, int narrow) {
  const Target target{y, narrow != 0};
  if (kind == BF16)
    weighted<Bf16>(count, values, p, tokens, target, rows, columns);
  else if (kind == FP32)
    weighted<Fp32>(count, values, p, tokens, target, rows, columns);
  else
    return 1;
  return 0;
}

// The weights as fp32 [rows, columns]. Returns as above.
int conmoe_expand(int kind, const void* values, const void* scales, float* out, int64_t rows, int64_t columns,
                  int64_t group) {
  const auto* steps = static_cast<const uint16_t*>(scales);
  if (kind == INT4) {
    if (rows % TILE || group % LANES || columns % group) return 1;
    expand_tiles(static_cast<const uint8_t*>(values), steps, out, rows, columns, group);
    return 0;
  }
  return !in_rows(kind, [&](auto form) {
    using Form = decltype(form);
    expand_rows<Form>(static_cast<const typename Form::T*>(values), steps, out, rows, columns);
  });
}
}
