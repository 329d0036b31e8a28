// Moving rows, and adding them up with weights.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include <cstdint>

#include "cpu/elements.h"
#include "cpu/moe/driver.h"

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
template <Dtype From, Dtype To>
inline void weighted_sum_as(const char* const* rows, const float* weights, int count, int64_t n, char* dst) {
  int64_t i = 0;
  for (; i + kSumVectors * W <= n; i += kSumVectors * W) {
    F32 sums[kSumVectors];
#pragma GCC unroll 4
    for (F32& sum : sums) sum = set1(-0.f);
    for (int j = 0; j < count; ++j) {
      const F32 weight = set1(weights[j]);
#pragma GCC unroll 4
      for (int v = 0; v < kSumVectors; ++v) sums[v] = add(sums[v], mul(weight, load_as<From>(rows[j], i + v * W)));
    }
#pragma GCC unroll 4
    for (int v = 0; v < kSumVectors; ++v) store_as<To>(dst, i + v * W, sums[v]);
  }
  for (; i < n; ++i) {
    float sum = -0.f;
    for (int j = 0; j < count; ++j) sum += weights[j] * element_as<From>(rows[j], i);
    store_element_as<To>(dst, i, sum);
  }
}

template <Dtype From>
inline void weighted_sum_from(const char* const* rows, const float* weights, int count, int64_t n, Dtype to,
                              char* dst) {
  switch (to) {
    case Dtype::bf16: return weighted_sum_as<From, Dtype::bf16>(rows, weights, count, n, dst);
    case Dtype::f16: return weighted_sum_as<From, Dtype::f16>(rows, weights, count, n, dst);
    default: return weighted_sum_as<From, Dtype::f32>(rows, weights, count, n, dst);
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
