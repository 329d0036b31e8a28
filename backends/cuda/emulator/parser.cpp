#include <cctype>
#include <cstdlib>
#include <cstring>

#include "ptx.h"

namespace moekern::emulator::ptx {
namespace {

struct Token {
  enum Kind : uint8_t { end, word, number, text, mark };
  Kind kind = end;
  std::string value;
  int line = 0;
  size_t begin = 0, finish = 0;  // where it stands in the source
  bool first_on_line = false;
};

bool starts_word(char c) { return std::isalpha(static_cast<unsigned char>(c)) || std::strchr("_$%.", c) != nullptr; }

std::vector<Token> tokens_of(const char* source) {
  std::vector<Token> tokens;
  int line = 1;
  bool fresh = true;
  const char* p = source;
  const auto add = [&](Token::Kind kind, const char* from, const char* to) {
    tokens.push_back({kind, std::string(from, to), line, static_cast<size_t>(from - source),
                      static_cast<size_t>(to - source), fresh});
    fresh = false;
  };
  while (*p) {
    if (*p == '\n') {
      ++line, ++p, fresh = true;
    } else if (std::isspace(static_cast<unsigned char>(*p))) {
      ++p;
    } else if (p[0] == '/' && p[1] == '/') {
      while (*p && *p != '\n') ++p;
    } else if (p[0] == '/' && p[1] == '*') {
      for (p += 2; *p && !(p[0] == '*' && p[1] == '/'); ++p) line += *p == '\n';
      if (*p) p += 2;
    } else if (*p == '"') {
      const char* from = p++;
      while (*p && *p != '"') p += (*p == '\\' && p[1]) ? 2 : 1;
      if (*p) ++p;
      add(Token::text, from, p);
    } else if (std::isdigit(static_cast<unsigned char>(*p))) {
      const char* from = p;
      const bool hex = p[0] == '0' && std::strchr("xXfFdD", p[1] ? p[1] : ' ');
      while (std::isalnum(static_cast<unsigned char>(*p)) || (*p == '.' && !hex) ||
             (!hex && (*p == '+' || *p == '-') && (p[-1] == 'e' || p[-1] == 'E')))
        ++p;
      add(Token::number, from, p);
    } else if (starts_word(*p)) {
      const char* from = p++;
      while (std::isalnum(static_cast<unsigned char>(*p)) || (*p && std::strchr("_$%.", *p)) ||
             (p[0] == ':' && p[1] == ':')) {
        p += *p == ':' ? 2 : 1;
      }
      add(Token::word, from, p);
    } else {
      add(Token::mark, p, p + 1);
      ++p;
    }
  }
  add(Token::end, p, p);
  return tokens;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

bool is_space(const std::string& word, Space& space) {
  static const std::map<std::string, Space> spaces{{".global", Space::global},
                                                   {".shared", Space::shared},
                                                   {".local", Space::local},
                                                   {".param", Space::param},
                                                   {".const", Space::constant}};
  const auto found = spaces.find(word);
  if (found == spaces.end()) return false;
  space = found->second;
  return true;
}

class Parser {
 public:
  explicit Parser(const char* source) : source_(source), tokens_(tokens_of(source)) {}

  Module module() {
    Module m;
    while (!at_end()) {
      const Token& t = peek();
      if (t.value == ".version" || t.value == ".address_size" || t.value == ".file" || t.value == ".loc") {
        skip_line();
      } else if (t.value == ".target") {
        next();
        m.target = peek().value;
        skip_line();
      } else if (t.value == ".section") {
        skip_section();
      } else if (t.value == ".visible" || t.value == ".extern" || t.value == ".weak" || t.value == ".common") {
        next();
      } else if (t.value == ".entry" || t.value == ".func") {
        m.functions.push_back(function());
      } else if (t.value == ".alias" || t.value == ".pragma") {
        while (!accept(";")) next();
      } else {
        Space space;
        if (!is_space(t.value, space)) fail("a directive or a variable was expected");
        variables(m.variables);
      }
    }
    return m;
  }

 private:
  const Token& peek(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  bool at_end() const { return peek().kind == Token::end; }
  const Token& next() {
    if (at_end()) fail("the text ends in the middle of something");
    return tokens_[at_++];
  }
  bool is(const char* value, size_t ahead = 0) const { return peek(ahead).value == value; }
  bool accept(const char* value) {
    if (!is(value)) return false;
    next();
    return true;
  }
  void expect(const char* value) {
    if (!accept(value)) fail(std::string("'") + value + "' was expected");
  }
  [[noreturn]] void fail(const std::string& what) const {
    const Token& t = peek();
    throw ParseError("PTX line " + std::to_string(t.line) + ": " + what + ", there is '" + t.value + "'");
  }
  void skip_line() {
    next();
    while (!at_end() && !peek().first_on_line) next();
  }
  void skip_section() {
    while (!is("{")) next();
    while (!accept("}")) next();
  }

  int64_t integer() {
    const bool negative = accept("-");
    if (peek().kind != Token::number) fail("a number was expected");
    const auto value = static_cast<int64_t>(std::strtoull(next().value.c_str(), nullptr, 0));
    return negative ? -value : value;
  }

  // .global .align 16 .b8 name[128] = {...}, other;
  void variables(std::vector<Variable>& into, bool one = false) {
    Variable common;
    while (peek().kind == Token::word && peek().value[0] == '.') {
      const std::string word = next().value;
      if (is_space(word, common.space)) continue;
      if (word == ".align") {
        common.align = integer();
      } else if (word == ".v2" || word == ".v4") {
        common.elements = word[2] - '0';
      } else if (type_bytes(word.substr(1)) || word == ".pred") {
        common.type = word.substr(1);
      } else if (word == ".ptr" || word == ".attribute") {  // .ptr .global .align 16
        if (word == ".attribute") {
          while (!accept(")")) next();
        } else {
          if (is(".global") || is(".shared") || is(".const") || is(".local") || is(".generic")) next();
          if (accept(".align")) integer();
        }
      } else {
        throw ParseError("PTX line " + std::to_string(peek().line) + ": " + word + " is no type of a variable");
      }
    }
    if (common.type.empty()) fail("a type was expected");
    do {
      Variable v = common;
      if (peek().kind != Token::word) fail("a name was expected");
      v.name = next().value;
      while (accept("[")) {
        v.elements *= is("]") ? 0 : integer();
        expect("]");
      }
      if (v.align < type_bytes(v.type)) v.align = type_bytes(v.type);
      if (accept("=")) initial(v);
      into.push_back(std::move(v));
    } while (!one && accept(","));
    if (!one) expect(";");
  }

  void initial(Variable& v) {
    const bool braces = accept("{");
    const auto width = static_cast<size_t>(type_bytes(v.type));
    do {
      while (accept("{")) {
      }
      uint64_t bits = 0;
      if (peek().kind == Token::number || is("-")) {
        bits = number().bits;
        if ((v.type == "f64") && bits == 0) bits = 0;
      } else {  // the address of a variable, or generic(variable)
        std::string name = next().value;
        if (name == "generic") {
          expect("(");
          name = next().value;
          expect(")");
        }
        if (accept("+")) bits = static_cast<uint64_t>(integer());
        v.addresses.push_back({static_cast<int64_t>(v.initial.size()), name});
      }
      for (size_t i = 0; i < width; ++i) v.initial.push_back(static_cast<uint8_t>(bits >> (8 * i)));
      while (braces && is("}") && is("}", 1)) next();
    } while (accept(",") || (braces && !is("}")));
    if (braces) expect("}");
  }

  Operand number() {
    Operand o;
    const bool negative = accept("-");
    if (peek().kind != Token::number) fail("a number was expected");
    const std::string& text = next().value;
    const char second = text.size() > 1 ? static_cast<char>(std::tolower(text[1])) : ' ';
    if (text[0] == '0' && (second == 'f' || second == 'd')) {
      o.kind = second == 'f' ? Operand::real32 : Operand::real64;
      o.bits = std::strtoull(text.c_str() + 2, nullptr, 16);
      if (negative) o.bits ^= second == 'f' ? 0x80000000ull : 1ull << 63;
    } else if (text.find_first_of(".eE") != std::string::npos && second != 'x') {
      o.kind = Operand::real64;
      const double value = negative ? -std::strtod(text.c_str(), nullptr) : std::strtod(text.c_str(), nullptr);
      std::memcpy(&o.bits, &value, 8);
    } else {
      o.kind = Operand::integer;
      o.bits = std::strtoull(text.c_str(), nullptr, 0);
      if (negative) o.bits = 0 - o.bits;
    }
    return o;
  }

  Operand operand() {
    Operand o;
    if (peek().kind == Token::number || (is("-") && peek(1).kind == Token::number)) return number();
    if (accept("!") || accept("-")) {
      o = operand();
      o.negated = true;
      return o;
    }
    if (accept("{")) {
      o.kind = Operand::vector;
      do o.parts.push_back(operand());
      while (accept(","));
      expect("}");
      return o;
    }
    if (accept("[")) return address();
    if (accept("(")) {  // of a call
      o.kind = Operand::vector;
      while (!accept(")")) {
        o.parts.push_back(operand());
        accept(",");
      }
      return o;
    }
    if (peek().kind != Token::word) fail("an operand was expected");
    o.text = next().value;
    o.kind = o.text == "_" ? Operand::sink : Operand::name;
    if (accept("|")) o.second = next().value;
    if (accept("+")) o.offset = integer();  // a variable's address and an offset
    return o;
  }

  Operand address() {
    Operand o;
    o.kind = Operand::address;
    if (peek().kind == Token::number) {
      o.offset = integer();
    } else {
      o.text = next().value;
      if (accept("+")) {
        o.offset = integer();
      } else if (is("-")) {
        o.offset = integer();
      }
    }
    while (accept(",")) o.parts.push_back(operand());  // a tensor's coordinates
    expect("]");
    return o;
  }

  void parameters(std::vector<Variable>& into) {
    expect("(");
    while (!accept(")")) {
      if (is(".reg")) next();
      variables(into, true);
      accept(",");
    }
  }

  Function function() {
    Function f;
    f.line = peek().line;
    f.is_entry = next().value == ".entry";
    if (!f.is_entry && is("(")) parameters(f.results);
    f.name = next().value;
    if (is("(")) parameters(f.parameters);
    while (!is("{") && !is(";")) directive(f);
    if (accept(";")) return f;
    f.has_body = true;
    f.scopes.emplace_back();
    next();
    body(f, 0);
    return f;
  }

  void directive(Function& f) {
    const std::string word = next().value;
    const auto up_to_three = [&] {
      int64_t value = integer();
      while (accept(",")) value *= integer();
      return static_cast<int>(value);
    };
    if (word == ".maxntid" || word == ".reqntid") {
      f.max_threads = up_to_three();
      f.exact_threads = word == ".reqntid";
    } else if (word == ".maxnreg") {
      f.max_registers = static_cast<int>(integer());
    } else if (word == ".minnctapersm" || word == ".maxclusterrank" || word == ".abi_preserve") {
      integer();
    } else if (word == ".reqnctapercluster") {
      f.cluster[1] = f.cluster[2] = 1;
      f.cluster[0] = static_cast<int>(integer());
      for (int i = 1; i < 3 && accept(","); ++i) f.cluster[i] = static_cast<int>(integer());
    } else if (word == ".pragma") {
      while (!accept(";")) next();
    } else if (word != ".explicitcluster" && word != ".noreturn" && word != ".blocksareclusters" && word != ".weak") {
      throw ParseError("PTX line " + std::to_string(peek().line) + ": the directive " + word + " is not known");
    }
  }

  void body(Function& f, int scope) {
    while (!accept("}")) {
      const Token& t = peek();
      if (t.value == "{") {
        next();
        f.scopes.emplace_back();
        f.scopes.back().parent = scope;
        body(f, static_cast<int>(f.scopes.size()) - 1);
      } else if (t.value == ".reg") {
        registers(f.scopes[static_cast<size_t>(scope)]);
      } else if (t.value == ".loc" || t.value == ".file") {
        skip_line();
      } else if (t.value == ".section") {
        skip_section();
      } else if (t.value == ".pragma" || t.value == ".callprototype") {
        while (!accept(";")) next();
      } else if (t.value == ";") {
        next();
      } else if (Space space; is_space(t.value, space)) {
        std::vector<Variable> found;
        variables(found);
        for (Variable& v : found) f.scopes[static_cast<size_t>(scope)].variables[v.name] = v;
      } else if (t.kind == Token::word && is(":", 1)) {
        label(f, scope);
      } else {
        statement(f, scope);
      }
    }
  }

  void label(Function& f, int scope) {
    const std::string name = next().value;
    next();
    Scope& s = f.scopes[static_cast<size_t>(scope)];
    if (is(".branchtargets") || is(".calltargets")) {
      next();
      do s.targets[name].push_back(next().value);
      while (accept(","));
      expect(";");
    } else if (is(".callprototype")) {
      while (!accept(";")) next();
    } else {
      s.labels[name] = f.statements.size();
    }
  }

  void registers(Scope& scope) {
    next();
    std::string type = next().value.substr(1);
    int64_t elements = 1;
    if (type == "v2" || type == "v4") {
      fail("registers that are vectors are not supported");
    }
    if (type != "pred" && !type_bytes(type)) fail("the type ." + type + " of a register is not known");
    do {
      const std::string name = next().value;
      if (accept("<")) {
        scope.families[name] = {type, static_cast<int>(integer())};
        expect(">");
      } else {
        Variable v;
        v.name = name, v.type = type, v.is_register = true, v.elements = elements;
        scope.variables[name] = v;
      }
    } while (accept(","));
    expect(";");
  }

  void statement(Function& f, int scope) {
    Statement s;
    s.scope = scope;
    s.line = peek().line;
    const size_t begin = peek().begin;
    if (accept("@")) {
      s.guard_negated = accept("!");
      s.guard = next().value;
    }
    if (peek().kind != Token::word) fail("an instruction was expected");
    s.opcode = split(next().value, '.');
    while (!is(";")) {
      s.operands.push_back(operand());
      if (!accept(",") && !is(";")) fail("',' or ';' was expected");
    }
    for (size_t i = begin; i < peek().begin; ++i) {
      const bool blank = std::isspace(static_cast<unsigned char>(source_[i]));
      if (!blank) {
        s.text += source_[i];
      } else if (!s.text.empty() && s.text.back() != ' ') {
        s.text += ' ';
      }
    }
    next();
    f.statements.push_back(std::move(s));
  }

  const char* source_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
};

}  // namespace

int64_t type_bytes(const std::string& type) {
  static const std::map<std::string, int> bytes{
      {"b8", 1},  {"u8", 1},  {"s8", 1},    {"b16", 2},  {"u16", 2},    {"s16", 2},    {"f16", 2},   {"bf16", 2},
      {"b32", 4}, {"u32", 4}, {"s32", 4},   {"f32", 4},  {"f16x2", 4},  {"bf16x2", 4}, {"b64", 8},   {"u64", 8},
      {"s64", 8}, {"f64", 8}, {"b128", 16}, {"tf32", 4}, {"e4m3x2", 2}, {"e5m2x2", 2}, {"u16x2", 4}, {"s16x2", 4}};
  const auto found = bytes.find(type);
  return found == bytes.end() ? 0 : found->second;
}

int64_t Variable::bytes() const { return elements * type_bytes(type); }

Module parse(const char* text) { return Parser(text).module(); }

}  // namespace moekern::emulator::ptx
