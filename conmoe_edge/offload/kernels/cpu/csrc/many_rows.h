// Stored weights times many tokens, and gated experts for the tokens of a prompt.
//
// A thread expands 64 rows of a matrix into its own caches and multiplies them with all tokens that want them. For an
// expert that few tokens want that does not pay: it is computed by the kernels of single tokens (experts.h). Outputs of
// experts are added in the order in which they are given, by one thread for each number, so neither threads nor how
// experts are divided among calls show in a result.

#pragma once

#include "expand_strips.h"
#include "experts.h"

namespace {

constexpr int64_t AT_A_TIME = 504;      // tokens: whole tiles of every size, whose products stay in the second cache
constexpr int64_t TOGETHER = 1 << 11;   // tokens of experts whose activations lie in memory at a time

constexpr int64_t FEW_AT_A_TIME = 128;  // tokens of experts that have few each, whose activations lie in memory as fp32

// Whether the products below take a matrix.
inline bool strips_take(int kind, int64_t rows, int64_t columns, int64_t group) {
  if (kind == INT8) return rows > 0 && columns > 0;
  return tiled(kind) && rows % TILE == 0 && grouped(kind, columns, group) && group % (UNROLLED * QUAD) == 0 &&
         group <= Packed::MOST_BLOCK;
}

// Columns of activations that share a scale beside a form.
inline int64_t block_of(int kind, int64_t group) { return kind == INT8 ? BLOCK : group; }

// Floats of a thread for rows that begin anywhere: two tiles.
inline int64_t panel_room(int64_t block) { return Panel::size(2 * PANEL / STRIP, SLICE, SLICE / block); }

// Rows that a thread takes after others: their first columns are brought while the last ones of those are multiplied. No
// values: none.
struct Coming {
  Stored w;
  int64_t row;
};

// Rows `row`... of a matrix times the tokens `first`... of `x` (a tile begins there), [tokens, step].
template <class Form>
void panel_times(const Stored& w, int64_t row, int64_t height, const Packed& x, int64_t first, int64_t tokens, float* room,
                 float* out, int64_t step, const Coming& next) {
  using How = Strips<Form>;
  const int64_t wide = up_to(w.columns, x.block);  // of tokens that are there for wider matrices, the first columns
  constexpr int64_t WHOLE = std::is_same_v<Form, Int8> ? 1 : TILE;  // tiles
  const int64_t begin = row % WHOLE;
  const int64_t tiles = (tokens + Quads::TOKENS - 1) / Quads::TOKENS;
  for (int64_t from = 0; from < wide; from += SLICE) {
    const int64_t columns = std::min(SLICE, wide - from);
    const Panel panel(room, 2 * PANEL / STRIP, columns, columns / x.block);
    How::slice(w, row - begin, from, panel);
    if (begin + height > TILE) How::slice(w, row - begin + TILE, from, panel.from(TILE / STRIP));
    const Panel here = panel.from(begin / STRIP);
    const bool last = from + columns == wide;
    const Part part{from == 0, last, x.block / QUAD, How::BY};
    const Stored& behind = last ? next.w : w;
    const int64_t its_row = last ? next.row - next.row % WHOLE : row - begin, its_from = last ? 0 : from + SLICE;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t t = tile * Quads::TOKENS, count = std::min(Quads::TOKENS, tokens - t);
      if (behind.values)
        How::ahead(behind, its_row, its_from, How::LINES * tile / tiles, How::LINES * (tile + 1) / tiles);
      Sums<How::SCALES, How::ZEROS, How::SAFE>::template tile<>(
          here, height, x.tile(first + t, count, from), part, out + t * step, step);
    }
  }
}

// `panel_times` of a form, and what it subtracts from its numbers.
struct Times {
  void (*panel)(const Stored&, int64_t, int64_t, const Packed&, int64_t, int64_t, float*, float*, int64_t, const Coming&);
  int32_t offset;
};

inline Times times_of(int kind) {
  Times found{panel_times<Int8>, Strips<Int8>::OFFSET};
  in_tiles(kind, [&](auto form) {
    using Form = decltype(form);
    found = {panel_times<Form>, Strips<Form>::OFFSET};
  });
  return found;
}

// Activations in bf16 or fp32, a row each.
struct Rows {
  const void* x;
  bool narrow;
  int64_t columns;
  // Some of a row; `room` is for as many floats.
  const float* some(int64_t row, int64_t from, int64_t width, float* room) const {
    const int64_t at = row * columns + from;
    if (!narrow) return static_cast<const float*>(x) + at;
    for (int64_t k = 0; k < width; ++k) room[k] = from_bf16(static_cast<const uint16_t*>(x)[at + k]);
    return room;
  }
};

