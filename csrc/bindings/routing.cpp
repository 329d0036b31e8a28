// The gate, permute and unpermute: called from python/moekern/op.py, calls the rows of backends/<device>/registry.cpp.
#include "moekern/routing.h"
#include "bindings/tensors.h"

namespace moekern {
namespace {

constexpr const char *kGate = "moe_gate", *kPermute = "moe_permute", *kUnpermute = "moe_unpermute";

// ---- gate --------------------------------------------------------------------------------------------

GateProblem gate_problem(py::handle logits, int64_t topk, bool sigmoid, py::handle correction_bias, int64_t groups,
                         int64_t kept_groups, int* device) {
  const View v = view(kGate, "logits", logits);
  *device = v.device;
  GateProblem p;
  p.logits = v.matrix;
  p.correction_bias = optional_matrix(kGate, "correction_bias", correction_bias, v.device, 1);
  p.topk = static_cast<int>(topk);
  p.groups = static_cast<int>(groups);
  p.kept_groups = static_cast<int>(kept_groups);
  p.sigmoid = sigmoid;
  return p;
}

// (weights, ids): those of `out`, a pair, or new ones where it is None.
py::tuple prepare_gate(py::handle logits, int64_t topk, bool sigmoid, py::handle correction_bias, int64_t groups,
                       int64_t kept_groups, float routed_scaling_factor, float mask_value, py::object out) {
  int device;
  GateProblem p = gate_problem(logits, topk, sigmoid, correction_bias, groups, kept_groups, &device);
  check_plain(kGate, "logits", logits);
  check_plain(kGate, "correction_bias", correction_bias);
  p.routed_scaling_factor = routed_scaling_factor;
  p.mask_value = mask_value;
  check_gate(kGate, p);
  if (out.is_none())
    return py::make_tuple(allocate(logits, device, {p.logits.rows, topk}, Dtype::f32),
                          allocate(logits, device, {p.logits.rows, topk}, Dtype::i32));
  const py::tuple pair = out;
  p.weights = matrix(kGate, "out.weights", pair[0], device);
  check_plain(kGate, "out.weights", pair[0]);
  p.ids = matrix(kGate, "out.ids", pair[1], device);
  check_gate_output(kGate, p);
  return pair;
}

// A row's scores and selection take about as long as decoding 16 weights an expert.
constexpr int64_t kGateWork = 16;

// The parameters of `moe_gate`, in order, to where a problem has them.
struct GateCall {
  GateProblem problem;
  int device;

