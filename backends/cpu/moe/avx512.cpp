#include "cpu/simd/avx512.h"

#include "cpu/moe/move.h"
#include "cpu/moe/select.h"

namespace moekern::cpu {

extern const RoutingIsa k_routing_avx512;
constexpr RoutingIsa k_routing_avx512 = {select, copy_past_caches, weighted_sum};

}  // namespace moekern::cpu
