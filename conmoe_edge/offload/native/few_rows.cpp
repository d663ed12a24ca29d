// Weights times few rows of activations, gated experts for one token, and weights expanded to fp32.
//
// One token makes every weight count once, so the only thing that matters is to read them at the speed of the memory.
// Each function runs one parallel region over all the matrices it is given: the experts of a token together.
// Activations come and go in bf16 or fp32 and are fp32 in between.
//
// Stored forms: see checkpoint/quantise.py. With plain weights products and sums are fp32. With weights in 8 or 4 bits
// the activations are rounded to 8 bits as well, in blocks of 32 columns (int4: of a group) with a scale each, and a
// block is summed in whole numbers: turning weights into fp32 takes longer than the memory takes to bring them.
// A sum runs over the columns in an order that depends on nothing but their number, so a token's result is the same
// bits whatever the number of matrices, tokens or threads.
//
// Plain C interface, no library but OpenMP: it is compiled in a second and called through ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#define CONMOE_INTEGERS 1
#endif

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
constexpr int64_t BLOCK = 32;       // columns of activations in 8 bits that share a scale, beside int8 weights
constexpr int64_t MANY = 1 << 15;   // numbers that are worth a second thread
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
inline Lanes load(const int32_t* from) { return {_mm512_cvtepi32_ps(_mm512_loadu_si512(from))}; }
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
inline Lanes load(const int32_t* from) {
  return {_mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)from)),
          _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i*)(from + 8)))};
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
inline Lanes load(const int32_t* from) { return each([=](int64_t i) { return float(from[i]); }); }
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

// exp of a number that is not above 0, to a few units in the last place; below 2^-126 it is that.
inline float exp_below(float x) {
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
  const float t = std::max(x * 1.44269504f, -126.0f), whole = (t + ROUND) - ROUND, f = t - whole;
  float p = 1.5403530e-4f;  // 2^f for |f| <= 1/2, its Taylor series
  p = p * f + 1.3333558e-3f;
  p = p * f + 9.6181291e-3f;
  p = p * f + 5.5504109e-2f;
  p = p * f + 2.4022651e-1f;
  p = p * f + 6.9314718e-1f;
  p = p * f + 1.0f;
  return p * from_bits(uint32_t(int32_t(whole) + 127) << 23);
}

// The softmax of `scaling` times `count` numbers, in their place. Sums run in lanes, so the order is always the same.
inline void softmax(float* x, int64_t count, float scaling) {
  float most[LANES], sums[LANES] = {0};
  for (float& one : most) one = -std::numeric_limits<float>::infinity();
  const int64_t whole = count - count % LANES;
  for (int64_t k = 0; k < count; ++k) x[k] *= scaling;
  for (int64_t k = 0; k < whole; k += LANES)
    for (int64_t i = 0; i < LANES; ++i) most[i] = most[i] > x[k + i] ? most[i] : x[k + i];
  float top = most[0];
  for (const float one : most) top = std::max(top, one);
  for (int64_t k = whole; k < count; ++k) top = std::max(top, x[k]);
  for (int64_t k = 0; k < whole; k += LANES)
    for (int64_t i = 0; i < LANES; ++i) sums[i] += x[k + i] = exp_below(x[k + i] - top);
  float total = 0;
  for (int64_t k = whole; k < count; ++k) total += x[k] = exp_below(x[k] - top);
  for (const float one : sums) total += one;
  for (int64_t k = 0; k < count; ++k) x[k] /= total;
}

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

// Tokens in fp32, one after another.
struct Floats {
  const float* x;
  int64_t columns;
  Floats(const float* x, int64_t, int64_t columns, int64_t) : x(x), columns(columns) {}
  const float* token(int64_t index) const { return x + index * columns; }
};

// ---- activations in 8 bits ------------------------------------------------------------------------------------------

// One token: [columns] whole numbers of -127..127, and for every block of columns a scale, the sum of its numbers, and
// the sum of the activations themselves.
struct Token {
  const int8_t* q;
  const float* scale;
  const int32_t* whole;
  const float* sum;
};

