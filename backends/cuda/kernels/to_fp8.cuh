// f32 to FP8: to nearest even, saturating; NaN stays NaN, and all of them are positive.
#pragma once
#include <cstdint>

#include "moekern/dtype.h"

namespace moekern::cuda {

template <Dtype F> constexpr float kMost = F == Dtype::e5m2 ? 57344.f : F == Dtype::e4m3fnuz ? 240.f : 448.f;

// The hardware has no e4m3fnuz.
__device__ inline uint32_t to_e4m3fnuz(float x) {
  const uint32_t bits = __float_as_uint(x), absolute = bits & 0x7fffffffu;
  if (absolute > 0x7f800000u) return 0x80;
  const float size = fminf(__uint_as_float(absolute), kMost<Dtype::e4m3fnuz>);
  const uint32_t kept = __float_as_uint(size);
  uint32_t code;
  if (kept < (128u - 8) << 23) {
    // Below 2^-7 codes are multiples of 2^-10: the last bit of a sum with 2^13, which the addition rounds.
    code = __float_as_uint(__fadd_rn(size, 8192.f)) - __float_as_uint(8192.f);
  } else {
    code = ((kept + (1u << 19) - 1 + (kept >> 20 & 1)) >> 20) - ((127u - 8) << 3);
  }
  return code ? code | (bits >> 24 & 0x80) : 0;
}

// Two codes, the first in the lower byte. cvt rounds f32 once to nearest even, subnormals too, and .satfinite takes all
// beyond the largest finite value to it, infinities too, and NaN to NaN (PTX ISA, cvt): the contract's own words.
template <Dtype F>
__device__ inline uint32_t to_fp8x2(float first, float second) {
  if constexpr (F == Dtype::e4m3fnuz) {
    return to_e4m3fnuz(first) | to_e4m3fnuz(second) << 8;
  } else {
    uint16_t pair;
    if constexpr (F == Dtype::e4m3fn)
      asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    else
      asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
    return pair;
  }
}

// max(amax, 1e-4) / max, of a magnitude's bits, which order as the magnitudes do, with NaN above all.
template <Dtype F>
__device__ inline float scale_of(uint32_t amax, bool round_up) {
  const float least = 1e-4f;
  const float scale = __fdiv_rn(__uint_as_float(max(amax, __float_as_uint(least))), kMost<F>);
  const uint32_t bits = __float_as_uint(scale);
  return round_up && bits < 0x7f800000u ? __uint_as_float((bits + 0x7fffffu) & 0xff800000u) : scale;
}

template <Dtype F>
struct Format {
  static constexpr Dtype value = F;
};

// Calls with the format as a type.
template <class Body>
__device__ inline void with_format(Dtype format, const Body& body) {
  switch (format) {
    case Dtype::e4m3fn: return body(Format<Dtype::e4m3fn>{});
    case Dtype::e5m2: return body(Format<Dtype::e5m2>{});
    default: return body(Format<Dtype::e4m3fnuz>{});
  }
}

}  // namespace moekern::cuda
