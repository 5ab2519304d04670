// Vectors of AVX2, with its VNNI instructions or without.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace fxprune {

#if defined(__AVXVNNI__)
constexpr const char* kInstructionSet = "avx2-vnni";
#else
constexpr const char* kInstructionSet = "avx2";
#endif
constexpr int kLanes = 8;
using Int = __m256i;
using Float = __m256;

inline Int fill(int32_t x) { return _mm256_set1_epi32(x); }
inline Int load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store(void* p, Int x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline Int narrow(Int a, Int b, Int c, Int d) {
  const Int bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
  return _mm256_shuffle_epi8(
      bytes, _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)));
}
inline Int raise(Int bytes, Int low) { return _mm256_max_epu8(bytes, low); }
inline void store_bytes(uint8_t* p, Int levels) {
  const __m256i bytes = _mm256_packus_epi16(_mm256_packs_epi32(levels, levels), levels);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(
                                                      bytes, _mm256_setr_epi32(0, 4, 0, 0, 0, 0, 0, 0))));
}

inline __m256i repeat_bytes(const int8_t* w) {
  int32_t four;
  std::memcpy(&four, w, 4);
  return _mm256_set1_epi32(four);
}

#if defined(__AVXVNNI__)
using Weight = __m256i;
inline Weight repeat(const int8_t* w) { return repeat_bytes(w); }
inline Int dot(Int sum, Int x, Weight w) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
  return sum;
}
inline Int dot_each(Int sum, Int x, Int w) { return dot(sum, x, w); }
#else
// `vpmaddubsw` saturates at 16 bits, so even and odd bytes are widened and multiplied apart.
struct Weight {
  __m256i even, odd;
};
inline Weight widen(__m256i bytes) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline Weight repeat(const int8_t* w) { return widen(repeat_bytes(w)); }
inline Int dot(Int sum, Int x, Weight w) {
  const __m256i even = _mm256_and_si256(x, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(x, 8);
  const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even, w.even), _mm256_madd_epi16(odd, w.odd));
  return _mm256_add_epi32(sum, products);
}
inline Int dot_each(Int sum, Int x, Int w) { return dot(sum, x, widen(w)); }
#endif

inline void interleave(const Int (&rows)[4], Int (&words)[4]) {
  const Int low01 = _mm256_unpacklo_epi8(rows[0], rows[1]), high01 = _mm256_unpackhi_epi8(rows[0], rows[1]);
  const Int low23 = _mm256_unpacklo_epi8(rows[2], rows[3]), high23 = _mm256_unpackhi_epi8(rows[2], rows[3]);
  words[0] = _mm256_unpacklo_epi16(low01, low23);
  words[1] = _mm256_unpackhi_epi16(low01, low23);
  words[2] = _mm256_unpacklo_epi16(high01, high23);
  words[3] = _mm256_unpackhi_epi16(high01, high23);
}
inline int byte_of(int k, int lane) { return lane / 4 * 16 + k * 4 + lane % 4; }
inline Int join(const Int (&levels)[4]) {
  return _mm256_packus_epi16(_mm256_packs_epi32(levels[0], levels[1]), _mm256_packs_epi32(levels[2], levels[3]));
}
inline void hide(Int& x) { asm volatile("" : "+x"(x)); }

inline Float to_float(Int x) { return _mm256_cvtepi32_ps(x); }
inline Float fill(float x) { return _mm256_set1_ps(x); }
inline Float multiply_then_add(Float x, Float m, Float a) { return _mm256_add_ps(_mm256_mul_ps(x, m), a); }
inline Float at_least(Float x, Float low) { return _mm256_max_ps(x, low); }
inline Float at_most(Float x, Float high) { return _mm256_min_ps(x, high); }
inline Int round_to_int(Float x) { return _mm256_cvtps_epi32(x); }
inline void store(float* p, Float x) { _mm256_storeu_ps(p, x); }
inline Float load_floats(const float* p) { return _mm256_loadu_ps(p); }

}  // namespace fxprune
