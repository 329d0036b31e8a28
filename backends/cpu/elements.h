// Elements of rows in memory as f32, by type, and back: rounded to nearest even.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

inline void copy(float* dst, const float* src, int64_t n) { __builtin_memcpy(dst, src, static_cast<size_t>(n) * 4); }

template <Dtype F>
inline F32 load_as(const char* p, int64_t i) {
  if constexpr (F == Dtype::bf16) return load_bf16(reinterpret_cast<const uint16_t*>(p) + i);
  if constexpr (F == Dtype::f16) return load_f16(reinterpret_cast<const uint16_t*>(p) + i);
  return load(reinterpret_cast<const float*>(p) + i);
}

template <Dtype F>
inline float element_as(const char* p, int64_t i) {
  if constexpr (F == Dtype::bf16) return bf16_to_f32(reinterpret_cast<const uint16_t*>(p)[i]);
  if constexpr (F == Dtype::f16) return f16_to_f32(reinterpret_cast<const uint16_t*>(p)[i]);
  return reinterpret_cast<const float*>(p)[i];
}

inline I32 round_to_bf16(F32 x) {
  const I32 u = bits(x), odd = bit_and(shr32<16>(u), set1_i32(1));
  const I32 rounded = add_i32(add_i32(u, set1_i32(0x7fff)), odd);
  return shr32<16>(if_nan(x, bit_or(u, set1_i32(0x400000)), rounded));
}

template <Dtype T>
inline void store_as(char* p, int64_t i, F32 x) {
  if constexpr (T == Dtype::bf16) store_low16(reinterpret_cast<uint16_t*>(p) + i, round_to_bf16(x));
  if constexpr (T == Dtype::f16) store_f16(reinterpret_cast<uint16_t*>(p) + i, x);
  if constexpr (T == Dtype::f32) store(reinterpret_cast<float*>(p) + i, x);
}

template <Dtype T>
inline void store_element_as(char* p, int64_t i, float x) {
  if constexpr (T == Dtype::bf16) reinterpret_cast<uint16_t*>(p)[i] = f32_to_bf16(x);
  if constexpr (T == Dtype::f16) reinterpret_cast<uint16_t*>(p)[i] = f32_to_f16(x);
  if constexpr (T == Dtype::f32) reinterpret_cast<float*>(p)[i] = x;
}

}  // namespace
}  // namespace moekern::cpu
