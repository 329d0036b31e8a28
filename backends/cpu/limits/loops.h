// Loops that do one thing as fast as the ISA can, written over the vector vocabulary.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "cpu/limits/driver.h"
#include "moekern/kernel.h"

namespace moekern::cpu {
namespace {

// Independent chains: 4 cycles of latency x 4 ports need 16, x 2 ports need 8. With the two factors
// they fit a file of 32 registers, or of 16.
constexpr int kChains = kRegisters >= 32 ? 24 : 12;

// acc * 1/2 + 1 tends to 2: never an infinity, a subnormal or a NaN, which some CPUs are slow at.
struct MultiplyAdd {
  static constexpr int kFlops = 2;  // a lane
  F32 half = set1(0.5f), one = set1(1.f);
  F32 operator()(F32 acc) const { return fma(acc, half, one); }
};

template <class Step>
int64_t multiply_add(int64_t rounds) {
  const Step step;
  F32 acc[kChains];
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(i));  // apart: equal chains would be merged
  for (int64_t round = 0; round < rounds; ++round) {
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) acc[i] = step(acc[i]);
  }
  F32 sum = zero();
#pragma GCC unroll 24
  for (int i = 0; i < kChains; ++i) sum = add(sum, acc[i]);
  volatile float result = reduce_add(sum);
  (void)result;
  return rounds * kChains * W * Step::kFlops;
}

constexpr int kVectors = 4;
constexpr int64_t kVectorBytes = sizeof(I32), kStepBytes = kVectors * kVectorBytes, kLineBytes = 64;

// kRuns halves (or one whole) side by side, each asking for the bytes kAhead further on.
template <int kRuns, int64_t kAhead>
void read(const char* src, int64_t bytes) {
  static_assert(kLimitGranule % (kRuns * kStepBytes) == 0, "no tail");
  const int64_t run = bytes / kRuns;
  I32 seen[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) seen[v] = set1_i32(0);
  for (int64_t i = 0; i < run; i += kStepBytes) {
#pragma GCC unroll 2
    for (int r = 0; r < kRuns; ++r) {
      const char* at = src + r * run + i;
      if (kAhead) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < kStepBytes; line += kLineBytes) __builtin_prefetch(at + kAhead + line);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) seen[v] = bit_or(seen[v], load_i32(at + v * kVectorBytes));
    }
  }
  uint32_t words[kVectors * W];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) store_i32(words + v * W, seen[v]);
  volatile uint32_t result = words[0] | words[W] | words[2 * W] | words[3 * W];
  (void)result;
}

void copy(const char* src, int64_t bytes, char* dst) {
  for (int64_t i = 0; i < bytes; i += kStepBytes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      store_past_caches(dst + i + v * kVectorBytes, load_i32(src + i + v * kVectorBytes));
  }
  __atomic_thread_fence(__ATOMIC_SEQ_CST);  // orders streaming stores too
}

template <class Step>
constexpr LimitIsa limits = {multiply_add<Step>, {read<1, 0>, read<1, 2048>, read<2, 0>}, copy};

}  // namespace
}  // namespace moekern::cpu
