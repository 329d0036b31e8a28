#include "cpu/simd/avx512.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {
namespace {

// Adds 2^-15 until the sum, 2^9, is too large to notice.
struct DotBf16 {
  static constexpr int kFlops = 4;                   // a lane: two products
  __m512bh x = (__m512bh)_mm512_set1_epi16(0x3b80);  // 2^-8
  F32 operator()(F32 acc) const { return _mm512_dpbf16_ps(acc, x, x); }
};

}  // namespace

extern const LimitIsa k_limits_avx512_bf16;
constexpr LimitIsa k_limits_avx512_bf16 = limits<DotBf16>;

}  // namespace moekern::cpu
