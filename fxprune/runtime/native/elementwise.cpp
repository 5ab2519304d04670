// Between floats and levels, and between the layouts of levels.
#include <algorithm>
#include <cmath>

#include "kernels.h"
#include "transpose.h"

namespace fxprune {
namespace {

// What is worked on at once: kSide positions by kBytes channels, as rows of positions or as words of groups.
constexpr int64_t kBytes = 4 * kSide;

struct Quantizer {
  float inverse_scale;
  int32_t zero_point;

  // Levels further out than this are beyond 0 … 255 whatever the zero point.
  static constexpr float kFar = 1024;

  Int operator()(Float x) const {
    const Float level = multiply_then_add(x, fill(inverse_scale), fill(0.0f));
    return add(round_to_int(at_most(at_least(level, fill(-kFar)), fill(kFar))), fill(zero_point));
  }

  // What is not a number becomes 0, here and above.
  uint8_t operator()(float x) const {
    const float level = x * inverse_scale, raised = level > -kFar ? level : -kFar;
    const int32_t whole = static_cast<int32_t>(std::nearbyint(raised < kFar ? raised : kFar)) + zero_point;
    return static_cast<uint8_t>(std::min(std::max(whole, 0), 255));
  }
};

// Quantise a row of channels. The last vector overlaps the one before it where channels fill no whole number of them.
void quantize_row(const float* values, int64_t stride, int64_t channels, Quantizer quantizer, uint8_t* row) {
  if (stride != 1 || channels < kLanes) {
    for (int64_t i = 0; i < channels; ++i) row[i] = quantizer(values[i * stride]);
    return;
  }
  for (int64_t i = 0; i < channels; i += kLanes) {
    const int64_t first = std::min<int64_t>(i, channels - kLanes);
    store_bytes(row + first, quantizer(load_floats(values + first)));
  }
}

// Quantise up to four channels, whose positions lie beside each other, into words.
void quantize_words(const float* values, int64_t stride, int64_t channels, int64_t positions, Quantizer quantizer,
                    uint8_t* words) {
  int64_t i = 0;
  if (channels == 4)
    for (; i + kLanes <= positions; i += kLanes) {
      const float* x = values + i;
      store(words + 4 * i, narrow(quantizer(load_floats(x)), quantizer(load_floats(x + stride)),
                                  quantizer(load_floats(x + 2 * stride)), quantizer(load_floats(x + 3 * stride))));
    }
  for (; i < positions; ++i)
    for (int64_t r = 0; r < 4; ++r) words[4 * i + r] = r < channels ? quantizer(values[r * stride + i]) : 0;
}

// Quantise a tile of positions and channels, in the direction that its floats lie in, and turn it where the layout is
// the other.
void quantize_tile(const Floats& input, const float* values, int64_t positions, int64_t channels, Quantizer quantizer,
                   Layout layout, uint8_t* output, int64_t stride) {
  alignas(64) uint8_t tile[kSide * kBytes];
  const bool by_words = input.position_stride == 1 && input.channel_stride != 1;
  const bool is_direct = by_words == (layout == Layout::packed);
  uint8_t* target = is_direct ? output : tile;
  const int64_t target_stride = is_direct ? stride : kBytes;
  if (by_words) {
    for (int64_t c = 0; c < channels; c += 4)
      quantize_words(values + c * input.channel_stride, input.channel_stride, std::min<int64_t>(4, channels - c),
                     positions, quantizer, target + c / 4 * target_stride);
    if (!is_direct) transpose(tile, kBytes, (channels + 3) / 4, 4 * positions, output, stride, channels);
    return;
  }
  for (int64_t i = 0; i < positions; ++i)
    quantize_row(values + i * input.position_stride, input.channel_stride, channels, quantizer,
                 target + i * target_stride);
  if (!is_direct) transpose(tile, kBytes, positions, channels, output, stride, 4 * positions);
}

// Call `compute(first position, positions, first channel, channels)` for every tile.
template <typename Compute>
void for_tiles(int64_t first, int64_t last, int64_t channels, Compute compute) {
  for (int64_t position = first; position < last; position += kSide)
    for (int64_t channel = 0; channel < channels; channel += kBytes)
      compute(position, std::min<int64_t>(kSide, last - position), channel, std::min(kBytes, channels - channel));
}

}  // namespace

void quantize(const Floats& input, float inverse_scale, int32_t zero_point, uint8_t* output, Layout layout,
              int64_t first_position, int64_t last_position) {
  const Quantizer quantizer{inverse_scale, zero_point};
  for_tiles(first_position, last_position, input.channels,
            [&](int64_t position, int64_t positions, int64_t channel, int64_t channels) {
              const float* values = input.values + position * input.position_stride + channel * input.channel_stride;
              const bool is_packed = layout == Layout::packed;
              uint8_t* target = output + (is_packed ? (channel / 4 * input.positions + position) * 4
                                                    : position * input.channels + channel);
              quantize_tile(input, values, positions, channels, quantizer, layout, target,
                            is_packed ? 4 * input.positions : input.channels);
            });
}

void dequantize(const Activations& input, float scale, int32_t zero_point, float* output, int64_t channels,
                int64_t first_position, int64_t last_position) {
  for_tiles(first_position, last_position, channels,
            [&](int64_t position, int64_t positions, int64_t channel, int64_t some) {
              alignas(64) uint8_t tile[kSide * kBytes];
              const uint8_t* rows = tile;
              int64_t stride = kBytes;
              if (input.layout == Layout::packed) {
                const uint8_t* words = input.levels + (channel / 4 * input.positions + position) * 4;
                transpose(words, 4 * input.positions, (some + 3) / 4, 4 * positions, tile, kBytes, some);
              } else {
                rows = input.levels + position * input.channels + channel;
                stride = input.channels;
              }
              for (int64_t i = 0; i < positions; ++i)
                for (int64_t c = 0; c < some; ++c)
                  output[(position + i) * channels + channel + c] =
                      static_cast<float>(rows[i * stride + c] - zero_point) * scale;
            });
}

void pack(const uint8_t* input, int64_t positions, int64_t channels, uint8_t* output, int64_t first_position,
          int64_t last_position) {
  const int64_t count = last_position - first_position;
  transpose_all(input + first_position * channels, channels, count, channels, output + 4 * first_position,
                4 * positions, 4 * count);
}

void unpack(const uint8_t* input, int64_t positions, int64_t channels, uint8_t* output, int64_t first_position,
            int64_t last_position) {
  const int64_t count = last_position - first_position;
  transpose_all(input + 4 * first_position, 4 * positions, (channels + 3) / 4, 4 * count,
                output + first_position * channels, channels, channels);
}

}  // namespace fxprune
