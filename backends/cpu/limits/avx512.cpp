#include "cpu/simd/avx512.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {

extern const LimitIsa k_limits_avx512;
constexpr LimitIsa k_limits_avx512 = limits<MultiplyAdd>;

}  // namespace moekern::cpu
