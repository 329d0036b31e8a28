#include "cpu/simd/scalar.h"

#include "cpu/moe/move.h"
#include "cpu/moe/select.h"

namespace moekern::cpu {

extern const RoutingIsa k_routing_scalar;
constexpr RoutingIsa k_routing_scalar = {select, copy_past_caches, weighted_sum};

}  // namespace moekern::cpu
