#include "access.h"

#include <algorithm>

namespace moekern::emulator {
namespace {

const char* verb(Use use) { return use == Use::read ? "read" : use == Use::write ? "write" : "atomic operation"; }

void misaligned(uint64_t address, uint32_t bytes, int lane) {
  throw Fault("misaligned address " + hex(address) + ": an access of " + std::to_string(bytes) +
                  " bytes needs a multiple of " + std::to_string(bytes),
              lane);
}

void touch(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Use use, int lane) {
  static const Touch kinds[] = {Touch::read, Touch::write, Touch::atomic, Touch::repeat};
  if (use != Use::look) touch_shared(w, cta, offset, bytes, kinds[static_cast<int>(use)], lane);
}

uint8_t* host(Warp& w, uint64_t address, uint32_t bytes, Use use, int lane) {
  const Region* r = w.launch->regions->find(address, bytes);
  if (!r)
    throw Fault("out of bounds: " + std::string(verb(use)) + " of " + std::to_string(bytes) + " bytes at " +
                    hex(address) + ", " + w.launch->regions->nearest(address),
                lane);
  if (use != Use::read && !r->writable)
    throw Fault("write to read-only memory: " + std::to_string(bytes) + " bytes at " + hex(address), lane);
  return reinterpret_cast<uint8_t*>(address);
}

uint8_t* local(Warp& w, uint64_t address, uint32_t bytes, int lane) {
  const uint32_t size = w.launch->program->local_bytes;
  if (address < kLocalBase || address + bytes > kLocalBase + size)
    throw Fault("out of bounds: " + std::to_string(bytes) + " bytes at " + hex(address) +
                    " of local memory, which has " + std::to_string(size),
                lane);
  return w.local.data() + static_cast<size_t>(lane) * size + (address - kLocalBase);
}

uint8_t* shared(Warp& w, uint32_t address, uint32_t bytes, Use use, int lane) {
  Cta& cta = shared_cta(w, address, lane);
  uint8_t* p = shared_bytes(cta, address, bytes, 1, lane, verb(use));
  touch(w, cta, shared_offset(address), bytes, use, lane);
  return p;
}

}  // namespace

uint32_t shared_address(uint64_t address, int lane) {
  if ((address & kWindowMask) == kSharedWindow) return static_cast<uint32_t>(address);
  if (address >> 32) throw Fault(hex(address) + " is no address in shared memory", lane);
  return static_cast<uint32_t>(address);
}

void resolve_addresses(Warp& w, uint32_t lanes, Unit unit, bool wide, int64_t offset, ptx::Space space, uint32_t bytes,
                       Use use, Pointers& pointers) {
  uint64_t address[32];
  uint64_t low = ~0ull, high = 0, bits = 0;
  for (const int l : Lanes(lanes)) {
    const uint64_t a = address[l] = lane_address(w, unit, wide, offset, l);
    low = std::min(low, a), high = std::max(high, a), bits |= a;
  }
  if (bits & (bytes - 1))
    for (const int l : Lanes(lanes))
      if (address[l] & (bytes - 1)) misaligned(address[l], bytes, l);
  if (space == ptx::Space::generic) {
    // Most often all lanes are in one space.
    const uint64_t window = low & kWindowMask;
    if (window != (high & kWindowMask)) {
      for (const int l : Lanes(lanes)) resolve_addresses(w, 1u << l, unit, wide, offset, space, bytes, use, pointers);
      return;
    }
    space = window == kSharedWindow  ? ptx::Space::shared
            : window == kLocalWindow ? ptx::Space::local
                                     : ptx::Space::global;
    if (window)
      for (const int l : Lanes(lanes)) address[l] &= ~kWindowMask;
  }
  switch (space) {
    case ptx::Space::shared: {
      Cta& own = *w.cta;
      const uint64_t end = kSharedBase + own.shared_bytes;
      // Consecutive lanes, consecutive bytes: one range. That is what most accesses look like.
      bool run = lanes == kAllLanes && high < (1u << kRankShift) && low == (address[0] & ~kWindowMask);
      for (int l = 1; run && l < 32; ++l) run = address[l] == address[0] + static_cast<uint64_t>(l) * bytes;
      if (run && address[0] >= kSharedBase && address[31] + bytes <= end) {
        touch(w, own, static_cast<uint32_t>(address[0]), 32 * bytes, use, -1);
        for (int l = 0; l < 32; ++l) pointers.at[l] = own.shared.data() + (address[l] - kSharedBase);
        return;
      }
      for (const int l : Lanes(lanes)) pointers.at[l] = shared(w, shared_address(address[l], l), bytes, use, l);
      return;
    }
    case ptx::Space::local:
      for (const int l : Lanes(lanes)) pointers.at[l] = local(w, address[l], bytes, l);
      return;
    default: {
      const Region* r = w.launch->regions->find(low, high - low + bytes);
      if (r && (use == Use::read || r->writable)) {
        for (const int l : Lanes(lanes)) pointers.at[l] = reinterpret_cast<uint8_t*>(address[l]);
      } else {
        for (const int l : Lanes(lanes)) pointers.at[l] = host(w, address[l], bytes, use, l);
      }
    }
  }
}

Cta& shared_cta(Warp& w, uint32_t address, int lane) {
  const uint32_t rank = address >> kRankShift;
  if (rank == 0) return *w.cta;
  if (rank > w.cta->cluster->ctas.size())
    throw Fault("address " + hex(address) + " of shared::cluster names CTA " + std::to_string(rank - 1) +
                    " of a cluster of " + std::to_string(w.cta->cluster->ctas.size()),
                lane);
  Cta& cta = *w.cta->cluster->ctas[rank - 1];
  if (cta.live_warps == 0 && &cta != w.cta)
    throw Fault("access to the shared memory of CTA " + std::to_string(rank - 1) + " of the cluster, which has exited",
                lane);
  return cta;
}

uint8_t* shared_bytes(Cta& cta, uint32_t address, uint32_t bytes, uint32_t align, int lane, const char* what) {
  const uint32_t offset = shared_offset(address);
  if (offset & (align - 1))
    throw Fault("misaligned address " + hex(address) + " in shared memory: " + what + " needs a multiple of " +
                    std::to_string(align),
                lane);
  if (offset < kSharedBase || uint64_t{offset} + bytes > uint64_t{kSharedBase} + cta.shared_bytes)
    throw Fault("out of bounds: " + std::string(what) + " of " + std::to_string(bytes) + " bytes at " + hex(offset) +
                    " of shared memory, which has " + std::to_string(cta.shared_bytes) + " bytes from " +
                    hex(kSharedBase) + " on",
                lane);
  return cta.shared.data() + (offset - kSharedBase);
}

}  // namespace moekern::emulator
