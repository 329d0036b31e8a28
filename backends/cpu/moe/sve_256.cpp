#include "cpu/simd/sve_256.h"

#include "cpu/moe/move.h"
#include "cpu/moe/select.h"

namespace moekern::cpu {

extern const RoutingIsa k_routing_sve_256;
constexpr RoutingIsa k_routing_sve_256 = {select, copy_past_caches, weighted_sum};

}  // namespace moekern::cpu
