// The sums of low_bits.h in whole numbers against a loop over the numbers as low_bits.py describes them, and what they
// stand on. Prints what is wrong; the exit status is whether anything is.

#include <cstddef>

#include <cmath>
#include <cstdio>
#include <random>

#include "products.h"

namespace {

std::mt19937 numbers(0);
int wrong = 0;

void expect(bool right, const char* what, int bits) {
  if (!right && ++wrong < 20) std::printf("%s, %d bits\n", what, bits);
}

template <int BITS>
int number(const uint8_t* block, int64_t row, int column) {
  constexpr int PLANE = BITS == 4 ? 4 : 2, INSIDE = 8 / PLANE;
  const int step = column / 4, byte = column % 4;
  int found = block[step / INSIDE * 4 * TILE + 4 * row + byte] >> (PLANE * (step % INSIDE)) & ((1 << PLANE) - 1);
  if (BITS == 3) found |= (block[8 * TILE + 4 * row + byte] >> step & 1) << 2;
  return found;
}

// One group of columns: random numbers, and the largest that there are.
template <int BITS>
void sums(bool largest) {
  std::vector<uint8_t> block(TILE * 32 * BITS / 8, 255);
  int8_t q[4][32];
  const int8_t* tokens[4] = {q[0], q[1], q[2], q[3]};
  if (!largest)
    for (uint8_t& one : block) one = uint8_t(numbers());
  for (int t = 0; t < 4; ++t)
    for (int8_t& one : q[t]) one = largest ? int8_t(t % 2 ? -127 : 127) : int8_t(int(numbers() % 255) - 127);
  int32_t alone[1][TILE], together[4][TILE];
  Low<BITS>::template sums_of<4>(block.data(), tokens, together);
  for (int t = 0; t < 4; ++t) {
    Low<BITS>::template sums_of<1>(block.data(), tokens + t, alone);
    for (int64_t row = 0; row < TILE; ++row) {
      int32_t wanted = 0;
      for (int k = 0; k < 32; ++k) wanted += number<BITS>(block.data(), row, k) * q[t][k];
      expect(alone[0][row] == wanted, "a sum of one token", BITS);
      expect(together[t][row] == wanted, "a sum of four tokens", BITS);
    }
  }
  for (int64_t row = 0; row < TILE; ++row) {
    int8_t found[32];
    Low<BITS>::row_of(block.data() + 4 * row, found);
    for (int k = 0; k < 32; ++k) expect(found[k] == number<BITS>(block.data(), row, k), "a number of a row", BITS);
  }
}

// Tiles of a matrix: four tokens have the bits of one.
template <int BITS>
void tiles() {
  const int64_t rows = 192, columns = 224;
  std::vector<uint8_t> values(rows * columns * BITS / 8), scales((4 + columns / 32) * rows);
  for (auto* bytes : {&values, &scales})
    for (uint8_t& one : *bytes) one = uint8_t(numbers());
  for (int64_t row = 0; row < rows; ++row) {
    const uint16_t pair[2] = {to_bf16(0.01f * float(row)), to_bf16(0.3f)};
    std::memcpy(scales.data() + 4 * row, pair, sizeof(pair));
  }
  std::vector<float> x(4 * columns);
  for (float& one : x) one = float(numbers() % 1000) / 500 - 1;
  const Bytes tokens(x.data(), 4, columns, 32);
  const Token each[4] = {tokens.token(0), tokens.token(1), tokens.token(2), tokens.token(3)};
  for (int64_t row = 0; row < rows; row += TILE) {
    float together[4 * TILE], alone[TILE];
    const uint8_t* const place = values.data() + row * columns * BITS / 8;
    Low<BITS>::template times<4>(place, scales.data(), row, rows, columns, 32, each, together);
    for (int t = 0; t < 4; ++t) {
      Low<BITS>::tile(place, scales.data(), row, rows, columns, 32, each[t], alone);
      expect(!std::memcmp(alone, together + t * TILE, sizeof(alone)), "a tile of four tokens", BITS);
    }
  }
}

void lanes() {
  for (int first = 0; first < 256; first += LANES) {
    uint8_t bytes[LANES];
    float low[LANES], high[LANES], powers[LANES];
    for (int i = 0; i < LANES; ++i) bytes[i] = uint8_t(first + i);
    Lanes a, b;
    load_steps(bytes, a, b);
    store(low, a);
    store(high, b);
    store(powers, load_exponents(bytes));
    for (int i = 0; i < LANES; ++i) {
      expect(low[i] == float(bytes[i] & 15) && high[i] == 16.0f * float((bytes[i] >> 4) - 8), "a byte of scales", 8);
      expect(bytes[i] == 255 || powers[i] == std::ldexp(1.0f, bytes[i] - 127), "a power of two", 8);
    }
  }
}

template <int BITS>
void all() {
  for (int round = 0; round < 20; ++round) sums<BITS>(round == 0);
  tiles<BITS>();
}

}  // namespace

int main() {
  all<4>();
  all<3>();
  all<2>();
  lanes();
  return wrong != 0;
}