// Rows of x, rounded once: several experts take each of them.
struct RoundedRows {
  int64_t columns, block, blocks;
  Room<int8_t> q;
  std::vector<Rounded> made;

  RoundedRows(const Rows& x, int64_t tokens, int64_t block)
      : columns(up_to(x.columns, block)), block(block), blocks(columns / block), q(tokens * columns), made(size_t(tokens * blocks)) {
    shared_loop(tokens, evenly(tokens, tokens * columns > MANY), [&](int64_t row, int64_t) {
      for (int64_t b = 0; b < blocks; ++b) {
        float wide[Packed::MOST_BLOCK], room[Packed::MOST_BLOCK];
        const int64_t width = std::min(block, x.columns - b * block);
        int8_t* const to = q.data() + row * columns + b * block;
        std::fill(to + width, to + block, int8_t(0));
        made[size_t(row * blocks + b)] = Rounded(x.some(row, b * block, width, wide), to, width, room);
      }
    });
  }
};

// Token `t` of `tokens` that begin at `first`: row `row` of x, or of `ready` where there is one.
inline void pack_row(Packed& to, const Rows& x, const RoundedRows* ready, int64_t row, int64_t first, int64_t tokens, int64_t t,
                     int32_t offset) {
  float room[Packed::MOST_BLOCK];
  const int64_t tile = t / Quads::TOKENS * Quads::TOKENS, count = std::min(Quads::TOKENS, tokens - tile);
  for (int64_t b = 0; ready && b < to.blocks; ++b)
    to.put_block(first + tile, count, t - tile, b, ready->q.data() + row * to.columns + b * to.block,
                 ready->made[size_t(row * to.blocks + b)], offset);
  if (ready) return;
  for (int64_t k = 0; k < x.columns; k += to.block) {
    const int64_t width = std::min(to.block, x.columns - k);
    to.put(first + tile, count, t - tile, x.some(row, k, width, room), k, width, offset);
  }
}

// y[t] = W x[t] for `tokens` tokens: [tokens, rows].
void many_rows(int kind, const Stored& w, const Rows& x, int64_t tokens, Target y) {
  const Times times = times_of(kind);
  const int64_t block = block_of(kind, w.group);
  Packed packed(tokens, w.columns, block);
  const int64_t most = std::min(tokens, AT_A_TIME), panels = (w.rows + PANEL - 1) / PANEL;
  const int64_t space = panel_room(block);
  RoomOfThreads rooms(space + most * PANEL);
  const bool worth = tokens * w.rows * w.columns > MANY;
  shared_loop(tokens, evenly(tokens, worth), [&](int64_t t, int64_t) {
    pack_row(packed, x, nullptr, t, 0, tokens, t, times.offset);
  });
  shared_loop(panels, evenly(panels, worth), [&](int64_t panel, int64_t thread) {
    const int64_t row = panel * PANEL, height = std::min(PANEL, w.rows - row);
    float *const room = rooms.own(thread), *const out = room + space;
    for (int64_t first = 0; first < tokens; first += AT_A_TIME) {
      const int64_t some = std::min(AT_A_TIME, tokens - first);
      times.panel(w, row, height, packed, first, some, room, out, PANEL, {w, first + some < tokens ? row : row + PANEL});
      for (int64_t t = 0; t < some; ++t)
        for (int64_t r = 0; r < height; ++r) y.put((first + t) * w.rows + row + r, out[t * PANEL + r]);
    }
  });
}

// Experts with the tokens that each of them gets: `rows[starts[i]]`... `rows[starts[i + 1] - 1]` are rows of x and of
// the outputs, `weights` what the results are multiplied with.
struct Routed {
  Gated ups;
  Down downs;
  const int64_t* starts;
  const int64_t* rows;
  const float* weights;
};

// Neurons that a thread takes at once: whole panels, and whole groups of the down matrix; whether there are so many.
inline int64_t strip_of(int64_t block) { return std::max(PANEL, block); }
inline bool whole_strips(int64_t block) { return strip_of(block) % block == 0 && strip_of(block) % PANEL == 0; }

