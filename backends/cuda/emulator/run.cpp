// A launch: CTAs become resident, cluster by cluster, as far as the device's SMs hold them; warps take turns; what is
// asynchronous lands in between; and if nothing can go on, that is a deadlock, told with what everybody waits for.
#include "run.h"

#include <algorithm>

#include "mbarriers.h"
#include "meeting.h"

namespace moekern::emulator {

std::string Cta::name() const {
  return "CTA (" + std::to_string(id[0]) + ", " + std::to_string(id[1]) + ", " + std::to_string(id[2]) + ")";
}

uint32_t Warp::live() const {
  const uint32_t threads = launch->block[0] * launch->block[1] * launch->block[2];
  const uint32_t first = static_cast<uint32_t>(index) * 32;
  const uint32_t all = threads >= first + 32 ? kAllLanes : (1u << (threads - first)) - 1;
  return all & ~exited;
}

void Launch::later(std::function<void()> land) {
  uint64_t wait = 0;
  switch (settings.schedule) {
    case Schedule::round_robin: wait = 8; break;
    case Schedule::random: wait = random() % 4 ? random() % 64 : random() % 1000; break;
    case Schedule::producer_greedy: wait = 2000; break;  // when nobody can do anything without
    case Schedule::consumer_greedy: wait = 1 + random() % 3; break;
  }
  events.push_back({now + wait, event_order++, std::move(land)});
  std::push_heap(events.begin(), events.end(), later_first);
}

bool later_first(const Event& a, const Event& b) { return a.due != b.due ? a.due > b.due : a.order > b.order; }

namespace {

constexpr int kSharedPerSm = 233472, kThreadsPerSm = 2048, kCtasPerSm = 32, kReservedShared = 1024;

struct Machine {
  explicit Machine(Launch& launch) : launch(launch), program(*launch.program) {}

  void go() {
    threads = launch.block[0] * launch.block[1] * launch.block[2];
    warps = static_cast<int>((threads + 31) / 32);
    shared = program.static_bytes + launch.dynamic_bytes;
    cluster_size = launch.cluster[0] * launch.cluster[1] * launch.cluster[2];
    const int by_shared = kSharedPerSm / static_cast<int>(shared + kReservedShared);
    per_sm = std::max(1, std::min({by_shared, kThreadsPerSm / (32 * warps), kCtasPerSm}));
    on_sm.assign(static_cast<size_t>(std::max<int>(launch.settings.sms, static_cast<int>(cluster_size))), 0);
    clusters = uint64_t{launch.grid[0]} * launch.grid[1] * launch.grid[2] / cluster_size;
    make_image();
    admit();
    while (!resident.empty()) step();
    while (!launch.events.empty()) land_first();  // stores that nobody waits for
  }

 private:
  // ---- what is resident -----------------------------------------------------------------------------------------

  void make_image() {
    constants.assign(static_cast<size_t>(program.constants) * 32, 0);
    const auto at = [&](Unit unit) { return constants.data() + static_cast<size_t>(program.constants + unit) * 32; };
    for (const auto& [unit, bits] : program.words32) std::fill_n(at(unit), 32, static_cast<uint32_t>(bits));
    for (const auto& [unit, bits] : program.words64) std::fill_n(reinterpret_cast<uint64_t*>(at(unit)), 32, bits);
  }

  void admit() {
    while (next_cluster < clusters) {
      std::vector<size_t> places;
      std::vector<int> load = on_sm;
      for (uint32_t n = 0; n < cluster_size; ++n) {
        const auto best = static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
        if (load[best] >= per_sm) break;
        ++load[best];
        places.push_back(best);
      }
      if (places.size() < cluster_size) return;
      on_sm = load;
      make_cluster(next_cluster++, places);
    }
  }

