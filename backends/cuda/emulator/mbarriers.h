// mbarrier objects, for those that complete transactions on them.
#pragma once
#include "warp.h"

namespace moekern::emulator {

Mbarrier& mbarrier_at(Cta& cta, uint32_t address, int lane);
// What a copy does when it has landed: `bytes` of the current phase's transactions.
void complete_transactions(Launch& launch, Cta& cta, uint32_t address, uint32_t bytes);
void arrive(Launch& launch, Cta& cta, Mbarrier& b, uint32_t count, uint32_t address, int lane);
std::string describe(const Mbarrier& b);

}  // namespace moekern::emulator
