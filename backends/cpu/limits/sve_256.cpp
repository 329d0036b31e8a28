#include "cpu/simd/sve_256.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {

extern const LimitIsa k_limits_sve_256;
constexpr LimitIsa k_limits_sve_256 = limits<MultiplyAdd>;

}  // namespace moekern::cpu