  GateCall(py::handle logits, int64_t topk, const std::string& scoring, py::handle correction_bias, int64_t groups,
           int64_t kept_groups, bool renormalize, float routed_scaling_factor, float mask_value, const py::tuple& out)
      : problem(gate_problem(logits, topk, scoring == "sigmoid", correction_bias, groups, kept_groups, &device)) {
    problem.renormalize = renormalize;
    problem.routed_scaling_factor = routed_scaling_factor;
    problem.mask_value = mask_value;
    problem.weights = view(kGate, "out.weights", out[0]).matrix;
    problem.ids = view(kGate, "out.ids", out[1]).matrix;
  }
};

void run_gate(const RoutingKernel& kernel, GateCall call) {
  GateProblem& p = call.problem;
  if (p.logits.rows == 0) return;
  p.threads = threads_for(p.logits.rows * p.logits.cols * kGateWork);
  run_routine(kernel.gate, p, call.device);
}

// ---- permute -----------------------------------------------------------------------------------------

void read_rows(const char* name, py::handle object, Matrix* data, ScaleGrid* grid, int* device) {
  if (is_scaled(object)) {
    const Scaled s = scaled(kPermute, name, object);
    *data = s.data;
    *grid = s.grid;
    *device = s.device;
  } else {
    const View v = view(kPermute, name, object);
    *data = v.matrix;
    *device = v.device;
  }
}

PermuteProblem permute_problem(py::handle x, py::handle ids, py::handle expert_map, int64_t alignment, int* device) {
  PermuteProblem p;
  read_rows("x", x, &p.x, &p.sx, device);
  p.ids = matrix(kPermute, "ids", ids, *device);
  p.expert_map = optional_matrix(kPermute, "expert_map", expert_map, *device, 1);
  p.alignment = alignment;
  return p;
}

// (x, inverse, starts, counts). x and inverse are those of `out`, a Permuted; where it is None, new ones, x of `rows`,
// the most that any ids take. starts and counts are complete, but on an accelerator left to the kernel.
py::tuple prepare_permute(py::handle x, py::handle ids, int64_t experts, int64_t alignment, py::handle expert_map,
                          py::handle format, int64_t rows, py::object out) {
  int device;
  PermuteProblem p = permute_problem(x, ids, expert_map, alignment, &device);
  if (!is_scaled(x)) check_plain(kPermute, "x", x);
  check_permute(kPermute, p);
  const Dtype cast = format.is_none() ? Dtype::other : format_argument(kPermute, format);
  check<TypeError>(cast == Dtype::other || !p.sx.values, kPermute, ": format is ", name_of(cast), ", but x is ",
                   name_of(p.x.dtype), " already; only float rows are cast");
  py::object starts = allocate(ids, device, {experts}, Dtype::i64);
  py::object counts = allocate(ids, device, {experts}, Dtype::i64);
  int64_t used = 0;
  if (readable(device)) {
    check_permute_ids(kPermute, p, experts);
    used =
        count_experts(p, matrix(kPermute, "starts", starts, device, 1), matrix(kPermute, "counts", counts, device, 1));
  }
  if (out.is_none()) {
    check(rows <= INT32_MAX, kPermute, ": ids and alignment take ", rows, " rows; the inverse map counts to 2^31 - 1");
    const py::object like = is_scaled(x) ? x.attr("data") : py::reinterpret_borrow<py::object>(x);
    py::object moved = allocate(like, device, {rows, p.x.cols}, cast == Dtype::other ? p.x.dtype : cast);
    if (is_scaled(x))
      moved = runtime().scaled_tensor(moved, allocate(like, device, {rows, p.sx.values.cols}, p.sx.values.dtype),
                                      x.attr("block"));
    else if (cast != Dtype::other)
      moved =
          runtime().scaled_tensor(moved, allocate(like, device, {rows, blocks(p.x.cols, p.kCastColumns)}, Dtype::f32),
                                  py::make_tuple(1, p.kCastColumns));
    py::object inverse = allocate(ids, device, {p.ids.rows, p.ids.cols}, Dtype::i32);
    return py::make_tuple(std::move(moved), std::move(inverse), std::move(starts), std::move(counts));
  }
  const py::tuple permuted = out;
  py::object moved = permuted[0], inverse = permuted[2];
  int out_device;
  read_rows("out.x", moved, &p.out, &p.sout, &out_device);
  check(out_device == device, kPermute, ": out.x is on another device than x");
  if (!is_scaled(moved)) check_plain(kPermute, "out.x", moved);
  p.inverse = matrix(kPermute, "out.inverse", inverse, device);
  check(readable(device) || p.out.rows >= rows, kPermute, ": out.x has ", p.out.rows,
        " rows; on an accelerator it needs ", rows, ", enough for any ids");
  check_permute_output(kPermute, p, used, cast);
  return py::make_tuple(std::move(moved), std::move(inverse), std::move(starts), std::move(counts));
}

// The parameters of `moe_permute`, in order, to where a problem has them.
struct PermuteCall {
  PermuteProblem problem;
  int device;

