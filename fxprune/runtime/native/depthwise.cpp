// Depthwise convolutions of uint8 images, channels-last, requantised.
//
// A position sums its taps four at a time: their bytes are interleaved, so that one dot product adds four taps of every
// channel. Weights are interleaved once for all positions. Where positions lie beside each other in memory, a few of
// them go together as one with so many channels more, so that these fill whole blocks.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "lanes.h"
#include "table.h"

namespace fxprune {
namespace {

// Channels that are worked on at once.
constexpr int64_t kBlock = 4 * kLanes;

using Words = Int[4];

// Positions that go together, and the channels that they have then: position by position those of the image.
struct Group {
  int64_t positions, channels;
};

Group group_of(const Windows& windows) {
  const int64_t channels = windows.bytes;
  const auto fits = [&](int64_t positions) { return windows.stride[1] == 1 && positions <= windows.out_width; };
  if (channels > 4 * kBlock) return {1, channels};
  const int64_t whole = kBlock / std::gcd(channels, kBlock), least = (kBlock + channels - 1) / channels;
  const int64_t positions = fits(whole) ? whole : fits(least) ? least : 1;
  return {positions, positions * channels};
}

// Repeat `count` numbers for every position of a group, with room to read a whole block.
template <typename T>
std::vector<T> repeated(const T* numbers, int64_t count, const Group& group) {
  std::vector<T> all(static_cast<size_t>(group.channels + kBlock));
  for (int64_t i = 0; i < group.positions; ++i) std::copy_n(numbers, count, all.begin() + i * count);
  return all;
}

// Weights and numbers of all channels of a group.
struct Layer {
  std::vector<std::vector<int8_t>> taps;
  std::vector<int32_t> offsets;
  std::vector<float> multiplier, addend;
  float low, high;
  const uint8_t* table;

  Layer(const int8_t* weight, int64_t count, int64_t channels, const Group& group, const Requantization& numbers)
      : offsets(repeated(numbers.offsets, channels, group)),
        multiplier(repeated(numbers.multiplier, channels, group)),
        addend(repeated(numbers.addend, channels, group)),
        low(numbers.low),
        high(numbers.high),
        table(numbers.table) {
    for (int64_t tap = 0; tap < count; ++tap) taps.push_back(repeated(weight + tap * channels, channels, group));
    while (taps.size() % 4) taps.emplace_back(static_cast<size_t>(group.channels + kBlock));
  }
};

// What a block of a group's channels is multiplied with and requantised by, in the order of lanes.
struct Block {
  int64_t first;             // Its first channel: blocks overlap where channels fill no whole number of them.
  int64_t count;             // Fewer than kBlock where the group has no more.
  std::vector<Int> weights;  // [quads of taps][4]
  Words offsets;
  Float multiplier[4], addend[4];
  Float low, high;
  Int least;  // `low` in every byte.
  const uint8_t* table;
};

Block block_of(const Layer& layer, int64_t first, int64_t count) {
  Block block{first,
              count,
              {},
              {},
              {},
              {},
              fill(layer.low),
              fill(layer.high),
              fill(static_cast<int32_t>(layer.low) * 0x01010101),
              layer.table};
  for (size_t tap = 0; tap < layer.taps.size(); tap += 4) {
    Words rows, words;
    for (size_t i = 0; i < 4; ++i) rows[i] = load(layer.taps[tap + i].data() + first);
    interleave(rows, words);
    block.weights.insert(block.weights.end(), words, words + 4);
  }
  for (int k = 0; k < 4; ++k) {
    int32_t offsets[kLanes];
    float multiplier[kLanes], addend[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto channel = static_cast<size_t>(first + byte_of(k, lane));
      offsets[lane] = layer.offsets[channel];
      multiplier[lane] = layer.multiplier[channel];
      addend[lane] = layer.addend[channel];
    }
    block.offsets[k] = load(offsets);
    block.multiplier[k] = load_floats(multiplier);
    block.addend[k] = load_floats(addend);
  }
  return block;
}

// Requantise the sums of a block and write them from output channel `place` on.
inline void finish(const Words& sums, const Block& block, const Output& output, int64_t place) {
  Float y[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    y[k] = at_most(multiply_then_add(to_float(sums[k]), block.multiplier[k], block.addend[k]), block.high);
  if (output.floats) {
    for (int k = 0; k < 4; ++k) {
      float values[kLanes];
      store(values, at_least(y[k], block.low));
      for (int lane = 0; lane < kLanes; ++lane)
        if (byte_of(k, lane) < block.count) output.floats[place + byte_of(k, lane)] = values[lane];
    }
    return;
  }
  Words levels;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) levels[k] = round_to_int(y[k]);
  uint8_t copy[kBlock];
  uint8_t* target = block.count == kBlock ? output.levels + place : copy;
  store(target, raise(join(levels), block.least));
  if (block.table) look_up(target, kBlock, block.table);
  if (block.count < kBlock) std::copy_n(copy, block.count, output.levels + place);
}

// Where the taps of an output row are: `rows` of the image, and in them `columns` bytes on from the position's own.
struct Taps {
  std::vector<const uint8_t*> rows;
  std::vector<int64_t> columns;

