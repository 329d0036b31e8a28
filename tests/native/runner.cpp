// Runs rows of the CPU backend's kernel table in a process without Python: the kernels of CPUs that
// only an emulator has. tests/remote.py talks to it over stdin and stdout, in lines and raw bytes:
//
//   list                    -> "features NAME...", then a "kernel OP NAME FEATURE..." per row, "end"
//   run OP KERNEL THREADS OPTIONS OPERANDS MEMORIES           ("ask" instead of "run": see below)
//     each option   NAME NUMBER
//     each operand  NAME DTYPE ROWS COLS ROW_STRIDE COL_STRIDE BLOCK_ROWS BLOCK_COLS MEMORY
//     each memory   BYTES WRITABLE, and after the line the bytes, from the operand's first element to its last
//                           -> "done" and the bytes of every writable memory, in order
//                            | "refused REASON" | "error MESSAGE"
//
// "ask" stops before running and answers "done" or "refused". Every memory ends where an unreadable
// page begins, and what is not writable is mapped so: a kernel that strays is killed.
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "moekern/arguments.h"
#include "moekern/routing.h"

namespace moekern::cpu {
const Backend& backend();
}

namespace moekern {
namespace {

std::string features_of(uint64_t bits, const char* separator) {
  std::string names;
  for (const Feature& f : cpu::backend().features)
    if (bits & f.bit) names += std::string(separator) + f.name;
  return names;
}

void list() {
  const Backend& b = cpu::backend();
  std::cout << "features" << features_of(b.detect_features(), " ") << "\n";
  for (const GemmKernel& k : b.gemm) std::cout << "kernel fp8_gemm_nt " << k.name << features_of(k.needs, " ") << "\n";
  for (const GroupedGemmKernel& k : b.grouped_gemm)
    std::cout << "kernel grouped " << k.name << features_of(k.needs, " ") << "\n";
  for (const ExpertsKernel& k : b.experts)
    std::cout << "kernel fused_experts " << k.name << features_of(k.needs, " ") << "\n";
  for (const RoutingKernel& k : b.routing)
    for (const char* op : {"moe_gate", "moe_permute", "moe_unpermute"})
      std::cout << "kernel " << op << " " << k.name << features_of(k.needs, " ") << "\n";
  for (const CastKernel& k : b.cast) std::cout << "kernel cast " << k.name << features_of(k.needs, " ") << "\n";
  std::cout << "end\n";
}

class Memory {
 public:
  explicit Memory(std::istream& in) {
    in >> bytes_ >> writable_;
    in.ignore();  // the end of the line
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    usable_ = (bytes_ + page - 1) / page * page;
    mapped_ = usable_ + page;
    map_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    check(map_ != MAP_FAILED, "mmap of ", mapped_, " bytes failed");
    std::memset(map_, 0xff, usable_);  // NaN in every format, before the operand
    in.read(data(), static_cast<std::streamsize>(bytes_));
    mprotect(map_ + usable_, page, PROT_NONE);
    if (!writable_ && usable_) mprotect(map_, usable_, PROT_READ);
  }
  ~Memory() { munmap(map_, mapped_); }
  Memory(const Memory&) = delete;

  char* data() { return map_ + usable_ - bytes_; }
  void write_back(std::ostream& out) {
    if (writable_) out.write(data(), static_cast<std::streamsize>(bytes_));
  }

 private:
  size_t bytes_ = 0, usable_ = 0, mapped_ = 0;
  bool writable_ = false;
  char* map_ = nullptr;
};

struct Request {
  std::string op, kernel;
  int threads = 1;
  std::map<std::string, double> options;
  std::map<std::string, ScaleGrid> operands;  // a plain matrix has a block of 1 x 1
  std::deque<Memory> memories;

