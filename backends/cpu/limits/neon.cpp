#include "cpu/simd/neon.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {

extern const LimitIsa k_limits_neon;
constexpr LimitIsa k_limits_neon = limits<MultiplyAdd>;

}  // namespace moekern::cpu