  PermuteCall(py::handle x, py::handle ids, int64_t, int64_t alignment, py::handle expert_map, py::handle,
              bool round_scale_up, const py::tuple& out)
      : problem(permute_problem(x, ids, expert_map, alignment, &device)) {
    static const py::object kStarts = interned("starts"), kCounts = interned("counts");
    const py::object layout = out[1];
    read_rows("out.x", out[0], &problem.out, &problem.sout, &device);
    problem.inverse = view(kPermute, "out.inverse", out[2]).matrix;
    problem.starts = view(kPermute, "starts", layout.attr(kStarts), 1).matrix;
    problem.counts = view(kPermute, "counts", layout.attr(kCounts), 1).matrix;
    problem.round_scale_up = round_scale_up;
  }
};

void run_permute(const RoutingKernel& kernel, PermuteCall call) {
  PermuteProblem& p = call.problem;
  p.threads = threads_for(p.ids.rows * p.ids.cols * p.x.cols * size_of(p.x.dtype));
  run_routine(kernel.permute, p, call.device);
}

// ---- unpermute ---------------------------------------------------------------------------------------

UnpermuteProblem unpermute_problem(py::handle y, py::handle inverse, py::handle weights, int* device) {
  const View v = view(kUnpermute, "y", y);
  *device = v.device;
  UnpermuteProblem p;
  p.y = v.matrix;
  p.inverse = matrix(kUnpermute, "inverse", inverse, v.device);
  p.weights = optional_matrix(kUnpermute, "weights", weights, v.device);
  return p;
}

py::object prepare_unpermute(py::handle y, py::handle inverse, py::handle weights, py::object out,
                             py::handle out_dtype) {
  int device;
  UnpermuteProblem p = unpermute_problem(y, inverse, weights, &device);
  check_plain(kUnpermute, "y", y);
  check_plain(kUnpermute, "weights", weights);
  check_unpermute(kUnpermute, p);
  if (readable(device)) check_ids(kUnpermute, "inverse", p.inverse, p.y.rows);
  if (out.is_none())
    return allocate(y, device, {p.inverse.rows, p.y.cols}, dtype_argument(kUnpermute, out_dtype, p.y.dtype));
  p.out = matrix(kUnpermute, "out", out, device);
  check_plain(kUnpermute, "out", out);
  check_unpermute_output(kUnpermute, p);
  const Dtype wanted = dtype_argument(kUnpermute, out_dtype, p.out.dtype);
  check<TypeError>(wanted == p.out.dtype, kUnpermute, ": out has dtype ", name_of(p.out.dtype), " but out_dtype is ",
                   name_of(wanted));
  return out;
}

UnpermuteProblem unpermute_problem(py::handle y, py::handle inverse, py::handle weights, py::handle out, int* device) {
  UnpermuteProblem p = unpermute_problem(y, inverse, weights, device);
  p.out = view(kUnpermute, "out", out).matrix;
  return p;
}

void run_unpermute(const RoutingKernel& kernel, py::handle y, py::handle inverse, py::handle weights, py::handle out) {
  int device;
  UnpermuteProblem p = unpermute_problem(y, inverse, weights, out, &device);
  if (p.out.rows == 0 || p.out.cols == 0) return;
  p.threads = threads_for(p.out.rows * p.out.cols * (p.inverse.cols * size_of(p.y.dtype) + 4));
  run_routine(kernel.unpermute, p, device);
}

}  // namespace

void routing_rows(const Backend& backend, KernelRows& rows) {
  for (const RoutingKernel& k : backend.routing) {
    const py::object needs = names_of(k.needs, backend.features);
    add_row(
        rows, kGate, k.name, needs, k.gate,
        [&k](py::handle logits, int64_t topk, const std::string& scoring, py::handle bias, int64_t groups,
             int64_t kept_groups, bool renormalize, float routed_scaling_factor, float mask_value,
             const py::tuple& out) {
          run_gate(k, GateCall(logits, topk, scoring, bias, groups, kept_groups, renormalize, routed_scaling_factor,
                               mask_value, out));
        },
        [&k](py::handle logits, int64_t topk, const std::string& scoring, py::handle bias, int64_t groups,
             int64_t kept_groups, bool renormalize, float routed_scaling_factor, float mask_value,
             const py::tuple& out) {
          const GateCall call(logits, topk, scoring, bias, groups, kept_groups, renormalize, routed_scaling_factor,
                              mask_value, out);
          return refusal(k.gate, call.problem);
        });
    add_row(
        rows, kPermute, k.name, needs, k.permute,
        [&k](py::handle x, py::handle ids, int64_t experts, int64_t alignment, py::handle expert_map, py::handle format,
             bool round_scale_up, const py::tuple& out) {
          run_permute(k, PermuteCall(x, ids, experts, alignment, expert_map, format, round_scale_up, out));
        },
        [&k](py::handle x, py::handle ids, int64_t experts, int64_t alignment, py::handle expert_map, py::handle format,
             bool round_scale_up, const py::tuple& out) {
          const PermuteCall call(x, ids, experts, alignment, expert_map, format, round_scale_up, out);
          return refusal(k.permute, call.problem);
        });
    add_row(
        rows, kUnpermute, k.name, needs, k.unpermute,
        [&k](py::handle y, py::handle inverse, py::handle weights, py::handle out, py::handle) {
          run_unpermute(k, y, inverse, weights, out);
        },
        [&k](py::handle y, py::handle inverse, py::handle weights, py::handle out, py::handle) {
          int device;
          return refusal(k.unpermute, unpermute_problem(y, inverse, weights, out, &device));
        });
  }
}

void bind_routing(py::module_& m) {
  m.def("prepare_gate", &prepare_gate);
  m.def("prepare_permute", &prepare_permute);
  m.def("prepare_unpermute", &prepare_unpermute);
}

}  // namespace moekern