// `count` tokens of `columns` in blocks of `block`. A block that holds infinity or NaN has the scale NaN.
struct Bytes {
  std::vector<int8_t> q;
  std::vector<float> scale, sum;
  std::vector<int32_t> whole;
  int64_t columns, blocks;

  Bytes(const float* x, int64_t count, int64_t columns, int64_t block)
      : q(size_t(count * columns)), columns(columns), blocks((columns + block - 1) / block) {
    scale.resize(size_t(count * blocks));
    sum.resize(scale.size());
    whole.resize(scale.size());
    for (int64_t token = 0; token < count; ++token)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = token * columns + b * block;
        const int64_t width = columns - b * block < block ? columns - b * block : block;
        one_block(x + first, q.data() + first, width, size_t(token * blocks + b));
      }
  }

  void one_block(const float* x, int8_t* to, int64_t width, size_t place) {
    uint32_t largest = 0;  // fp32 numbers without their signs are ordered as whole numbers are
    for (int64_t k = 0; k < width; ++k) {
      uint32_t bits;
      std::memcpy(&bits, x + k, sizeof(bits));
      bits &= 0x7fffffffu;
      largest = largest > bits ? largest : bits;
    }
    const float most = from_bits(largest);
    const bool finite = largest < 0x7f800000u;
    const float factor = finite && most > 1e-30f ? 127.0f / most : 0.0f;
    float total = 0;
    int32_t numbers = 0;
    for (int64_t k = 0; k < width; ++k) {
      const int32_t number = finite ? int32_t(std::nearbyint(x[k] * factor)) : 0;
      to[k] = int8_t(number);
      numbers += number;
      total += x[k];
    }
    scale[place] = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
    whole[place] = numbers;
    sum[place] = total;
  }

  Token token(int64_t index) const {
    const size_t at = size_t(index * blocks);
    return {q.data() + index * columns, scale.data() + at, whole.data() + at, sum.data() + at};
  }
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

inline float sum_of(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

// `COUNT` rows of int8 times one token.
template <int64_t COUNT>
inline void dot_bytes(const int8_t* w, int64_t columns, Token x, float* sums) {
  __m256 total[COUNT];
  for (int64_t r = 0; r < COUNT; ++r) total[r] = _mm256_setzero_ps();
  const int64_t whole = columns - columns % BLOCK;
  for (int64_t k = 0; k < whole; k += BLOCK) {
    const __m256i value = _mm256_loadu_si256((const __m256i*)(x.q + k));
    const __m256 scale = _mm256_set1_ps(x.scale[k / BLOCK]);
    for (int64_t r = 0; r < COUNT; ++r) {
      const int8_t* row = w + r * columns + k;
      __builtin_prefetch(row + COUNT * columns);
      const __m256i part = products_of(_mm256_loadu_si256((const __m256i*)row), value);
      total[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(part), scale, total[r]);
    }
  }
  for (int64_t r = 0; r < COUNT; ++r) {
    int32_t rest = 0;
    for (int64_t k = whole; k < columns; ++k) rest += int32_t(w[r * columns + k]) * x.q[k];
    sums[r] = sum_of(total[r]) + (whole < columns ? float(rest) * x.scale[whole / BLOCK] : 0.0f);
  }
}

#else

template <int64_t COUNT>
inline void dot_bytes(const int8_t* w, int64_t columns, Token x, float* sums) {
  for (int64_t r = 0; r < COUNT; ++r) {
    float total = 0;
    for (int64_t start = 0; start < columns; start += BLOCK) {
      const int64_t stop = start + BLOCK < columns ? start + BLOCK : columns;
      int32_t part = 0;
      for (int64_t k = start; k < stop; ++k) part += int32_t(w[r * columns + k]) * x.q[k];
      total += float(part) * x.scale[start / BLOCK];
    }
    sums[r] = total;
  }
}

#endif

inline void some_rows(const int8_t* w, const uint16_t* scale, int64_t columns, Token x, int64_t height, float* sums) {
  if (height == ROWS)
    dot_bytes<ROWS>(w, columns, x, sums);
  else
    for (int64_t r = 0; r < height; ++r) dot_bytes<1>(w + r * columns, columns, x, sums + r);
  for (int64_t r = 0; r < height; ++r) sums[r] *= from_bf16(scale[r]);
}

// ---- products -------------------------------------------------------------------------------------------------------

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

// What the products of a form with fp32 activations, and of int8 with those in 8 bits, have different.
template <class Form>
struct Plain {
  using T = typename Form::T;
  using Input = Floats;
  static void rows(const T* w, const uint16_t* scale, int64_t columns, const float* x, int64_t height, float* sums) {
    some_rows<Form>(w, scale, columns, x, height, sums);
  }
};
struct Whole {
  using T = int8_t;
  using Input = Bytes;
  static void rows(const T* w, const uint16_t* scale, int64_t columns, Token x, int64_t height, float* sums) {
    some_rows(w, scale, columns, x, height, sums);
  }
};

template <class Way>
void rows_kind(int64_t count, const void* const* values, const void* const* scales, const typename Way::Input& x,
               bool shared, int64_t tokens, Target y, int64_t rows, int64_t columns) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS, all_blocks = blocks * count;
  const int64_t at_once = CHUNK / int64_t(ROWS * columns * sizeof(typename Way::T)) + 1;
#pragma omp parallel for schedule(dynamic, at_once) if (all_blocks > at_once)
  for (int64_t block = 0; block < all_blocks; ++block) {
    const int64_t which = block / blocks, row = block % blocks * ROWS;
    const auto* w = static_cast<const typename Way::T*>(values[which]) + row * columns;
    const auto* scale = static_cast<const uint16_t*>(scales[which]);
    const int64_t height = rows - row < ROWS ? rows - row : ROWS;
    for (int64_t token = 0; token < tokens; ++token) {
      float sums[ROWS];
      const auto input = x.token((shared ? 0 : which * tokens) + token);
      Way::rows(w, scale ? scale + row : nullptr, columns, input, height, sums);
      for (int64_t r = 0; r < height; ++r) y.put((which * tokens + token) * rows + row + r, sums[r]);
    }
  }
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
    int64_t which = 0;
    while (before[size_t(which + 1)] <= *block) ++which;
    *block -= before[size_t(which)];
    return which;
  }
};

