// Elements of rows in memory as f32, by type.
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

}  // namespace
}  // namespace moekern::cpu
