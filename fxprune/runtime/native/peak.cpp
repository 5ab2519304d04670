// How fast this core multiplies: what the kernels are measured against.
#include <algorithm>
#include <chrono>

#include "kernels.h"
#include "lanes.h"

namespace fxprune {

double peak_gops() {
  constexpr int kSums = 12;  // More than latency times throughput of any known core.
  constexpr int64_t kRounds = 200000;
  const int8_t four[4] = {1, 2, 3, 4};
  const Weight w = repeat(four);
  Int x = fill(0x01020304), sums[kSums];
  for (Int& sum : sums) sum = fill(0);
  double best = 1e30;
  for (int repeat = 0; repeat < 9; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    for (int64_t round = 0; round < kRounds; ++round) {
      hide(x);  // For all that the compiler knows, every round multiplies something else.
#pragma GCC unroll 12
      for (int i = 0; i < kSums; ++i) sums[i] = dot(sums[i], x, w);
    }
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::min(best, seconds.count());
    for (int i = 1; i < kSums; ++i) x = add(x, sums[i]);  // The sums are used, so they are computed.
  }
  int32_t words[kLanes];
  store(words, x);
  volatile int32_t used = words[0];
  (void)used;
  return 2.0 * 4 * kLanes * kSums * kRounds / best / 1e9;
}

}  // namespace fxprune