  void make_cluster(uint64_t number, const std::vector<size_t>& places) {
    auto cluster = std::make_unique<Cluster>();
    const uint32_t per[3] = {launch.grid[0] / launch.cluster[0], launch.grid[1] / launch.cluster[1],
                             launch.grid[2] / launch.cluster[2]};
    const uint32_t origin[3] = {static_cast<uint32_t>(number % per[0]), static_cast<uint32_t>(number / per[0] % per[1]),
                                static_cast<uint32_t>(number / per[0] / per[1])};
    std::vector<std::unique_ptr<Cta>> members;
    for (uint32_t rank = 0; rank < cluster_size; ++rank) {
      std::unique_ptr<Cta> cta;
      if (!spare.empty()) {
        cta = std::move(spare.back());
        spare.pop_back();
      } else {
        cta = std::make_unique<Cta>();
      }
      const uint32_t within[3] = {rank % launch.cluster[0], rank / launch.cluster[0] % launch.cluster[1],
                                  rank / launch.cluster[0] / launch.cluster[1]};
      for (int d = 0; d < 3; ++d) cta->id[d] = origin[d] * launch.cluster[d] + within[d];
      cta->launch = &launch, cta->cluster = cluster.get(), cta->rank = rank, cta->sm = static_cast<int>(places[rank]);
      start(*cta, within, origin, per);
      cluster->ctas.push_back(cta.get());
      members.push_back(std::move(cta));
    }
    start_races(*cluster);
    for (auto& cta : members) {
      for (Warp& w : cta->warps) turns.push_back(&w);
      resident.push_back(std::move(cta));
    }
    all_clusters.push_back(std::move(cluster));
  }

  void start(Cta& cta, const uint32_t* within, const uint32_t* origin, const uint32_t* clusters_of_grid) {
    cta.shared_bytes = shared;
    cta.shared.assign(shared, launch.settings.poison ? 0xff : 0);
    cta.valid.assign(shared, kUnwritten);
    for (NamedBarrier& b : cta.barriers) b = {};
    cta.mbarriers.clear();
    for (auto& queue : cta.products) queue.clear();
    cta.live_warps = warps;
    const size_t units = static_cast<size_t>(program.units), all = static_cast<size_t>(program.constants) + units;
    cta.registers.resize(all * 32 * static_cast<size_t>(warps));
    cta.defined.assign(units * static_cast<size_t>(warps), 0);
    cta.touched.assign(units * static_cast<size_t>(warps), ~0u);
    cta.in_flight.assign(units * static_cast<size_t>(warps), 0);
    cta.warps.clear();
    cta.warps.resize(static_cast<size_t>(warps));
    for (int n = 0; n < warps; ++n) {
      Warp& w = cta.warps[static_cast<size_t>(n)];
      const auto k = static_cast<size_t>(n);
      w.cta = &cta, w.launch = &launch, w.index = n, w.code = program.code.data();
      uint32_t* base = cta.registers.data() + k * all * 32;
      std::memcpy(base, constants.data(), constants.size() * 4);
      w.registers = base + static_cast<size_t>(program.constants) * 32;
      w.defined = cta.defined.data() + k * units;
      w.touched = cta.touched.data() + k * units;
      w.in_flight = cta.in_flight.data() + k * units;
      w.local.assign(size_t{program.local_bytes} * 32, 0);
      for (const auto& [unit, special] : program.specials) fill(w, unit, special, within, origin, clusters_of_grid);
      Path path;
      path.lanes = w.live();
      w.paths.push_back(path);
    }
  }

