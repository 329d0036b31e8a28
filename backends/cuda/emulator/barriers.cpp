// Barriers of a CTA (bar, barrier) and of a cluster (barrier.cluster), and fences.
#include "lanes.h"
#include "meeting.h"

namespace moekern::emulator {
namespace {

bool cluster_barrier(Resolver& r, bool arrive);

enum : uint32_t { kSync, kArrive, kPopc, kAnd, kOr };

void complete(NamedBarrier& b, Launch& launch) {
  join(b.complete, b.clock);  // who is slow may see more than one phase, never less than its own
  b.clock = {};
  b.expected = b.arrived = 0;
  b.result = b.votes;
  b.votes = 0;
  b.warps.clear();
  ++b.phase;
  ++launch.progress;
}

std::string threads(int n) { return std::to_string(n) + " threads"; }

// The barrier counts warps: a warp that comes brings 32 threads.
Status barrier(Warp& w, const Instruction& i, uint32_t lanes) {
  Cta& cta = *w.cta;
  Path& path = w.path();
  const uint32_t id = w.lanes<uint32_t>(i.a)[__builtin_ctz(lanes)];
  if (id >= 16) throw Fault("there is no barrier " + std::to_string(id) + ": a CTA has 0 to 15");
  NamedBarrier& b = cta.barriers[id];
  if (path.stage == 1) {
    if (b.phase == path.token) return Status::blocked;
  } else {
    const bool whole = !i.list_size;
    const int count =
        whole ? 32 * cta.live_warps : static_cast<int>(w.lanes<uint32_t>(i.list[0])[__builtin_ctz(lanes)]);
    if (count <= 0 || count % 32)
      throw Fault("a barrier's number of threads has to be a positive multiple of 32, not " + std::to_string(count));
    if (count > 32 * static_cast<int>(cta.warps.size()))
      throw Fault("barrier " + std::to_string(id) + " waits for " + threads(count) + " of a CTA of " +
                  threads(32 * static_cast<int>(cta.warps.size())));
    if (b.arrived && (b.expected != count || b.whole != whole))
      throw Fault("barrier " + std::to_string(id) + " is used with " + threads(count) +
                  " while others wait at it with " + threads(b.expected));
    for (const auto& [warp, waits] : b.warps)
      if (warp == w.index)
        throw Fault("warp " + std::to_string(warp) + " arrives at barrier " + std::to_string(id) +
                    " again before the barrier is complete");
    b.expected = count, b.whole = whole;
    b.arrived += 32;
    b.warps.emplace_back(w.index, i.mode != kArrive);
    release(w, b.clock);
    if (i.mode > kArrive) {
      const uint32_t p = w.predicate(i.b) ^ (i.c ? ~0u : 0);
      const auto n = static_cast<uint64_t>(__builtin_popcount(p & lanes));
      if (i.mode == kPopc) b.votes += n;
      if (i.mode == kOr) b.votes |= n != 0;
      if (i.mode == kAnd) b.votes |= n != static_cast<uint64_t>(__builtin_popcount(lanes));
    }
    path.token = b.phase;
    path.stage = 1;
    const bool last = b.arrived == b.expected;
    if (last) complete(b, *w.launch);
    if (i.mode == kArrive) {
      path.stage = 0;
      return Status::next;
    }
    if (!last) return Status::blocked;
  }
  path.stage = 0;
  acquire(w, b.complete);
  if (i.mode > kArrive) {
    if (i.mode == kPopc) {
      const auto n = static_cast<uint32_t>(b.result);
      each(lanes, w.lanes<uint32_t>(i.d), [=](int) { return n; });
    } else {
      const bool r = i.mode == kOr ? b.result != 0 : b.result == 0;
      uint32_t& d = w.predicate(i.d);
      d = (d & ~lanes) | (r ? lanes : 0);
    }
  }
  return Status::next;
}

bool bar(Resolver& r) {
  if (r.has("cluster")) {
    r.i.converged = r.has("aligned");
    r.ignore({"release", "acquire", "relaxed"});
    const bool arrive = r.has("arrive");
    if (!arrive && !r.has("wait")) return false;
    return cluster_barrier(r, arrive);
  }
  if (r.has("warp")) {
    r.has("sync");
    r.i.run = meet_warp;
    r.i.a = r.read(0, 4);
    return r.operands() == 1;
  }
  r.ignore({"cta", "aligned"});
  r.types();
  r.i.converged = true;
  r.i.run = barrier;
  size_t first = 0;
  if (r.has("arrive")) r.i.mode = kArrive;
  if (r.has("red")) {
    r.i.mode = r.has("popc") ? kPopc : r.has("and") ? kAnd : kOr;
    r.ignore({"or", "pred"});
    r.i.d = r.write(first++);
  }
  r.ignore({"sync"});
  r.i.a = r.read(first++, 4);
  const size_t left = r.operands() - first - (r.i.mode > kArrive ? 1 : 0);
  if (left == 1) r.list({r.read(first++, 4)});
  if (r.i.mode > kArrive) {
    r.i.b = r.read(first, 0);
    r.i.c = r.operand(first).negated;
  }
  return left <= 1;
}

Status cluster_arrive(Warp& w, const Instruction& i, uint32_t) {
  ClusterBarrier& b = w.cta->cluster->barrier;
  if (w.cluster_arrived) throw Fault("barrier.cluster.arrive twice without a wait between them");
  w.cluster_arrived = true;
  w.cluster_phase = b.phase;
  if (i.mode) {
    release(w, b.clock);
  } else {
    release_relaxed(w, b.clock);
  }
  ++b.arrived;
  cluster_complete(*w.cta->cluster, *w.launch);
  return Status::next;
}

Status cluster_wait(Warp& w, const Instruction&, uint32_t) {
  ClusterBarrier& b = w.cta->cluster->barrier;
  if (!w.cluster_arrived) throw Fault("barrier.cluster.wait without barrier.cluster.arrive before it");
  if (b.phase == w.cluster_phase) return Status::blocked;
  w.cluster_arrived = false;
  acquire(w, b.complete);
  return Status::next;
}

// Fences order what the warp did before for others. In the emulated machine bytes are visible at once; the checker of
// races wants to know of fences between proxies.
Status fence_proxy(Warp& w, const Instruction&, uint32_t) {
  fence_async_proxy(w);
  return Status::next;
}
Status fence_release(Warp& w, const Instruction&, uint32_t) {
  release_fence(w);
  return Status::next;
}

bool fence(Resolver& r) {
  r.i.run = fence_release;
  r.ignore({"sc", "acq_rel", "acquire", "release", "cta", "cluster", "gpu", "sys", "gl", "level", "mbarrier_init",
            "sync_restrict::shared::cta", "sync_restrict::shared::cluster"});
  if (r.has("proxy")) {
    if (r.has("async") || r.has("async::generic")) r.i.run = fence_proxy;
    r.ignore({"alias", "global", "shared::cta", "shared::cluster", "tensormap::generic"});
  }
  return true;
}

bool cluster_barrier(Resolver& r, bool arrive) {
  r.i.converged = true;
  r.i.mode = !r.has("relaxed");
  r.i.run = arrive ? cluster_arrive : cluster_wait;
  return r.operands() == 0;
}

}  // namespace

void cluster_complete(Cluster& cluster, Launch& launch) {
  ClusterBarrier& b = cluster.barrier;
  int live = 0;
  for (const Cta* cta : cluster.ctas) live += cta->live_warps;
  if (live == 0 || b.arrived < live) return;
  join(b.complete, b.clock);
  b.clock = {};
  b.arrived = 0;
  ++b.phase;
  ++launch.progress;
}

void barriers_without(Warp& w) {
  for (NamedBarrier& b : w.cta->barriers)
    if (b.whole && b.arrived && b.arrived >= 32 * w.cta->live_warps) complete(b, *w.launch);
  if (w.cluster_arrived && w.cta->cluster->barrier.phase == w.cluster_phase) --w.cta->cluster->barrier.arrived;
  cluster_complete(*w.cta->cluster, *w.launch);
}

void add_barriers(Table& t) {
  t["bar"] = t["barrier"] = bar;
  t["fence"] = t["membar"] = fence;
}

}  // namespace moekern::emulator
