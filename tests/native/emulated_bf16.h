// The arithmetic that VDPBF16PS and TDPBF16PS share: FMAs in f32, rounded to nearest even, with
// subnormal inputs read as zero and subnormal results written as zero. MXCSR has no say.
#pragma once
#include <cmath>
#include <cstdint>

#include "moekern/float_formats.h"

namespace moekern::emulated {

static inline float flush(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.f, x) : x; }

static inline float fma_bf16(float sum, uint16_t a, uint16_t b) {
  return flush(std::fma(flush(bf16_to_f32(a)), flush(bf16_to_f32(b)), flush(sum)));
}

}  // namespace moekern::emulated
