#include "program.h"

#include <algorithm>

namespace moekern::emulator {
namespace {

const Table& table() {
  static const Table all = [] {
    Table t;
    add_integer(t);
    add_floating(t);
    add_conversions(t);
    add_moves(t);
    add_memory(t);
    add_atomics(t);
    add_control(t);
    add_warp_wide(t);
    add_barriers(t);
    add_mbarriers(t);
    add_copies(t);
    add_products(t);
    add_fragments(t);
    add_tensor_map_edits(t);
    return t;
  }();
  return all;
}

uint32_t align_up(uint32_t value, int64_t align) {
  const auto a = static_cast<uint32_t>(align < 1 ? 1 : align);
  return (value + a - 1) / a * a;
}

const std::map<std::string, Special>& specials() {
  static const std::map<std::string, Special> names{
      {"%tid.x", Special::tid_x},
      {"%tid.y", Special::tid_y},
      {"%tid.z", Special::tid_z},
      {"%ntid.x", Special::ntid_x},
      {"%ntid.y", Special::ntid_y},
      {"%ntid.z", Special::ntid_z},
      {"%ctaid.x", Special::ctaid_x},
      {"%ctaid.y", Special::ctaid_y},
      {"%ctaid.z", Special::ctaid_z},
      {"%nctaid.x", Special::nctaid_x},
      {"%nctaid.y", Special::nctaid_y},
      {"%nctaid.z", Special::nctaid_z},
      {"%laneid", Special::laneid},
      {"%warpid", Special::warpid},
      {"%nwarpid", Special::nwarpid},
      {"%smid", Special::smid},
      {"%nsmid", Special::nsmid},
      {"%gridid", Special::gridid},
      {"%clusterid.x", Special::clusterid_x},
      {"%clusterid.y", Special::clusterid_y},
      {"%clusterid.z", Special::clusterid_z},
      {"%nclusterid.x", Special::nclusterid_x},
      {"%nclusterid.y", Special::nclusterid_y},
      {"%nclusterid.z", Special::nclusterid_z},
      {"%cluster_ctaid.x", Special::cluster_ctaid_x},
      {"%cluster_ctaid.y", Special::cluster_ctaid_y},
      {"%cluster_ctaid.z", Special::cluster_ctaid_z},
      {"%cluster_nctaid.x", Special::cluster_nctaid_x},
      {"%cluster_nctaid.y", Special::cluster_nctaid_y},
      {"%cluster_nctaid.z", Special::cluster_nctaid_z},
      {"%cluster_ctarank", Special::cluster_ctarank},
      {"%cluster_nctarank", Special::cluster_nctarank},
      {"%is_explicit_cluster", Special::is_explicit_cluster},
      {"%lanemask_eq", Special::lanemask_eq},
      {"%lanemask_le", Special::lanemask_le},
      {"%lanemask_lt", Special::lanemask_lt},
      {"%lanemask_ge", Special::lanemask_ge},
      {"%lanemask_gt", Special::lanemask_gt},
      {"%dynamic_smem_size", Special::dynamic_smem_size},
      {"%total_smem_size", Special::total_smem_size},
      {"%aggr_smem_size", Special::aggr_smem_size},
      {"%reserved_smem_offset_begin", Special::reserved_smem_offset_begin},
      {"%reserved_smem_offset_end", Special::reserved_smem_offset_end},
  };
  return names;
}

bool predicate_special(Special s) { return s == Special::is_explicit_cluster; }

// Static shared variables in the order of the text, and behind them all those without a size, which share the dynamic
// part.
void lay_out_shared(Program& p) {
  uint32_t offset = kSharedBase, dynamic_align = 16;
  const auto place = [&](const ptx::Variable& v) {
    if (v.space != ptx::Space::shared || v.is_register || p.shared_offsets.count(v.name)) return;
    if (v.elements == 0) {
      dynamic_align = std::max(dynamic_align, static_cast<uint32_t>(v.align));
      return;
    }
    offset = align_up(offset, v.align);
    p.shared_offsets[v.name] = offset;
    offset += static_cast<uint32_t>(v.bytes());
  };
  for (const ptx::Variable& v : p.module->variables) place(v);
  for (const ptx::Scope& scope : p.function->scopes)
    for (const auto& [name, v] : scope.variables) place(v);
  offset = align_up(offset, offset == kSharedBase ? 16 : dynamic_align);
  p.static_bytes = offset - kSharedBase;
  const auto dynamic = [&](const ptx::Variable& v) {
    if (v.space == ptx::Space::shared && v.elements == 0) p.shared_offsets[v.name] = offset;
  };
  for (const ptx::Variable& v : p.module->variables) dynamic(v);
  for (const ptx::Scope& scope : p.function->scopes)
    for (const auto& [name, v] : scope.variables) dynamic(v);
}

std::string opcode_name(const ptx::Statement& s) {
  std::string name;
  for (const std::string& part : s.opcode) name += (name.empty() ? "" : ".") + part;
  return name;
}

}  // namespace

Status unknown_instruction(Warp&, const Instruction& i, uint32_t lanes) {
  throw Fault("the emulator does not know the instruction " + opcode_name(*i.statement),
              __builtin_ctz(lanes | 1u << 31));
}

// What is named where, found once a program so that a statement's names cost a look-up.
struct Names {
  struct Register {
    Unit unit;
    int bytes;
  };
  std::map<std::pair<int, std::string>, Register> registers;
  std::map<std::pair<uint64_t, int>, Unit> constants;
  std::map<std::string, Unit> specials;
  std::map<std::string, uint32_t> locals;
};

namespace {
thread_local Names* names = nullptr;  // of the program being resolved
}

Resolver::Resolver(Program& program, const Globals& globals, const ptx::Statement& statement, Instruction& i)
    : s(statement), i(i), program(program), globals_(globals), used_(statement.opcode.size(), false) {
  used_[0] = true;
}

bool Resolver::has(const std::string& modifier) {
  bool found = false;
  for (size_t n = 1; n < s.opcode.size(); ++n)
    if (s.opcode[n] == modifier) used_[n] = found = true;
  return found;
}

bool Resolver::has_all_of(std::initializer_list<const char*> modifiers) {
  bool all = true;
  for (const char* m : modifiers) all &= has(m);
  return all;
}

std::string Resolver::types(int from_last) {
  for (size_t n = s.opcode.size(); n-- > 1;)
    if ((ptx::type_bytes(s.opcode[n]) || s.opcode[n] == "pred") && from_last-- == 0) {
      used_[n] = true;
      return s.opcode[n];
    }
  return "";
}

bool Resolver::all_used() const {
  return std::all_of(used_.begin(), used_.end(), [](bool u) { return u; });
}

const ptx::Operand& Resolver::operand(size_t n) const {
  if (n >= s.operands.size())
    throw ParseError("PTX line " + std::to_string(s.line) + ": an operand is missing: " + s.text);
  return s.operands[n];
}

Unit Resolver::constant(uint64_t bits, int bytes) {
  if (bytes < 8) bits &= bytes == 0 ? 1 : (1ull << (8 * bytes)) - 1;
  const int words = bytes == 8 ? 2 : 1;
  const auto [it, fresh] = names->constants.insert({{bits, bytes == 0 ? 0 : words}, 0});
  if (fresh) {
    program.constants += words;
    it->second = -program.constants;
    if (words == 2) {
      program.words64.emplace_back(it->second, bits);
    } else {
      program.words32.emplace_back(it->second, bytes == 0 ? (bits ? kAllLanes : 0) : bits);
    }
  }
  return it->second;
}

const ptx::Variable* Resolver::variable(const std::string& name) const {
  for (int scope = s.scope; scope >= 0; scope = program.function->scopes[static_cast<size_t>(scope)].parent) {
    const auto& variables = program.function->scopes[static_cast<size_t>(scope)].variables;
    if (const auto found = variables.find(name); found != variables.end()) return &found->second;
  }
  for (const ptx::Variable& v : program.module->variables)
    if (v.name == name) return &v;
  return nullptr;
}

Unit Resolver::register_unit(const std::string& name, int* bytes) {
  for (int scope = s.scope; scope >= 0; scope = program.function->scopes[static_cast<size_t>(scope)].parent) {
    const auto found = names->registers.find({scope, name});
    if (found != names->registers.end()) {
      *bytes = found->second.bytes;
      return found->second.unit;
    }
    const ptx::Scope& here = program.function->scopes[static_cast<size_t>(scope)];
    std::string type;
    if (const auto v = here.variables.find(name); v != here.variables.end()) {
      if (!v->second.is_register) return kNoUnit;
      type = v->second.type;
    } else {
      size_t digits = name.size();
      while (digits > 0 && std::isdigit(static_cast<unsigned char>(name[digits - 1]))) --digits;
      const auto family = here.families.find(name.substr(0, digits));
      if (digits == name.size() || family == here.families.end() ||
          std::stoll(name.substr(digits)) >= family->second.second)
        continue;
      type = family->second.first;
    }
    *bytes = type == "pred" ? 0 : static_cast<int>(ptx::type_bytes(type));
    const Unit unit = program.units;
    program.units += *bytes == 16 ? 4 : *bytes == 8 ? 2 : 1;
    if (*bytes) program.registers += std::max(1, *bytes / 4);
    names->registers[{scope, name}] = {unit, *bytes};
    program.unit_names.emplace_back(unit, name);
    return unit;
  }
  return kNoUnit;
}

Unit Resolver::unchecked(const ptx::Operand& o) {
  int bytes = 0;
  const Unit unit = o.kind == ptx::Operand::name ? register_unit(o.text, &bytes) : kNoUnit;
  if (unit == kNoUnit || bytes != 4)
    throw ParseError("PTX line " + std::to_string(s.line) + ": a register of 32 bits was expected: " + s.text);
  return unit;
}

std::string Program::unit_name(Unit unit) const {
  for (const auto& [u, name] : unit_names)
    if (u == unit) return name;
  return "a register";
}

int Resolver::width(const ptx::Operand& o) {
  int bytes = 0;
  if (o.kind == ptx::Operand::name && register_unit(o.text, &bytes) != kNoUnit) return bytes;
  return 0;
}

uint64_t Resolver::address_of_variable(const std::string& name, bool& found) const {
  found = true;
  if (const auto g = globals_.find(name); g != globals_.end()) return g->second;
  if (const auto it = program.shared_offsets.find(name); it != program.shared_offsets.end()) return it->second;
  if (const auto it = names->locals.find(name); it != names->locals.end()) return it->second;
  if (const ptx::Variable* v = variable(name); v && v->space == ptx::Space::local) {
    program.local_bytes = align_up(program.local_bytes + kLocalBase, v->align) - kLocalBase;
    const uint32_t at = program.local_bytes + kLocalBase;
    program.local_bytes += static_cast<uint32_t>(v->bytes());
    return names->locals[name] = at;
  }
  found = false;
  return 0;
}

Unit Resolver::special(const std::string& name, int bytes) {
  const auto found = specials().find(name);
  if (found == specials().end() && name.rfind("%envreg", 0) != 0) return kNoUnit;
  if (found == specials().end()) return constant(0, 4);
  const std::string key = name + (bytes == 8 ? "/64" : "");
  const auto [it, fresh] = names->specials.insert({key, 0});
  if (fresh) {
    const int words = bytes == 8 ? 2 : 1;
    program.constants += words;
    it->second = -program.constants;
    program.specials.emplace_back(it->second, found->second);
    if (words == 2) program.words64.emplace_back(it->second, 0);
    if (words == 1 && !predicate_special(found->second)) program.words32.emplace_back(it->second, 0);
  }
  return it->second;
}

Unit Resolver::read(const ptx::Operand& o, int bytes) {
  switch (o.kind) {
    case ptx::Operand::integer: return constant(o.bits, bytes);
    case ptx::Operand::real32: {
      if (bytes != 8) return constant(o.bits, bytes);
      float f;
      const auto bits = static_cast<uint32_t>(o.bits);
      std::memcpy(&f, &bits, 4);
      const double d = f;
      uint64_t wide;
      std::memcpy(&wide, &d, 8);
      return constant(wide, 8);
    }
    case ptx::Operand::real64: {
      if (bytes == 8) return constant(o.bits, 8);
      double d;
      std::memcpy(&d, &o.bits, 8);
      const auto f = static_cast<float>(d);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      return constant(bits, 4);
    }
    case ptx::Operand::name: {
      int have = 0;
      if (const Unit unit = register_unit(o.text, &have); unit != kNoUnit) {
        if ((have == 0) != (bytes == 0) || (have == 8 && bytes < 8) || (have < 8 && bytes == 8))
          throw ParseError("PTX line " + std::to_string(s.line) + ": the register " + o.text +
                           " has another size than the instruction reads: " + s.text);
        reads_.push_back(unit);
        return unit;
      }
      if (const Unit unit = special(o.text, bytes); unit != kNoUnit) return unit;
      if (const auto it = program.parameter_offsets.find(o.text); it != program.parameter_offsets.end())
        throw ParseError("PTX line " + std::to_string(s.line) + ": a parameter's address is wanted here: " + s.text);
      bool found;
      const uint64_t address = address_of_variable(o.text, found) + static_cast<uint64_t>(o.offset);
      if (found) return constant(address, bytes);
      throw ParseError("PTX line " + std::to_string(s.line) + ": " + o.text + " is not declared: " + s.text);
    }
    default: throw ParseError("PTX line " + std::to_string(s.line) + ": an operand has the wrong form: " + s.text);
  }
}

Unit Resolver::write(const ptx::Operand& o) {
  if (o.kind == ptx::Operand::sink) return 0;
  int bytes = 0;
  const Unit unit = o.kind == ptx::Operand::name ? register_unit(o.text, &bytes) : kNoUnit;
  if (unit == kNoUnit)
    throw ParseError("PTX line " + std::to_string(s.line) + ": the destination is no declared register: " + s.text);
  writes_.push_back(unit);
  return unit;
}

Unit Resolver::write_second(const ptx::Operand& o) {
  if (o.second.empty() || o.second == "_") return 0;
  ptx::Operand second;
  second.kind = ptx::Operand::name;
  second.text = o.second;
  return write(second);
}

Unit Resolver::address_of(const ptx::Operand& o, int64_t& offset, bool& wide) {
  if (o.kind != ptx::Operand::address)
    throw ParseError("PTX line " + std::to_string(s.line) + ": an address was expected: " + s.text);
  offset = o.offset;
  wide = true;
  if (o.text.empty()) return constant(0, 8);
  int bytes = 0;
  if (const Unit unit = register_unit(o.text, &bytes); unit != kNoUnit) {
    wide = bytes == 8;
    reads_.push_back(unit);
    return unit;
  }
  if (const auto it = program.parameter_offsets.find(o.text); it != program.parameter_offsets.end()) {
    offset += it->second;
    const auto [unit, fresh] = names->specials.insert({"parameters", 0});
    if (fresh) {
      unit->second = -(program.constants += 2);
      program.specials.emplace_back(unit->second, Special::parameters);
    }
    return unit->second;
  }
  bool found;
  const uint64_t address = address_of_variable(o.text, found);
  if (!found) throw ParseError("PTX line " + std::to_string(s.line) + ": " + o.text + " is not declared: " + s.text);
  return constant(address, 8);
}

void Resolver::address(size_t n) { i.a = address_of(operand(n), i.offset, i.wide_address); }

std::vector<Unit> Resolver::read_vector(const ptx::Operand& o, int bytes) {
  std::vector<Unit> units;
  if (o.kind != ptx::Operand::vector) return {read(o, bytes)};
  for (const ptx::Operand& part : o.parts) units.push_back(read(part, bytes));
  return units;
}

std::vector<Unit> Resolver::write_vector(const ptx::Operand& o) {
  std::vector<Unit> units;
  if (o.kind != ptx::Operand::vector) return {write(o)};
  for (const ptx::Operand& part : o.parts) units.push_back(write(part));
  return units;
}

void Resolver::list(const std::vector<Unit>& units) {
  program.lists.push_back(units);
  i.list = program.lists.back().data();
  i.list_size = static_cast<uint16_t>(units.size());
}

bool Resolver::immediate(size_t n, int64_t& value) const {
  if (n >= s.operands.size() || s.operands[n].kind != ptx::Operand::integer) return false;
  value = static_cast<int64_t>(s.operands[n].bits);
  return true;
}

size_t Resolver::target(const std::string& label) const {
  const auto& scopes = program.function->scopes;
  for (int scope = s.scope; scope >= 0; scope = scopes[static_cast<size_t>(scope)].parent) {
    const auto& labels = scopes[static_cast<size_t>(scope)].labels;
    if (const auto found = labels.find(label); found != labels.end()) return found->second;
  }
  throw ParseError("PTX line " + std::to_string(s.line) + ": there is no label " + label);
}

const std::vector<std::string>* Resolver::targets(const std::string& label) const {
  const auto& scopes = program.function->scopes;
  for (int scope = s.scope; scope >= 0; scope = scopes[static_cast<size_t>(scope)].parent) {
    const auto& lists = scopes[static_cast<size_t>(scope)].targets;
    if (const auto found = lists.find(label); found != lists.end()) return &found->second;
  }
  return nullptr;
}

void Resolver::finish() {
  if (!s.guard.empty()) {
    int bytes = 1;
    i.guard = register_unit(s.guard, &bytes);
    if (i.guard == kNoUnit || bytes != 0)
      throw ParseError("PTX line " + std::to_string(s.line) + ": the guard " + s.guard + " is no predicate: " + s.text);
    i.guard_negated = s.guard_negated;
  }
  std::vector<Unit> all = reads_;
  all.insert(all.end(), writes_.begin(), writes_.end());
  program.lists.push_back(all);
  i.reads = program.lists.back().data();
  i.reads_size = static_cast<uint16_t>(reads_.size());
  i.writes = i.reads + reads_.size();
  i.writes_size = static_cast<uint16_t>(writes_.size());
}

Program resolve(const ptx::Module& module, const ptx::Function& function, const Globals& globals) {
  Program p;
  p.name = function.name;
  p.module = &module;
  p.function = &function;
  for (const ptx::Variable& v : function.parameters) {
    p.parameter_bytes = align_up(p.parameter_bytes, v.align);
    p.parameter_offsets[v.name] = p.parameter_bytes;
    p.parameter_bytes += static_cast<uint32_t>(v.bytes());
  }
  lay_out_shared(p);
  Names mine;
  names = &mine;
  std::map<std::string, uint32_t> opcode_numbers;
  p.code.resize(function.statements.size());
  for (size_t n = 0; n < function.statements.size(); ++n) {
    const ptx::Statement& s = function.statements[n];
    Instruction& i = p.code[n];
    i.statement = &s;
    i.line = s.line;
    i.guard = kNoUnit;
    const std::string name = opcode_name(s);
    const auto [number, fresh] = opcode_numbers.insert({name, static_cast<uint32_t>(p.opcodes.size())});
    if (fresh) p.opcodes.push_back(name);
    i.opcode = number->second;
    Resolver r(p, globals, s, i);
    const auto found = table().find(s.opcode[0]);
    const bool known = found != table().end() && found->second(r) && r.all_used() && i.run;
    if (!known) {
      i.run = unknown_instruction;
      if (std::find(p.unknown.begin(), p.unknown.end(), name) == p.unknown.end()) p.unknown.push_back(name);
    }
    r.finish();
  }
  names = nullptr;
  return p;
}

}  // namespace moekern::emulator
