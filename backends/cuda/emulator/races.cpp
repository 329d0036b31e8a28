#include "races.h"

#include "warp.h"

namespace moekern::emulator {

void touch_shared(Warp&, Cta& cta, uint32_t offset, uint32_t bytes, Touch touch, int lane) {
  uint8_t* valid = cta.valid.data() + (offset - kSharedBase);
  for (uint32_t n = 0; n < bytes; ++n) {
    if (valid[n] == kBarrierByte)
      throw Fault(
          "an mbarrier lies at " + hex(offset + n) + " of shared memory: only mbarrier instructions may touch it",
          lane);
    if (touch == Touch::read && valid[n] == kUnwritten)
      throw Fault(
          "read of shared memory at " + hex(offset + n) + ", which was never written or has a copy under way to it",
          lane);
  }
  if (touch == Touch::write) std::memset(valid, kWritten, bytes);
}

void release(Warp&, Clock&) {}
void acquire(Warp&, const Clock&) {}
void join(Clock&, const Clock&) {}
void fence_async_proxy(Warp&) {}
void new_mbarrier(Warp&, Cta&, Mbarrier&) {}
void use_mbarrier(Warp&, Cta&, const Mbarrier&, uint32_t, int) {}
void write_by_barrier(Warp&, Cta&, uint32_t, uint32_t, const Mbarrier&, int) {}
void write_by_group(Warp&, Cta&, uint32_t, uint32_t, Async, uint64_t, int) {}
void read_by_group(Warp&, Cta&, uint32_t, uint32_t, Async, uint64_t, int) {}
void read_async(Warp&, Cta&, uint32_t, uint32_t, int) {}
void see_group(Warp&, Async, uint64_t, int) {}
void group_clock(Warp&, Async, uint64_t, int, Clock&) {}
void start_races(Cluster&) {}

}  // namespace moekern::emulator
