#include "cpu/simd/neon.h"

#include "cpu/moe/move.h"
#include "cpu/moe/select.h"

namespace moekern::cpu {

extern const RoutingIsa k_routing_neon;
constexpr RoutingIsa k_routing_neon = {select, copy_past_caches, weighted_sum};

}  // namespace moekern::cpu
