#include "races.h"

#include <algorithm>

#include "program.h"
#include "warp.h"

namespace moekern::emulator {
namespace {

constexpr size_t kManyStates = 200000;

uint32_t at(const std::vector<uint32_t>& v, uint32_t actor) { return actor < v.size() ? v[actor] : 0; }

void raise(std::vector<uint32_t>& v, uint32_t actor, uint32_t time) {
  if (actor >= v.size()) v.resize(actor + 1, 0);
  v[actor] = std::max(v[actor], time);
}

void join(std::vector<uint32_t>& into, const std::vector<uint32_t>& from) {
  if (from.size() > into.size()) into.resize(from.size(), 0);
  for (size_t n = 0; n < from.size(); ++n) into[n] = std::max(into[n], from[n]);
}

Races* races_of(Warp& w) { return w.cta->cluster->races.get(); }
Clock& clock_of(Warp& w) { return races_of(w)->clocks[static_cast<size_t>(w.actor)]; }

uint64_t group_key(const Warp& w, Async kind, int lane) {
  return 1ull << 40 | static_cast<uint64_t>(w.actor) << 16 | static_cast<uint64_t>(kind) << 8 |
         static_cast<uint64_t>(kind == Async::bulk ? lane : 0);
}

std::string told(const Races::Access& a, size_t ctas) {
  std::string text = a.instruction->statement->text;
  if (text.size() > 90) text = text.substr(0, 87) + "...";
  return (ctas > 1 ? "CTA " + std::to_string(a.rank) + " of the cluster, " : std::string()) + "warp " +
         std::to_string(a.warp) + ", line " + std::to_string(a.instruction->line) + ": " + text;
}

struct Toucher {
  Toucher(Warp& w, Cta& cta, const Races::Access& access, bool writes, bool repeats, int lane)
      : races(*races_of(w)),
        clock(clock_of(w)),
        cta(cta),
        access(access),
        writes(writes),
        repeats(repeats),
        lane(lane) {}

  void go(uint32_t offset, uint32_t bytes) {
    uint32_t* ids = races.bytes[cta.rank].data() + (offset - kSharedBase);
    for (uint32_t n = 0; n < bytes;) {
      const uint32_t old = ids[n];
      uint32_t end = n + 1;
      while (end < bytes && ids[end] == old) ++end;
      const uint32_t fresh = next_state(old, offset + n);
      if (fresh != old) std::fill(ids + n, ids + end, fresh);
      n = end;
    }
  }

 private:
  void check(const Races::Access& before, bool wrote, uint32_t offset) const {
    if (!before.time || (before.atomic && access.atomic)) return;
    const bool seen = at(clock.seen, before.actor) >= before.time;
    const bool crosses = wrote && access.async && !before.async;
    if (seen && !(crosses && at(clock.fenced, before.actor) < before.time)) return;
    const size_t ctas = cta.cluster->ctas.size();
    const std::string here = std::string(writes ? "writes" : "reads") + " shared memory at " + hex(offset);
    if (seen)
      throw Fault("race: " + here +
                      " through the async proxy, and no fence.proxy.async lies behind the ordinary write of " +
                      told(before, ctas),
                  lane);
    throw Fault("race: " + here + ", and nothing orders that behind the " + (wrote ? "write" : "read") + " of " +
                    told(before, ctas),
                lane);
  }

  // Behind all that was done by ordinary accesses.
  bool ordered(const Races::State& state) const {
    const auto seen = [&](const Races::Access& a) { return !a.time || a.async || at(clock.seen, a.actor) >= a.time; };
    return seen(state.writer) && std::all_of(state.readers.begin(), state.readers.end(), seen);
  }

  uint32_t next_state(uint32_t old, uint32_t offset) {
    const auto kind = static_cast<uint8_t>(writes ? repeats ? 2 : 1 : 0);
    const auto [it, fresh] = races.transitions.insert({{old, access.actor, access.time, access.instruction, kind}, 0});
    if (!fresh) return it->second;
    const Races::State& state = races.states[old];
    if (repeats && !ordered(state)) return it->second = old;
    check(state.writer, true, offset);
    if (writes) {
      for (const Races::Access& reader : state.readers) check(reader, false, offset);
      // Whatever was there before: one state for all that this access writes.
      const auto [written, first] =
          races.transitions.insert({{~0u, access.actor, access.time, access.instruction, uint8_t{1}}, 0});
      if (first) {
        written->second = static_cast<uint32_t>(races.states.size());
        races.states.push_back({access, {}});
      }
      return it->second = written->second;
    }
    Races::State next = state;
    bool replaced = false;
    for (Races::Access& reader : next.readers)
      if (reader.actor == access.actor && reader.atomic == access.atomic) {
        if (reader.time == access.time) return it->second = old;
        reader = access;
        replaced = true;
      }
    if (!replaced) next.readers.push_back(access);
    it->second = static_cast<uint32_t>(races.states.size());
    races.states.push_back(std::move(next));
    return it->second;
  }

