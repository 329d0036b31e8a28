// Branches, exits, calls of the few functions that device code cannot do without, and instructions that the emulated
// machine has nothing to do for.
#include <cstdio>

#include "access.h"
#include "lanes.h"

namespace moekern::emulator {
namespace {

void leave(Warp& w, uint32_t lanes) {  // the current path goes on without these lanes
  Path& path = w.path();
  path.lanes &= ~lanes;
  if (path.lanes) {
    ++path.pc;
  } else {
    w.paths.erase(w.paths.begin() + static_cast<std::ptrdiff_t>(w.current));
  }
}

Status branch(Warp& w, const Instruction& i, uint32_t lanes) {
  Path& path = w.path();
  const auto target = static_cast<uint32_t>(i.offset);
  if (lanes == path.lanes) {
    path.pc = target;
    return Status::jumped;
  }
  Path taken;
  taken.pc = target, taken.lanes = lanes;
  path.lanes &= ~lanes;
  ++path.pc;
  w.paths.push_back(taken);
  return Status::jumped;
}

Status branch_by_index(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t* index = w.lanes<uint32_t>(i.a);
  uint32_t rest = lanes;
  std::vector<Path> taken;
  while (rest) {
    const uint32_t n = index[__builtin_ctz(rest)];
    if (n >= i.list_size)
      throw Fault("branch number " + std::to_string(n) + " of a list of " + std::to_string(i.list_size),
                  __builtin_ctz(rest));
    uint32_t same = 0;
    for (const int l : Lanes(rest)) same |= static_cast<uint32_t>(index[l] == n) << l;
    Path path;
    path.pc = static_cast<uint32_t>(i.list[n]), path.lanes = same;
    taken.push_back(path);
    rest &= ~same;
  }
  leave(w, lanes);
  w.paths.insert(w.paths.end(), taken.begin(), taken.end());
  return Status::jumped;
}

Status leave_kernel(Warp& w, const Instruction&, uint32_t lanes) {
  w.exited |= lanes;
  leave(w, lanes);
  ++w.launch->progress;
  return Status::jumped;
}

Status trap(Warp&, const Instruction&, uint32_t lanes) {
  throw Fault("the kernel executed trap", __builtin_ctz(lanes));
}

Status assertion(Warp& w, const Instruction& i, uint32_t lanes) {
  // __assertfail(message, file, line, function, size of a character); its arguments went through parameters of the
  // call.
  const int l = __builtin_ctz(lanes);
  std::string what = "an assertion of the kernel failed";
  for (uint32_t k = 0; k < i.list_size && k < 2; ++k) {
    const uint64_t address = w.lanes<uint64_t>(i.list[k])[l];
    if (w.launch->regions->find(address, 1))
      what += (k ? " in " : ": ") + std::string(reinterpret_cast<const char*>(address));
  }
  throw Fault(what, l);
}

Status nothing(Warp&, const Instruction&, uint32_t) { return Status::next; }
Status pause(Warp&, const Instruction&, uint32_t) { return Status::yield; }

bool bra(Resolver& r) {
  r.ignore({"uni"});
  if (r.operands() != 1 || r.operand(0).kind != ptx::Operand::name) return false;
  r.i.offset = static_cast<int64_t>(r.target(r.operand(0).text));
  r.i.run = branch;
  return true;
}

bool brx(Resolver& r) {
  if (!r.has("idx") || r.operands() != 2) return false;
  r.ignore({"uni"});
  const std::vector<std::string>* labels = r.targets(r.operand(1).text);
  if (!labels) return false;
  std::vector<Unit> targets;
  for (const std::string& label : *labels) targets.push_back(static_cast<Unit>(r.target(label)));
  r.list(targets);
  r.i.a = r.read(0, 4);
  r.i.run = branch_by_index;
  return true;
}

bool leaves(Resolver& r) {
  r.ignore({"uni"});
  r.i.run = leave_kernel;
  return true;
}
bool traps(Resolver& r) {
  r.i.run = trap;
  return true;
}

bool call(Resolver& r) {
  r.ignore({"uni"});
  for (const ptx::Operand& o : r.s.operands)
    if (o.kind == ptx::Operand::name && o.text == "__assertfail") {
      r.i.run = assertion;
      return true;
    }
  return false;
}

bool sleep(Resolver& r) {
  r.types();
  r.read(0, 4);
  r.i.run = pause;
  return true;
}

bool grid_dependency(Resolver& r) {
  r.ignore({"wait", "launch_dependents"});
  r.i.run = nothing;
  return true;
}

// Registers of the warpgroup, of which the emulated machine has as many as PTX names.
Status change_registers(Warp&, const Instruction& i, uint32_t) {
  if (i.offset < 24 || i.offset > 256 || i.offset % 8)
    throw Fault("setmaxnreg takes a multiple of 8 from 24 to 256, not " + std::to_string(i.offset));
  return Status::next;
}
bool setmaxnreg(Resolver& r) {
  r.types();
  r.ignore({"inc", "dec", "sync", "aligned"});
  r.i.converged = true;
  r.i.run = change_registers;
  return r.immediate(0, r.i.offset);
}

bool no_effect(Resolver& r) {
  r.ignore({"event"});
  r.i.run = nothing;
  return true;
}

}  // namespace

void add_control(Table& t) {
  t["bra"] = bra;
  t["brx"] = brx;
  t["ret"] = t["exit"] = leaves;
  t["trap"] = traps;
  t["brkpt"] = traps;
  t["call"] = call;
  t["nanosleep"] = sleep;
  t["griddepcontrol"] = grid_dependency;
  t["setmaxnreg"] = setmaxnreg;
  t["pmevent"] = no_effect;
}

}  // namespace moekern::emulator