// Up to how many tokens of an expert the kernels of single tokens take less time (benchmarks/few_tokens.py): those read
// weights as they lie, once for two tokens, where the products here expand them for any number of tokens. Not measured
// with NEON: as many as a tile has, for fewer of which it is not filled.
constexpr int64_t few_tokens(int up_kind) {
#if CONMOE_WIDE_BYTES
  return up_kind == INT8 ? 1 : up_kind == MXFP4 ? 3 : up_kind == Q4 || up_kind == Q3 || up_kind == Q2 ? 6 : 4;
#elif CONMOE_INTEGERS
  return up_kind == Q3 ? 3 : up_kind == MXFP4 ? 5 : 6;
#else
  return Quads::TOKENS;
#endif
}

// What those experts of `first`... `last` - 1 that get up to `few` tokens make of them, by the kernels of single tokens.
struct FewTokens {
  std::vector<const float*> outputs;  // of each expert, a row for each of its tokens; null where it gets more
  Room<float> y;

  FewTokens(int64_t first, int64_t last, int64_t few, const int64_t* starts, int64_t columns)
      : outputs(size_t(last - first), nullptr), y(places(first, last, few, starts) * columns) {}

  static int64_t places(int64_t first, int64_t last, int64_t few, const int64_t* starts) {
    int64_t found = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t mine = starts[i + 1] - starts[i];
      if (mine <= few) found += mine;
    }
    return found;
  }

  // 0, or another code.
  int64_t compute(int up_kind, int down_kind, const Routed& all, int64_t first, int64_t last, int64_t few, const Rows& x,
                  int64_t up_group, int64_t columns) {
    std::vector<const void*> tables[4];
    std::vector<const uint16_t*> biases[2];
    std::vector<int64_t> widths, groups, slots;
    Askers askers;
    for (int64_t i = first; i < last; ++i) {
      if (all.starts[i + 1] - all.starts[i] > few) continue;
      outputs[size_t(i - first)] = y.data() + int64_t(slots.size()) * columns;
      if (all.starts[i + 1] == all.starts[i]) continue;
      for (int64_t slot = all.starts[i]; slot < all.starts[i + 1]; ++slot) {
        askers.tokens.push_back(int64_t(slots.size()));
        slots.push_back(slot);
      }
      askers.starts.push_back(int64_t(slots.size()));
      const void* const* const from[4] = {all.ups.values, all.ups.scales, all.downs.values, all.downs.scales};
      for (int j = 0; j < 4; ++j) tables[j].push_back(from[j][i]);
      biases[0].push_back(all.ups.bias_of(i));
      biases[1].push_back(all.downs.bias ? all.downs.bias[i] : nullptr);
      widths.push_back(all.ups.widths[i]);
      groups.push_back(all.downs.groups[i]);
    }
    if (slots.empty()) return 0;
    const auto tokens = int64_t(slots.size());
    Room<float> wide(tokens * columns);
    for (int64_t t = 0; t < tokens; ++t) {
      float* const to = wide.data() + t * columns;
      const float* const row = x.some(all.rows[slots[size_t(t)]], 0, columns, to);
      if (row != to) std::copy_n(row, columns, to);
    }
    const Gated ups{int64_t(widths.size()), tables[0].data(), tables[1].data(), biases[0].data(), widths.data(),
                    all.ups.gate};
    const Down downs{tables[2].data(), tables[3].data(), biases[1].data(), groups.data()};
    return gated_experts(up_kind, down_kind, ups, downs, askers, wide.data(), tokens, y.data(), columns, up_group);
  }
};

