// The emulated device: one a process. What the driver's functions and the emulator's own work on.
#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "program.h"

namespace moekern::emulator {

struct Function;

struct Module {
  ptx::Module text;
  Globals globals;
  std::vector<std::pair<std::unique_ptr<uint64_t[]>, uint64_t>> memory;  // of its variables, and their bytes
  std::map<std::string, std::unique_ptr<Function>> functions;
};

struct Function {
  Module* module;
  Program program;
};

struct Emulator {
  std::mutex mutex;
  Regions regions;
  Settings settings;
  bool strict = false;  // true: what was not allowed is forbidden, even if nothing was
  std::string fault, statistics, description;
  std::map<uint64_t, std::unique_ptr<uint64_t[]>> allocations;  // of cuMemAlloc
};

Emulator& emulator();

std::unique_ptr<Module> load(const char* ptx);                   // throws ParseError
Function* function_of(Module& module, const std::string& name);  // null: there is no such kernel

struct Grid {
  uint32_t grid[3], block[3], cluster[3];
  uint32_t dynamic_bytes;
  bool explicit_cluster;
};
// Empty, or why the device refuses the launch.
std::string refusal(const Function& f, const Grid& g);
// `parameters`: the kernel's parameter block. Throws Fault.
void launch(Function& f, const Grid& g, const void* parameters);

// name = value; false: no such name or value.
bool set(const std::string& name, const std::string& value);

}  // namespace moekern::emulator