  void fill(Warp& w, Unit unit, Special special, const uint32_t* within, const uint32_t* origin,
            const uint32_t* of_grid) {
    const Cta& cta = *w.cta;
    if (special == Special::parameters) {
      std::fill_n(w.lanes<uint64_t>(unit), 32, reinterpret_cast<uint64_t>(launch.parameters));
      return;
    }
    // 64-bit uses of a special register have a unit of their own, which `words64` names.
    const bool wide = std::any_of(program.words64.begin(), program.words64.end(),
                                  [&](const auto& word) { return word.first == unit; });
    for (uint32_t lane = 0; lane < 32; ++lane) {
      const uint32_t thread = static_cast<uint32_t>(w.index) * 32 + lane;
      const auto s = static_cast<int>(special);
      const auto axis = [&](Special first) { return s - static_cast<int>(first); };
      uint32_t v = 0;
      if (special <= Special::tid_z) {
        const uint32_t tid[3] = {thread % launch.block[0], thread / launch.block[0] % launch.block[1],
                                 thread / launch.block[0] / launch.block[1]};
        v = tid[axis(Special::tid_x)];
      } else if (special <= Special::ntid_z) {
        v = launch.block[axis(Special::ntid_x)];
      } else if (special <= Special::ctaid_z) {
        v = cta.id[axis(Special::ctaid_x)];
      } else if (special <= Special::nctaid_z) {
        v = launch.grid[axis(Special::nctaid_x)];
      } else {
        switch (special) {
          case Special::laneid: v = lane; break;
          case Special::warpid: v = static_cast<uint32_t>(w.index); break;
          case Special::nwarpid: v = kThreadsPerSm / 32; break;
          case Special::smid: v = static_cast<uint32_t>(cta.sm); break;
          case Special::nsmid: v = static_cast<uint32_t>(launch.settings.sms); break;
          case Special::clusterid_x:
          case Special::clusterid_y:
          case Special::clusterid_z: v = origin[axis(Special::clusterid_x)]; break;
          case Special::nclusterid_x:
          case Special::nclusterid_y:
          case Special::nclusterid_z: v = of_grid[axis(Special::nclusterid_x)]; break;
          case Special::cluster_ctaid_x:
          case Special::cluster_ctaid_y:
          case Special::cluster_ctaid_z: v = within[axis(Special::cluster_ctaid_x)]; break;
          case Special::cluster_nctaid_x:
          case Special::cluster_nctaid_y:
          case Special::cluster_nctaid_z: v = launch.cluster[axis(Special::cluster_nctaid_x)]; break;
          case Special::cluster_ctarank: v = cta.rank; break;
          case Special::cluster_nctarank: v = cluster_size; break;
          case Special::is_explicit_cluster: v = launch.explicit_cluster ? kAllLanes : 0; break;
          case Special::lanemask_eq: v = 1u << lane; break;
          case Special::lanemask_lt: v = (1u << lane) - 1; break;
          case Special::lanemask_le: v = (1u << lane) - 1 + (1u << lane); break;
          case Special::lanemask_gt: v = ~((1u << lane) - 1 + (1u << lane)); break;
          case Special::lanemask_ge: v = ~((1u << lane) - 1); break;
          case Special::dynamic_smem_size: v = launch.dynamic_bytes; break;
          case Special::total_smem_size: v = shared; break;
          case Special::aggr_smem_size: v = shared + kReservedShared; break;
          case Special::reserved_smem_offset_begin: v = 0; break;
          case Special::reserved_smem_offset_end: v = kSharedBase; break;
          default: v = 0;
        }
      }
      if (wide) {
        w.lanes<uint64_t>(unit)[lane] = v;
      } else {
        w.lanes<uint32_t>(unit)[lane] = v;
      }
    }
  }

  void retire() {  // whole clusters whose CTAs have all exited
    for (size_t n = 0; n < all_clusters.size();) {
      Cluster& cluster = *all_clusters[n];
      const bool live =
          std::any_of(cluster.ctas.begin(), cluster.ctas.end(), [](const Cta* c) { return c->live_warps > 0; });
      if (live || pending_events_may_touch(cluster)) {
        ++n;
        continue;
      }
      for (Cta* cta : cluster.ctas) {
        --on_sm[static_cast<size_t>(cta->sm)];
        turns.erase(std::remove_if(turns.begin(), turns.end(), [&](const Warp* w) { return w->cta == cta; }),
                    turns.end());
        const auto it = std::find_if(resident.begin(), resident.end(), [&](const auto& c) { return c.get() == cta; });
        spare.push_back(std::move(*it));
        resident.erase(it);
      }
      all_clusters.erase(all_clusters.begin() + static_cast<std::ptrdiff_t>(n));
    }
    admit();
  }

  // Copies hold pointers into their CTA: it stays until all that is under way has landed.
  bool pending_events_may_touch(const Cluster&) {
    while (!launch.events.empty()) land_first();
    return false;
  }

  // ---- turns ------------------------------------------------------------------------------------------------------

  void land_first() {
    std::pop_heap(launch.events.begin(), launch.events.end(), later_first);
    const Event event = std::move(launch.events.back());
    launch.events.pop_back();
    launch.now = std::max(launch.now, event.due);
    launch.warp = nullptr, launch.instruction = nullptr;
    event.land();
  }

  void step() {
    while (!launch.events.empty() && launch.events.front().due <= launch.now) land_first();
    ++launch.now;
    Warp* w = choose();
    if (!w) {
      if (!launch.events.empty()) return land_first();
      return give_up_waiting();
    }
    const bool moved = turn(*w, budget());
    w->asleep = !moved;
    w->slept_at = launch.progress;
    if (moved) {
      if (launch.progress != last_progress) {
        last_progress = launch.progress;
        executed_then = launch.executed;
      } else if (launch.executed - executed_then > launch.settings.patience && launch.events.empty()) {
        throw Fault("hung: " + std::to_string(launch.executed - executed_then) +
                    " instructions were executed without any progress\n" + everybody());
      }
    }
    if (w->done()) finished(*w);
  }

