// e^x, for scores and activations.
#pragma once

namespace moekern::cuda {

// Within 3 ulp: 2 are those of the instruction, which alone would lose x 2^-24. With t = x log2 e, rounded,
// e^x = 2^t e^(x - t ln 2), and the last factor is 1 + r to within r^2 < 2^-35. 1 of 0; 0 below 2^-126, infinite from
// 2^128 on, where r means nothing; NaN of NaN.
__device__ inline float exponential(float x) {
  const float t = x * 1.44269504f;
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(t));
  const float r = __fmaf_rn(t, 1.90465421e-9f, __fmaf_rn(t, -0.693147182f, x));
  return power > 0.f && power < __int_as_float(0x7f800000) ? __fmaf_rn(power, r, power) : power;
}

}  // namespace moekern::cuda
