// Products of uint8 activations and a block-sparse int8 matrix, requantised.
//
// A tile is a few vectors of positions and all input channels, word (group, position) holding four channels. It is
// laid out anew in memory of the thread's own, so that every load is aligned and it stays in the first-level cache
// while all rows of the matrix pass. The four weights of a block are repeated in a vector and multiplied with the
// tile's vectors of that group: one load and one dot product each.
#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "lanes.h"
#include "tile.h"

namespace fxprune {
namespace {

// Block columns, read four at a time and long before they are needed: the address of a tile's words depends on a
// column, and loads that wait for another load hold up all loads behind them.
struct Columns {
  const int16_t* last;  // Where the last four columns of the matrix begin.

  uint64_t four(const int16_t* at) const {
    const int16_t* from = std::min(at, last);
    uint64_t columns;
    std::memcpy(&columns, from, 8);
    return columns >> (16 * (at - from) & 63);
  }
};

// Sum the products of the `blocks` blocks of R rows with T vectors of positions. R T sums that are few would wait for
// one another, so that blocks take turns with U sets of them. `near` holds the first four columns.
template <int R, int T, int U>
inline __attribute__((always_inline)) void accumulate(const uint8_t* tile, int64_t pitch, const int8_t* values,
                                                      const int16_t* columns, int64_t blocks, uint64_t near,
                                                      const Columns& all, Int (&sums)[U][R][T]) {
  const auto block = [&](int turn) __attribute__((always_inline)) {
    const uint8_t* words = tile + (near & 0xffff) * pitch;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Weight w = repeat(values + (turn * R + r) * 4);
#pragma GCC unroll 16
      for (int t = 0; t < T; ++t) sums[turn % U][r][t] = dot(sums[turn % U][r][t], load(words + t * kVectorBytes), w);
    }
    near >>= 16;
  };
  uint64_t far = all.four(columns + 4);
  for (; blocks >= 4; blocks -= 4) {
#pragma GCC unroll 4
    for (int turn = 0; turn < 4; ++turn) block(turn);
    near = far;
    columns += 4;
    values += 16 * R;
    far = all.four(columns + 4);
  }
  if (blocks > 0) block(0);
  if (blocks > 1) block(1);
  if (blocks > 2) block(2);
}

// Compute the channels of a part for one tile of positions.
template <int R, int T>
void multiply(const Tile& tile, const Matrix& matrix, const Requantization& numbers, const Output& output,
              const Part& part) {
  constexpr int U = R * T >= 8 ? 1 : R * T >= 4 ? 2 : 4;
  const bool is_float = output.floats != nullptr;
  // Whole words of whole vectors are written where they belong, all else by way of the stage.
  const bool is_direct = !is_float && output.layout == Layout::packed && tile.count == T * kLanes;
  const int64_t at_once = is_float ? kSide : 4 * kSide;
  const Columns all{matrix.columns + matrix.blocks - 4};
  Quad<T> quad{numbers, {}};
  uint64_t near = all.four(matrix.columns + matrix.row_pointers[part.first_channel / R]);
  for (int64_t group = part.first_channel; group < part.last_channel; group += at_once) {
    const int64_t end = std::min(group + at_once, part.last_channel);
    for (int64_t channel = group; channel < end; channel += R) {
      const int32_t first = matrix.row_pointers[channel / R], last = matrix.row_pointers[channel / R + 1];
      Int sums[U][R][T];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const Int offset = fill(channel + r < end ? numbers.offsets[channel + r] : 0);
#pragma GCC unroll 4
        for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) sums[u][r][t] = u == 0 ? offset : fill(0);
      }
      const uint64_t now = near;
      near = all.four(matrix.columns + last);
      accumulate<R, T, U>(tile.words, tile.pitch, matrix.values + static_cast<int64_t>(first) * R * 4,
                          matrix.columns + first, last - first, now, all, sums);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          Int sum = sums[0][r][t];
#pragma GCC unroll 4
          for (int u = 1; u < U; ++u) sum = add(sum, sums[u][r][t]);
          quad.sums[(channel + r) % 4][t] = sum;
        }
      const int64_t done = std::min(channel + R, end);
      if (done % 4 != 0 && done != end) continue;
      const int64_t begin = (done - 1) / 4 * 4, row = begin - group;
      if (is_float)
        quad.to_floats(begin, done - begin, tile.stage + row * tile.pitch, tile.pitch);
      else if (is_direct)
        quad.to_levels(begin, done - begin, output.levels + (begin / 4 * tile.all + tile.first) * 4);
      else
        quad.to_levels(begin, done - begin, tile.stage + row / 4 * tile.pitch);
    }
    if (!is_direct) flush(tile, group, end - group, output);
  }
}

