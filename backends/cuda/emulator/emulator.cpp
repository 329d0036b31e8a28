#include "emulator.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "run.h"

namespace moekern::emulator {

namespace {

bool set_in(Emulator& e, const std::string& name, const std::string& value) {
  static const std::map<std::string, Schedule> schedules{{"round_robin", Schedule::round_robin},
                                                         {"random", Schedule::random},
                                                         {"producer_greedy", Schedule::producer_greedy},
                                                         {"consumer_greedy", Schedule::consumer_greedy}};
  static const std::map<std::string, Accumulation> accumulations{{"exact", Accumulation::exact},
                                                                 {"hopper", Accumulation::hopper}};
  Settings& s = e.settings;
  if (name == "schedule") {
    const auto found = schedules.find(value);
    if (found == schedules.end()) return false;
    s.schedule = found->second;
    return true;
  }
  if (name == "accumulation") {
    const auto found = accumulations.find(value);
    if (found == accumulations.end()) return false;
    s.accumulation = found->second;
    return true;
  }
  char* end;
  const long long number = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end || number < 0) return false;
  if (name == "sms" && number >= 1 && number <= 1024) {
    s.sms = static_cast<int>(number);
  } else if (name == "seed") {
    s.seed = static_cast<uint64_t>(number);
  } else if (name == "races") {
    s.races = number != 0;
  } else if (name == "poison") {
    s.poison = number != 0;
  } else if (name == "patience") {
    s.patience = static_cast<uint64_t>(number);
  } else if (name == "strict") {
    e.strict = number != 0;
  } else {
    return false;
  }
  return true;
}

void configure(Emulator& e, std::string rest) {  // "sms=4,schedule=random,seed=3"
  while (!rest.empty()) {
    const size_t comma = std::min(rest.find(','), rest.size()), equals = std::min(rest.find('='), comma);
    if (!set_in(e, rest.substr(0, equals), equals < comma ? rest.substr(equals + 1, comma - equals - 1) : ""))
      std::fprintf(stderr, "MOEKERN_EMULATOR: there is no setting %s\n", rest.substr(0, comma).c_str());
    rest = comma < rest.size() ? rest.substr(comma + 1) : "";
  }
}

}  // namespace

Emulator& emulator() {
  static Emulator& one = []() -> Emulator& {
    auto* e = new Emulator;  // leaked: other statics may launch while they are destroyed
    if (const char* text = std::getenv("MOEKERN_EMULATOR")) configure(*e, text);
    return *e;
  }();
  return one;
}

bool set(const std::string& name, const std::string& value) { return set_in(emulator(), name, value); }

std::unique_ptr<Module> load(const char* text) {
  auto m = std::make_unique<Module>();
  m->text = ptx::parse(text);
  for (const ptx::Variable& v : m->text.variables) {
    if (v.space != ptx::Space::global && v.space != ptx::Space::constant) continue;
    const auto bytes = static_cast<uint64_t>(std::max<int64_t>(v.bytes(), 1));
    // Room to begin at any alignment that a variable may ask for.
    const uint64_t align = static_cast<uint64_t>(std::max<int64_t>(v.align, 16));
    auto memory = std::make_unique<uint64_t[]>((bytes + align) / 8 + 2);
    const uint64_t at = (reinterpret_cast<uint64_t>(memory.get()) + align - 1) / align * align;
    std::memcpy(reinterpret_cast<void*>(at), v.initial.data(), v.initial.size());
    m->globals[v.name] = at;
    m->memory.emplace_back(std::move(memory), bytes);
  }
  for (const ptx::Variable& v : m->text.variables)
    for (const auto& [where, name] : v.addresses) {
      if (!m->globals.count(v.name) || !m->globals.count(name)) continue;
      uint64_t value;
      auto* at = reinterpret_cast<uint8_t*>(m->globals[v.name]) + where;
      std::memcpy(&value, at, 8);
      value += m->globals[name];
      std::memcpy(at, &value, 8);
    }
  return m;
}

Function* function_of(Module& m, const std::string& name) {
  if (const auto found = m.functions.find(name); found != m.functions.end()) return found->second.get();
  for (const ptx::Function& f : m.text.functions)
    if (f.is_entry && f.has_body && f.name == name) {
      auto made = std::make_unique<Function>();
      made->module = &m;
      made->program = resolve(m.text, f, m.globals);
      return (m.functions[name] = std::move(made)).get();
    }
  return nullptr;
}

