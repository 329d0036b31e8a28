#include "cpu/simd/neon.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {
namespace {

// BFMMLA: two rows times two columns of four, all 2^-8. Adds 2^-14 until the sum, 2^10, is too large to notice.
struct DotBf16 {
  static constexpr int kFlops = 8;  // a lane: four products
  bfloat16x8_t x = vreinterpretq_bf16_u16(vdupq_n_u16(0x3b80));
  F32 operator()(F32 acc) const { return vbfmmlaq_f32(acc, x, x); }
};

}  // namespace

extern const LimitIsa k_limits_neon_bf16;
constexpr LimitIsa k_limits_neon_bf16 = limits<DotBf16>;

}  // namespace moekern::cpu
