// Who has seen what: vector clocks, and what they say about each byte of shared memory.
#pragma once
#include <cstdint>
#include <vector>

namespace moekern::emulator {

struct Cluster;
struct Cta;
struct Mbarrier;
struct Warp;

struct Clock {
  std::vector<uint32_t> seen;
};
struct Races {};

enum class Touch : uint8_t { read, write };

// A warp's own access to shared memory of a CTA (generic proxy).
void touch_shared(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Touch touch, int lane);

// What w has seen goes into a clock; what a clock has seen, w has from now on.
void release(Warp& w, Clock& clock);
void acquire(Warp& w, const Clock& clock);
void fence_async_proxy(Warp& w);
void new_mbarrier(Warp& w, Cta& cta, Mbarrier& b);
// An operation on an mbarrier, whose mbarrier.init has to have been seen.
void use_mbarrier(Warp& w, Cta& cta, const Mbarrier& b, uint32_t address, int lane);
// Accesses through the async proxy. A write that completes on an mbarrier is seen by who has seen that phase; what is
// read or written by a group of copies, by who has waited for the group.
enum class Async : uint8_t { copies, bulk, products };
void write_by_barrier(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, const Mbarrier& b, int lane);
void write_by_group(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Async kind, uint64_t group, int lane);
void read_by_group(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Async kind, uint64_t group, int lane);
void read_async(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, int lane);
void see_group(Warp& w, Async kind, uint64_t group, int lane);
void group_clock(Warp& w, Async kind, uint64_t group, int lane, Clock& clock);
void start_races(Cluster& cluster);
void join(Clock& into, const Clock& from);

}  // namespace moekern::emulator
