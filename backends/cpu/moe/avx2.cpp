#include "cpu/simd/avx2.h"

#include "cpu/moe/move.h"
#include "cpu/moe/select.h"

namespace moekern::cpu {

extern const RoutingIsa k_routing_avx2;
constexpr RoutingIsa k_routing_avx2 = {select, copy_past_caches, weighted_sum};

}  // namespace moekern::cpu