// Compute the channels of a part for one position, which would leave all lanes of a tile but one empty: the lanes are
// four rows of blocks and as many columns as fit. `tile.words` [groups][4] holds every word of the position four times.
void multiply_one(const Tile& tile, const Matrix& matrix, const Requantization& numbers, const Output& output,
                  const Part& part) {
  constexpr int64_t kBlocks = kLanes / 4;
  Quad<1> quad{numbers, {}};
  for (int64_t channel = part.first_channel; channel < part.last_channel; channel += 4) {
    const int64_t begin = matrix.row_pointers[channel / 4], end = matrix.row_pointers[channel / 4 + 1];
    Int sums[4] = {fill(0), fill(0), fill(0), fill(0)};
    for (int64_t block = begin, turn = 0; block < end; block += kBlocks, turn = (turn + 1) % 4) {
      const int16_t* columns = matrix.columns + block;
      alignas(64) uint8_t words[kVectorBytes], weights[kVectorBytes];
      const uint8_t *x = tile.words + columns[0] * 16,
                    *w = reinterpret_cast<const uint8_t*>(matrix.values) + block * 16;
      if (block + kBlocks > end) {
        std::memset(weights, 0, sizeof weights);
        std::memset(words, 0, sizeof words);
        std::memcpy(weights, w, static_cast<size_t>((end - block) * 16));
        w = weights;
      }
      if (block + kBlocks > end || columns[kBlocks - 1] - columns[0] != kBlocks - 1) {
        for (int64_t i = 0; i < std::min(kBlocks, end - block); ++i)
          std::memcpy(words + 16 * i, tile.words + columns[i] * 16, 16);
        x = words;
      }
      sums[turn] = dot_each(sums[turn], load(x), load(w));
    }
    int32_t lanes[kLanes], rows[4] = {0, 0, 0, 0};
    store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
    for (int lane = 0; lane < kLanes; ++lane) rows[lane % 4] += lanes[lane];
    const int64_t count = std::min<int64_t>(4, part.last_channel - channel);
    for (int i = 0; i < count; ++i) quad.sums[i][0] = fill(rows[i] + numbers.offsets[channel + i]);
    if (output.floats)
      quad.to_floats(channel, count, tile.stage, tile.pitch);
    else
      quad.to_levels(channel, count, tile.stage);
    flush(tile, channel, count, output);
  }
}

using Multiply = decltype(&multiply<1, 1>);

// How many vectors of positions have their sums in registers, beside R rows.
constexpr int in_registers(int R) {
#if FXPRUNE_AVX512
  return R == 4 ? 6 : 8;
#else
  return 8 / R;
#endif
}

template <int R, int T>
Multiply with_vectors(int64_t vectors) {
  if constexpr (T > 1)
    if (vectors < T) return with_vectors<R, T - 1>(vectors);
  return multiply<R, T>;
}

Multiply kernel(int block_rows, int64_t vectors) {
  if (block_rows == 1) return with_vectors<1, in_registers(1)>(vectors);
  return block_rows == 2 ? with_vectors<2, in_registers(2)>(vectors) : with_vectors<4, in_registers(4)>(vectors);
}

// How many vectors of positions a tile has at most: its sums stay in registers, its words in the first-level cache.
int64_t most_vectors(int block_rows, int64_t groups) {
  const int64_t in_cache = 40 * 1024 / (std::max<int64_t>(groups, 1) * kVectorBytes), most = in_registers(block_rows);
  return std::clamp<int64_t>(in_cache, std::min<int64_t>(3, most), most);
}

}  // namespace

void linear(const Activations& input, const Matrix& matrix, const Requantization& numbers, const Output& output,
            const Part& part) {
  if (part.first_position >= part.last_position || part.first_channel >= part.last_channel) return;
  if (matrix.blocks < 4) {  // Columns are read four at a time.
    int16_t columns[4] = {0, 0, 0, 0};
    std::copy_n(matrix.columns, matrix.blocks, columns);
    linear(input, {matrix.values, columns, matrix.row_pointers, 4, matrix.block_rows}, numbers, output, part);
    return;
  }
  const int64_t vectors = (part.last_position - part.first_position + kLanes - 1) / kLanes;
  if (part.last_position - part.first_position == 1 && matrix.block_rows == 4) {
    uint8_t* words = scratch(static_cast<size_t>(input.groups() * 16 + kSide * kVectorBytes));
    for (int64_t repeat = 0; repeat < 4; ++repeat) gather(input, part.first_position, 1, words + 4 * repeat, 16);
    const Tile tile{words, words + input.groups() * 16, kVectorBytes, part.first_position, 1, input.positions};
    return multiply_one(tile, matrix, numbers, output, part);
  }
  const int64_t most = most_vectors(matrix.block_rows, input.groups());
  const int64_t tiles = (vectors + most - 1) / most;
  const int64_t pitch = (vectors + tiles - 1) / tiles * kVectorBytes;
  uint8_t* words = scratch(static_cast<size_t>((input.groups() + kSide) * pitch));
  int64_t first = part.first_position;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t width = vectors / tiles + (i < vectors % tiles ? 1 : 0);
    const int64_t count = std::min(width * kLanes, part.last_position - first);
    gather(input, first, count, words, pitch);
    const Tile tile{words, words + input.groups() * pitch, pitch, first, count, input.positions};
    kernel(matrix.block_rows, width)(tile, matrix, numbers, output, part);
    first += count;
  }
}

}  // namespace fxprune
