#include "memory.h"

#include "fault.h"

namespace moekern::emulator {

std::string hex(unsigned long long value) {
  char text[24];
  std::snprintf(text, sizeof text, "0x%llx", value);
  return text;
}

void Regions::add(uint64_t begin, uint64_t bytes, bool writable) {
  last_ = nullptr;
  if (bytes) regions_.insert({begin, Region{begin, begin + bytes, writable}});
}

bool Regions::remove(uint64_t begin) {
  last_ = nullptr;
  const auto found = regions_.find(begin);
  if (found == regions_.end()) return false;
  regions_.erase(found);
  return true;
}

void Regions::clear() {
  last_ = nullptr;
  regions_.clear();
}

const Region* Regions::find(uint64_t begin, uint64_t bytes) const {
  const uint64_t end = begin + bytes;
  if (last_ && begin >= last_->begin && end <= last_->end) return last_;
  static const Region anything{0, ~0ull, true};
  if (!check) return &anything;
  // Regions may lie in one another (a tensor and a view of it): the nearest beginning need not be the right one.
  for (auto it = regions_.upper_bound(begin); it != regions_.begin();) {
    --it;
    if (it->second.end >= end) return last_ = &it->second;
  }
  return nullptr;
}

std::string Regions::nearest(uint64_t address) const {
  const Region* best = nullptr;
  uint64_t distance = ~0ull;
  for (const auto& [begin, r] : regions_) {
    const uint64_t d = address < begin ? begin - address : address - r.end + 1;
    if (address >= begin && address < r.end)
      return "inside of " + std::to_string(r.end - begin) + " bytes at " + hex(begin);
    if (d < distance) distance = d, best = &r;
  }
  if (!best) return "no memory is known to the emulator";
  const bool before = address < best->begin;
  return std::to_string(before ? best->begin - address : address - best->end) + " bytes " +
         (before ? "before the beginning" : "behind the end") + " of " + std::to_string(best->end - best->begin) +
         " bytes at " + hex(best->begin);
}

}  // namespace moekern::emulator
