// Patches of images as rows of a matrix.
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace fxprune {
namespace {

// Copy the taps of one row of a kernel: `taps` positions from column `left` on, of which some may lie outside the
// image.
void copy_taps(const uint8_t* row, const Windows& windows, int64_t left, uint8_t fill, uint8_t* output) {
  const int64_t taps = windows.kernel[1], step = windows.dilation[1], bytes = windows.bytes;
  if (step == 1 && left >= 0 && left + taps <= windows.width) {
    std::memcpy(output, row + left * bytes, static_cast<size_t>(taps * bytes));
    return;
  }
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t column = left + tap * step;
    if (column >= 0 && column < windows.width)
      std::memcpy(output + tap * bytes, row + column * bytes, static_cast<size_t>(bytes));
    else
      std::memset(output + tap * bytes, fill, static_cast<size_t>(bytes));
  }
}

}  // namespace

void im2col(const uint8_t* input, const Windows& windows, uint8_t fill, uint8_t* output, int64_t first_row,
            int64_t last_row) {
  const int64_t row_bytes = windows.kernel[1] * windows.bytes;
  output += first_row * windows.out_width * windows.kernel[0] * row_bytes;
  for (int64_t out_row = first_row; out_row < last_row; ++out_row) {
    const uint8_t* image = input + out_row / windows.out_height * windows.height * windows.width * windows.bytes;
    const int64_t top = out_row % windows.out_height * windows.stride[0] - windows.padding[0];
    for (int64_t x = 0; x < windows.out_width; ++x)
      for (int64_t tap = 0; tap < windows.kernel[0]; ++tap, output += row_bytes) {
        const int64_t row = top + tap * windows.dilation[0], left = x * windows.stride[1] - windows.padding[1];
        if (row >= 0 && row < windows.height)
          copy_taps(image + row * windows.width * windows.bytes, windows, left, fill, output);
        else
          std::memset(output, fill, static_cast<size_t>(row_bytes));
      }
  }
}

}  // namespace fxprune
