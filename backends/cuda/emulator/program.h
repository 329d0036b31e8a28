// A kernel ready to run: instructions with handlers and register numbers, made once from PTX statements.
#pragma once
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "warp.h"

namespace moekern::emulator {

constexpr Unit kNoUnit = INT32_MIN;

enum class Special : uint8_t {
  tid_x,
  tid_y,
  tid_z,
  ntid_x,
  ntid_y,
  ntid_z,
  ctaid_x,
  ctaid_y,
  ctaid_z,
  nctaid_x,
  nctaid_y,
  nctaid_z,
  laneid,
  warpid,
  nwarpid,
  smid,
  nsmid,
  gridid,
  clusterid_x,
  clusterid_y,
  clusterid_z,
  nclusterid_x,
  nclusterid_y,
  nclusterid_z,
  cluster_ctaid_x,
  cluster_ctaid_y,
  cluster_ctaid_z,
  cluster_nctaid_x,
  cluster_nctaid_y,
  cluster_nctaid_z,
  cluster_ctarank,
  cluster_nctarank,
  is_explicit_cluster,
  lanemask_eq,
  lanemask_le,
  lanemask_lt,
  lanemask_ge,
  lanemask_gt,
  dynamic_smem_size,
  total_smem_size,
  aggr_smem_size,
  reserved_smem_offset_begin,
  reserved_smem_offset_end,
  parameters,
  envreg
};

struct Program {
  std::string name;
  const ptx::Module* module = nullptr;
  const ptx::Function* function = nullptr;
  std::vector<Instruction> code;
  std::vector<std::string> opcodes;  // names, for statistics
  std::vector<std::string> unknown;  // opcodes that nobody can execute

  Unit units = 4;      // of registers, from 0 on; the first are a sink for `_`
  Unit constants = 0;  // units before them, at negative numbers
  std::vector<std::pair<Unit, uint64_t>> words32, words64;
  std::vector<std::pair<Unit, Special>> specials;

  std::map<std::string, uint32_t> parameter_offsets;
  uint32_t parameter_bytes = 0;
  std::map<std::string, uint32_t> shared_offsets;
  uint32_t static_bytes = 0;
  uint32_t local_bytes = 0;
  int registers = 0;                             // 32-bit registers that PTX names, for information: ptxas needs fewer
  uint32_t dynamic_limit = kDefaultSharedBytes;  // cuFuncSetAttribute
  bool non_portable_cluster = false;

  std::vector<std::pair<Unit, std::string>> unit_names;
  std::string unit_name(Unit unit) const;

  std::deque<std::vector<Unit>> lists;
  std::deque<std::vector<uint8_t>> extras;
};

// The module's .global and .const variables: host memory.
using Globals = std::map<std::string, uint64_t>;

Program resolve(const ptx::Module& module, const ptx::Function& function, const Globals& globals);

// Fills an instruction. What an operand is asked for with is what is checked while running: reads are to be defined.
class Resolver {
 public:
  Resolver(Program& program, const Globals& globals, const ptx::Statement& statement, Instruction& i);

  const ptx::Statement& s;
  Instruction& i;
  Program& program;

  const std::string& root() const { return s.opcode[0]; }
  bool has(const std::string& modifier);  // and takes note of it
  bool has_all_of(std::initializer_list<const char*> modifiers);
  void ignore(std::initializer_list<const char*> modifiers) {
    for (const char* m : modifiers) has(m);
  }
  std::string types(int from_last = 0);  // the last type of the opcode, the one before it, ...
  bool all_used() const;                 // no modifier was left unread
  size_t operands() const { return s.operands.size(); }
  const ptx::Operand& operand(size_t n) const;

  Unit read(size_t n, int bytes) { return read(operand(n), bytes); }
  Unit read(const ptx::Operand& o, int bytes);  // bytes of the type that the instruction reads; 0: a predicate
  Unit write(size_t n) { return write(operand(n)); }
  Unit write(const ptx::Operand& o);
  Unit write_second(const ptx::Operand& o);  // q of p|q
  Unit unchecked(const ptx::Operand& o);     // a register that the handler checks by itself
  int width(const ptx::Operand& o);          // bytes of a register; of anything else 0
  void address(size_t n);                    // i.a, i.offset, i.wide_address
  Unit address_of(const ptx::Operand& o, int64_t& offset, bool& wide);
  std::vector<Unit> read_vector(const ptx::Operand& o, int bytes);
  std::vector<Unit> write_vector(const ptx::Operand& o);
  void list(const std::vector<Unit>& units);
  Unit constant(uint64_t bits, int bytes);
  template <typename T>
  T* extra(const T& value) {
    program.extras.emplace_back(sizeof(T));
    std::memcpy(program.extras.back().data(), &value, sizeof(T));
    i.extra = program.extras.back().data();
    return reinterpret_cast<T*>(program.extras.back().data());
  }
  bool immediate(size_t n, int64_t& value) const;
  size_t target(const std::string& label) const;  // the instruction that it stands before
  const std::vector<std::string>* targets(const std::string& label) const;
  void finish();

 private:
  friend struct Names;
  const ptx::Variable* variable(const std::string& name) const;
  Unit special(const std::string& name, int bytes);
  Unit register_unit(const std::string& name, int* bytes);
  uint64_t address_of_variable(const std::string& name, bool& found) const;

  const Globals& globals_;
  std::vector<bool> used_;
  std::vector<Unit> reads_, writes_;
};

using Resolve = bool (*)(Resolver&);
using Table = std::map<std::string, Resolve>;
void add_integer(Table&);
void add_floating(Table&);
void add_conversions(Table&);
void add_moves(Table&);
void add_memory(Table&);
void add_atomics(Table&);
void add_control(Table&);
void add_warp_wide(Table&);
void add_barriers(Table&);
void add_mbarriers(Table&);
void add_copies(Table&);
void add_products(Table&);
void add_fragments(Table&);
void add_tensor_map_edits(Table&);

Status unknown_instruction(Warp&, const Instruction&, uint32_t);

}  // namespace moekern::emulator