  // A warp that could not move sleeps until something has changed.
  bool awake(const Warp& w) const { return !w.done() && (!w.asleep || w.slept_at != launch.progress); }

  Warp* choose() {
    const size_t n = turns.size();
    switch (launch.settings.schedule) {
      case Schedule::random: {
        // For a while one CTA gets most of the turns.
        if (launch.now % 256 == 0) favourite = turns[launch.random() % n]->cta;
        const size_t first = launch.random() % n;
        if (launch.random() % 8)
          for (size_t k = 0; k < n; ++k)
            if (Warp* w = turns[(first + k) % n]; w->cta == favourite && awake(*w)) return w;
        for (size_t k = 0; k < n; ++k)
          if (Warp* w = turns[(first + k) % n]; awake(*w)) return w;
        return nullptr;
      }
      case Schedule::producer_greedy:
      case Schedule::consumer_greedy: {
        const bool producers = launch.settings.schedule == Schedule::producer_greedy;
        Warp* other = nullptr;
        ++position;
        for (size_t k = 0; k < n; ++k) {
          Warp* w = turns[(position + k) % n];
          if (!awake(*w)) continue;
          if (w->producer == producers && launch.now % 64) return w;  // now and then the others, who may be spun for
          if (!other) other = w;
        }
        return other;
      }
      default:
        for (size_t k = 0; k < n; ++k) {
          position = (position + 1) % n;
          if (awake(*turns[position])) return turns[position];
        }
        return nullptr;
    }
  }

  int budget() {
    return launch.settings.schedule == Schedule::random ? 1 + static_cast<int>(launch.random() % 100) : 400;
  }

  void finished(Warp& w) {
    Cta& cta = *w.cta;
    --cta.live_warps;
    ++launch.progress;
    if (w.pending) throw Fault("warp " + std::to_string(w.index) + " exits while its wgmma are under way");
    for (const Warp::Groups& reads : w.bulk_reads)
      if (!reads.left.empty())
        throw Fault("warp " + std::to_string(w.index) + " exits while its bulk copies have yet to read shared memory");
    barriers_without(w);
    if (cta.live_warps == 0) {
      check_exit(cta);
      const Cluster& cluster = *cta.cluster;
      if (std::none_of(cluster.ctas.begin(), cluster.ctas.end(), [](const Cta* c) { return c->live_warps > 0; }))
        retire();
    }
  }

  // Nothing can move and nothing is under way: waits with a time limit reach it, once. If that changes nothing, it is a
  // deadlock.
  void give_up_waiting() {
    bool any = false;
    for (Warp* w : turns)
      for (Path& path : w->paths)
        if (path.stage == kWaitsForPhase && path.gave_up != launch.progress) {
          path.gave_up = launch.progress;
          path.expired = true;
          w->asleep = false;
          any = true;
        }
    if (any) return;
    launch.warp = nullptr, launch.instruction = nullptr;
    throw Fault("deadlock: no warp can go on\n" + everybody());
  }

  // ---- a turn -----------------------------------------------------------------------------------------------------

  // The runnable path that is furthest behind, so that lanes which branched meet again. False: all are blocked.
  static bool select(Warp& w) {
    size_t best = w.paths.size();
    for (int round = 0; round < 2; ++round) {
      for (size_t n = 0; n < w.paths.size(); ++n) {
        const Path& p = w.paths[n];
        if (!p.blocked && !p.rests && (best == w.paths.size() || p.pc < w.paths[best].pc)) best = n;
      }
      if (best < w.paths.size()) break;
      for (Path& p : w.paths) p.rests = false;
    }
    w.current = best;
    return best < w.paths.size();
  }

  // Lanes that stand at the same instruction become one path again.
  static void merge(Warp& w) {
    for (size_t n = 0; n < w.paths.size(); ++n)
      for (size_t m = n + 1; m < w.paths.size();) {
        Path &p = w.paths[n], &q = w.paths[m];
        if (p.pc == q.pc && p.stage == q.stage && p.stage != 1) {
          p.lanes |= q.lanes;
          p.blocked = p.rests = false;
          w.paths.erase(w.paths.begin() + static_cast<std::ptrdiff_t>(m));
        } else {
          ++m;
        }
      }
  }

