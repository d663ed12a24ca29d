// Sixteen floats at a time, on whatever vectors the processor has, and numbers in 16 bits.
//
// Each of the three kinds of `Lanes` below adds up in its own order, always the same one.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
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

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>
#define CONMOE_NEON 1
#endif

namespace {

constexpr int64_t LANES = 16;

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
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
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline uint16_t to_fp16(float value) {  // likewise
  const uint32_t bits = to_bits(value), size = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (size > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and more
  if (size < 0x38800000u)  // below 2^-14: in steps of 2^-24, which is the last digit of a number from 0.5 to 1
    return uint16_t(sign | uint16_t(to_bits(from_bits(size) + 0.5f) - 0x3f000000u));
  return uint16_t(sign | uint16_t((size - 0x38000000u + 0xfffu + ((size >> 13) & 1)) >> 13));
}

// Room for numbers that are all written before they are read: a vector would set them to zero first. It begins where a
// line of the cache does, so that no vector lies in two of them.
template <class T>
class Room {
 public:
  explicit Room(int64_t count)
      : numbers(static_cast<T*>(::operator new[](size_t(count) * sizeof(T), std::align_val_t(LINE)))) {}
  T* data() { return numbers.get(); }
  const T* data() const { return numbers.get(); }
  T& operator[](int64_t index) { return numbers[size_t(index)]; }

 private:
  static constexpr size_t LINE = 64;
  struct Free {
    void operator()(T* place) const { ::operator delete[](place, std::align_val_t(LINE)); }
  };
  std::unique_ptr<T[], Free> numbers;
};

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
  float get(int64_t index) const {
    return narrow ? from_bf16(static_cast<uint16_t*>(place)[index]) : static_cast<float*>(place)[index];
  }
  Target from(int64_t index) const {
    return {static_cast<char*>(place) + index * (narrow ? 2 : 4), narrow};
  }
};

// Activations in fp32: as they are, or widened into a buffer that lives as long as this.
struct Source {
  Room<float> buffer;
  const float* values;
  Source(const void* x, bool narrow, int64_t count) : buffer(narrow ? count : 0) {
    if (!narrow) {
      values = static_cast<const float*>(x);
      return;
    }
    for (int64_t i = 0; i < count; ++i) buffer[i] = from_bf16(static_cast<const uint16_t*>(x)[i]);
    values = buffer.data();
  }
};

#if CONMOE_INTEGERS
inline float sum_of(__m256 x) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}
#endif

// ---- sixteen floats ------------------------------------------------------------------------------------------------
//
// `most` and `least` give their second argument where one of the two is NaN; `power_of_two` takes whole numbers from -126
// to 127.

#if CONMOE_AVX512

