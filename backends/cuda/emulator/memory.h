// Where a kernel's bytes live. Global, constant and parameter addresses are host pointers; shared and local memory have
// windows in the generic address space that no host pointer reaches.
#pragma once
#include <cstdint>
#include <map>
#include <string>

namespace moekern::emulator {

constexpr uint64_t kSharedWindow = 1ull << 56, kLocalWindow = 2ull << 56, kWindowMask = 0xffull << 56;
// A CTA's shared memory starts behind what the hardware keeps for itself, so that address 0 is nobody's.
constexpr uint32_t kSharedBase = 1024, kLocalBase = 64;
// In shared::cluster, CTA r of the cluster starts at (r + 1) << 24. Below 1 << 24 lies the CTA's own memory.
constexpr int kRankShift = 24;
constexpr uint32_t kOffsetMask = (1u << kRankShift) - 1;
constexpr uint32_t kMaxSharedBytes = 232448, kDefaultSharedBytes = 49152;

struct Region {
  uint64_t begin, end;
  bool writable;
};

// Host memory that kernels may touch.
class Regions {
 public:
  void add(uint64_t begin, uint64_t bytes, bool writable);
  bool remove(uint64_t begin);
  void clear();
  bool empty() const { return regions_.empty(); }
  // The region that holds all of it, or null.
  const Region* find(uint64_t begin, uint64_t bytes) const;
  std::string nearest(uint64_t address) const;  // in words, for a fault
  bool check = true;                            // false: any address will do

 private:
  std::multimap<uint64_t, Region> regions_;
  mutable const Region* last_ = nullptr;
};

}  // namespace moekern::emulator
