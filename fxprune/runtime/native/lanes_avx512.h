// Vectors of AVX512-VNNI.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fxprune {

constexpr const char* kInstructionSet = "avx512-vnni";
constexpr int kLanes = 16;
using Int = __m512i;
using Float = __m512;
using Weight = __m512i;

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

inline Int fill(int32_t x) { return _mm512_set1_epi32(x); }
inline Int load(const void* p) { return _mm512_loadu_si512(p); }
inline void store(void* p, Int x) { _mm512_storeu_si512(p, x); }
inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }

// Put four vectors of levels into one, a byte of every lane each; what lies outside 0 … 255 becomes 0 or 255.
inline Int narrow(Int a, Int b, Int c, Int d) {
  const Int bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
  return _mm512_shuffle_epi8(
      bytes, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}

// Raise every byte to at least that of `low`.
inline Int raise(Int bytes, Int low) { return _mm512_max_epu8(bytes, low); }

// Store the levels of a vector beside each other, a byte each.
inline void store_bytes(uint8_t* p, Int levels) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtusepi32_epi8(_mm512_max_epi32(levels, _mm512_setzero_si512())));
}

// Repeat four int8 weights in every lane.
inline Weight repeat(const int8_t* w) {
  int32_t four;
  std::memcpy(&four, w, 4);
  return _mm512_set1_epi32(four);
}

// Add to every lane of `sum` the products of its four bytes: uint8 `x` by int8 `w`.
// The instruction is spelled out because GCC copies every sum twice in a loop of the intrinsic.
inline Int dot(Int sum, Int x, Weight w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
  return sum;
}

// The same with weights of its own for every lane.
inline Int dot_each(Int sum, Int x, Int w) { return dot(sum, x, w); }

// Interleave four rows of bytes: every lane gets one of each row. Lane `lane` of vector `k` is of byte `byte_of(k,
// lane)`.
inline void interleave(const Int (&rows)[4], Int (&words)[4]) {
  const Int low01 = _mm512_unpacklo_epi8(rows[0], rows[1]), high01 = _mm512_unpackhi_epi8(rows[0], rows[1]);
  const Int low23 = _mm512_unpacklo_epi8(rows[2], rows[3]), high23 = _mm512_unpackhi_epi8(rows[2], rows[3]);
  words[0] = _mm512_unpacklo_epi16(low01, low23);
  words[1] = _mm512_unpackhi_epi16(low01, low23);
  words[2] = _mm512_unpacklo_epi16(high01, high23);
  words[3] = _mm512_unpackhi_epi16(high01, high23);
}
inline int byte_of(int k, int lane) { return lane / 4 * 16 + k * 4 + lane % 4; }

// Put levels, a lane each in the order of `byte_of`, into bytes; what lies outside 0 … 255 becomes 0 or 255.
inline Int join(const Int (&levels)[4]) {
  return _mm512_packus_epi16(_mm512_packs_epi32(levels[0], levels[1]), _mm512_packs_epi32(levels[2], levels[3]));
}

// Keep the compiler from knowing what `x` holds.
inline void hide(Int& x) { asm volatile("" : "+v"(x)); }

inline Float to_float(Int x) { return _mm512_cvtepi32_ps(x); }
inline Float fill(float x) { return _mm512_set1_ps(x); }
inline Float multiply_then_add(Float x, Float m, Float a) { return _mm512_add_ps(_mm512_mul_ps(x, m), a); }
inline Float at_least(Float x, Float low) { return _mm512_max_ps(x, low); }
inline Float at_most(Float x, Float high) { return _mm512_min_ps(x, high); }
inline Int round_to_int(Float x) { return _mm512_cvtps_epi32(x); }
inline void store(float* p, Float x) { _mm512_storeu_ps(p, x); }
inline Float load_floats(const float* p) { return _mm512_loadu_ps(p); }

}  // namespace fxprune