struct Lanes {
  __m512 v;
};
inline Lanes zero() { return {_mm512_setzero_ps()}; }
inline Lanes all(float value) { return {_mm512_set1_ps(value)}; }
inline Lanes load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline Lanes add(Lanes a, Lanes b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Lanes divide(Lanes a, Lanes b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Lanes most(Lanes a, Lanes b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Lanes least(Lanes a, Lanes b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Lanes power_of_two(Lanes a) {
  const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(a.v), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(whole, 23))};
}
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
// Of 16 bytes the lower halves, and 16 times the upper ones less 8.
inline void load_steps(const uint8_t* from, Lanes& low, Lanes& high) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  low.v = _mm512_cvtepi32_ps(_mm512_and_si512(wide, _mm512_set1_epi32(15)));
  high.v = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(240)), _mm512_set1_epi32(128)));
}
// 2^(e - 127) of 16 bytes e, also where it is below the least normal number.
inline Lanes load_exponents(const uint8_t* from) {
  const __m512i wide = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
  return {_mm512_castsi512_ps(_mm512_max_epu32(_mm512_slli_epi32(wide, 23), _mm512_set1_epi32(1 << 22)))};
}
// 16 pairs of bf16: the first of each, the second of each.
inline void load_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  const __m512i pairs = _mm512_loadu_si512(from);
  first.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000u))));
}
// The same of fp16.
inline void load_half_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  const __m512i pairs = _mm512_loadu_si512(from);
  first.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs));
  second.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)));
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
inline Lanes divide(Lanes x, Lanes y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Lanes most(Lanes x, Lanes y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Lanes least(Lanes x, Lanes y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline __m256 power_of_two(__m256 x) {
  const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(whole, 23));
}
inline Lanes power_of_two(Lanes x) { return {power_of_two(x.a), power_of_two(x.b)}; }
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
inline void load_steps(const uint8_t* from, Lanes& low, Lanes& high) {
  const __m256i mask = _mm256_set1_epi32(15), upper = _mm256_set1_epi32(240), middle = _mm256_set1_epi32(128);
  const __m256i a = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + 8)));
  low = {_mm256_cvtepi32_ps(_mm256_and_si256(a, mask)), _mm256_cvtepi32_ps(_mm256_and_si256(b, mask))};
  high = {_mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(a, upper), middle)),
          _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_and_si256(b, upper), middle))};
}
inline __m256 exponents(const uint8_t* from) {
  const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_max_epu32(_mm256_slli_epi32(wide, 23), _mm256_set1_epi32(1 << 22)));
}
inline Lanes load_exponents(const uint8_t* from) { return {exponents(from), exponents(from + 8)}; }
inline void load_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  const __m256i a = _mm256_loadu_si256((const __m256i*)from), b = _mm256_loadu_si256((const __m256i*)(from + 16));
  const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(a, upper)), _mm256_castsi256_ps(_mm256_and_si256(b, upper))};
}
// The same of fp16.
inline void load_half_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  float wide[2][LANES];
  for (int64_t i = 0; i < LANES; ++i) {
    wide[0][i] = from_fp16(from[2 * i]);
    wide[1][i] = from_fp16(from[2 * i + 1]);
  }
  first = load(wide[0]);
  second = load(wide[1]);
}
inline float sum(Lanes x) { return sum_of(_mm256_add_ps(x.a, x.b)); }

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
inline Lanes divide(Lanes a, Lanes b) { return each([&](int64_t i) { return a.v[i] / b.v[i]; }); }
inline Lanes most(Lanes a, Lanes b) { return each([&](int64_t i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes least(Lanes a, Lanes b) { return each([&](int64_t i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline Lanes power_of_two(Lanes a) {
  return each([&](int64_t i) { return from_bits(a.v[i] == a.v[i] ? uint32_t(int32_t(a.v[i]) + 127) << 23 : 0x7fc00000u); });
}
inline void store(float* to, Lanes a) { std::memcpy(to, a.v, sizeof(a.v)); }
inline Lanes load(const uint16_t* from) { return each([=](int64_t i) { return from_bf16(from[i]); }); }
inline Lanes load_half(const uint16_t* from) { return each([=](int64_t i) { return from_fp16(from[i]); }); }
inline Lanes load(const int32_t* from) { return each([=](int64_t i) { return float(from[i]); }); }
inline Lanes load(const int8_t* from) { return each([=](int64_t i) { return float(from[i]); }); }
inline void load_nibbles(const uint8_t* from, Lanes& low, Lanes& high) {
  low = each([=](int64_t i) { return float(int(from[i] & 15) - 8); });
  high = each([=](int64_t i) { return float(int(from[i] >> 4) - 8); });
}
inline void load_steps(const uint8_t* from, Lanes& low, Lanes& high) {
  low = each([=](int64_t i) { return float(from[i] & 15); });
  high = each([=](int64_t i) { return float(int(from[i] & 240) - 128); });
}
inline Lanes load_exponents(const uint8_t* from) {
  return each([=](int64_t i) { return from_bits(std::max(uint32_t(from[i]) << 23, 1u << 22)); });
}
inline void load_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  first = each([=](int64_t i) { return from_bf16(from[2 * i]); });
  second = each([=](int64_t i) { return from_bf16(from[2 * i + 1]); });
}
inline void load_half_pairs(const uint16_t* from, Lanes& first, Lanes& second) {
  first = each([=](int64_t i) { return from_fp16(from[2 * i]); });
  second = each([=](int64_t i) { return from_fp16(from[2 * i + 1]); });
}
inline float sum(Lanes a) {
  for (int64_t half = LANES / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) a.v[i] += a.v[i + half];
  return a.v[0];
}

#endif

// sums[i] = sum(x[i]), the same bits: what is added up is the same pairs in the same order, of many vectors at once where
// the processor has shuffles for it. Two vectors become one that has both their halves added up, four one with the
// quarters, and so on.
inline void sums_of(const Lanes* x, int64_t count, float* sums) {
  int64_t i = 0;
#if CONMOE_AVX512
  const auto halve = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  };
  const auto quarter = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  for (; i + 8 <= count; i += 8) {
    const __m512 a = quarter(halve(x[i].v, x[i + 1].v), halve(x[i + 2].v, x[i + 3].v));
    const __m512 b = quarter(halve(x[i + 4].v, x[i + 5].v), halve(x[i + 6].v, x[i + 7].v));
    const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
    // Each quarter begins with a sum of the first four vectors and one of the second four.
    const __m512 found = _mm512_add_ps(_mm512_shuffle_ps(c, c, 0x88), _mm512_shuffle_ps(c, c, 0xdd));
    const __m512i places = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm256_storeu_ps(sums + i, _mm512_castps512_ps256(_mm512_permutexvar_ps(places, found)));
  }
#elif CONMOE_AVX2
  const auto halve = [](Lanes a, Lanes b) {
    const __m256 first = _mm256_add_ps(a.a, a.b), second = _mm256_add_ps(b.a, b.b);
    return _mm256_add_ps(_mm256_permute2f128_ps(first, second, 0x20), _mm256_permute2f128_ps(first, second, 0x31));
  };
  for (; i + 4 <= count; i += 4) {
    const __m256 a = halve(x[i], x[i + 1]), b = halve(x[i + 2], x[i + 3]);
    const __m256 c = _mm256_add_ps(_mm256_shuffle_ps(a, b, 0x44), _mm256_shuffle_ps(a, b, 0xee));
    const __m256 found = _mm256_add_ps(_mm256_shuffle_ps(c, c, 0x88), _mm256_shuffle_ps(c, c, 0xdd));
    const __m256 sorted = _mm256_permutevar8x32_ps(found, _mm256_setr_epi32(0, 4, 1, 5, 0, 0, 0, 0));
    _mm_storeu_ps(sums + i, _mm256_castps256_ps128(sorted));
  }
#endif
  for (; i < count; ++i) sums[i] = sum(x[i]);
}

}  // namespace
