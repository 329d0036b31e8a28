// Moving rows, and adding them up with weights.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include <cstdint>

#include "cpu/moe/driver.h"
#include "cpu/rows.h"

namespace moekern::cpu {
namespace {

void copy_past_caches(const char* src, int64_t bytes, char* dst) {
  constexpr int64_t kVector = sizeof(I32);
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % kVector);
  int64_t i = misaligned ? kVector - misaligned : 0;
  if (i > bytes) i = bytes;
  __builtin_memcpy(dst, src, static_cast<size_t>(i));
  for (; i + kVector <= bytes; i += kVector) store_past_caches(dst + i, load_i32(src + i));
  __builtin_memcpy(dst + i, src + i, static_cast<size_t>(bytes - i));
}

constexpr int kSumVectors = 4;  // one accumulator each: loads and conversions are the bulk

// A product and a sum round once each, in the order of the rows, on every ISA alike. -0 is the sum of nothing:
// added to -0 it stays so.
template <Dtype F>
inline void weighted_sum_from(const char* const* rows, const float* weights, int count, int64_t n, Dtype to,
                              char* dst) {
  constexpr int64_t kStep = kSumVectors * W;
  alignas(64) float sums[kStep];
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    F32 acc[kSumVectors];
#pragma GCC unroll 4
    for (F32& a : acc) a = set1(-0.f);
    for (int j = 0; j < count; ++j) {
      const F32 weight = set1(weights[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kSumVectors; ++v) acc[v] = add(acc[v], mul(weight, load_as<F>(rows[j], i + v * W)));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kSumVectors; ++v) store(sums + v * W, acc[v]);
    row_store(to, sums, kStep, dst + i * size_of(to));
  }
  for (; i < n; ++i) {
    float sum = -0.f;
    for (int j = 0; j < count; ++j) sum += weights[j] * element_as<F>(rows[j], i);
    row_store(to, &sum, 1, dst + i * size_of(to));
  }
}

void weighted_sum(Dtype from, const char* const* rows, const float* weights, int count, int64_t n, Dtype to,
                  char* dst) {
  switch (from) {
    case Dtype::bf16: return weighted_sum_from<Dtype::bf16>(rows, weights, count, n, to, dst);
    case Dtype::f16: return weighted_sum_from<Dtype::f16>(rows, weights, count, n, to, dst);
    default: return weighted_sum_from<Dtype::f32>(rows, weights, count, n, to, dst);
  }
}

}  // namespace
}  // namespace moekern::cpu
