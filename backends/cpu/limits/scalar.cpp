#include "cpu/simd/scalar.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {

extern const LimitIsa k_limits_scalar;
constexpr LimitIsa k_limits_scalar = limits<MultiplyAdd>;

}  // namespace moekern::cpu