// The experts `first`... `last` - 1: out [.., columns] += weight * D gate(G x, U x), added in their order. 0, or another
// code.
int64_t some_experts(int up_kind, int down_kind, const Routed& all, int64_t first, int64_t last, int64_t few, const Rows& x,
                     const RoundedRows* ready, int64_t up_group, float* out, int64_t columns) {
  FewTokens aside(first, last, few, all.starts, columns);
  if (const int64_t code = aside.compute(up_kind, down_kind, all, first, last, few, x, up_group, columns)) return code;
  const Times up = times_of(up_kind), down = times_of(down_kind);
  const Gated& ups = all.ups;
  const int64_t begin = all.starts[first], tokens = all.starts[last] - begin, block = block_of(up_kind, up_group);
  const int64_t down_block = block_of(down_kind, all.downs.groups[first]);
  const int64_t strip = strip_of(down_block);
  int64_t widest = 0, most = 0;
  std::vector<int64_t> widths;
  for (int64_t i = first; i < last; ++i) {
    const bool here = !aside.outputs[size_t(i - first)];
    widths.push_back(here ? ups.widths[i] : 0);
    if (!here) continue;
    widest = std::max(widest, ups.widths[i]);
    most = std::max(most, std::min(AT_A_TIME, all.starts[i + 1] - all.starts[i]));
  }
  const Blocks strips(last - first, widths.data(), strip);
  const int64_t packing = most ? tokens : 0;
  Packed packed(packing, columns, block), inner(packing, widest, down_block);
  const int64_t space = std::max(panel_room(block), panel_room(down_block));
  RoomOfThreads rooms(space + most * 2 * strip);
  const bool apart_rows = ups.gate.interleaved != 0;
  const auto up_of = [&](int64_t which) {
    return Stored{ups.values[which], ups.scales[which], 2 * ups.widths[which], columns, up_group};
  };
  const auto down_of = [&](int64_t which) {
    return Stored{all.downs.values[which], all.downs.scales[which], columns, ups.widths[which], all.downs.groups[which]};
  };
  const bool worth = tokens * widest * columns > MANY;
  shared_loop(packing, evenly(packing, worth), [&](int64_t slot, int64_t) {
    const int64_t which = std::upper_bound(all.starts + first, all.starts + last + 1, begin + slot) - all.starts - 1;
    if (aside.outputs[size_t(which - first)]) return;
    const int64_t from = all.starts[which] - begin, mine = all.starts[which + 1] - all.starts[which];
    pack_row(packed, x, ready, all.rows[begin + slot], from, mine, slot - from, up.offset);
  });
  shared_loop(strips.all(), worth ? 2 : strips.all(), [&](int64_t number, int64_t thread) {
    int64_t place = number;
    const int64_t which = first + strips.find(&place), width = ups.widths[which], neuron = place * strip;
    const int64_t height = std::min(strip, width - neuron);
    const Stored w = up_of(which);
    const uint16_t* const bias = ups.bias_of(which);
    float *const room = rooms.own(thread), *const both = room + space;
    const int64_t from = all.starts[which] - begin, mine = all.starts[which + 1] - all.starts[which];
    // Two runs of rows, as in `gated_rows`.
    const int64_t run[2] = {apart_rows ? 2 * neuron : neuron, apart_rows ? 2 * neuron + height : width + neuron};
    Coming after{};
    if (number + 1 < strips.all()) {
      place = number + 1;
      after.w = up_of(first + strips.find(&place));
      after.row = (apart_rows ? 2 : 1) * place * strip;
    }
    for (int64_t t = 0; t < mine; t += AT_A_TIME) {
      const int64_t some = std::min(AT_A_TIME, mine - t);
      for (int64_t half = 0; half < 2; ++half)
        for (int64_t row = 0; row < height; row += PANEL) {
          const int64_t rest = height - row;
          const bool done = rest <= PANEL && half == 1;
          const Coming more{w, rest > PANEL ? run[half] + row + PANEL : run[1 - half]};
          up.panel(w, run[half] + row, std::min(PANEL, rest), packed, from + t, some, room, both + half * strip + row,
                   2 * strip, done && t + some == mine ? after : more);
        }
      for (int64_t i = 0; i < some; ++i) {
        float* const one = both + i * 2 * strip;
        float* const other = one + strip;
        if (bias)
          for (int64_t r = 0; r < height; ++r) {
            one[r] += from_bf16(bias[run[0] + r]);
            other[r] += from_bf16(bias[run[1] + r]);
          }
        if (apart_rows) {
          float turned[2 * Packed::MOST_BLOCK];
          std::copy_n(one, height, turned);
          std::copy_n(other, height, turned + height);
          for (int64_t r = 0; r < height; ++r) {
            one[r] = turned[2 * r];
            other[r] = turned[2 * r + 1];
          }
        }
        gate(one, other, height, ups.gate);
        const int64_t tile = (t + i) / Quads::TOKENS * Quads::TOKENS, count = std::min(Quads::TOKENS, mine - tile);
        inner.put(from + tile, count, t + i - tile, other, neuron, height, down.offset);
      }
    }
  });
  const int64_t panels = (columns + PANEL - 1) / PANEL;
  shared_loop(panels, worth ? 1 : panels, [&](int64_t panel, int64_t thread) {
    const int64_t row = panel * PANEL;
    float *const room = rooms.own(thread), *const found = room + space;
    const int64_t height = std::min(PANEL, columns - row);
    for (int64_t which = first; which < last; ++which) {
      if (const float* const made = aside.outputs[size_t(which - first)]) {
        for (int64_t slot = all.starts[which]; slot < all.starts[which + 1]; ++slot) {
          const float* const value = made + (slot - all.starts[which]) * columns + row;
          float* const to = out + all.rows[slot] * columns + row;
          for (int64_t r = 0; r < height; ++r) to[r] += all.weights[slot] * value[r];
        }
        continue;
      }
      const Stored w = down_of(which);
      const uint16_t* const bias = all.downs.bias ? all.downs.bias[which] : nullptr;
      int64_t then = which + 1;
      while (then < last && aside.outputs[size_t(then - first)]) ++then;
      Coming after{};
      if (then < last) after = {down_of(then), row};
      const int64_t from = all.starts[which] - begin, mine = all.starts[which + 1] - all.starts[which];
      for (int64_t t = 0; t < mine; t += AT_A_TIME) {
        const int64_t some = std::min(AT_A_TIME, mine - t);
        down.panel(w, row, height, inner, from + t, some, room, found, PANEL, t + some < mine ? Coming{w, row} : after);
        for (int64_t i = 0; i < some; ++i) {
          const int64_t slot = all.starts[which] + t + i;
          const float weight = all.weights[slot];
          float* const to = out + all.rows[slot] * columns + row;
          for (int64_t r = 0; r < height; ++r) {
            const float value = bias ? found[i * PANEL + r] + from_bf16(bias[row + r]) : found[i * PANEL + r];
            to[r] += weight * value;
          }
        }
      }
    }
  });
  return 0;
}

