// What the kernels compute; they know nothing of torch. The modules of fxprune/runtime/int8 say what each thing means.
#pragma once

#include <cstdint>

namespace fxprune {

enum class Layout { channels_last, packed };

// A uint8 tensor: channels-last [positions][channels], or packed [(channels + 3) / 4][positions][4].
struct Activations {
  const uint8_t* levels;
  int64_t positions;
  int64_t channels;
  Layout layout;

  int64_t groups() const { return (channels + 3) / 4; }
};

// Block compressed rows: blocks of `block_rows` x 4.
struct Matrix {
  const int8_t* values;
  const int16_t* columns;
  const int32_t* row_pointers;
  int64_t blocks;
  int block_rows;
};

// y = float(accumulator + offset) * multiplier + addend, clamped; as levels rounded and looked up in `table`, if any.
struct Requantization {
  const int32_t* offsets;
  const float* multiplier;
  const float* addend;
  const uint8_t* table;
  float low, high;

  // The level `low` in every byte of a word.
  int32_t low_bytes() const {
    return low > 0 ? static_cast<int32_t>(static_cast<uint32_t>(low) * 0x01010101u) : 0;
  }
};

// Where the products go: `levels` or `floats`, whichever is not null. Floats are channels-last.
struct Output {
  uint8_t* levels;
  float* floats;
  int64_t channels;
  Layout layout;
};

// A range of output channels for a range of positions: the unit that threads share out.
struct Part {
  int64_t first_position, last_position;
  int64_t first_channel, last_channel;
};

// Positions and channels that a part should begin at multiples of.
constexpr int64_t kPartPositions = 16;
constexpr int64_t kPartChannels = 16;

void linear(const Activations& input, const Matrix& matrix, const Requantization& numbers, const Output& output,
            const Part& part);

// Strided float input [positions][channels] to levels in a layout.
struct Floats {
  const float* values;
  int64_t positions, channels;
  int64_t position_stride, channel_stride;
};

void quantize(const Floats& input, float inverse_scale, int32_t zero_point, uint8_t* output, Layout layout,
              int64_t first_position, int64_t last_position);
void dequantize(const Activations& input, float scale, int32_t zero_point, float* output, int64_t channels,
                int64_t first_position, int64_t last_position);
void pack(const uint8_t* input, int64_t positions, int64_t channels, uint8_t* output, int64_t first_position,
          int64_t last_position);
void unpack(const uint8_t* input, int64_t positions, int64_t channels, uint8_t* output, int64_t first_position,
            int64_t last_position);

// Images [batch][height][width][bytes] and the windows that move over them: vertical sizes first.
struct Windows {
  int64_t height, width, bytes;
  int64_t out_height, out_width;
  int64_t kernel[2], stride[2], padding[2], dilation[2];
};

// Rows are those of all images' outputs, [batch * out_height].
void im2col(const uint8_t* input, const Windows& windows, uint8_t fill, uint8_t* output, int64_t first_row,
            int64_t last_row);

// Convolve every channel by itself. `weight` is [taps][channels], `fill` the level outside the image; output is
// channels-last. Rows are as above.
void depthwise(const uint8_t* input, const Windows& windows, const int8_t* weight, uint8_t fill,
               const Requantization& numbers, const Output& output, int64_t first_row, int64_t last_row);

// Billions of multiplications and additions a second that this core's dot products reach from registers.
double peak_gops();

}  // namespace fxprune
