// The scores and weighted sums of a cache's rows (kv_rows.h) against one row after another, which is what they have to be
// bit for bit. Prints what is wrong; the exit status is whether anything is.

#include <cstddef>

#include <cmath>
#include <cstdio>
#include <random>

#include "kv_rows.h"

namespace {

std::mt19937 numbers(0);
int wrong = 0;

float number() { return float(int(numbers() % 2001) - 1000) * 1e-3f; }

bool same(float a, float b) { return to_bits(a) == to_bits(b); }

// `a` times `b` more than `sum`, as vectors have it (in one step only where the processor has one) or as what is left does.
float added(float sum, float a, float b, bool in_vector) {
  if (!in_vector) return std::fma(a, b, sum);
  float found[LANES];
  store(found, fma(all(a), all(b), all(sum)));
  return found[0];
}

// `tokens` of each of two heads over `length` rows of `width` numbers.
void check(int64_t tokens, int64_t length, int64_t width, bool packed) {
  constexpr int64_t HEADS = 2;
  const RowForm form{width, packed};
  std::vector<uint8_t> held[HEADS];
  std::vector<float> wide[HEADS];
  const void* rows[HEADS];
  std::vector<uint16_t> row(size_t(width), 0);
  for (int64_t head = 0; head < HEADS; ++head) {
    held[head].resize(size_t(length * form.nbytes()));
    wide[head].resize(size_t(length * width));
    for (int64_t r = 0; r < length; ++r) {
      for (uint16_t& one : row) one = to_bf16(number());
      uint8_t* const place = held[head].data() + r * form.nbytes();
      float* const expanded = wide[head].data() + r * width;
      if (packed) {
        pack_row(row.data(), width, place);
        expand_row(place, width, expanded);
      } else {
        std::memcpy(place, row.data(), size_t(2 * width));
        for (int64_t k = 0; k < width; ++k) expanded[k] = from_bf16(row[size_t(k)]);
      }
    }
    rows[head] = held[head].data();
  }
  std::vector<float> x(size_t(HEADS * tokens * width)), p(size_t(HEADS * tokens * length));
  for (float& one : x) one = number();
  for (float& one : p) one = number();
  std::vector<float> scores(p.size(), 7.0f), sums(x.size(), 7.0f);
  row_scores(HEADS, rows, form, x.data(), tokens, scores.data(), length);
  row_sums(HEADS, rows, form, p.data(), tokens, Target{sums.data(), false}, length);

  constexpr int64_t PART = 512;  // rows that are added up before those of the next part are
  int found = 0;
  for (int64_t head = 0; head < HEADS; ++head)
    for (int64_t t = 0; t < tokens; ++t) {
      const float* const input = x.data() + (head * tokens + t) * width;
      const float* const share = p.data() + (head * tokens + t) * length;
      for (int64_t r = 0; r < length; ++r) {
        float wanted;
        dot_row<Fp32, 1>(wide[head].data() + r * width, width, &input, &wanted);
        found += !same(scores[size_t((head * tokens + t) * length + r)], wanted);
      }
      for (int64_t k = 0; k < width; ++k) {
        float wanted = 0;
        for (int64_t first = 0; first < length; first += PART) {
          float part = 0;
          for (int64_t r = first; r < std::min(length, first + PART); ++r)
            part = added(part, wide[head][size_t(r * width + k)], share[r], k < width / LANES * LANES);
          wanted += part;
        }
        found += !same(sums[size_t((head * tokens + t) * width + k)], wanted);
      }
    }
  if (found && ++wrong < 20)
    std::printf("%d of %d tokens, %d rows of %d numbers%s\n", found, int(tokens), int(length), int(width),
                packed ? " in 8 bits" : "");
}

}  // namespace

int main() {
  const Allowed allowed(3);
  for (const bool packed : {false, true})
    for (const int64_t width : {24, 32, 64, 80, 128, 200})
      for (const int64_t length : {1, 16, 37, 530})
        for (const int64_t tokens : {1, 2, 3, 4, 7, 8}) check(tokens, length, width, packed);
  return wrong != 0;
}
