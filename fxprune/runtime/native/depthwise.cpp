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
  const int64_t channels = windows.bytes, alone = (channels + kBlock - 1) / kBlock * kBlock;
  // Blocks of one position that overlap little cost less than the weights of a group.
  if (windows.stride[1] != 1 || 4 * alone <= 5 * channels) return {1, channels};
  const int64_t whole = kBlock / std::gcd(channels, kBlock), least = (kBlock + channels - 1) / channels;
  const int64_t positions = 4 * whole <= windows.out_width ? whole : least <= windows.out_width ? least : 1;
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
  const Requantization& numbers;  // Those of one position.

  Layer(const int8_t* weight, int64_t count, int64_t channels, const Group& group, const Requantization& numbers)
      : offsets(repeated(numbers.offsets, channels, group)),
        multiplier(repeated(numbers.multiplier, channels, group)),
        addend(repeated(numbers.addend, channels, group)),
        numbers(numbers) {
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
              fill(layer.numbers.low),
              fill(layer.numbers.high),
              fill(layer.numbers.low_bytes()),
              layer.numbers.table};
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

// Rows of a padded image, and how far the rows and columns of a kernel lie apart in it, in bytes.
struct Taps {
  const uint8_t* first;
  int64_t row_step, column_step;
};

// Compute a block of channels of all positions of an output row, which begins at `position`; the last group overlaps
// the one before it where groups do not fill the row. Kernel sizes of 0 are any.
//
// Addresses are sums of registers, one tap after the other: loads of addresses would hold up the loads behind them.
template <int kRows, int kColumns>
void convolve(const Block& block, const Taps& taps, const Windows& windows, const Group& group, const Output& output,
              int64_t position) {
  const int64_t columns = kColumns ? kColumns : windows.kernel[1];
  const int64_t count = kRows ? kRows * kColumns : windows.kernel[0] * columns;
  const int64_t step = windows.stride[1] * windows.bytes;
  const Int* weights = block.weights.data();
  for (int64_t next = 0; next < windows.out_width; next += group.positions) {
    const int64_t x = std::min(next, windows.out_width - group.positions);
    const uint8_t* row = taps.first + x * step + block.first;
    Words sums;
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) sums[k] = block.offsets[k];
    int64_t tap = 0, column = 0;
#pragma GCC unroll 8
    for (int64_t quad = 0; 4 * quad < count; ++quad) {
      Words bytes, words;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        // What fills up a quad is the last tap again, and its weights are zero.
        bytes[i] = load(row + column * taps.column_step);
        hide(bytes[i]);  // Or compilers load twice what is interleaved twice.
        if (++tap >= count) continue;
        if (++column == columns) {
          column = 0;
          row += taps.row_step;
        }
      }
      interleave(bytes, words);
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] = dot_each(sums[k], words[k], weights[4 * quad + k]);
    }
    finish(sums, block, output, (position + x) * output.channels + block.first);
  }
}

// A few rows of an image with what is outside filled in, and room to read a whole block at their end.
class Strip {
 public:
  Strip(const Windows& windows, uint8_t fill_level)
      : windows_(windows),
        fill_(fill_level),
        pitch_(((windows.width + 2 * windows.padding[1]) * windows.bytes + 2 * kBlock - 1) / kBlock * kBlock) {}

  int64_t pitch() const { return pitch_; }

  // Return `count` rows from `top` on, which may begin above the image and end below.
  const uint8_t* rows(const uint8_t* image, int64_t top, int64_t count) {
    const int64_t width = windows_.width * windows_.bytes, side = windows_.padding[1] * windows_.bytes;
    lines_.resize(static_cast<size_t>(count * pitch_ / kBlock));
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* row = lines_.front().bytes + i * pitch_;
      const bool is_inside = top + i >= 0 && top + i < windows_.height;
      std::memset(row, fill_, static_cast<size_t>(is_inside ? side : pitch_));
      if (!is_inside) continue;
      std::memcpy(row + side, image + (top + i) * width, static_cast<size_t>(width));
      std::memset(row + side + width, fill_, static_cast<size_t>(pitch_ - side - width));
    }
    return lines_.front().bytes;
  }

 private:
  struct alignas(kBlock) Line {
    uint8_t bytes[kBlock];
  };

  const Windows& windows_;
  uint8_t fill_;
  int64_t pitch_;
  std::vector<Line> lines_;
};

// Output rows of a strip: more would leave the caches, fewer would copy the rows between two strips more often.
constexpr int64_t kStripRows = 8;

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
  Strip strip(windows, fill_level);
  const int64_t reach = windows.dilation[0] * (windows.kernel[0] - 1) + 1;
  for (int64_t row = first_row; row < last_row;) {
    const int64_t image = row / windows.out_height, first = row % windows.out_height;
    const int64_t count = std::min({kStripRows, windows.out_height - first, last_row - row});
    const uint8_t* rows =
        strip.rows(input + image * windows.height * windows.width * channels,
                   first * windows.stride[0] - windows.padding[0], (count - 1) * windows.stride[0] + reach);
    for (int64_t i = 0; i < count; ++i, ++row)
      for (const Block& block : blocks)
        convolve_row(block,
                     {rows + i * windows.stride[0] * strip.pitch(), windows.dilation[0] * strip.pitch(),
                      windows.dilation[1] * channels},
                     windows, group, output, row * windows.out_width);
  }
}

}  // namespace fxprune