  int64_t count() const { return static_cast<int64_t>(rows.size() * columns.size()); }
};

// Return where a tap is; those that fill up a quad are as the first, and their weights are zero. With kernel sizes that
// are known, addresses are sums of registers: loads of addresses would hold up the loads behind them.
template <int kRows, int kColumns>
inline const uint8_t* place(const Taps& taps, const uint8_t* const* rows, const int64_t* columns, int64_t tap) {
  const int64_t width = kColumns ? kColumns : static_cast<int64_t>(taps.columns.size());
  const int64_t count = kRows ? kRows * kColumns : taps.count();
  return tap < count ? rows[tap / width] + columns[tap % width] : rows[0] + columns[0];
}

// Compute a block of channels of all positions of an output row, which begins at `position`; the last group overlaps
// the one before it where groups do not fill the row. Kernel sizes of 0 are any.
template <int kRows, int kColumns>
void convolve(const Block& block, const Taps& taps, const Windows& windows, const Group& group, const Output& output,
              int64_t position) {
  constexpr int64_t kQuads = (kRows * kColumns + 3) / 4;
  const int64_t quads = kQuads ? kQuads : (taps.count() + 3) / 4, step = windows.stride[1] * windows.bytes;
  const uint8_t* known_rows[kRows + 1];
  int64_t known_columns[kColumns + 1];
  std::copy_n(taps.rows.begin(), kRows, known_rows);
  std::copy_n(taps.columns.begin(), kColumns, known_columns);
  const uint8_t* const* rows = kRows ? known_rows : taps.rows.data();
  const int64_t* columns = kColumns ? known_columns : taps.columns.data();
  const Int* weights = block.weights.data();
  for (int64_t next = 0; next < windows.out_width; next += group.positions) {
    const int64_t x = std::min(next, windows.out_width - group.positions), offset = x * step + block.first;
    Words sums;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = block.offsets[k];
#pragma GCC unroll 8
    for (int64_t quad = 0; quad < quads; ++quad) {
      Words bytes, words;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        bytes[i] = load(place<kRows, kColumns>(taps, rows, columns, 4 * quad + i) + offset);
        hide(bytes[i]);  // Or compilers load twice what is interleaved twice.
      }
      interleave(bytes, words);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] = dot_each(sums[k], words[k], weights[4 * quad + k]);
    }
    finish(sums, block, output, (position + x) * output.channels + block.first);
  }
}

// The rows of an image that the taps of an output row lie in, with what is outside filled in, and room to read a whole
// block at their end. Rows stay from one output row to the next.
class PaddedRows {
 public:
  PaddedRows(const uint8_t* input, const Windows& windows, uint8_t fill_level)
      : input_(input),
        windows_(windows),
        fill_(fill_level),
        pitch_((windows.width + 2 * windows.padding[1]) * windows.bytes + kBlock),
        held_(static_cast<size_t>(windows.dilation[0] * (windows.kernel[0] - 1) + 1), -1),
        rows_(held_.size() * static_cast<size_t>(pitch_), fill_level) {}

  // Return row `row` of image `image`, which may be outside; its padding comes first.
  const uint8_t* row(int64_t image, int64_t row) {
    const int64_t count = static_cast<int64_t>(held_.size()),
                  key = image * (windows_.height + 2 * windows_.padding[0] + count) + row + windows_.padding[0];
    const int64_t place = key % count, width = windows_.width * windows_.bytes;
    uint8_t* target = rows_.data() + place * pitch_;
    if (held_[static_cast<size_t>(place)] != key) {
      held_[static_cast<size_t>(place)] = key;
      uint8_t* inside = target + windows_.padding[1] * windows_.bytes;
      if (row >= 0 && row < windows_.height)
        std::memcpy(inside, input_ + (image * windows_.height + row) * width, static_cast<size_t>(width));
      else
        std::memset(inside, fill_, static_cast<size_t>(width));
    }
    return target;
  }

 private:
  const uint8_t* input_;
  const Windows& windows_;
  uint8_t fill_;
  int64_t pitch_;
  std::vector<int64_t> held_;
  std::vector<uint8_t> rows_;
};

}  // namespace

void depthwise(const uint8_t* input, const Windows& windows, const int8_t* weight, uint8_t fill_level,
               const Requantization& numbers, const Output& output, int64_t first_row, int64_t last_row) {
  const int64_t channels = windows.bytes, taps = windows.kernel[0] * windows.kernel[1];
  const auto is_square = [&](int64_t side) { return windows.kernel[0] == side && windows.kernel[1] == side; };
  const auto convolve_row = is_square(3) ? convolve<3, 3> : is_square(5) ? convolve<5, 5> : convolve<0, 0>;
  const Group group = group_of(windows);
  const Layer layer(weight, taps, channels, group, numbers);
  std::vector<Block> blocks;
  for (int64_t next = 0; next < group.channels; next += kBlock) {
    const int64_t first = std::max<int64_t>(std::min(next, group.channels - kBlock), 0);
    blocks.push_back(block_of(layer, first, std::min(kBlock, group.channels)));
  }
  PaddedRows rows(input, windows, fill_level);
  Taps places{std::vector<const uint8_t*>(static_cast<size_t>(windows.kernel[0])), {}};
  for (int64_t x = 0; x < windows.kernel[1]; ++x) places.columns.push_back(x * windows.dilation[1] * channels);
  for (int64_t out_row = first_row; out_row < last_row; ++out_row) {
    const int64_t image = out_row / windows.out_height;
    const int64_t top = out_row % windows.out_height * windows.stride[0] - windows.padding[0];
    for (int64_t y = 0; y < windows.kernel[0]; ++y)
      places.rows[static_cast<size_t>(y)] = rows.row(image, top + y * windows.dilation[0]);
    for (const Block& block : blocks) convolve_row(block, places, windows, group, output, out_row * windows.out_width);
  }
}

}  // namespace fxprune
