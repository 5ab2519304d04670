// Vectors of 32-bit lanes: AVX512-VNNI, AVX2 (with or without VNNI), and plain C++ for every other processor.
//
// All three give the same bits: products of bytes are exact, floats are rounded after every operation, halves to even.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define FXPRUNE_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__)
#define FXPRUNE_AVX2 1
#include <immintrin.h>
#endif

namespace fxprune {

#if !FXPRUNE_AVX512
template <size_t size>
inline void load_some(int8_t (&target)[size], const int8_t* source, int64_t count) {
  for (size_t i = 0; i < size; ++i) target[i] = static_cast<int64_t>(i) < count ? source[i] : 0;
}
#endif

#if FXPRUNE_AVX512

constexpr const char* kInstructionSet = "avx512-vnni";
constexpr int kLanes = 16;
using Int = __m512i;
using Float = __m512;
using Weight = __m512i;

inline __mmask64 first_bytes(int64_t count) { return count >= 64 ? ~0ull : (1ull << count) - 1; }

// Copy `count` bytes into an array of `size`, at most 64, and fill it up with zeros.
template <size_t size>
inline void load_some(int8_t (&target)[size], const int8_t* source, int64_t count) {
  static_assert(size == 16 || size == 32 || size == 64);
  const __m512i bytes = _mm512_maskz_loadu_epi8(first_bytes(count), source);
  // Loads wait for a masked store to reach the cache, but not for one of whole registers.
  if (size == 16) _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm512_castsi512_si128(bytes));
  if (size == 32) _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_castsi512_si256(bytes));
  if (size == 64) _mm512_storeu_si512(target, bytes);
}

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

#elif FXPRUNE_AVX2

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
#else
// `vpmaddubsw` saturates at 16 bits, so even and odd bytes are widened and multiplied apart.
struct Weight {
  __m256i even, odd;
};
inline Weight repeat(const int8_t* w) {
  const __m256i bytes = repeat_bytes(w);
  return {_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8), _mm256_srai_epi16(bytes, 8)};
}
inline Int dot(Int sum, Int x, Weight w) {
  const __m256i even = _mm256_and_si256(x, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(x, 8);
  const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(even, w.even), _mm256_madd_epi16(odd, w.odd));
  return _mm256_add_epi32(sum, products);
}
#endif

#if defined(__AVXVNNI__)
inline Int dot_each(Int sum, Int x, Int w) { return dot(sum, x, w); }
#else
inline Int dot_each(Int sum, Int x, Int w) {
  return dot(sum, x, Weight{_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)});
}
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

#else

constexpr const char* kInstructionSet = "portable";
constexpr int kLanes = 8;
struct Int {
  int32_t lane[kLanes];
};
struct Float {
  float lane[kLanes];
};
struct Weight {
  int32_t byte[4];
};

template <typename To, typename Compute>
inline To each(Compute compute) {
  To result;
  for (int i = 0; i < kLanes; ++i) result.lane[i] = compute(i);
  return result;
}

inline Int fill(int32_t x) {
  return each<Int>([=](int) { return x; });
}
inline Int load(const void* p) {
  Int x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void store(void* p, Int x) { std::memcpy(p, &x, sizeof x); }
inline Int add(Int a, Int b) {
  return each<Int>(
      [&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i])); });
}
inline Int narrow(Int a, Int b, Int c, Int d) {
  return each<Int>([&](int i) {
    uint8_t bytes[4];
    const int32_t levels[4] = {a.lane[i], b.lane[i], c.lane[i], d.lane[i]};
    for (int k = 0; k < 4; ++k) bytes[k] = static_cast<uint8_t>(levels[k] < 0 ? 0 : levels[k] > 255 ? 255 : levels[k]);
    int32_t word;
    std::memcpy(&word, bytes, 4);
    return word;
  });
}
inline Int raise(Int x, Int low) {
  uint8_t bytes[sizeof x], least[sizeof x];
  std::memcpy(bytes, &x, sizeof x);
  std::memcpy(least, &low, sizeof x);
  for (size_t i = 0; i < sizeof x; ++i) bytes[i] = bytes[i] < least[i] ? least[i] : bytes[i];
  return load(bytes);
}
inline void store_bytes(uint8_t* p, Int x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(x.lane[i] < 0 ? 0 : x.lane[i] > 255 ? 255 : x.lane[i]);
}
inline Weight repeat(const int8_t* w) { return {{w[0], w[1], w[2], w[3]}}; }
inline Int dot(Int sum, Int x, Weight w) {
  return add(sum, each<Int>([&](int i) {
               const uint32_t four = static_cast<uint32_t>(x.lane[i]);
               int32_t products = 0;
               for (int k = 0; k < 4; ++k) products += static_cast<int32_t>(four >> (8 * k) & 0xff) * w.byte[k];
               return products;
             }));
}
inline Int dot_each(Int sum, Int x, Int w) {
  return add(sum, each<Int>([&](int i) {
               const uint32_t levels = static_cast<uint32_t>(x.lane[i]), weights = static_cast<uint32_t>(w.lane[i]);
               int32_t products = 0;
               for (int k = 0; k < 4; ++k)
                 products +=
                     static_cast<int32_t>(levels >> (8 * k) & 0xff) * static_cast<int8_t>(weights >> (8 * k) & 0xff);
               return products;
             }));
}
inline void interleave(const Int (&rows)[4], Int (&words)[4]) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(rows);
  auto* target = reinterpret_cast<uint8_t*>(words);
  for (int i = 0; i < 4 * kLanes; ++i)
    for (int row = 0; row < 4; ++row) target[4 * i + row] = bytes[row * 4 * kLanes + i];
}
inline int byte_of(int k, int lane) { return k * kLanes + lane; }
inline Int join(const Int (&levels)[4]) {
  Int bytes;
  for (int k = 0; k < 4; ++k) store_bytes(reinterpret_cast<uint8_t*>(&bytes) + k * kLanes, levels[k]);
  return bytes;
}
inline void hide(Int& x) { asm volatile("" : "+m"(x)); }

inline Float to_float(Int x) {
  return each<Float>([&](int i) { return static_cast<float>(x.lane[i]); });
}
inline Float fill(float x) {
  return each<Float>([=](int) { return x; });
}
inline Float multiply_then_add(Float x, Float m, Float a) {
  return each<Float>([&](int i) {
    const float product = x.lane[i] * m.lane[i];
    return product + a.lane[i];
  });
}
inline Float at_least(Float x, Float low) {
  return each<Float>([&](int i) { return x.lane[i] > low.lane[i] ? x.lane[i] : low.lane[i]; });
}
inline Float at_most(Float x, Float high) {
  return each<Float>([&](int i) { return x.lane[i] < high.lane[i] ? x.lane[i] : high.lane[i]; });
}
inline Int round_to_int(Float x) {
  return each<Int>([&](int i) {  // Smaller numbers than int32 holds are no undefined behaviour.
    return x.lane[i] < -1e9f ? -1000000000 : static_cast<int32_t>(std::nearbyint(x.lane[i]));
  });
}
inline void store(float* p, Float x) { std::memcpy(p, &x, sizeof x); }
inline Float load_floats(const float* p) {
  Float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

#endif

}  // namespace fxprune
