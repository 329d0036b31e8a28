// fused_experts, and the table of a layer's experts that it takes.
#include <memory>

#include "bindings/tensors.h"

namespace moekern {
namespace {

constexpr const char* kTable = "ExpertWeights";
constexpr const char* kExperts = "fused_experts";

// Views of the weights of a layer, checked once. Python's ExpertWeights keeps what they point at.
struct ExpertTable {
  static constexpr const char* kName = "moekern.ExpertTable";  // of the capsule that holds it
  std::vector<Expert> experts;
  int device = 0;
};

bool alike(const Projection& a, const Projection& b) {
  return a.weight.dtype == b.weight.dtype && a.scale.values.dtype == b.scale.values.dtype &&
         a.scale.block_rows == b.scale.block_rows && a.scale.block_cols == b.scale.block_cols;
}

// Rows [first, first + count) of each matrix of `weights`, whose name is for errors. What is alike for all
// experts a kernel looks at once.
void add_projections(ExpertTable& table, Projection Expert::* which, const std::string& name, const py::list& weights,
                     const py::object& biases, int64_t first, int64_t count, int64_t inputs) {
  for (size_t e = 0; e < table.experts.size(); ++e) {
    const std::string item = text(name, "[", e, "]");
    const Scaled s = scaled(kTable, item.c_str(), weights[e]);
    check(s.device == table.device, kTable, ": ", item, " is on another device than the first expert");
    Projection& w = table.experts[e].*which;
    w = {s.data, s.grid, {}, first, count};
    if (!biases.is_none()) w.bias = matrix(kTable, (item + ".bias").c_str(), py::list(biases)[e], table.device, 1);
    check_projection(kTable, item.c_str(), w, count, inputs);
    check(alike(w, table.experts[0].*which), kTable, ": ", item, " is ", name_of(w.weight.dtype), " in blocks of (",
          w.scale.block_rows, ", ", w.scale.block_cols, ") with scales in ", name_of(w.scale.values.dtype),
          "; all experts must be as the first");
  }
}

py::capsule expert_table(const std::tuple<std::string, std::string, std::string>& names, const py::list& gate,
                         const py::list& up, const py::list& down, const py::object& gate_bias,
                         const py::object& up_bias, const py::object& down_bias, int64_t up_first, int64_t intermediate,
                         int64_t hidden) {
  auto table = std::make_unique<ExpertTable>();
  table->experts.resize(gate.size());
  table->device = scaled(kTable, std::get<0>(names).c_str(), gate[0]).device;
  add_projections(*table, &Expert::gate, std::get<0>(names), gate, gate_bias, 0, intermediate, hidden);
  add_projections(*table, &Expert::up, std::get<1>(names), up, up_bias, up_first, intermediate, hidden);
  add_projections(*table, &Expert::down, std::get<2>(names), down, down_bias, 0, hidden, intermediate);
  for (const Expert& e : table->experts)
    check(alike(e.gate, e.up), kTable, ": ", std::get<1>(names),
          " must have the format, block and scale dtype of gate");
  return py::capsule(table.release(), ExpertTable::kName, [](PyObject* capsule) {
    delete static_cast<ExpertTable*>(PyCapsule_GetPointer(capsule, ExpertTable::kName));
  });
}

const ExpertTable& table_of(py::handle experts) {
  static const py::object kAttribute = interned("table");
  const py::object held = experts.attr(kAttribute);
  const auto* table = static_cast<const ExpertTable*>(PyCapsule_GetPointer(held.ptr(), ExpertTable::kName));
  if (!table) throw py::error_already_set();
  return *table;
}

// The spec's parameters, in order.
enum Argument {
  kX,
  kWeightsOfExperts,
  kIds,
  kWeights,
  kActivation,
  kAlpha,
  kBeta,
  kLimit,
  kQuantize,
  kOnInput,
  kMap,
  kShared,
  kReduce,
  kOut,
  kOutDtype,
  kWorkspace,
  kArguments
};

Activation activation_named(const std::string& name) {
  return name == "gelu" ? Activation::gelu : name == "gelu_tanh" ? Activation::gelu_tanh : Activation::swiglu;
}

// All but `out`. Kernels get arguments that `prepare_experts` has checked.
ExpertsProblem problem_of(const py::tuple& call, int* device) {
  check(call.size() == kArguments, kExperts, ": ", call.size(), " arguments");
  const ExpertTable& table = table_of(call[kWeightsOfExperts]);
  *device = table.device;
  ExpertsProblem p;
  p.experts = table.experts.data();
  p.num_experts = static_cast<int64_t>(table.experts.size());
  if (is_scaled(call[kX])) {
    const Scaled s = scaled(kExperts, "x", call[kX]);
    check(s.device == table.device, kExperts, ": x is on another device than the experts");
    p.x = s.data;
    p.sx = s.grid;
  } else {
    p.x = matrix(kExperts, "x", call[kX], table.device);
  }
  if (!call[kShared].is_none()) {
    const ExpertTable& shared = table_of(call[kShared]);
    check(shared.device == table.device, kExperts, ": shared is on another device than the experts");
    p.shared = shared.experts.data();
    p.num_shared = static_cast<int64_t>(shared.experts.size());
  }
  p.ids = matrix(kExperts, "ids", call[kIds], table.device);
  p.weights = optional_matrix(kExperts, "weights", call[kWeights], table.device);
  p.gating.activation = activation_named(call[kActivation].cast<std::string>());
  p.gating.alpha = call[kAlpha].cast<float>();
  p.gating.beta = call[kBeta].cast<float>();
  if (!call[kLimit].is_none()) p.gating.limit = call[kLimit].cast<float>();
  p.quantize = call[kQuantize].cast<bool>();
  p.weight_on_input = call[kOnInput].cast<bool>();
  p.reduce = call[kReduce].cast<bool>();
  p.workspace = optional_matrix(kExperts, "workspace", call[kWorkspace], table.device, 1);
  return p;
}

ExpertsProblem problem_with_output(const py::tuple& call, int* device) {
  ExpertsProblem p = problem_of(call, device);
  p.out = matrix(kExperts, "out", call[kOut], *device);
  p.expert_map = optional_matrix(kExperts, "expert_map", call[kMap], *device, 1);
  return p;
}

// ids of all experts as ids of these: map[id], -1 where that expert lives elsewhere.
py::object mapped_ids(const ExpertsProblem& p, py::object ids, const Matrix& m, int device) {
  check_ids(kExperts, "expert_map", m, p.num_experts);
  check_ids(kExperts, "ids", p.ids, m.cols);
  py::object local = allocate(ids, device, {p.ids.rows, p.ids.cols}, Dtype::i32);
  const Matrix out = matrix(kExperts, "ids", local, device);
  for (int64_t i = 0; i < out.rows; ++i)
    for (int64_t j = 0; j < out.cols; ++j) {
      const int64_t id = index_at(p.ids, i, j);
      *reinterpret_cast<int32_t*>(out.at(i, j)) = id < 0 ? -1 : static_cast<int32_t>(index_at(m, 0, id));
    }
  return local;
}

py::tuple prepare_experts(py::args arguments) {
  py::list call(arguments);
  int device;
  ExpertsProblem p = problem_of(py::tuple(arguments), &device);
  if (!is_scaled(call[kX])) check_plain(kExperts, "x", call[kX]);
  check_plain(kExperts, "weights", call[kWeights]);
  check_experts(kExperts, p);
  const Matrix map = optional_matrix(kExperts, "expert_map", call[kMap], device, 1);
  check<TypeError>(!map || is_index(map.dtype), kExperts, ": expert_map has dtype ", name_of(map.dtype),
                   "; it is i32 or i64");
  if (readable(device)) {  // what lies elsewhere, its kernels map
    if (!map) {
      check_ids(kExperts, "ids", p.ids, p.num_experts);
    } else {
      call[kIds] = mapped_ids(p, call[kIds], map, device);
      call[kMap] = py::none();
    }
  }
  const Dtype natural = is_fp8(p.x.dtype) ? Dtype::bf16 : p.x.dtype;
  const bool fresh = call[kOut].is_none();
  if (fresh)
    call[kOut] = allocate(is_scaled(call[kX]) ? py::object(call[kX].attr("data")) : py::object(call[kX]), device,
                          {p.tokens() * (p.reduce ? 1 : p.top_k()), p.hidden()},
                          dtype_argument(kExperts, call[kOutDtype], natural));
  p.out = matrix(kExperts, "out", call[kOut], device);
  check_plain(kExperts, "out", call[kOut]);
  check_experts_output(kExperts, p);
  const Dtype wanted = dtype_argument(kExperts, call[kOutDtype], p.out.dtype);
  check<TypeError>(wanted == p.out.dtype, kExperts, ": out has dtype ", name_of(p.out.dtype), " but out_dtype is ",
                   name_of(wanted));
  call[kOutDtype] = py::none();
  return py::tuple(call);
}

void run_experts(const ExpertsKernel& kernel, const py::tuple& call) {
  int device;
  ExpertsProblem p = problem_with_output(call, &device);
  if (p.out.rows == 0 || p.out.cols == 0) return;
  const int64_t bytes = p.workspace || kernel.needs_workspace ? kernel.workspace_bytes(p) : 0;
  py::object memory;  // queued work may still use it when it is freed: whoever has it next does so behind that
  if (p.workspace) {
    check(p.workspace.cols >= bytes, kExperts, ": workspace has ", p.workspace.cols, " bytes; ", kernel.name, " needs ",
          bytes);
  } else if (bytes) {
    memory = allocate(call[kOut], device, {bytes}, Dtype::u8);
    p.workspace = matrix(kExperts, "workspace", memory, device, 1);
  }
  const auto weights = [&](const Expert& e) { return 3 * e.gate.count * p.hidden(); };
  const int64_t slots = p.tokens() * p.top_k(), hit = std::min(slots, p.num_experts);
  int64_t work = hit * weights(p.experts[0]) * (1 + slots / std::max<int64_t>(4 * hit, 1));
  if (p.num_shared) work += p.num_shared * weights(p.shared[0]) * (1 + p.tokens() / 4);
  p.threads = threads_for(work);
  run_routine(kernel.experts, p, device);
}

}  // namespace

void experts_rows(const Backend& backend, KernelRows& rows) {
  for (const ExpertsKernel& k : backend.experts) {
    const auto workspace = [&k](py::args call) {
      int device;
      return k.workspace_bytes(problem_with_output(call, &device));
    };
    add_row(
        rows, kExperts, k.name, names_of(k.needs, backend.features), k.experts,
        [&k](py::args call) { run_experts(k, call); },
        [&k](py::args call) {
          int device;
          return refusal(k.experts, problem_with_output(call, &device));
        },
        k.workspace_bytes ? py::object(py::cpp_function(workspace)) : py::object(py::none()));
  }
}

void bind_experts(py::module_& m) {
  m.def("expert_table", &expert_table);
  m.def("prepare_experts", &prepare_experts);
}

}  // namespace moekern
