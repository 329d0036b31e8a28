// What is running: a launch, its CTAs, their warps and their lanes; and what an instruction is once it is resolved.
#pragma once
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "fault.h"
#include "memory.h"
#include "ptx.h"
#include "races.h"
#include "settings.h"

namespace moekern::emulator {

struct Cta;
struct Instruction;
struct Launch;
struct Program;
struct Warp;

// What a byte of shared memory is: Cta::valid.
constexpr uint8_t kUnwritten = 0, kWritten = 1, kBarrierByte = 2;
constexpr uint32_t kWaitsForPhase = 7;  // Path::stage of a try_wait

constexpr uint32_t kAllLanes = ~0u;

// Loops over lanes read and write the same lane only, whatever registers they name.
#if defined(__clang__)
#define MOEKERN_EACH_LANE _Pragma("clang loop vectorize(assume_safety)")
#else
#define MOEKERN_EACH_LANE _Pragma("GCC ivdep")
#endif

enum class Status : uint8_t {
  next,     // go on behind the instruction
  jumped,   // the handler has moved the lanes
  blocked,  // the instruction has to be tried again later
  yield     // go on, but let others run first
};

using Handler = Status (*)(Warp&, const Instruction&, uint32_t lanes);

// A register is a number of units of 32 words: one for 32 bits and less and for predicates (a mask in the first
// word), two for 64 bits. Constants and special registers are registers too, filled before the warp starts.
using Unit = int32_t;

struct Instruction {
  Handler run = nullptr;
  Unit guard = -1;
  bool guard_negated = false;
  bool converged = false;     // all lanes of the warp that have not exited have to be here
  bool moves = false;         // undefined values may be copied
  bool asynchronous = false;  // a wgmma: its registers follow other rules
  Unit d = 0, d2 = 0, a = 0, b = 0, c = 0;
  int64_t offset = 0;  // of an address, a jump's target, an immediate
  uint32_t mode = 0;   // the handler's own
  ptx::Space space = ptx::Space::generic;
  bool wide_address = true;
  uint16_t list_size = 0;
  const Unit* list = nullptr;  // more operands
  uint16_t reads_size = 0, writes_size = 0;
  const Unit* reads = nullptr;
  const Unit* writes = nullptr;
  const void* extra = nullptr;  // the handler's own
  uint32_t opcode = 0;          // number of the opcode's name, for statistics
  int line = 0;
  const ptx::Statement* statement = nullptr;
};

// Lanes that execute together.
struct Path {
  uint32_t pc = 0;
  uint32_t lanes = 0;
  uint32_t stage = 0;        // of an instruction that is tried again: what it has done
  uint64_t token = 0;        // and what it waits for
  bool expired = false;      // the time limit of its try_wait is over
  uint64_t gave_up = ~0ull;  // the launch's progress when that happened last
  bool blocked = false;
  bool rests = false;  // lets other paths of the warp run
};

struct Warp {
  Cta* cta = nullptr;
  Launch* launch = nullptr;
  int index = 0;  // in the CTA
  int actor = 0;  // in the checker of races
  const Instruction* code = nullptr;
  uint32_t* registers = nullptr;
  uint32_t* defined = nullptr;   // per unit: lanes that have a value
  uint8_t* in_flight = nullptr;  // per unit: pending wgmma that use it
  uint32_t* touched = nullptr;   // per unit: the number of wgmma.fence at the last ordinary use
  uint32_t exited = 0;
  uint32_t carry = 0;   // of add.cc, a bit a lane
  uint32_t fences = 0;  // wgmma.fence so far
  int pending = 0;      // wgmma that have not landed
  std::vector<Path> paths;
  size_t current = 0;
  bool cluster_arrived = false;  // at the cluster's barrier, in this phase
  uint64_t cluster_phase = 0;
  bool producer = false;  // has issued bulk copies
  bool asleep = false;    // could not go on when the launch's progress was slept_at
  uint64_t slept_at = 0;
  std::vector<uint8_t> local;  // local memory of all lanes, one behind the other
  // cp.async and cp.async.bulk groups, and wgmma groups: see copies.cpp and wgmma.cpp.
  struct Groups {
    uint64_t open = 1, landed = 0;               // number of the group being filled; groups that are complete
    std::vector<std::pair<uint64_t, int>> left;  // group -> operations under way
  };
  Groups copies, products, bulk[32], bulk_reads[32];
  uint64_t copies_issued = 0;           // cp.async so far
  std::vector<uint64_t> copies_out;     // which of them have not landed
  std::vector<uint64_t> copies_tokens;  // how many there were at each commit
  struct Arrival {                      // cp.async.mbarrier.arrive that waits for copies
    uint64_t token;
    Cta* cta;
    uint32_t address, count;
    int lane;
    Clock clock;
  };
  std::vector<Arrival> copies_arrivals;
  struct ProductOut {
    const Instruction* instruction;
    uint64_t group, number;
  };
  std::deque<ProductOut> products_out;
  uint64_t issued_products = 0, executed_products = 0;

