// PTX text as statements: what parser.cpp makes of a file and program.cpp turns into instructions.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace moekern::emulator {

struct ParseError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace ptx {

enum class Space : uint8_t { generic, global, shared, local, param, constant };

struct Operand {
  enum Kind : uint8_t { name, integer, real32, real64, vector, address, sink };
  Kind kind = sink;
  std::string text;            // of a name
  uint64_t bits = 0;           // of a number
  bool negated = false;        // !p, -x
  int64_t offset = 0;          // of an address: [text + offset]
  std::string second;          // p|q: the second destination
  std::vector<Operand> parts;  // of a vector; of a tensor's address: the base, then the vector of coordinates
};

struct Statement {
  int line = 0;
  int scope = 0;
  std::string text;  // as written, white space folded
  std::string guard;
  bool guard_negated = false;
  std::vector<std::string> opcode;  // "ld", "global", "v4", ...
  std::vector<Operand> operands;
};

// A register, or a variable in memory.
struct Variable {
  std::string name;
  std::string type;  // "f32", "pred", ...
  Space space = Space::generic;
  bool is_register = false;
  int64_t elements = 1;  // of an array; 0: its size comes with the launch
  int64_t align = 1;
  std::vector<uint8_t> initial;
  struct Address {  // a word of `initial` that holds another variable's address
    int64_t at;
    std::string name;
  };
  std::vector<Address> addresses;

  int64_t bytes() const;
};

int64_t type_bytes(const std::string& type);  // 0: not a type

struct Scope {
  int parent = -1;
  std::map<std::string, Variable> variables;
  std::map<std::string, std::pair<std::string, int>> families;  // %f<1159>: "%f" -> (f32, 1159)
  std::map<std::string, size_t> labels;                         // -> index of a statement
  std::map<std::string, std::vector<std::string>> targets;      // .branchtargets
};

struct Function {
  std::string name;
  bool is_entry = false;
  bool has_body = false;
  int line = 0;
  std::vector<Variable> results, parameters;
  int max_threads = 0;         // .maxntid, .reqntid: 0 if not said
  bool exact_threads = false;  // .reqntid
  int max_registers = 0;       // .maxnreg
  int cluster[3] = {0, 0, 0};  // .reqnctapercluster
  std::vector<Scope> scopes;   // the first is the body's
  std::vector<Statement> statements;
};

struct Module {
  std::string target;
  std::vector<Variable> variables;  // .global, .const, .shared outside of functions
  std::vector<Function> functions;
};

Module parse(const char* text);

}  // namespace ptx
}  // namespace moekern::emulator
