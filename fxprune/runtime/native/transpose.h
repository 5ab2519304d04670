// Transposition of small matrices of 32-bit words: between positions side by side and channels side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace fxprune {

constexpr int kSide = 16;

#if FXPRUNE_AVX512

// Write word (i, j) of `source` to (j, i) of `target`. Reads `row_bytes` of each of `rows` rows, what is missing to a
// whole word being zero, and writes `column_bytes` of each row of the target; no more than kSide words either way.
inline void transpose(const uint8_t* source, int64_t stride, int64_t rows, int64_t row_bytes, uint8_t* target,
                      int64_t target_stride, int64_t column_bytes) {
  const __mmask64 read = first_bytes(row_bytes), written = first_bytes(column_bytes);
  __m512i a[kSide], b[kSide];
#pragma GCC unroll 16
  for (int i = 0; i < kSide; ++i)
    a[i] = i < rows ? _mm512_maskz_loadu_epi8(read, source + i * stride) : _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int i = 0; i < kSide; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kSide; i += 4) {
    a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
    a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
    a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
    a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
  }
  // a[4 q + c] holds, in its 128-bit part p, words 4 q … 4 q + 3 of column 4 p + c.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0x44),
                  low23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0x44);
    const __m512i high01 = _mm512_shuffle_i32x4(a[c], a[4 + c], 0xee),
                  high23 = _mm512_shuffle_i32x4(a[8 + c], a[12 + c], 0xee);
    b[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    b[4 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    b[8 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    b[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
  const int64_t columns = (row_bytes + 3) / 4;
#pragma GCC unroll 16
  for (int j = 0; j < kSide; ++j)
    if (j < columns) _mm512_mask_storeu_epi8(target + j * target_stride, written, b[j]);
}

#else

inline void transpose(const uint8_t* source, int64_t stride, int64_t rows, int64_t row_bytes, uint8_t* target,
                      int64_t target_stride, int64_t column_bytes) {
  const int64_t columns = (row_bytes + 3) / 4;
  for (int64_t i = 0; i < rows && 4 * i < column_bytes; ++i) {
    const int64_t written = std::min<int64_t>(4, column_bytes - 4 * i);
    for (int64_t j = 0; j < columns; ++j) {
      uint8_t word[4] = {0, 0, 0, 0};
      std::memcpy(word, source + i * stride + 4 * j, static_cast<size_t>(std::min<int64_t>(4, row_bytes - 4 * j)));
      std::memcpy(target + j * target_stride + 4 * i, word, static_cast<size_t>(written));
    }
  }
}

#endif

// The same for a matrix of any size.
inline void transpose_all(const uint8_t* source, int64_t stride, int64_t rows, int64_t row_bytes, uint8_t* target,
                          int64_t target_stride, int64_t column_bytes) {
  for (int64_t j = 0; 4 * j < row_bytes; j += kSide)
    for (int64_t i = 0; i < rows; i += kSide)
      transpose(source + i * stride + 4 * j, stride, std::min<int64_t>(kSide, rows - i),
                std::min<int64_t>(4 * kSide, row_bytes - 4 * j), target + j * target_stride + 4 * i, target_stride,
                std::min<int64_t>(4 * kSide, column_bytes - 4 * i));
}

}  // namespace fxprune
