#include "cpu/simd/avx2.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {

extern const LimitIsa k_limits_avx2;
constexpr LimitIsa k_limits_avx2 = limits<MultiplyAdd>;

}  // namespace moekern::cpu
