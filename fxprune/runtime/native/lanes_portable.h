// Vectors in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace fxprune {

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

}  // namespace fxprune
