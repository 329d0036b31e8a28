// fp8_gemm_nt: called from python/moekern/op.py, calls the rows of backends/<device>/registry.cpp.
#include <array>

#include "bindings/tensors.h"

namespace moekern {
namespace {

constexpr const char* kGemm = "fp8_gemm_nt";

// All but `out`. Kernels get arguments that `prepare_gemm` has checked.
GemmProblem gemm_problem(py::handle a, py::handle b, py::handle c, py::handle bias, int* device) {
  GemmProblem p;
  const Scaled weights = scaled(kGemm, "b", b);
  p.b = weights.data;
  p.sb = weights.grid;
  *device = weights.device;
  if (is_scaled(a)) {
    const Scaled s = scaled(kGemm, "a", a);
    check(s.device == weights.device, kGemm, ": a is on another device than b");
    p.a = s.data;
    p.sa = s.grid;
  } else {
    p.a = matrix(kGemm, "a", a, weights.device);
  }
  p.c = optional_matrix(kGemm, "c", c, weights.device);
  p.bias = optional_matrix(kGemm, "bias", bias, weights.device, 1);
  return p;
}

// What prepare_gemm has just read, for the `refuses` and `run` that op.py calls next with the same
// objects: reading five tensors again would cost as much as a small product. `run` takes it away, so
// it never outlives its call.
struct Prepared {
  std::array<PyObject*, 5> operands{};
  GemmProblem problem;
  int device = 0;
};
thread_local Prepared prepared;

GemmProblem problem_of(py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out, int* device) {
  if (prepared.operands == std::array<PyObject*, 5>{a.ptr(), b.ptr(), c.ptr(), bias.ptr(), out.ptr()}) {
    *device = prepared.device;
    return prepared.problem;
  }
  GemmProblem p = gemm_problem(a, b, c, bias, device);
  p.out = matrix(kGemm, "out", out, *device);
  return p;
}

py::tuple prepare_gemm(py::object a, py::object b, py::object c, py::object bias, py::object out,
                       py::object out_dtype) {
  int device;
  GemmProblem p = gemm_problem(a, b, c, bias, &device);
  if (!is_scaled(a)) check_plain(kGemm, "a", a);
  check_plain(kGemm, "c", c);
  check_plain(kGemm, "bias", bias);
  check<TypeError>(!is_fp8(p.a.dtype) || p.sa.values, kGemm, ": a has dtype ", name_of(p.a.dtype),
                   " but no scale; pass a ScaledTensor or a (data, scale) pair");
  check_gemm(kGemm, p);
  const Dtype natural = is_fp8(p.a.dtype) ? Dtype::bf16 : p.a.dtype;
  const bool fresh = out.is_none();
  if (fresh)
    out = allocate(is_scaled(a) ? py::object(a.attr("data")) : a, device, {p.m(), p.n()},
                   dtype_argument(kGemm, out_dtype, natural));
  p.out = matrix(kGemm, "out", out, device);
  if (!fresh) {
    check_plain(kGemm, "out", out);
    check_gemm_output(kGemm, p);
    const Dtype wanted = dtype_argument(kGemm, out_dtype, p.out.dtype);
    check<TypeError>(wanted == p.out.dtype, kGemm, ": out has dtype ", name_of(p.out.dtype), " but out_dtype is ",
                     name_of(wanted));
  }
  prepared = {{a.ptr(), b.ptr(), c.ptr(), bias.ptr(), out.ptr()}, p, device};
  return py::make_tuple(std::move(a), std::move(b), std::move(c), std::move(bias), std::move(out), py::none());
}

void run_gemm(const GemmKernel& kernel, py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out) {
  int device;
  GemmProblem p = problem_of(a, b, c, bias, out, &device);
  prepared.operands = {};
  if (p.m() == 0 || p.n() == 0) return;
  p.threads = threads_for(p.n() * std::max<int64_t>(p.k(), 1) * (1 + p.m() / 4));
  run_routine(kernel.gemm, p, device);
}

py::object refuse_gemm(const GemmKernel& kernel, py::handle a, py::handle b, py::handle c, py::handle bias,
                       py::handle out) {
  int device;
  return refusal(kernel.gemm, problem_of(a, b, c, bias, out, &device));
}

}  // namespace

void gemm_rows(const Backend& backend, KernelRows& rows) {
  for (const GemmKernel& k : backend.gemm) {
    add_row(
        rows, kGemm, k.name, names_of(k.needs, backend.features), k.gemm,
        [&k](py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out, py::handle) {
          run_gemm(k, a, b, c, bias, out);
        },
        [&k](py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out, py::handle) {
          return refuse_gemm(k, a, b, c, bias, out);
        });
  }
}

void bind_gemm(py::module_& m) { m.def("prepare_gemm", &prepare_gemm); }

}  // namespace moekern
