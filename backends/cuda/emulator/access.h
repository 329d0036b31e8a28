// Addresses of a warp's lanes as host pointers, checked.
#pragma once
#include "program.h"

namespace moekern::emulator {

// update: an atomic; repeat: a write of the bytes that are there; look: nothing yet, addresses only.
enum class Use : uint8_t { read, write, update, repeat, look };

struct Pointers {
  uint8_t* at[32];
};

// `bytes` at register `address` plus `offset` in every lane. Faults name the lane. What is read in shared memory has to
// have been written; who wrote it, and whether that is known to the reader, the checker of races looks at.
void resolve_addresses(Warp& w, uint32_t lanes, Unit address, bool wide, int64_t offset, ptx::Space space,
                       uint32_t bytes, Use use, Pointers& pointers);

// The same for one address that is already known, of shared::cluster or shared::cta.
inline uint64_t lane_address(Warp& w, Unit unit, bool wide, int64_t offset, int lane) {
  const uint64_t base = wide ? w.lanes<uint64_t>(unit)[lane] : w.lanes<uint32_t>(unit)[lane];
  const uint64_t sum = base + static_cast<uint64_t>(offset);
  return wide ? sum : sum & 0xffffffff;
}
// As an address in shared::cluster, from what is one already or from a generic address.
uint32_t shared_address(uint64_t address, int lane);

}  // namespace moekern::emulator
