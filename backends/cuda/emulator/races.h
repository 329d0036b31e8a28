// Who has seen what: vector clocks, and what they say about each byte of shared memory. A cluster has one checker.
//
// Actors are warps, and whatever else accesses shared memory by itself: the copies that complete on an mbarrier (its
// phase is their time), a lane's groups of bulk copies, a warp's groups of cp.async and of wgmma (the group's number is
// their time). An access is ordered before another if the second's warp has seen the first's actor at its time: through
// barriers, mbarriers and waits for groups. The lanes of a warp count as one; global memory is not looked at.
//
// Reads and writes of copies and of wgmma go through the async proxy. What was written by ordinary stores they may
// touch only if a fence.proxy.async lies in between, in the writer or later on the way.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace moekern::emulator {

struct Cluster;
struct Cta;
struct Instruction;
struct Mbarrier;
struct Warp;

// For every actor, up to when it was seen; and up to when with a proxy fence after it.
struct Clock {
  std::vector<uint32_t> seen, fenced;
};

// repeat: a write of the very bytes that are there. That nobody can tell, in whatever order.
enum class Touch : uint8_t { read, write, atomic, repeat };
enum class Async : uint8_t { copies, bulk, products };

struct Races {
  struct Access {
    uint32_t actor = 0, time = 0;  // time 0: none
    bool async = false, atomic = false;
    const Instruction* instruction = nullptr;
    int warp = 0, rank = 0;
  };
  struct State {  // of bytes: equal for all bytes with the same history
    Access writer;
    std::vector<Access> readers;  // since that write, one an actor
  };
  std::vector<State> states;                 // the first: never touched
  std::vector<std::vector<uint32_t>> bytes;  // per CTA of the cluster: the number of each byte's state
  std::vector<Clock> clocks;                 // per warp
  std::unordered_map<uint64_t, uint32_t> actors;
  uint32_t next_actor = 0;
  std::vector<Clock> released;                  // per warp: up to its last fence, for relaxed arrivals
  std::unordered_map<uint64_t, Clock> atomics;  // by rank and offset
  struct Transition {                           // what an access makes of a state
    uint32_t old, actor, time;
    const Instruction* instruction;
    uint8_t kind;  // 0: a read, 1: a write, 2: a write of what is there
    bool operator==(const Transition& o) const {
      return old == o.old && actor == o.actor && time == o.time && instruction == o.instruction && kind == o.kind;
    }
  };
  struct Hash {
    size_t operator()(const Transition& t) const;
  };
  std::unordered_map<Transition, uint32_t, Hash> transitions;

  uint32_t actor(uint64_t key);
};

// A warp's own access to shared memory of a CTA (generic proxy). Lane -1: of all of them.
void touch_shared(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Touch touch, int lane);

// What w has seen goes into a clock; what a clock has seen, w has from now on.
void release(Warp& w, Clock& clock);
void acquire(Warp& w, const Clock& clock);
void join(Clock& into, const Clock& from);
void fence_async_proxy(Warp& w);
// A fence that releases, and a relaxed arrival: it hands over what lies before the fence.
void release_fence(Warp& w);
void release_relaxed(Warp& w, Clock& clock);

// A new mbarrier; an operation on one, whose mbarrier.init has to have been seen; the end of a phase.
void new_mbarrier(Warp& w, Mbarrier& b);
void use_mbarrier(Warp& w, const Mbarrier& b, uint32_t address, int lane);
void end_phase(Cta& cta, Mbarrier& b);

// Accesses through the async proxy. A write that completes on an mbarrier is seen by who has seen that phase; what a
// group of copies or products reads or writes, by who has waited for the group.
void write_by_barrier(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, const Mbarrier& b, int lane);
void read_by_barrier(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, const Mbarrier& b, int lane);
void write_by_group(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Async kind, uint64_t group, int lane);
void read_by_group(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Async kind, uint64_t group, int lane);
void see_group(Warp& w, Async kind, uint64_t group, int lane);
void group_clock(Warp& w, Async kind, uint64_t group, int lane, Clock& clock);

void start_races(Cluster& cluster);
// All warps of a CTA have exited: others' accesses to its shared memory have to be known to it.
void check_exit(Cta& cta);

}  // namespace moekern::emulator
