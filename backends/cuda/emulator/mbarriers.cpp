// mbarrier: barriers in shared memory that count arrivals and bytes.
#include "mbarriers.h"

#include "access.h"
#include "lanes.h"

namespace moekern::emulator {

Mbarrier& mbarrier_at(Cta& cta, uint32_t address, int lane) {
  shared_bytes(cta, address, 8, 8, lane, "mbarrier");
  const auto found = cta.mbarriers.find(shared_offset(address));
  if (found == cta.mbarriers.end())
    throw Fault("there is no mbarrier at " + hex(shared_offset(address)) + " of shared memory: none was initialised",
                lane);
  return found->second;
}

std::string describe(const Mbarrier& b) {
  return "phase " + std::to_string(b.phase) + ", waits for " + std::to_string(b.pending) + " of " +
         std::to_string(b.expected) + " arrivals and " + std::to_string(b.bytes) + " bytes";
}

namespace {

constexpr int64_t kMaxBytes = (1 << 20) - 1;
constexpr uint32_t kMaxCount = (1 << 20) - 1;

void maybe_complete(Launch& launch, Cta& cta, Mbarrier& b) {
  if (b.pending || b.bytes) return;
  b.pending = b.expected;
  ++b.phase;
  join(b.complete, b.clock);
  b.clock = {};
  end_phase(cta, b);
  ++launch.progress;
}

void expect(Mbarrier& b, int64_t bytes, int lane) {
  b.bytes += bytes;
  if (b.bytes > kMaxBytes || b.bytes < -kMaxBytes)
    throw Fault("transaction overflow: the mbarrier would wait for " + std::to_string(b.bytes) +
                    " bytes, it can count to " + std::to_string(kMaxBytes),
                lane);
}

}  // namespace

void arrive(Launch& launch, Cta& cta, Mbarrier& b, uint32_t count, uint32_t address, int lane) {
  if (count > b.pending)
    throw Fault("more arrivals than the mbarrier at " + hex(shared_offset(address)) +
                    " expects: " + std::to_string(count) + " come, and it is in " + describe(b),
                lane);
  b.pending -= count;
  ++launch.progress;
  maybe_complete(launch, cta, b);
}

void complete_transactions(Launch& launch, Cta& cta, uint32_t address, uint32_t bytes) {
  const auto found = cta.mbarriers.find(shared_offset(address));
  if (found == cta.mbarriers.end())
    throw Fault("a copy has landed, and its mbarrier at " + hex(shared_offset(address)) + " is gone");
  expect(found->second, -static_cast<int64_t>(bytes), -1);
  ++launch.progress;
  maybe_complete(launch, cta, found->second);
}

namespace {

// The mbarrier of a lane, which may lie in another CTA of the cluster.
struct At {
  At(Warp& w, const Instruction& i, int lane)
      : address(shared_address(lane_address(w, i.a, i.wide_address, i.offset, lane), lane)),
        cta(shared_cta(w, address, lane)),
        barrier(mbarrier_at(cta, address, lane)) {
    use_mbarrier(w, barrier, address, lane);
  }
  uint32_t address;
  Cta& cta;
  Mbarrier& barrier;
};

Status initialise(Warp& w, const Instruction& i, uint32_t lanes) {
  for (const int l : Lanes(lanes)) {
    const uint32_t address = shared_address(lane_address(w, i.a, i.wide_address, i.offset, l), l);
    Cta& cta = shared_cta(w, address, l);
    shared_bytes(cta, address, 8, 8, l, "mbarrier.init");
    const uint32_t offset = shared_offset(address), count = w.lanes<uint32_t>(i.b)[l];
    if (count < 1 || count > kMaxCount)
      throw Fault("an mbarrier cannot expect " + std::to_string(count) + " arrivals", l);
    if (cta.mbarriers.count(offset))
      throw Fault("there is an mbarrier at " + hex(offset) + " already, initialised in line " +
                      std::to_string(cta.mbarriers[offset].line) + ": mbarrier.inval has to come first",
                  l);
    touch_shared(w, cta, offset, 8, Touch::write, l);
    Mbarrier& b = cta.mbarriers[offset];
    b.expected = b.pending = count;
    b.line = i.line;
    std::memset(cta.valid.data() + (offset - kSharedBase), kBarrierByte, 8);
    new_mbarrier(w, b);
    ++w.launch->progress;
  }
  return Status::next;
}

Status invalidate(Warp& w, const Instruction& i, uint32_t lanes) {
  for (const int l : Lanes(lanes)) {
    const At at(w, i, l);
    std::memset(at.cta.valid.data() + (shared_offset(at.address) - kSharedBase), 0, 8);
    at.cta.mbarriers.erase(shared_offset(at.address));
  }
  return Status::next;
}

enum : uint32_t { kExpect = 1, kDrop = 2, kNoComplete = 4, kCount = 8, kRelaxed = 16, kParity = 32, kTry = 64 };

Status arrival(Warp& w, const Instruction& i, uint32_t lanes) {
  for (const int l : Lanes(lanes)) {
    const At at(w, i, l);
    Mbarrier& b = at.barrier;
    uint32_t count = 1;
    if (i.mode & kExpect) {
      expect(b, w.lanes<uint32_t>(i.b)[l], l);
    } else if (i.mode & kCount) {
      count = w.lanes<uint32_t>(i.b)[l];
      if (count < 1 || count > kMaxCount) throw Fault("an arrival counts at least 1, not " + std::to_string(count), l);
    }
    if (i.mode & kRelaxed) {
      release_relaxed(w, b.clock);
    } else {
      release(w, b.clock);
    }
    const uint64_t phase = b.phase;
    if (i.mode & kDrop) {
      if (b.expected < count) throw Fault("arrive_drop by more than the mbarrier expects", l);
      b.expected -= count;
    }
    if (i.mode & kNoComplete && count >= b.pending && b.bytes == 0)
      throw Fault("mbarrier.arrive.noComplete completes the phase", l);
    arrive(*w.launch, at.cta, b, count, at.address, l);
    if (i.d) w.lanes<uint64_t>(i.d)[l] = phase;
  }
  return Status::next;
}

Status transactions(Warp& w, const Instruction& i, uint32_t lanes) {  // expect_tx and complete_tx
  for (const int l : Lanes(lanes)) {
    const At at(w, i, l);
    const int64_t bytes = w.lanes<uint32_t>(i.b)[l];
    expect(at.barrier, i.mode & kExpect ? bytes : -bytes, l);
    ++w.launch->progress;
    if (!(i.mode & kExpect)) maybe_complete(*w.launch, at.cta, at.barrier);
  }
  return Status::next;
}

// A try_wait may give up at any time: under the random schedule some do, so that code which does not try again is found
// out.
bool impatient(Launch& launch) { return launch.settings.schedule == Schedule::random && launch.random() % 8 == 0; }

Status wait(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t complete = 0;
  for (const int l : Lanes(lanes)) {
    const At at(w, i, l);
    const uint64_t phase = at.barrier.phase;
    const bool passed =
        i.mode & kParity ? (phase & 1) != (w.lanes<uint32_t>(i.b)[l] & 1) : phase != w.lanes<uint64_t>(i.b)[l];
    complete |= static_cast<uint32_t>(passed) << l;
    if (passed && !(i.mode & kRelaxed)) acquire(w, at.barrier.complete);
  }
  Path& path = w.path();
  if (complete != lanes && i.mode & kTry && !path.expired && !impatient(*w.launch)) {
    // It may wait for as long as it likes. What wakes it is the phase, or that nothing else in the launch can run.
    path.stage = kWaitsForPhase;
    return Status::blocked;
  }
  path.stage = 0;
  path.expired = false;
  uint32_t& d = w.predicate(i.d);
  d = (d & ~lanes) | complete;
  return complete == lanes ? Status::next : Status::yield;
}

bool mbarrier(Resolver& r) {
  r.ignore({"shared", "shared::cta", "shared::cluster", "b64", "release", "acquire", "cta", "cluster"});
  const bool remote = r.has("shared::cluster");
  if (r.has("relaxed")) r.i.mode |= kRelaxed;
  if (r.has("init")) {
    r.address(0);
    r.i.b = r.read(1, 4);
    r.i.run = initialise;
    return r.operands() == 2;
  }
  if (r.has("inval")) {
    r.address(0);
    r.i.run = invalidate;
    return r.operands() == 1;
  }
  if (r.has("arrive") || r.has("arrive_drop")) {
    if (r.has("arrive_drop")) r.i.mode |= kDrop;
    if (r.has("noComplete")) r.i.mode |= kNoComplete;
    if (r.has("expect_tx")) r.i.mode |= kExpect;
    // The state may be left out where the mbarrier is another CTA's.
    const bool has_state = r.operand(0).kind != ptx::Operand::address;
    if (!has_state && !remote) return false;
    if (has_state) r.i.d = r.write(0);
    r.address(has_state);
    if (r.operands() > (has_state ? 2u : 1u)) {
      r.i.b = r.read(has_state ? 2 : 1, 4);
      if (!(r.i.mode & kExpect)) r.i.mode |= kCount;
    }
    r.i.run = arrival;
    return true;
  }
  if (r.has("expect_tx") || r.has("complete_tx")) {
    if (r.has("expect_tx")) r.i.mode |= kExpect;
    r.address(0);
    r.i.b = r.read(1, 4);
    r.i.run = transactions;
    return r.operands() == 2;
  }
  if (r.has("test_wait") || r.has("try_wait")) {
    if (r.has("try_wait")) r.i.mode |= kTry;
    if (r.has("parity")) r.i.mode |= kParity;
    r.i.d = r.write(0);
    r.address(1);
    r.i.b = r.read(2, r.i.mode & kParity ? 4 : 8);
    if (r.operands() == 4) r.read(3, 4);
    r.i.run = wait;
    return r.operands() >= 3;
  }
  return false;
}

}  // namespace

void add_mbarriers(Table& t) { t["mbarrier"] = mbarrier; }

}  // namespace moekern::emulator
