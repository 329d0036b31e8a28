// FP8 bytes -> f32 lanes, exactly, in 9 vector operations per 4W weights.
//
// A byte at the top of a 16-bit word, shifted right arithmetically by S, has its exponent and
// mantissa where f32 has the low end of its exponent and the high end of its mantissa:
//
//   e4m3  s eeee mmm 00000000  >> 4  ->  s ssss eeee mmm 0000   & 0x87f0  (f32: s | exponent | mantissa)
//   e5m2  s eeeee mm 00000000  >> 3  ->  s sss eeeee mm 00000   & 0x8fe0
//
// The result is the value times 2^-(127 - bias), subnormals included: they become f32 subnormals,
// which is why the driver clears flush-to-zero. The factor goes into the activations' row exponent.
// NaN and infinity are not representable that way; `Special` notices them for 2 operations per
// vector of bytes and the caller repairs the rare tile that has one.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

template <Dtype F> struct Decode {
  static constexpr int kShift = F == Dtype::e5m2 ? 3 : 4;
  static constexpr uint32_t kMask = F == Dtype::e5m2 ? 0x8fe00000u : 0x87f00000u;

  // x lane i holds bytes 4i .. 4i+3; w[j] lane i becomes byte 4i + j.
  static inline void lanes(I32 x, F32* w) {
    const I32 mask = set1_i32(kMask);
    const I32 odd = sra16<kShift>(x), even = sra16<kShift>(shl16<8>(x));
    w[3] = as_f32(bit_and(odd, mask));
    w[2] = as_f32(bit_and(even, mask));
    w[1] = as_f32(bit_and(shl32<16>(odd), mask));
    w[0] = as_f32(bit_and(shl32<16>(even), mask));
  }

  // One of them: 11 operations for all four, but nothing to keep between them.
  static inline F32 lane(I32 x, int j) {
    const I32 high = j == 3   ? sra16<kShift>(x)
                     : j == 2 ? sra16<kShift>(shl16<8>(x))
                     : j == 1 ? sra32<kShift>(shl32<16>(x))
                              : sra32<kShift>(shl32<24>(x));
    return as_f32(bit_and(high, set1_i32(kMask)));
  }
};

// Whether a stream of bytes held a NaN or an infinity. Doubling a byte drops its sign, so that in
// e4m3fn (0x7f) and e5m2 (0x7c .. 0x7f) they are the largest unsigned bytes of all; e4m3fnuz has
// only 0x80, the smallest signed byte. One register either way: the micro-kernels have no second.
template <Dtype F> struct Special {
  I32 extreme = set1_i32(F == Dtype::e4m3fnuz ? 0x7f7f7f7fu : 0);

  inline void see(I32 x) {
    if constexpr (F == Dtype::e4m3fnuz) {
      extreme = min_s8(extreme, x);
    } else {
      extreme = max_u8(extreme, add_i8(x, x));
    }
  }
  inline bool found() const {
    alignas(64) uint8_t bytes[4 * W];
    store_i32(bytes, extreme);
    bool any = false;
    for (int i = 0; i < 4 * W; ++i)
      any |= F == Dtype::e4m3fnuz ? bytes[i] == 0x80 : bytes[i] >= 2 * (F == Dtype::e5m2 ? 0x7c : 0x7f);
    return any;
  }
};

}  // namespace
}  // namespace moekern::cpu
