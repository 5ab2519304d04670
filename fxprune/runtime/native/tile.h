// Tiles of positions: where their words come from, and where what is computed of them goes.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "kernels.h"
#include "lanes.h"
#include "table.h"
#include "transpose.h"

namespace fxprune {

constexpr int64_t kVectorBytes = kLanes * 4;

// Positions `first` … `first + count - 1` of `all`, and where their words are: `words` [groups][vectors][kLanes] of the
// input, `stage` [kSide][vectors][kLanes] of output that is about to leave; rows of both are `pitch` bytes apart.
struct Tile {
  const uint8_t* words;
  uint8_t* stage;
  int64_t pitch;
  int64_t first, count, all;
};

// Memory of a thread, aligned to cache lines, kept from call to call.
inline uint8_t* scratch(size_t bytes) {
  thread_local std::unique_ptr<void, decltype(&std::free)> memory(nullptr, &std::free);
  thread_local size_t size = 0;
  if (size < bytes) {
    const size_t whole = (bytes + 4095) / 4096 * 4096;
    size = 0;  // Until there is as much.
    memory.reset(std::aligned_alloc(64, whole));
    if (!memory) throw std::bad_alloc();
    std::memset(memory.get(), 0, whole);
    size = whole;
  }
  return static_cast<uint8_t*>(memory.get());
}

// Lay out the positions of a tile.
inline void gather(const Activations& input, int64_t first, int64_t count, uint8_t* words, int64_t pitch) {
  if (input.layout == Layout::channels_last) {
    transpose_all(input.levels + first * input.channels, input.channels, count, input.channels, words, pitch,
                  4 * count);
    return;
  }
  for (int64_t group = 0; group < input.groups(); ++group)
    std::memcpy(words + group * pitch, input.levels + (group * input.positions + first) * 4,
                static_cast<size_t>(4 * count));
}

// Where the sums of a tile go: those of four channels are collected, then requantised.
template <int T>
struct Quad {
  const Requantization& numbers;
  Int sums[4][T];

  // Requantise `count` channels from `channel` on to words of one byte a channel.
  __attribute__((noinline)) void to_levels(int64_t channel, int64_t count, uint8_t* words) const {
    const Float high = fill(numbers.high);
    const Int low = fill(numbers.low_bytes());
    Float multiplier[4], addend[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      multiplier[i] = fill(i < count ? numbers.multiplier[channel + i] : 0.0f);
      addend[i] = fill(i < count ? numbers.addend[channel + i] : 0.0f);
    }
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) {
      Int level[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        level[i] = round_to_int(at_most(multiply_then_add(to_float(sums[i][t]), multiplier[i], addend[i]), high));
      store(words + t * kVectorBytes, raise(narrow(level[0], level[1], level[2], level[3]), low));
    }
    if (numbers.table) look_up(words, T * kVectorBytes, numbers.table);
  }

  // Requantise `count` channels from `channel` on to a row of floats each, `pitch` bytes apart.
  __attribute__((noinline)) void to_floats(int64_t channel, int64_t count, uint8_t* rows, int64_t pitch) const {
    const Float low = fill(numbers.low), high = fill(numbers.high);
    for (int64_t i = 0; i < count; ++i) {
      const Float multiplier = fill(numbers.multiplier[channel + i]), addend = fill(numbers.addend[channel + i]);
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) {
        const Float y = multiply_then_add(to_float(sums[i][t]), multiplier, addend);
        store(reinterpret_cast<float*>(rows + i * pitch + t * kVectorBytes), at_most(at_least(y, low), high));
      }
    }
  }
};

// Move some output channels of a tile from the stage to the output.
inline void flush(const Tile& tile, int64_t channel, int64_t channels, const Output& output) {
  const int64_t words = (channels + 3) / 4;
  if (output.floats) {
    auto* target = reinterpret_cast<uint8_t*>(output.floats + tile.first * output.channels + channel);
    transpose_all(tile.stage, tile.pitch, channels, 4 * tile.count, target, 4 * output.channels, 4 * channels);
  } else if (output.layout == Layout::channels_last) {
    uint8_t* target = output.levels + tile.first * output.channels + channel;
    transpose_all(tile.stage, tile.pitch, words, 4 * tile.count, target, output.channels, channels);
  } else {
    for (int64_t word = 0; word < words; ++word)
      std::memcpy(output.levels + ((channel / 4 + word) * tile.all + tile.first) * 4, tile.stage + word * tile.pitch,
                  static_cast<size_t>(4 * tile.count));
  }
}

}  // namespace fxprune