  explicit Request(std::istream& in) {
    int option_count, operand_count, memory_count;
    in >> op >> kernel >> threads >> option_count >> operand_count >> memory_count;
    for (int i = 0; i < option_count; ++i) {
      std::string name;
      in >> name >> options[name];
    }
    std::vector<std::pair<Matrix*, size_t>> pending;
    for (int i = 0; i < operand_count; ++i) {
      std::string name, dtype;
      size_t memory;
      in >> name >> dtype;
      ScaleGrid& g = operands[name];
      in >> g.values.rows >> g.values.cols >> g.values.row_stride >> g.values.col_stride >> g.block_rows >>
          g.block_cols >> memory;
      g.values.dtype = dtype_named(dtype);
      check<TypeError>(g.values.dtype != Dtype::other, "no dtype is named ", dtype);
      pending.emplace_back(&g.values, memory);
    }
    for (int i = 0; i < memory_count; ++i) memories.emplace_back(in);
    for (auto& [matrix, memory] : pending) matrix->data = memories.at(memory).data();
  }

  double option(const std::string& name, double otherwise = 0) const {
    const auto found = options.find(name);
    return found == options.end() ? otherwise : found->second;
  }
  ScaleGrid grid(const std::string& name) const {
    const auto found = operands.find(name);
    return found == operands.end() ? ScaleGrid{} : found->second;
  }
  Matrix matrix(const std::string& name) const { return grid(name).values; }
};

template <class Row>
const Row& row_named(const Table<Row>& table, const std::string& name) {
  for (const Row& row : table) {
    if (name != row.name) continue;
    const uint64_t missing = row.needs & ~cpu::backend().detect_features();
    check(!missing, name, " needs", features_of(missing, " "));
    return row;
  }
  throw ValueError("no kernel is named " + name);
}

// The product whose operands have names that begin with `prefix`.
GemmProblem product(const Request& r, const std::string& prefix) {
  GemmProblem p;
  p.a = r.matrix(prefix + "a");
  p.sa = r.grid(prefix + "a.scale");
  p.b = r.matrix(prefix + "b");
  p.sb = r.grid(prefix + "b.scale");
  p.c = r.matrix(prefix + "c");
  p.bias = r.matrix(prefix + "bias");
  p.out = r.matrix(prefix + "out");
  p.threads = r.threads;
  check_gemm(r.op.c_str(), p);
  check_gemm_output(r.op.c_str(), p);
  return p;
}

// A reason to refuse, or null once done.
const char* gemm(const Request& r, bool ask) {
  const GemmKernel& kernel = row_named(cpu::backend().gemm, r.kernel);
  const GemmProblem p = product(r, "");
  if (const char* reason = kernel.gemm.refuses(p)) return reason;
  if (!ask && p.m() && p.n()) kernel.gemm.run(p);
  return nullptr;
}

// The operands of group g are named "g.a", "g.b" and so on.
const char* grouped(const Request& r, bool ask) {
  const GroupedGemmKernel& kernel = row_named(cpu::backend().grouped_gemm, r.kernel);
  const auto& routine = r.op[0] == 'k' ? kernel.k_grouped : kernel.m_grouped;
  GroupedGemmProblem p;
  std::vector<Group> groups;
  for (int g = 0; r.operands.count(text(g, ".a")); ++g) {
    const GemmProblem q = product(r, text(g, "."));
    if (q.m() == 0 || q.n() == 0) continue;
    if (groups.empty() || q.k() > p.shared.k()) p.shared = q;
    groups.push_back({q.a.data, q.sa.values.data, q.b.data, q.sb.values.data, q.c.data, q.out.data, q.m(), q.k()});
  }
  if (groups.empty()) return nullptr;
  p.groups = groups.data();
  p.count = static_cast<int64_t>(groups.size());
  p.threads = r.threads;
  if (const char* reason = routine.refuses(p)) return reason;
  if (!ask) routine.run(p);
  return nullptr;
}

const char* cast(const Request& r, bool ask) {
  const CastKernel& kernel = row_named(cpu::backend().cast, r.kernel);
  const bool gated = r.op == "silu_mul_cast_to_fp8", back = r.op == "dequantize";
  CastProblem p;
  p.x = r.matrix(back ? "out" : "x");
  p.q = r.matrix(back ? "x" : "out");
  p.scale = r.grid(back ? "x.scale" : "out.scale");
  p.round_scale_up = r.option("round_scale_up") != 0;
  p.threads = r.threads;
  check_cast(r.op.c_str(), p, !back, gated);
  if (!ask && p.q.rows && p.q.cols) (back ? kernel.dequantize : gated ? kernel.silu_mul_cast : kernel.cast).run(p);
  return nullptr;
}

std::vector<Expert> experts_named(const Request& r, const std::string& name) {
  const int64_t hidden = static_cast<int64_t>(r.option(name + ".hidden"));
  const int64_t intermediate = static_cast<int64_t>(r.option(name + ".intermediate"));
  const auto projection = [&](const std::string& which, int64_t first, int64_t count, int64_t inputs) {
    const Projection w{r.matrix(which), r.grid(which + ".scale"), r.matrix(which + ".bias"), first, count};
    check_projection("fused_experts", which.c_str(), w, count, inputs);
    return w;
  };
  std::vector<Expert> experts;
  for (int64_t e = 0; e < static_cast<int64_t>(r.option(name + ".count")); ++e) {
    const std::string which = text(name, ".", e, ".");
    const int64_t up_first = static_cast<int64_t>(r.option(name + ".up_first"));
    experts.push_back({projection(which + "gate", 0, intermediate, hidden),
                       projection(which + "up", up_first, intermediate, hidden),
                       projection(which + "down", 0, hidden, intermediate)});
  }
  return experts;
}

const char* fused_experts(const Request& r, bool ask) {
  const ExpertsKernel& kernel = row_named(cpu::backend().experts, r.kernel);
  const std::vector<Expert> experts = experts_named(r, "experts"), shared = experts_named(r, "shared");
  ExpertsProblem p;
  p.x = r.matrix("x");
  p.sx = r.grid("x.scale");
  p.experts = experts.data();
  p.num_experts = static_cast<int64_t>(experts.size());
  p.shared = shared.data();
  p.num_shared = static_cast<int64_t>(shared.size());
  p.ids = r.matrix("ids");
  p.weights = r.matrix("weights");
  p.gating.activation = static_cast<Activation>(r.option("activation"));
  p.gating.alpha = static_cast<float>(r.option("alpha"));
  p.gating.beta = static_cast<float>(r.option("beta"));
  p.gating.limit = static_cast<float>(r.option("limit", INFINITY));
  p.quantize = r.option("quantize_activations") != 0;
  p.weight_on_input = r.option("apply_router_weight_on_input") != 0;
  p.reduce = r.option("reduce") != 0;
  p.out = r.matrix("out");
  p.workspace = r.matrix("workspace");
  p.threads = r.threads;
  check_experts("fused_experts", p);
  check_ids("fused_experts", "ids", p.ids, p.num_experts);
  check_experts_output("fused_experts", p);
  if (const char* reason = kernel.experts.refuses(p)) return reason;
  if (!ask && p.out.rows && p.out.cols) kernel.experts.run(p);
  return nullptr;
}

const char* moe_gate(const Request& r, bool ask) {
  const RoutingKernel& kernel = row_named(cpu::backend().routing, r.kernel);
  GateProblem p;
  p.logits = r.matrix("logits");
  p.correction_bias = r.matrix("correction_bias");
  p.weights = r.matrix("out.weights");
  p.ids = r.matrix("out.ids");
  p.topk = static_cast<int>(r.option("topk"));
  p.groups = static_cast<int>(r.option("num_expert_group"));
  p.kept_groups = static_cast<int>(r.option("topk_group"));
  p.sigmoid = r.option("sigmoid") != 0;
  p.renormalize = r.option("renormalize") != 0;
  p.routed_scaling_factor = static_cast<float>(r.option("routed_scaling_factor"));
  p.mask_value = static_cast<float>(r.option("mask_value", -INFINITY));
  p.threads = r.threads;
  check_gate("moe_gate", p);
  check_gate_output("moe_gate", p);
  if (!ask && p.logits.rows) kernel.gate.run(p);
  return nullptr;
}

const char* moe_permute(const Request& r, bool ask) {
  const RoutingKernel& kernel = row_named(cpu::backend().routing, r.kernel);
  const auto experts = static_cast<int64_t>(r.option("num_experts"));
  PermuteProblem p;
  p.x = r.matrix("x");
  p.sx = r.grid("x.scale");
  p.ids = r.matrix("ids");
  p.expert_map = r.matrix("expert_map");
  p.starts = r.matrix("out.layout.starts");
  p.counts = r.matrix("out.layout.counts");
  p.alignment = static_cast<int64_t>(r.option("alignment"));
  p.out = r.matrix("out.x");
  p.sout = r.grid("out.x.scale");
  p.inverse = r.matrix("out.inverse");
  p.round_scale_up = r.option("round_scale_up") != 0;
  p.threads = r.threads;
  check_permute("moe_permute", p);
  check_permute_ids("moe_permute", p, experts);
  std::vector<int64_t> starts(static_cast<size_t>(experts)), counts(starts);
  Matrix of_starts, of_counts;
  of_starts.data = reinterpret_cast<char*>(starts.data());
  of_counts.data = reinterpret_cast<char*>(counts.data());
  of_starts.cols = of_counts.cols = experts;
  check_permute_output("moe_permute", p, count_experts(p, of_starts, of_counts),
                       p.casts() ? p.out.dtype : Dtype::other);
  if (!ask) kernel.permute.run(p);
  return nullptr;
}

const char* moe_unpermute(const Request& r, bool ask) {
  const RoutingKernel& kernel = row_named(cpu::backend().routing, r.kernel);
  UnpermuteProblem p;
  p.y = r.matrix("y");
  p.inverse = r.matrix("inverse");
  p.weights = r.matrix("weights");
  p.out = r.matrix("out");
  p.threads = r.threads;
  check_unpermute("moe_unpermute", p);
  check_ids("moe_unpermute", "inverse", p.inverse, p.y.rows);
  check_unpermute_output("moe_unpermute", p);
  if (!ask && p.out.rows && p.out.cols) kernel.unpermute.run(p);
  return nullptr;
}

void serve(const std::string& verb) {
  Request request(std::cin);
  const bool ask = verb == "ask";
  const char* reason = nullptr;
  try {
    reason = request.op == "fp8_gemm_nt"                         ? gemm(request, ask)
             : request.op == "fused_experts"                     ? fused_experts(request, ask)
             : request.op.find("_grouped_") != std::string::npos ? grouped(request, ask)
             : request.op == "moe_gate"                          ? moe_gate(request, ask)
             : request.op == "moe_permute"                       ? moe_permute(request, ask)
             : request.op == "moe_unpermute"                     ? moe_unpermute(request, ask)
                                                                 : cast(request, ask);
  } catch (const std::logic_error& fault) {  // of an emulated instruction, amid a parallel region
    std::cerr << fault.what() << "\n";
    std::abort();
  } catch (const std::exception& error) {
    std::cout << "error " << error.what() << "\n";
    return;
  }
  if (reason) {
    std::cout << "refused " << reason << "\n";
    return;
  }
  std::cout << "done\n";
  if (!ask)
    for (Memory& memory : request.memories) memory.write_back(std::cout);
}

}  // namespace
}  // namespace moekern

int main() {
  const rlimit none{0, 0};
  setrlimit(RLIMIT_CORE, &none);  // a test may want the crash, not its core
  std::ios::sync_with_stdio(false);
  for (std::string verb; std::cin >> verb; std::cout.flush()) verb == "list" ? moekern::list() : moekern::serve(verb);
}
