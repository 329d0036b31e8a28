// The casts to FP8 and back.
#include "bindings/tensors.h"

namespace moekern {
namespace {

constexpr const char *kSiluMul = "silu_mul_cast_to_fp8", *kDequantize = "dequantize";

// (x, out) for a cast to FP8: out is allocated here when it is None.
py::tuple prepare_cast(const std::string& op, py::object x, py::object out, py::handle format, int64_t block_rows,
                       int64_t block_cols, bool gated) {
  const char* name = op.c_str();
  const Dtype dtype = format_argument(name, format);
  const View v = view(name, "x", x);
  check_plain(name, "x", x);
  CastProblem p;
  p.x = v.matrix;
  check(!gated || p.x.cols % 2 == 0, name, ": x has ", p.x.cols, " columns; gate and up halves need an even number");
  const int64_t cols = p.x.cols / (gated ? 2 : 1);
  if (out.is_none()) {
    check<TypeError>(is_float(p.x.dtype), name, ": x has dtype ", name_of(p.x.dtype), "; it is f32, f16 or bf16");
    py::object data = allocate(x, v.device, {p.x.rows, cols}, dtype);
    py::object scale = allocate(x, v.device, {blocks(p.x.rows, block_rows), blocks(cols, block_cols)}, Dtype::f32);
    out = runtime().scaled_tensor(data, scale, py::make_tuple(block_rows, block_cols));
  }
  const Scaled s = scaled(name, "out", out);
  check(s.device == v.device, name, ": out is on another device than x");
  check(s.grid.block_rows == block_rows && s.grid.block_cols == block_cols, name, ": out.block is (", s.grid.block_rows,
        ", ", s.grid.block_cols, "); this cast writes (", block_rows, ", ", block_cols, ")");
  p.q = s.data;
  p.scale = s.grid;
  check(dtype == p.q.dtype || dtype == Dtype::e4m3fn, name, ": format is ", name_of(dtype), ", but out holds ",
        name_of(p.q.dtype));  // the default, e4m3fn, yields to out
  check_cast(name, p, true, gated);
  return py::make_tuple(std::move(x), std::move(out));
}

py::tuple prepare_dequantize(py::object x, py::object out, py::object out_dtype) {
  const Scaled s = scaled(kDequantize, "x", x);
  CastProblem p;
  p.q = s.data;
  p.scale = s.grid;
  if (out.is_none())
    out = allocate(x.attr("data"), s.device, {s.data.rows, s.data.cols},
                   dtype_argument(kDequantize, out_dtype, Dtype::f32));
  p.x = matrix(kDequantize, "out", out, s.device);
  check_plain(kDequantize, "out", out);
  const Dtype wanted = dtype_argument(kDequantize, out_dtype, p.x.dtype);
  check<TypeError>(wanted == p.x.dtype, kDequantize, ": out has dtype ", name_of(p.x.dtype), " but out_dtype is ",
                   name_of(wanted));
  check_cast(kDequantize, p, false, false);
  return py::make_tuple(std::move(x), std::move(out));
}

CastProblem cast_problem(const char* op, py::handle x, py::handle q, int* device) {
  const Scaled s = scaled(op, "out", q);
  CastProblem p;
  p.x = view(op, "x", x).matrix;
  p.q = s.data;
  p.scale = s.grid;
  *device = s.device;
  return p;
}

void run_cast(const Routine<CastProblem>& routine, CastProblem p, int device) {
  if (p.q.rows == 0 || p.q.cols == 0) return;
  p.threads = threads_for(p.q.rows * p.q.cols * 2);
  run_routine(routine, p, device);
}

}  // namespace

void cast_rows(const Backend& backend, KernelRows& rows) {
  for (const CastKernel& k : backend.cast) {
    const py::object needs = names_of(k.needs, backend.features);
    for (const auto& [name, routine] : {std::pair{"per_token_cast_to_fp8", &k.cast},
                                        {"per_block_cast_to_fp8", &k.cast},
                                        {"per_channel_cast_to_fp8", &k.cast},
                                        {kSiluMul, &k.silu_mul_cast}}) {
      const auto run = [op = name, routine = routine](py::handle x, py::handle, bool round_scale_up, py::handle out) {
        int device;
        CastProblem p = cast_problem(op, x, out, &device);
        p.round_scale_up = round_scale_up;
        run_cast(*routine, p, device);
      };
      const auto refuses = [op = name, routine = routine](py::handle x, py::handle, bool, py::handle out) {
        int device;
        return refusal(*routine, cast_problem(op, x, out, &device));
      };
      add_row(rows, name, k.name, needs, *routine, run, refuses);
    }
    const auto run = [&k](py::handle x, py::handle out, py::handle) {
      int device;
      const CastProblem p = cast_problem(kDequantize, out, x, &device);
      run_cast(k.dequantize, p, device);
    };
    const auto refuses = [&k](py::handle x, py::handle out, py::handle) {
      int device;
      return refusal(k.dequantize, cast_problem(kDequantize, out, x, &device));
    };
    add_row(rows, kDequantize, k.name, needs, k.dequantize, run, refuses);
  }
}

void bind_casts(py::module_& m) {
  m.def("prepare_cast", &prepare_cast);
  m.def("prepare_dequantize", &prepare_dequantize);
}

}  // namespace moekern
