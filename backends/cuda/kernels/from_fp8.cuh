// FP8 and ue8m0 to f32, which has all their values.
#pragma once
#include "cuda/kernels/elements.cuh"

namespace moekern::cuda {

__device__ inline float from_ue8m0(uint32_t code) {
  return __uint_as_float(code == 255 ? 0x7fffffffu : code ? code << 23 : 1u << 22);
}

// A decode multiplier: f32 or ue8m0.
__device__ inline float load_scale(const char* at, Dtype dtype) {
  return dtype == Dtype::f32 ? *reinterpret_cast<const float*>(at) : from_ue8m0(*reinterpret_cast<const uint8_t*>(at));
}

// A code's exponent and mantissa land where f32 has the low end of its exponent and the high end of its mantissa; what
// the biases differ by is a factor, exact for subnormals too.
__device__ inline float from_e4m3fnuz(uint32_t code) {
  constexpr float kBiases = 0x1p119f;  // 2^(127 - 8)
  if (code == 0x80) return __uint_as_float(0x7fffffffu);
  const float size = __fmul_rn(__uint_as_float((code & 0x7f) << 20), kBiases);
  return __uint_as_float(__float_as_uint(size) | (code & 0x80) << 24);
}

// Two codes, the first in the lower byte. f16 has all values of the formats that the hardware knows.
template <Dtype F>
__device__ inline float2 from_fp8x2(uint32_t codes) {
  if constexpr (F == Dtype::e4m3fnuz) {
    return {from_e4m3fnuz(codes & 0xff), from_e4m3fnuz(codes >> 8 & 0xff)};
  } else {
    uint32_t pair;
    if constexpr (F == Dtype::e4m3fn)
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(codes)));
    else
      asm("cvt.rn.f16x2.e5m2x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(codes)));
    return {f16_to_f32(pair & 0xffff), f16_to_f32(pair >> 16)};
  }
}

}  // namespace moekern::cuda