  template <typename T>
  T* lanes(Unit unit) {
    return reinterpret_cast<T*>(registers + static_cast<size_t>(unit) * 32);
  }
  uint32_t& predicate(Unit unit) { return registers[static_cast<size_t>(unit) * 32]; }
  bool done() const { return paths.empty(); }
  Path& path() { return paths[current]; }
  int thread(int lane) const { return index * 32 + lane; }
  uint32_t live() const;
};

template <typename T, typename F>
inline void each(uint32_t mask, T* d, F f) {
  if (mask == kAllLanes) {
    MOEKERN_EACH_LANE
    for (int l = 0; l < 32; ++l) d[l] = f(l);
  } else {
    for (uint32_t m = mask; m; m &= m - 1) {
      const int l = __builtin_ctz(m);
      d[l] = f(l);
    }
  }
}

// The lane of a mask: for (const int lane : Lanes(mask)).
struct Lanes {
  explicit Lanes(uint32_t mask) : mask(mask) {}
  uint32_t mask;
  struct Iterator {
    uint32_t mask;
    int operator*() const { return __builtin_ctz(mask); }
    void operator++() { mask &= mask - 1; }
    bool operator!=(const Iterator& other) const { return mask != other.mask; }
  };
  Iterator begin() const { return {mask}; }
  Iterator end() const { return {0}; }
};

struct NamedBarrier {
  int expected = 0;  // threads; 0: nobody has come
  int arrived = 0;
  uint64_t phase = 0;
  std::vector<std::pair<int, bool>> warps;  // who has come, and whether it waits
  Clock clock, complete;
  bool whole = false;  // counts all threads of the CTA
  uint64_t votes = 0, result = 0;
};

// mbarrier objects live here and not in the bytes of shared memory, whose contents are opaque.
struct Mbarrier {
  uint32_t expected = 0;  // arrivals of a phase
  uint32_t pending = 0;   // arrivals that are to come
  int64_t bytes = 0;      // transactions that are to come
  uint64_t phase = 0;
  uint32_t actor = 0, initialised_by = 0, initialised_at = 0;  // in the checker of races
  int line = 0;                                                // of the mbarrier.init
  Clock clock, complete;
};

struct ClusterBarrier {
  uint64_t phase = 0;
  int arrived = 0;  // warps
  Clock clock, complete;
};

struct Cluster {
  std::vector<Cta*> ctas;
  ClusterBarrier barrier;
  int live_threads = 0;
  std::unique_ptr<Races> races;
};

struct Product;  // a wgmma under way: see wgmma.cpp

struct Cta {
  Launch* launch = nullptr;
  Cluster* cluster = nullptr;
  uint32_t id[3] = {0, 0, 0};
  uint32_t rank = 0;  // in the cluster
  int sm = 0;
  uint32_t shared_bytes = 0;
  std::vector<uint8_t> shared, valid;  // valid: what a byte is
  std::vector<Warp> warps;
  std::vector<uint32_t> registers;
  std::vector<uint32_t> defined, touched;
  std::vector<uint8_t> in_flight;
  NamedBarrier barriers[16];
  std::unordered_map<uint32_t, Mbarrier> mbarriers;  // by offset in shared memory
  std::deque<std::shared_ptr<Product>> products[8];  // per warpgroup
  int live_warps = 0;
  std::string name() const;
};

// Something that happens later: a copy that lands, a wgmma that is computed.
struct Event {
  uint64_t due;
  uint64_t order;
  std::function<void()> land;
};

bool later_first(const Event& a, const Event& b);  // for a heap

struct Launch {
  Program* program = nullptr;
  Settings settings;
  Regions* regions = nullptr;
  uint32_t grid[3] = {1, 1, 1}, block[3] = {1, 1, 1}, cluster[3] = {1, 1, 1};
  bool explicit_cluster = false;
  uint32_t dynamic_bytes = 0;
  const uint8_t* parameters = nullptr;
  std::mt19937_64 random;
  uint64_t now = 0;       // turns given to warps so far
  uint64_t progress = 0;  // changes that somebody may wait for
  uint64_t executed = 0;  // instructions of warps
  uint64_t copies = 0, copied_bytes = 0, products = 0;
  std::vector<uint64_t> counts;  // per instruction of the program
  std::vector<Event> events;
  uint64_t event_order = 0;
  const Instruction* instruction = nullptr;  // being executed, for faults
  Warp* warp = nullptr;

  // When an asynchronous operation that is issued now lands.
  void later(std::function<void()> land);
};

// Shared memory of the cluster at an address in shared::cluster (or shared::cta).
Cta& shared_cta(Warp& w, uint32_t address, int lane);
inline uint32_t shared_offset(uint32_t address) { return address & kOffsetMask; }
// A host pointer to bytes of shared memory, checked; `what` says what they are for.
uint8_t* shared_bytes(Cta& cta, uint32_t address, uint32_t bytes, uint32_t align, int lane, const char* what);

}  // namespace moekern::emulator