  bool turn(Warp& w, int budget) {
    bool moved = false;
    launch.warp = &w;
    for (Path& p : w.paths) p.blocked = false;
    while (budget > 0) {
      if (w.paths.size() > 1) merge(w);
      if (w.paths.empty() || !select(w)) break;
      const bool alone = w.paths.size() == 1;
      const size_t current = w.current, paths = w.paths.size();
      const uint32_t pc = w.path().pc;
      const Status status = alone ? straight(w, budget, moved) : single(w, moved);
      if (!alone && status != Status::blocked) --budget;  // or the last of it, and another path could have gone on
      if (status == Status::blocked) {
        w.path().blocked = true;
        if (alone) break;
      } else if (status == Status::yield && alone) {
        break;
      } else if (!alone && w.paths.size() >= paths && (status == Status::yield || w.paths[current].pc <= pc)) {
        w.paths[current].rests = true;  // a loop: the lanes that it may be waiting for get their turn
      }
    }
    return moved;
  }

  // One instruction of the current path.
  Status single(Warp& w, bool& moved) {
    Path& path = w.path();
    const Instruction& i = w.code[path.pc];
    const Status status = execute(w, path, i);
    if (status == Status::blocked) return status;
    moved = true;
    if (status == Status::next || status == Status::yield) ++w.path().pc;
    return status;
  }

  // As many as the budget allows, as long as there is one path.
  Status straight(Warp& w, int& budget, bool& moved) {
    while (budget-- > 0) {
      const Status status = single(w, moved);
      if (status == Status::blocked) return status;
      if (status == Status::yield) return status;
      if (status == Status::jumped && w.paths.size() != 1) return status;
    }
    return Status::next;
  }

  Status execute(Warp& w, Path& path, const Instruction& i) {
    uint32_t lanes = path.lanes;
    launch.instruction = &i;
    if (i.guard != kNoUnit) {
      if ((w.defined[i.guard] & lanes) != lanes) undefined(w, i, i.guard, lanes & ~w.defined[i.guard]);
      const uint32_t p = w.predicate(i.guard);
      lanes &= i.guard_negated ? ~p : p;
      w.touched[i.guard] = w.fences;
      if (!lanes) return ++launch.executed, Status::next;
    }
    if (i.converged && (path.lanes & w.live()) != w.live()) return Status::blocked;
    if (!i.asynchronous) {
      if (i.moves) {
        uint32_t all = lanes;
        for (uint16_t n = 0; n < i.reads_size; ++n) {
          all &= w.defined[i.reads[n]];
          w.touched[i.reads[n]] = w.fences;
        }
        for (uint16_t n = 0; n < i.writes_size; ++n) {
          w.defined[i.writes[n]] = (w.defined[i.writes[n]] & ~lanes) | all;
          w.touched[i.writes[n]] = w.fences;
        }
      } else {
        for (uint16_t n = 0; n < i.reads_size; ++n) {
          const Unit u = i.reads[n];
          if ((w.defined[u] & lanes) != lanes) undefined(w, i, u, lanes & ~w.defined[u]);
          w.touched[u] = w.fences;
        }
        for (uint16_t n = 0; n < i.writes_size; ++n) {
          w.defined[i.writes[n]] |= lanes;
          w.touched[i.writes[n]] = w.fences;
        }
      }
      if (w.pending) {
        for (uint16_t n = 0; n < i.reads_size; ++n)
          if (w.in_flight[i.reads[n]]) taken(i, n);
        for (uint16_t n = 0; n < i.writes_size; ++n)
          if (w.in_flight[i.writes[n]]) taken(i, i.reads_size + n);
      }
    }
    const Status status = i.run(w, i, lanes);
    if (status != Status::blocked) {
      ++launch.executed;
      ++launch.counts[static_cast<size_t>(&i - program.code.data())];
    }
    return status;
  }

  [[noreturn]] void undefined(Warp&, const Instruction&, Unit unit, uint32_t lanes) {
    throw Fault("read of " + program.unit_name(unit) + ", which has no value", __builtin_ctz(lanes));
  }
  [[noreturn]] void taken(const Instruction& i, int n) {
    throw Fault(program.unit_name(i.reads[n]) + " belongs to a wgmma under way: wgmma.wait_group has to come first");
  }

  // ---- for faults ---------------------------------------------------------------------------------------------------