// All experts of a call, those of up to `TOGETHER` tokens at a time; x has `tokens` rows. `few`: up to how many tokens of
// an expert the kernels of single tokens compute it; below 0 as many as suit its form. 0, or another code.
int64_t many_experts(int up_kind, int down_kind, const Routed& all, int64_t few, const Rows& x, int64_t tokens,
                     int64_t up_group, float* out, int64_t columns) {
  if (few < 0) few = few_tokens(up_kind);
  const int64_t count = all.ups.count;
  if (!strips_take(up_kind, TILE, columns, up_group)) return FORM;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t width = all.ups.widths[i], group = all.downs.groups[i];
    if (width <= 0 || all.starts[i + 1] < all.starts[i]) return ARGUMENT;
    if (tiled(up_kind) && 2 * width % TILE) return FORM;
    if (!strips_take(down_kind, columns, width, group) || !whole_strips(block_of(down_kind, group))) return FORM;
  }
  std::unique_ptr<RoundedRows> ready;
  if (all.starts[count] - all.starts[0] >= 2 * tokens)
    ready = std::make_unique<RoundedRows>(x, tokens, block_of(up_kind, up_group));
  for (int64_t first = 0, last = 0; first < count; first = last) {
    const int64_t group = all.downs.groups[first];
    for (last = first + 1; last < count && all.downs.groups[last] == group; ++last)
      if (all.starts[last + 1] - all.starts[first] > TOGETHER ||
          FewTokens::places(first, last + 1, few, all.starts) > FEW_AT_A_TIME)
        break;
    if (all.starts[last] == all.starts[first]) continue;
    const int64_t code = some_experts(up_kind, down_kind, all, first, last, few, x, ready.get(), up_group, out, columns);
    if (code) return code;
  }
  return 0;
}

// Has the compiler believe that a register was changed.
template <class Sum>
inline Sum kept(Sum sum) {
#if CONMOE_INTEGERS
  __asm__ volatile("" : "+v"(sum));
#elif CONMOE_NEON
  __asm__ volatile("" : "+w"(sum));
#endif
  return sum;
}

// Products in registers, as many as rows and tokens of a tile have in so many rounds, by every thread: operations. 0
// without vectors, where the compiler chooses what becomes of them.
template <class V>
int64_t byte_products(int64_t rounds) {
  std::atomic<int64_t> done{0};
#if CONMOE_INTEGERS || CONMOE_NEON
  shared_loop(threads_allowed, 1, [&](int64_t, int64_t) {
    constexpr int64_t COUNT = V::VECTORS * V::TOKENS;  // one after another, so that they stay in registers
    typename V::Sum sums[COUNT];
    for (auto& one : sums) one = V::start(0);
    int8_t bytes[LINE];
    std::fill_n(bytes, LINE, int8_t(1));
    const auto w = V::load(bytes);
    auto x = V::four(bytes);
    for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 16
      for (int64_t i = 0; i < COUNT; ++i) {
        x = kept(x);
        if constexpr (V::SHORT)
          sums[i] = kept(V::add_short(sums[i], w, x));
        else
          sums[i] = kept(V::add(sums[i], w, x));
      }
    done += 2 * rounds * COUNT * V::ROWS * QUAD;
  });
#endif
  return done;
}

}  // namespace
