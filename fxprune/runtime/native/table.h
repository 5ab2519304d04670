// Activations as tables of 256 levels.
#pragma once

#include <cstdint>

#include "lanes.h"

namespace fxprune {

// Replace every byte of `count` by its entry in a table.
inline void look_up(uint8_t* bytes, int64_t count, const uint8_t* table) {
  int64_t i = 0;
#if defined(__AVX512VBMI__)
  const __m512i t0 = load(table), t1 = load(table + 64), t2 = load(table + 128), t3 = load(table + 192);
  for (; i + 64 <= count; i += 64) {
    const __m512i index = load(bytes + i);
    const __m512i low = _mm512_permutex2var_epi8(t0, index, t1), high = _mm512_permutex2var_epi8(t2, index, t3);
    store(bytes + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(index), low, high));
  }
#endif
  for (; i < count; ++i) bytes[i] = table[bytes[i]];
}

}  // namespace fxprune