// h_i[j] = silu(gate_j x) * up_j x for `count` experts whose gate rows lie before their up rows: widths[i] numbers, the
// experts one after another.
template <class Way>
void gated_rows(int64_t count, const void* const* values, const void* const* scales, const typename Way::Input& x,
                const int64_t* widths, float* const* h, int64_t columns) {
  const Blocks blocks(count, widths, ROWS);
  const int64_t at_once = CHUNK / int64_t(2 * ROWS * columns * sizeof(typename Way::T)) + 1;
#pragma omp parallel for schedule(dynamic, at_once) if (blocks.all() > at_once)
  for (int64_t number = 0; number < blocks.all(); ++number) {
    int64_t block = number;
    const int64_t which = blocks.find(&block), row = block * ROWS, width = widths[which];
    const auto* w = static_cast<const typename Way::T*>(values[which]);
    const auto* scale = static_cast<const uint16_t*>(scales[which]);
    const int64_t height = width - row < ROWS ? width - row : ROWS;
    float gate[ROWS], up[ROWS];
    Way::rows(w + row * columns, scale ? scale + row : nullptr, columns, x.token(0), height, gate);
    Way::rows(w + (width + row) * columns, scale ? scale + width + row : nullptr, columns, x.token(0), height, up);
    for (int64_t r = 0; r < height; ++r) h[which][row + r] = silu(gate[r]) * up[r];
  }
}