  std::string everybody() {
    std::string text;
    int told = 0;
    for (const auto& cta : resident) {
      if (told++ == 4) {
        text += "  and " + std::to_string(resident.size() - 4) + " more CTAs\n";
        break;
      }
      text += "  " + cta->name() + "\n";
      for (const Warp& w : cta->warps) {
        if (w.done()) {
          text += "    warp " + std::to_string(w.index) + ": has exited\n";
          continue;
        }
        for (const Path& p : w.paths) {
          const Instruction& i = program.code[p.pc];
          text += "    warp " + std::to_string(w.index) + (p.lanes == w.live() ? "" : " lanes " + hex(p.lanes)) +
                  ": line " + std::to_string(i.line) + ": " + shortened(i.statement->text) + waits_for(w, p, i) + "\n";
        }
      }
      for (const auto& [offset, b] : cta->mbarriers)
        text += "    mbarrier " + hex(offset) + " (line " + std::to_string(b.line) + "): " + describe(b) + "\n";
      for (int id = 0; id < 16; ++id)
        if (const NamedBarrier& b = cta->barriers[id]; b.arrived) {
          text += "    barrier " + std::to_string(id) + ": " + std::to_string(b.arrived) + " of " +
                  std::to_string(b.expected) + " threads have come, warps";
          for (const auto& [warp, waits] : b.warps) text += " " + std::to_string(warp);
          text += "\n";
        }
      if (cluster_size > 1 && cta->cluster->barrier.arrived)
        text += "    cluster barrier: " + std::to_string(cta->cluster->barrier.arrived) + " warps have come\n";
    }
    return text;
  }

  static std::string waits_for(const Warp& w, const Path& p, const Instruction& i) {
    if (i.converged && p.lanes != w.live()) return " (waits for the other lanes of the warp)";
    if (p.stage == kWaitsForPhase || i.statement->opcode[0] == "mbarrier") {
      Warp& mine = const_cast<Warp&>(w);
      const int l = __builtin_ctz(p.lanes);
      const uint64_t base = i.wide_address ? mine.lanes<uint64_t>(i.a)[l] : mine.lanes<uint32_t>(i.a)[l];
      std::string text =
          " (mbarrier " + hex(shared_offset(static_cast<uint32_t>(base + static_cast<uint64_t>(i.offset))));
      if (i.statement->text.find("parity") != std::string::npos)
        text += ", parity " + std::to_string(mine.lanes<uint32_t>(i.b)[l] & 1);
      return text + ")";
    }
    return "";
  }

  static std::string shortened(const std::string& s) { return s.size() > 120 ? s.substr(0, 117) + "..." : s; }

 public:
  std::string where(const Fault& fault) {
    std::string text = "kernel " + program.name;
    if (const Warp* w = launch.warp) {
      text += ", " + w->cta->name();
      if (cluster_size > 1) text += " (rank " + std::to_string(w->cta->rank) + " of its cluster)";
      text += ", warp " + std::to_string(w->index);
      if (fault.lane >= 0) text += ", lane " + std::to_string(fault.lane);
    }
    if (const Instruction* i = launch.instruction)
      text += ", PTX line " + std::to_string(i->line) + ": " + shortened(i->statement->text);
    return text;
  }

 private:
  Launch& launch;
  Program& program;
  uint32_t threads = 0, shared = 0, cluster_size = 1;
  int warps = 0, per_sm = 1;
  uint64_t clusters = 0, next_cluster = 0;
  size_t position = 0;
  uint64_t last_progress = 0, executed_then = 0;
  std::vector<uint32_t> constants;
  std::vector<int> on_sm;
  const Cta* favourite = nullptr;
  std::vector<Warp*> turns;
  std::vector<std::unique_ptr<Cta>> resident, spare;
  std::vector<std::unique_ptr<Cluster>> all_clusters;
};

}  // namespace

void run(Launch& launch) {
  launch.random.seed(launch.settings.seed * 0x9e3779b97f4a7c15ull + 1);
  launch.counts.assign(launch.program->code.size(), 0);
  Machine machine(launch);
  try {
    machine.go();
  } catch (const Fault& fault) {
    const std::string what = fault.what();
    const size_t end = what.find('\n');  // the states of warps come last
    throw Fault(
        what.substr(0, end) + "\n  in " + machine.where(fault) + (end == std::string::npos ? "" : what.substr(end)),
        fault.lane);
  }
}

}  // namespace moekern::emulator