std::string refusal(const Function& f, const Grid& g) {
  const ptx::Function& declared = *f.program.function;
  const uint64_t threads = uint64_t{g.block[0]} * g.block[1] * g.block[2];
  const uint64_t cluster = uint64_t{g.cluster[0]} * g.cluster[1] * g.cluster[2];
  for (int d = 0; d < 3; ++d) {
    if (!g.grid[d] || !g.block[d] || !g.cluster[d])
      return "a grid, block or cluster has no size in dimension " + std::to_string(d);
    if (g.grid[d] % g.cluster[d])
      return "a grid of " + std::to_string(g.grid[d]) + " is no multiple of the cluster's " +
             std::to_string(g.cluster[d]);
  }
  if (g.grid[0] > 0x7fffffff || g.grid[1] > 65535 || g.grid[2] > 65535) return "the grid is too large";
  if (threads > 1024 || g.block[2] > 64)
    return "a block of " + std::to_string(threads) + " threads; a CTA has at most 1024";
  if (declared.max_threads && threads > static_cast<uint64_t>(declared.max_threads))
    return "a block of " + std::to_string(threads) + " threads; the kernel was compiled for at most " +
           std::to_string(declared.max_threads);
  if (declared.exact_threads && threads != static_cast<uint64_t>(declared.max_threads))
    return "a block of " + std::to_string(threads) + " threads; the kernel was compiled for " +
           std::to_string(declared.max_threads);
  if (cluster > 16 || (cluster > 8 && !f.program.non_portable_cluster))
    return "a cluster of " + std::to_string(cluster) +
           " CTAs; allowed are 8, or 16 if the function's attribute says so";
  if (declared.cluster[0] && (g.cluster[0] != static_cast<uint32_t>(declared.cluster[0]) ||
                              g.cluster[1] != static_cast<uint32_t>(declared.cluster[1]) ||
                              g.cluster[2] != static_cast<uint32_t>(declared.cluster[2])))
    return "the kernel was compiled for another cluster";
  if (g.dynamic_bytes > f.program.dynamic_limit)
    return std::to_string(g.dynamic_bytes) + " bytes of dynamic shared memory; the function's attribute allows " +
           std::to_string(f.program.dynamic_limit);
  if (uint64_t{g.dynamic_bytes} + f.program.static_bytes > kMaxSharedBytes)
    return std::to_string(uint64_t{g.dynamic_bytes} + f.program.static_bytes) +
           " bytes of shared memory; a CTA has at most " + std::to_string(kMaxSharedBytes);
  return "";
}

void launch(Function& f, const Grid& g, const void* parameters) {
  Emulator& e = emulator();
  Launch l;
  l.program = &f.program;
  l.settings = e.settings;
  Regions regions = e.regions;
  regions.check = e.strict || !e.regions.empty();
  // The parameter block may hold tensor maps: it lies at a multiple of 64 bytes, and is the kernel's own copy.
  const size_t bytes = std::max<size_t>(f.program.parameter_bytes, 1);
  std::vector<uint8_t> block(bytes + 128);
  auto* at = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(block.data()) + 127) / 128 * 128);
  std::memcpy(at, parameters, f.program.parameter_bytes);
  regions.add(reinterpret_cast<uint64_t>(at), bytes, false);
  for (const ptx::Variable& v : f.module->text.variables)
    if (const auto it = f.module->globals.find(v.name); it != f.module->globals.end())
      regions.add(it->second, static_cast<uint64_t>(std::max<int64_t>(v.bytes(), 1)), v.space == ptx::Space::global);
  l.regions = &regions;
  std::copy(g.grid, g.grid + 3, l.grid);
  std::copy(g.block, g.block + 3, l.block);
  std::copy(g.cluster, g.cluster + 3, l.cluster);
  l.explicit_cluster = g.explicit_cluster;
  l.dynamic_bytes = g.dynamic_bytes;
  l.parameters = at;
  const auto begin = std::chrono::steady_clock::now();
  const auto tell = [&] {
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    std::map<std::string, uint64_t> opcodes;
    for (size_t n = 0; n < l.counts.size(); ++n)
      if (l.counts[n]) opcodes[f.program.opcodes[f.program.code[n].opcode]] += l.counts[n];
    std::string text = "{\"kernel\": \"" + f.program.name + "\", \"seconds\": " + std::to_string(seconds.count()) +
                       ", \"instructions\": " + std::to_string(l.executed) + ", \"turns\": " + std::to_string(l.now) +
                       ", \"products\": " + std::to_string(l.products) +
                       ", \"bulk_copies\": " + std::to_string(l.copies) +
                       ", \"bulk_bytes\": " + std::to_string(l.copied_bytes) + ", \"opcodes\": {";
    bool first = true;
    for (const auto& [name, count] : opcodes) {
      text += (first ? "\"" : ", \"") + name + "\": " + std::to_string(count);
      first = false;
    }
    e.statistics = text + "}}";
  };
  try {
    run(l);
  } catch (const Fault&) {
    tell();
    throw;
  }
  tell();
}

}  // namespace moekern::emulator