// y[i] = W_i x_i for one token of every matrix, [count, rows]; columns[i] numbers each.
template <class Way>
void down_rows(int64_t count, const void* const* values, const void* const* scales,
               const std::vector<typename Way::Input>& x, const int64_t* columns, float* y, int64_t rows) {
  const int64_t blocks = (rows + ROWS - 1) / ROWS, all_blocks = blocks * count;
  const int64_t widest = *std::max_element(columns, columns + count);
  const int64_t at_once = CHUNK / int64_t(ROWS * widest * sizeof(typename Way::T)) + 1;
#pragma omp parallel for schedule(dynamic, at_once) if (all_blocks > at_once)
  for (int64_t block = 0; block < all_blocks; ++block) {
    const int64_t which = block / blocks, row = block % blocks * ROWS;
    const auto* w = static_cast<const typename Way::T*>(values[which]) + row * columns[which];
    const auto* scale = static_cast<const uint16_t*>(scales[which]);
    const int64_t height = rows - row < ROWS ? rows - row : ROWS;
    float sums[ROWS];
    Way::rows(w, scale ? scale + row : nullptr, columns[which], x[size_t(which)].token(0), height, sums);
    for (int64_t r = 0; r < height; ++r) y[which * rows + row + r] = sums[r];
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

// sums[r] = sum over k < count of (w[r, k] - 8) q[k], for the 64 rows of a tile; count is even.
#if CONMOE_INTEGERS

// Rows 0..7 and 16..23, or 8..15 and 24..31, of half a tile: added where they belong.
inline void spread(__m256i part, __m256i* first, __m256i* second) {
  *first = _mm256_add_epi32(*first, _mm256_cvtepi16_epi32(_mm256_castsi256_si128(part)));
  *second = _mm256_add_epi32(*second, _mm256_cvtepi16_epi32(_mm256_extracti128_si256(part, 1)));
}

inline void tile_sums(const uint8_t* w, const int8_t* q, int64_t count, int32_t eights, int32_t* sums) {
  constexpr int64_t SAFE = 16;  // columns whose products fit into 16 bits: 8 pairs of at most 2 * 15 * 127
  const __m256i mask = _mm256_set1_epi8(15);
  __m256i total[8];
  for (__m256i& one : total) one = _mm256_set1_epi32(-eights);
  for (int64_t start = 0; start < count; start += SAFE) {
    const int64_t stop = start + SAFE < count ? start + SAFE : count;
    __m256i part[4];
    for (__m256i& one : part) one = _mm256_setzero_si256();
    for (int64_t k = start; k < stop; k += 2) {
      const uint8_t* bytes = w + k * (TILE / 2);
      __builtin_prefetch(bytes + 4096);
      int16_t two;
      std::memcpy(&two, q + k, sizeof(two));
      const __m256i x = _mm256_set1_epi16(two);
      const __m256i a = _mm256_loadu_si256((const __m256i*)bytes);
      const __m256i b = _mm256_loadu_si256((const __m256i*)(bytes + TILE / 2));
      const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
      const auto times = [&](__m256i weights) { return _mm256_maddubs_epi16(_mm256_and_si256(weights, mask), x); };
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

inline void tile_sums(const uint8_t* w, const int8_t* q, int64_t count, int32_t eights, int32_t* sums) {
  for (int64_t r = 0; r < TILE; ++r) sums[r] = -eights;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t r = 0; r < TILE / 2; ++r) {
      sums[r] += int32_t(w[k * (TILE / 2) + r] & 15) * q[k];
      sums[r + TILE / 2] += int32_t(w[k * (TILE / 2) + r] >> 4) * q[k];
    }
}

#endif

// The 64 rows of a tile times one token in blocks of a group. `pairs` are the tile's (scale, zero) of the first group.
inline void one_tile(const uint8_t* w, const uint16_t* pairs, int64_t rows, int64_t columns, int64_t group, Token x,
                     float* sums) {
  Lanes total[4] = {zero(), zero(), zero(), zero()};
  for (int64_t start = 0; start < columns; start += group) {
    const int64_t block = start / group;
    int32_t whole[TILE];
    tile_sums(w + start * (TILE / 2), x.q + start, group, 8 * x.whole[block], whole);
    const Lanes factor = all(x.scale[block]), inputs = all(x.sum[block]);
    const uint16_t* here = pairs + block * rows * 2;
    for (int64_t j = 0; j < 4; ++j) {
      Lanes scale, shift;
      load_pairs(here + j * LANES * 2, scale, shift);
      total[j] = fma(fma(load(whole + j * LANES), factor, zero()), scale, total[j]);
      total[j] = fma(shift, inputs, total[j]);
    }
  }
  for (int64_t j = 0; j < 4; ++j) store(sums + j * LANES, total[j]);
}

void tiles(int64_t count, const void* const* values, const void* const* scales, const Bytes& x, bool shared,
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
      one_tile(w, pairs, rows, columns, group, x.token((shared ? 0 : which * tokens) + token), sums);
      for (int64_t r = 0; r < TILE; ++r) y.put((which * tokens + token) * rows + row + r, sums[r]);
    }
  }
}

void gated_tiles(int64_t count, const void* const* values, const void* const* scales, Token x,
                 const int64_t* widths, float* const* h, int64_t columns, int64_t group) {
  const Blocks blocks(count, widths, TILE);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t number = 0; number < blocks.all(); ++number) {
    int64_t block = number;
    const int64_t which = blocks.find(&block), row = block * TILE, width = widths[which], second = width + row;
    const auto* w = static_cast<const uint8_t*>(values[which]);
    const auto* pairs = static_cast<const uint16_t*>(scales[which]);
    float gate[TILE], up[TILE];
    one_tile(w + row * columns / 2, pairs + row * 2, 2 * width, columns, group, x, gate);
    one_tile(w + second * columns / 2, pairs + second * 2, 2 * width, columns, group, x, up);
    for (int64_t r = 0; r < TILE; ++r) h[which][row + r] = silu(gate[r]) * up[r];
  }
}

void down_tiles(int64_t count, const void* const* values, const void* const* scales, const std::vector<Bytes>& x,
                const int64_t* columns, float* y, int64_t rows, int64_t group) {
  const int64_t blocks = rows / TILE, all_blocks = blocks * count;
  const int64_t at_once = CHUNK / (TILE * *std::max_element(columns, columns + count) / 2) + 1;
#pragma omp parallel for schedule(dynamic, at_once) if (all_blocks > at_once)
  for (int64_t block = 0; block < all_blocks; ++block) {
    const int64_t which = block / blocks, row = block % blocks * TILE;
    const auto* w = static_cast<const uint8_t*>(values[which]) + row * columns[which] / 2;
    const auto* pairs = static_cast<const uint16_t*>(scales[which]) + row * 2;
    one_tile(w, pairs, rows, columns[which], group, x[size_t(which)].token(0), y + which * rows + row);
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
             bool shared, int64_t tokens, Target y, int64_t rows, int64_t columns, int64_t group) {
  const int64_t inputs = (shared ? 1 : count) * tokens;
  if (kind == INT4) {
    if (rows % TILE || group % 2 || columns % group) return 1;
    tiles(count, values, scales, Bytes(x, inputs, columns, group), shared, tokens, y, rows, columns, group);
    return 0;
  }
  return !in_rows(kind, [&](auto form) {
    using Way = typename decltype(form)::Way;
    const typename Way::Input input(x, inputs, columns, BLOCK);
    rows_kind<Way>(count, values, scales, input, shared, tokens, y, rows, columns);
  });
}

int gated(int kind, int64_t count, const void* const* values, const void* const* scales, const float* x,
          const int64_t* widths, float* const* h, int64_t columns, int64_t group) {
  if (kind == INT4) {
    for (int64_t i = 0; i < count; ++i)
      if (widths[i] % TILE) return 1;
    if (group % 2 || columns % group) return 1;
    const Bytes input(x, 1, columns, group);
    gated_tiles(count, values, scales, input.token(0), widths, h, columns, group);
    return 0;
  }
  return !in_rows(kind, [&](auto form) {
    using Way = typename decltype(form)::Way;
    const typename Way::Input input(x, 1, columns, BLOCK);
    gated_rows<Way>(count, values, scales, input, widths, h, columns);
  });
}

// y[i] = W_i h_i, fp32 [count, rows], for matrices of columns[i] columns.
int downward(int kind, int64_t count, const void* const* values, const void* const* scales, float* const* h,
             const int64_t* columns, float* y, int64_t rows, int64_t group) {
  if (kind == INT4) {
    if (rows % TILE || group % 2) return 1;
    std::vector<Bytes> inputs;
    for (int64_t i = 0; i < count; ++i) {
      if (columns[i] % group) return 1;
      inputs.emplace_back(h[i], 1, columns[i], group);
    }
    down_tiles(count, values, scales, inputs, columns, y, rows, group);
    return 0;
  }
  return !in_rows(kind, [&](auto form) {
    using Way = typename decltype(form)::Way;
    std::vector<typename Way::Input> inputs;
    for (int64_t i = 0; i < count; ++i) inputs.emplace_back(h[i], 1, columns[i], BLOCK);
    down_rows<Way>(count, values, scales, inputs, columns, y, rows);
  });
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
  return products(kind, count, values, scales, source.values, x_stride == 0, tokens, Target{y, narrow != 0}, rows,
                  columns, group);
}

// y[i] = D_i (silu(G_i x) * U_i x), fp32 [count, columns], for one token x [columns] (bf16 where `narrow`). up_values
// hold [G_i; U_i]: [2 * widths[i], columns]; down_values D_i: [columns, widths[i]]. Returns as above.
int conmoe_gated_experts(int up_kind, int down_kind, int64_t count, const void* const* up_values,
                         const void* const* up_scales, const void* const* down_values, const void* const* down_scales,
                         const void* x, float* y, const int64_t* widths, int64_t columns, int64_t up_group,
                         int64_t down_group, int narrow) {
  const Source source(x, narrow, columns);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += widths[i];
  std::vector<float> inner(size_t(total) + 1);
  std::vector<float*> h;
  for (int64_t i = 0, start = 0; i < count; start += widths[i++]) h.push_back(inner.data() + start);
  const int failed =
      gated(up_kind, count, up_values, up_scales, source.values, widths, h.data(), columns, up_group);
  if (failed) return failed;
  return downward(down_kind, count, down_values, down_scales, h.data(), widths, y, columns, down_group);
}

// out = sum over i of weights[i] * y[i] + sum over j of gates[j] * constants[j], in this order; y: fp32 [count, columns],
// constants: addresses of fp32 [columns] each; out bf16 where `narrow`.
void conmoe_combine(int64_t count, const float* y, const float* weights, int64_t extra, const float* const* constants,
                    const float* gates, void* out, int64_t columns, int narrow) {
  const Target target{out, narrow != 0};
  std::vector<float> total(size_t(columns), 0.0f);
  const auto add = [&](const float* row, float weight) {
    for (int64_t k = 0; k < columns; ++k) total[size_t(k)] += weight * row[k];
  };
  for (int64_t i = 0; i < count; ++i) add(y + i * columns, weights[i]);
  for (int64_t j = 0; j < extra; ++j) add(constants[j], gates[j]);
  for (int64_t k = 0; k < columns; ++k) target.put(k, total[size_t(k)]);
}

// A layer whose prototypes all lie in memory. Tables are by the order of the prototypes; `target` says which of them
// stands behind each of the router's slots, -1 for none.
struct Layer {
  int64_t up_kind, down_kind, slots, columns, up_group, down_group;
  const int64_t* target;
  const float* factor;  // of each slot, or null
  const void* const* up_values;
  const void* const* up_scales;
  const void* const* down_values;
  const void* const* down_scales;
  const int64_t* widths;
  const float* const* constants;  // of each slot, null where it has none; or null
};

// The routed experts' output of one token, `slots` and `gates` [k] as its router gave them (gates bf16 where
// `narrow_gates`, else fp32), x and out [columns] (bf16 where `narrow`). What meets on a prototype is added first, in
// fp64 and in the order of the slots. Returns how many prototypes there were, or -1 where a form cannot be taken.
int64_t conmoe_layer(const Layer* layer, const int64_t* slots, const void* gates, int narrow_gates, int64_t k,
                     const void* x, void* out, int narrow) {
  std::vector<int64_t> chosen;
  std::vector<double> sums;
  std::vector<const float*> constants;
  std::vector<float> shares;
  for (int64_t i = 0; i < k; ++i) {
    const int64_t slot = slots[i];
    if (slot < 0 || slot >= layer->slots) continue;
    const float gate =
        narrow_gates ? from_bf16(static_cast<const uint16_t*>(gates)[i]) : static_cast<const float*>(gates)[i];
    if (layer->constants && layer->constants[slot]) {
      constants.push_back(layer->constants[slot]);
      shares.push_back(gate);
    }
    const int64_t target = layer->target[slot];
    if (target < 0) continue;
    const double weight = double(gate) * (layer->factor ? double(layer->factor[slot]) : 1.0);
    const auto place = std::lower_bound(chosen.begin(), chosen.end(), target);
    const auto at = place - chosen.begin();
    if (place != chosen.end() && *place == target) {
      sums[size_t(at)] += weight;
    } else {
      chosen.insert(place, target);
      sums.insert(sums.begin() + at, weight);
    }
  }
  const auto count = int64_t(chosen.size());
  std::vector<const void*> tables[4];
  std::vector<int64_t> widths;
  std::vector<float> weights;
  const void* const* const sources[4] = {layer->up_values, layer->up_scales, layer->down_values, layer->down_scales};
  for (int64_t i = 0; i < count; ++i) {
    for (int j = 0; j < 4; ++j) tables[j].push_back(sources[j][chosen[size_t(i)]]);
    widths.push_back(layer->widths[chosen[size_t(i)]]);
    weights.push_back(float(sums[size_t(i)]));
  }
  std::vector<float> y(size_t(count * layer->columns) + 1);
  if (count && conmoe_gated_experts(int(layer->up_kind), int(layer->down_kind), count, tables[0].data(),
                                    tables[1].data(), tables[2].data(), tables[3].data(), x, y.data(), widths.data(),
                                    layer->columns, layer->up_group, layer->down_group, narrow))
    return -1;
  conmoe_combine(count, y.data(), weights.data(), int64_t(constants.size()), constants.data(), shares.data(), out,
                 layer->columns, narrow);
  return count;
}

// Rows of x over the root of their mean square, times a weight: [rows, columns], bf16 where `narrow`, else fp32; weight
// bf16 where `narrow_weight`. `plus_one` adds 1 to the weight; `early` rounds the rows to the format of x before the
// weight is applied.
void conmoe_rms_norm(const void* x, const void* weight, void* out, int64_t rows, int64_t columns, float epsilon,
                     int narrow, int narrow_weight, int plus_one, int early) {
  const Source source(x, narrow, rows * columns), factors(weight, narrow_weight, columns);
  const Target target{out, narrow != 0};
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = source.values + row * columns;
    float sums[LANES] = {0};
    int64_t k = 0;
    for (; k + LANES <= columns; k += LANES)
      for (int64_t i = 0; i < LANES; ++i) sums[i] += from[k + i] * from[k + i];
    float total = 0;
    for (; k < columns; ++k) total += from[k] * from[k];
    for (const float one : sums) total += one;
    const float scale = 1.0f / std::sqrt(total / float(columns) + epsilon);
    for (k = 0; k < columns; ++k) {
      float value = from[k] * scale;
      if (early && narrow) value = from_bf16(to_bf16(value));
      target.put(row * columns + k, value * (factors.values[k] + (plus_one ? 1.0f : 0.0f)));
    }
  }
}

// out = softmax(q K^T * scaling) V of one new token: q [groups, each, columns] and out [groups, each, width] in bf16, K_i
// [length, columns] and V_i [length, width] of every group in bf16; scores and sums are fp32.
void conmoe_attend(int64_t groups, const void* const* keys, const void* const* values, const void* q, int64_t each,
                   void* out, int64_t length, int64_t columns, int64_t width, float scaling) {
  const Source query(q, true, groups * each * columns);
  std::vector<float> scores(size_t(groups * each * length));
  const std::vector<const void*> none(size_t(groups), nullptr);
  products(BF16, groups, keys, none.data(), query.values, false, each, Target{scores.data(), false}, length, columns, 0);
  const int64_t rows = groups * each;
#pragma omp parallel for schedule(static) if (rows * length > MANY)
  for (int64_t row = 0; row < rows; ++row) softmax(scores.data() + row * length, length, scaling);
  weighted<Bf16>(groups, values, scores.data(), each, Target{out, true}, length, width);
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