  Races& races;
  const Clock& clock;
  Cta& cta;
  const Races::Access& access;
  bool writes, repeats;
  int lane;
};

// States that no byte is in any more.
void collect(Races& r) {
  std::vector<uint32_t> renumbered(r.states.size(), ~0u);
  std::vector<Races::State> kept;
  for (auto& ids : r.bytes)
    for (uint32_t& id : ids) {
      if (renumbered[id] == ~0u) {
        renumbered[id] = static_cast<uint32_t>(kept.size());
        kept.push_back(r.states[id]);
      }
      id = renumbered[id];
    }
  r.states = std::move(kept);
  r.transitions.clear();
}

void touch(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, bool writes, uint32_t actor, uint32_t time, bool async,
           bool atomic, int lane, bool repeats = false) {
  Races& r = *races_of(w);
  if (r.states.size() > kManyStates) collect(r);
  Races::Access access;
  access.actor = actor, access.time = time, access.async = async, access.atomic = atomic;
  access.instruction = w.launch->instruction, access.warp = w.index, access.rank = static_cast<int>(w.cta->rank);
  Toucher(w, cta, access, writes, repeats, lane).go(offset, bytes);
}

}  // namespace

size_t Races::Hash::operator()(const Transition& t) const {
  uint64_t h = t.old * 0x9e3779b97f4a7c15ull + t.actor;
  h = (h ^ h >> 29) * 0xbf58476d1ce4e5b9ull + t.time;
  h = (h ^ h >> 32) * 0x94d049bb133111ebull + reinterpret_cast<uint64_t>(t.instruction) + t.kind;
  return h ^ h >> 31;
}

uint32_t Races::actor(uint64_t key) {
  const auto [it, fresh] = actors.insert({key, next_actor});
  if (fresh) ++next_actor;
  return it->second;
}

void start_races(Cluster& cluster) {
  int warps = 0;
  for (Cta* cta : cluster.ctas)
    for (Warp& w : cta->warps) w.actor = warps++;
  if (!cluster.ctas[0]->launch->settings.races) return;
  cluster.races = std::make_unique<Races>();
  Races& r = *cluster.races;
  r.states.emplace_back();
  r.next_actor = static_cast<uint32_t>(warps);
  r.clocks.resize(static_cast<size_t>(warps));
  for (uint32_t n = 0; n < static_cast<uint32_t>(warps); ++n) raise(r.clocks[n].seen, n, 1);
  r.released.resize(static_cast<size_t>(warps));
  for (const Cta* cta : cluster.ctas) r.bytes.emplace_back(cta->shared_bytes, 0);
}

void check_exit(Cta& cta) {
  const Races* r = cta.cluster->races.get();
  if (!r || cta.cluster->ctas.size() == 1) return;
  Clock all;
  for (const Warp& w : cta.warps) join(all, r->clocks[static_cast<size_t>(w.actor)]);
  uint32_t last = ~0u;
  for (const uint32_t id : r->bytes[cta.rank]) {
    if (id == last) continue;
    last = id;
    const auto check = [&](const Races::Access& a, const char* what) {
      if (a.time && a.rank != static_cast<int>(cta.rank) && at(all.seen, a.actor) < a.time)
        throw Fault("race: " + cta.name() + " exits, and nothing orders that behind the " + what +
                    " of its shared memory by " + told(a, 2));
    };
    check(r->states[id].writer, "write");
    for (const Races::Access& reader : r->states[id].readers) check(reader, "read");
  }
}

void touch_shared(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Touch kind, int lane) {
  uint8_t* valid = cta.valid.data() + (offset - kSharedBase);
  for (uint32_t n = 0; n < bytes; ++n) {
    if (valid[n] == kBarrierByte)
      throw Fault(
          "an mbarrier lies at " + hex(offset + n) + " of shared memory: only mbarrier instructions may touch it",
          lane);
    if ((kind == Touch::read || kind == Touch::atomic) && valid[n] == kUnwritten)
      throw Fault(
          "read of shared memory at " + hex(offset + n) + ", which was never written or has a copy under way to it",
          lane);
  }
  if (kind != Touch::read) std::memset(valid, kWritten, bytes);
  Races* r = races_of(w);
  if (!r) return;
  // Atomics order what comes before them on one warp and behind them on another, whatever their semantics.
  if (kind == Touch::atomic) acquire(w, r->atomics[uint64_t{cta.rank} << 32 | offset]);
  touch(w, cta, offset, bytes, kind != Touch::read, static_cast<uint32_t>(w.actor),
        at(clock_of(w).seen, static_cast<uint32_t>(w.actor)), false, kind == Touch::atomic, lane,
        kind == Touch::repeat);
  if (kind == Touch::atomic) release(w, r->atomics[uint64_t{cta.rank} << 32 | offset]);
}

void join(Clock& into, const Clock& from) {
  join(into.seen, from.seen);
  join(into.fenced, from.fenced);
}

void release(Warp& w, Clock& clock) {
  if (!races_of(w)) return;
  Clock& mine = clock_of(w);
  join(clock, mine);
  ++mine.seen[static_cast<size_t>(w.actor)];  // what comes later was not released
}

void acquire(Warp& w, const Clock& clock) {
  if (races_of(w)) join(clock_of(w), clock);
}

void fence_async_proxy(Warp& w) {
  if (!races_of(w)) return;
  Clock& mine = clock_of(w);
  join(mine.fenced, mine.seen);
  ++mine.seen[static_cast<size_t>(w.actor)];
}

void release_fence(Warp& w) {
  if (races_of(w)) release(w, races_of(w)->released[static_cast<size_t>(w.actor)]);
}
void release_relaxed(Warp& w, Clock& clock) {
  if (races_of(w)) join(clock, races_of(w)->released[static_cast<size_t>(w.actor)]);
}

void new_mbarrier(Warp& w, Mbarrier& b) {
  Races* r = races_of(w);
  if (!r) return;
  b.actor = r->next_actor++;
  b.initialised_by = static_cast<uint32_t>(w.actor);
  b.initialised_at = at(clock_of(w).seen, b.initialised_by);
}

void use_mbarrier(Warp& w, const Mbarrier& b, uint32_t address, int lane) {
  if (!races_of(w) || at(clock_of(w).seen, b.initialised_by) >= b.initialised_at) return;
  throw Fault("race: the mbarrier at " + hex(shared_offset(address)) + " was initialised in line " +
                  std::to_string(b.line) + ", and nothing orders that before its use here",
              lane);
}

void end_phase(Cta& cta, Mbarrier& b) {
  if (cta.cluster->races) raise(b.complete.seen, b.actor, static_cast<uint32_t>(b.phase));
}

void write_by_barrier(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, const Mbarrier& b, int lane) {
  if (races_of(w)) touch(w, cta, offset, bytes, true, b.actor, static_cast<uint32_t>(b.phase) + 1, true, false, lane);
}
void read_by_barrier(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, const Mbarrier& b, int lane) {
  if (races_of(w)) touch(w, cta, offset, bytes, false, b.actor, static_cast<uint32_t>(b.phase) + 1, true, false, lane);
}

// cp.async, unlike the others, goes through the generic proxy.
void write_by_group(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Async kind, uint64_t group, int lane) {
  if (Races* r = races_of(w))
    touch(w, cta, offset, bytes, true, r->actor(group_key(w, kind, lane)), static_cast<uint32_t>(group),
          kind != Async::copies, false, lane);
}
void read_by_group(Warp& w, Cta& cta, uint32_t offset, uint32_t bytes, Async kind, uint64_t group, int lane) {
  if (Races* r = races_of(w))
    touch(w, cta, offset, bytes, false, r->actor(group_key(w, kind, lane)), static_cast<uint32_t>(group),
          kind != Async::copies, false, lane);
}

void group_clock(Warp& w, Async kind, uint64_t group, int lane, Clock& clock) {
  if (Races* r = races_of(w)) raise(clock.seen, r->actor(group_key(w, kind, lane)), static_cast<uint32_t>(group));
}
void see_group(Warp& w, Async kind, uint64_t group, int lane) {
  if (races_of(w)) group_clock(w, kind, group, lane, clock_of(w));
}

}  // namespace moekern::emulator
