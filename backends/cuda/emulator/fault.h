// What ends a launch: an error in the kernel, in plain words.
#pragma once
#include <stdexcept>
#include <string>

namespace moekern::emulator {

struct Fault : std::runtime_error {
  explicit Fault(const std::string& what, int lane = -1) : std::runtime_error(what), lane(lane) {}
  int lane;
};

std::string hex(unsigned long long value);

}  // namespace moekern::emulator
