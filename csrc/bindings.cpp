// moekern._C: Python objects in, views and kernel rows out. The only file that knows pybind11.
//
// Called from python/moekern/op.py; calls into backends/<device>/registry.cpp's rows. Tensors are
// read, and outputs allocated, through torch's DLPack exchange table: about 0.1 us a tensor, and no
// link against libtorch, so one build serves every torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "moekern/arguments.h"
#include "moekern/dlpack.h"

namespace py = pybind11;

namespace moekern {

#define MOEKERN_BACKEND(NAME) \
  namespace NAME {            \
  const Backend& backend();   \
  }
#include "moekern/backends.inc"
#undef MOEKERN_BACKEND

namespace {

py::object interned(const char* name) { return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name)); }

// ---- tensors -------------------------------------------------------------------------------------

Dtype dtype_of(dlpack::DataType t) {
  if (t.lanes != 1) return Dtype::other;
  switch (t.code) {
    case dlpack::kFloat: return t.bits == 32 ? Dtype::f32 : t.bits == 16 ? Dtype::f16 : Dtype::other;
    case dlpack::kBfloat: return t.bits == 16 ? Dtype::bf16 : Dtype::other;
    case dlpack::kE4m3fn: return Dtype::e4m3fn;
    case dlpack::kE4m3fnuz: return Dtype::e4m3fnuz;
    case dlpack::kE5m2: return Dtype::e5m2;
    case dlpack::kE8m0fnu: return Dtype::ue8m0;
    default: return Dtype::other;
  }
}

dlpack::DataType dlpack_type(Dtype t) {
  switch (t) {
    case Dtype::f16: return {dlpack::kFloat, 16, 1};
    case Dtype::bf16: return {dlpack::kBfloat, 16, 1};
    case Dtype::e4m3fn: return {dlpack::kE4m3fn, 8, 1};
    case Dtype::e4m3fnuz: return {dlpack::kE4m3fnuz, 8, 1};
    case Dtype::e5m2: return {dlpack::kE5m2, 8, 1};
    default: return {dlpack::kFloat, 32, 1};
  }
}

// What Python hands over once, at import: classes and functions that C++ cannot name by itself.
struct Runtime {
  py::object scaled_tensor;  // the class moekern.ScaledTensor
  py::object tensor;         // the class torch.Tensor
  py::object num_threads;    // () -> int
  py::object read;           // (tensor) -> (pointer, shape, strides, format name, device type), without the table
  py::object allocate;       // (like, shape, format name) -> tensor, without the table
  py::dict dtypes;           // torch.dtype -> format name
  const dlpack::ExchangeApi* exchange = nullptr;
};

Runtime& runtime() {
  static Runtime* instance = new Runtime;  // leaked: Python may be gone when statics are destroyed
  return *instance;
}

Dtype dtype_named(const std::string& name) {
  for (Dtype t : {Dtype::f32, Dtype::f16, Dtype::bf16, Dtype::e4m3fn, Dtype::e4m3fnuz, Dtype::e5m2, Dtype::ue8m0})
    if (name == name_of(t)) return t;
  return Dtype::other;
}

std::string attribute(py::handle object, const char* name) { return py::str(object.attr(name)).cast<std::string>(); }

// What torch says of a tensor that cannot be read: on the meta device, sparse, without storage.
[[noreturn]] void unreadable(const char* op, const char* name, py::handle object, const std::string& why) {
  throw ValueError(text(op, ": ", name, " cannot be read (device ", attribute(object, "device"), ", layout ",
                        attribute(object, "layout"), "): ", why.substr(0, why.find('\n'))));
}

struct View {
  Matrix matrix;
  int device = 0;  // DLPack's device type, and its index in the upper half
};

// A tensor of `dimensions`: 2, or 1, which becomes one row.
View view(const char* op, const char* name, py::handle object, int dimensions = 2) {
  const Runtime& r = runtime();
  const bool exact = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == r.tensor.ptr();
  check<TypeError>(exact || PyObject_IsInstance(object.ptr(), r.tensor.ptr()) == 1, op, ": ", name, " is a ",
                   Py_TYPE(object.ptr())->tp_name, "; it must be a tensor");
  View v;
  int64_t shape[2] = {1, 1}, strides[2] = {0, 0};
  int ndim;
  if (r.exchange) {
    dlpack::Tensor t;
    if (r.exchange->view_of_object(object.ptr(), &t)) unreadable(op, name, object, py::error_already_set().what());
    ndim = t.ndim;
    check(ndim == dimensions, op, ": ", name, " has ", ndim, " dimensions; it must have ", dimensions);
    for (int d = 0; d < ndim; ++d) {
      shape[2 - ndim + d] = t.shape[d];
      strides[2 - ndim + d] = t.strides ? t.strides[d] : d + 1 == ndim ? 1 : t.shape[1];
    }
    v.matrix.data = static_cast<char*>(t.data) + t.byte_offset;
    v.matrix.dtype = dtype_of(t.dtype);
    v.device = t.device.type | t.device.id << 16;
  } else {
    const auto fields =
        r.read(object).cast<std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, std::string, int>>();
    ndim = static_cast<int>(std::get<1>(fields).size());
    check(ndim == dimensions, op, ": ", name, " has ", ndim, " dimensions; it must have ", dimensions);
    for (int d = 0; d < ndim; ++d) {
      shape[2 - ndim + d] = std::get<1>(fields)[d];
      strides[2 - ndim + d] = std::get<2>(fields)[d];
    }
    v.matrix.data = reinterpret_cast<char*>(std::get<0>(fields));
    v.matrix.dtype = dtype_named(std::get<3>(fields));
    v.device = std::get<4>(fields);
  }
  v.matrix.rows = shape[0];
  v.matrix.cols = shape[1];
  v.matrix.row_stride = strides[0];
  v.matrix.col_stride = shape[1] == 1 ? 1 : strides[1];
  if (v.matrix.dtype == Dtype::other)
    throw TypeError(text(op, ": ", name, " has dtype ", attribute(object, "dtype"), ", which no operand may have"));
  static char nothing;  // an empty tensor has no address, but it is there
  if (!v.matrix.data) {
    if (shape[0] && shape[1]) unreadable(op, name, object, "its storage is empty");
    v.matrix.data = &nothing;
  }
  return v;
}

Matrix matrix(const char* op, const char* name, py::handle object, int device, int dimensions = 2) {
  const View v = view(op, name, object, dimensions);
  check(v.device == device, op, ": ", name, " is on another device than the other operands");
  return v.matrix;
}

Matrix optional_matrix(const char* op, const char* name, py::handle object, int device, int dimensions = 2) {
  return object.is_none() ? Matrix{} : matrix(op, name, object, device, dimensions);
}

// DLPack does not carry the bit that says "negate on reading" (the imaginary part of a conjugate has it).
void check_plain(const char* op, const char* name, py::handle tensor) {
  static const py::object kIsNegated = interned("is_neg");
  if (tensor.is_none()) return;
  check(!tensor.attr(kIsNegated)().cast<bool>(), op, ": ", name, " is a negated view; pass ", name, ".resolve_neg()");
}

void set_dlpack_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

py::object allocate(py::handle like, int device, int64_t rows, int64_t cols, Dtype dtype) {
  const Runtime& r = runtime();
  if (!r.exchange) return r.allocate(like, py::make_tuple(rows, cols), name_of(dtype));
  int64_t shape[2] = {rows, cols};
  dlpack::Tensor prototype{
      nullptr, {static_cast<dlpack::DeviceType>(device & 0xffff), device >> 16}, 2, dlpack_type(dtype), shape, nullptr,
      0};
  dlpack::ManagedTensor* tensor = nullptr;
  if (r.exchange->allocate(&prototype, &tensor, nullptr, set_dlpack_error)) throw py::error_already_set();
  void* object = nullptr;
  if (r.exchange->to_object(tensor, &object)) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

struct Scaled {
  Matrix data;
  ScaleGrid grid;
  int device;
};

bool is_scaled(py::handle object) {
  return Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(runtime().scaled_tensor.ptr());
}

Scaled scaled(const char* op, const char* name, py::handle object) {
  static const py::object kData = interned("data"), kScale = interned("scale"), kBlock = interned("block");
  check<TypeError>(is_scaled(object), op, ": ", name, " is a ", Py_TYPE(object.ptr())->tp_name,
                   "; it must be a ScaledTensor or a (data, scale) pair");
  const View data = view(op, name, object.attr(kData));
  Scaled s{data.matrix, {}, data.device};
  s.grid.values = matrix(op, name, object.attr(kScale), data.device);
  const py::tuple block = object.attr(kBlock);
  s.grid.block_rows = block[0].cast<int64_t>();
  s.grid.block_cols = block[1].cast<int64_t>();
  return s;
}

Dtype dtype_argument(const char* op, py::handle dtype, Dtype otherwise) {
  if (dtype.is_none()) return otherwise;
  PyObject* name = PyDict_GetItem(runtime().dtypes.ptr(), dtype.ptr());
  const Dtype found = name ? dtype_named(py::handle(name).cast<std::string>()) : Dtype::other;
  check<TypeError>(is_float(found), op, ": out_dtype is ", py::str(dtype).cast<std::string>(),
                   "; it is torch.float32, torch.float16 or torch.bfloat16");
  return found;
}

int num_threads() { return runtime().num_threads().cast<int>(); }

// ---- fp8_gemm_nt ---------------------------------------------------------------------------------

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
};
thread_local Prepared prepared;

GemmProblem problem_of(py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out) {
  if (prepared.operands == std::array<PyObject*, 5>{a.ptr(), b.ptr(), c.ptr(), bias.ptr(), out.ptr()})
    return prepared.problem;
  int device;
  GemmProblem p = gemm_problem(a, b, c, bias, &device);
  p.out = matrix(kGemm, "out", out, device);
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
    out = allocate(is_scaled(a) ? py::object(a.attr("data")) : a, device, p.m(), p.n(),
                   dtype_argument(kGemm, out_dtype, natural));
  p.out = matrix(kGemm, "out", out, device);
  if (!fresh) {
    check_plain(kGemm, "out", out);
    check_gemm_output(kGemm, p);
    const Dtype wanted = dtype_argument(kGemm, out_dtype, p.out.dtype);
    check<TypeError>(wanted == p.out.dtype, kGemm, ": out has dtype ", name_of(p.out.dtype), " but out_dtype is ",
                     name_of(wanted));
  }
  prepared = {{a.ptr(), b.ptr(), c.ptr(), bias.ptr(), out.ptr()}, p};
  return py::make_tuple(std::move(a), std::move(b), std::move(c), std::move(bias), std::move(out), py::none());
}

// Waking a second thread takes some microseconds: as long as decoding this many weights.
constexpr int64_t kWorkWorthAThread = 1 << 18;

int threads_for(int64_t work) {
  const int available = num_threads();
  if (work < 2 * kWorkWorthAThread) return 1;
  return static_cast<int>(std::min<int64_t>(available, work / kWorkWorthAThread));
}

void run_gemm(const GemmKernel& kernel, py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out) {
  GemmProblem p = problem_of(a, b, c, bias, out);
  prepared.operands = {};
  if (p.m() == 0 || p.n() == 0) return;
  p.threads = threads_for(p.n() * std::max<int64_t>(p.k(), 1) * (1 + p.m() / 4));
  py::gil_scoped_release release;
  kernel.run(p);
}

py::object refuse_gemm(const GemmKernel& kernel, py::handle a, py::handle b, py::handle c, py::handle bias,
                       py::handle out) {
  const char* reason = kernel.refuses(problem_of(a, b, c, bias, out));
  return reason ? py::object(py::str(reason)) : py::object(py::none());
}

// ---- casts ---------------------------------------------------------------------------------------

// (x, out) for a cast to FP8: out is allocated here when it is None.
py::tuple prepare_cast(const std::string& op, py::object x, py::object out, py::object format, int64_t block_rows,
                       int64_t block_cols, bool gated) {
  const char* name = op.c_str();
  const std::string format_name = py::str(format);
  const Dtype dtype = dtype_named(format_name);
  check<TypeError>(py::isinstance<py::str>(format), name, ": format is a ", Py_TYPE(format.ptr())->tp_name,
                   "; it is the name of one, such as \"e4m3fn\"");
  check(is_fp8(dtype), name, ": format is \"", format_name, "\"; it is \"e4m3fn\", \"e4m3fnuz\" or \"e5m2\"");
  const View v = view(name, "x", x);
  check_plain(name, "x", x);
  CastProblem p;
  p.x = v.matrix;
  check(!gated || p.x.cols % 2 == 0, name, ": x has ", p.x.cols, " columns; gate and up halves need an even number");
  const int64_t cols = p.x.cols / (gated ? 2 : 1);
  if (out.is_none()) {
    check<TypeError>(is_float(p.x.dtype), name, ": x has dtype ", name_of(p.x.dtype), "; it is f32, f16 or bf16");
    py::object data = allocate(x, v.device, p.x.rows, cols, dtype);
    py::object scale = allocate(x, v.device, blocks(p.x.rows, block_rows), blocks(cols, block_cols), Dtype::f32);
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
  constexpr const char* kName = "dequantize";
  const Scaled s = scaled(kName, "x", x);
  CastProblem p;
  p.q = s.data;
  p.scale = s.grid;
  if (out.is_none())
    out = allocate(x.attr("data"), s.device, s.data.rows, s.data.cols, dtype_argument(kName, out_dtype, Dtype::f32));
  p.x = matrix(kName, "out", out, s.device);
  check_plain(kName, "out", out);
  const Dtype wanted = dtype_argument(kName, out_dtype, p.x.dtype);
  check<TypeError>(wanted == p.x.dtype, kName, ": out has dtype ", name_of(p.x.dtype), " but out_dtype is ",
                   name_of(wanted));
  check_cast(kName, p, false, false);
  return py::make_tuple(std::move(x), std::move(out));
}

void run_cast(void (*run)(const CastProblem&), const char* op, py::handle x, py::handle q, bool round_scale_up) {
  const Scaled s = scaled(op, "out", q);
  CastProblem p;
  p.x = view(op, "x", x).matrix;
  p.q = s.data;
  p.scale = s.grid;
  p.round_scale_up = round_scale_up;
  if (p.q.rows == 0 || p.q.cols == 0) return;
  p.threads = threads_for(p.q.rows * p.q.cols * 2);
  py::gil_scoped_release release;
  run(p);
}

void run_dequantize(void (*run)(const CastProblem&), py::handle x, py::handle out) {
  const Scaled s = scaled("dequantize", "x", x);
  CastProblem p;
  p.x = view("dequantize", "out", out).matrix;
  p.q = s.data;
  p.scale = s.grid;
  if (p.q.rows == 0 || p.q.cols == 0) return;
  p.threads = threads_for(p.q.rows * p.q.cols * 2);
  py::gil_scoped_release release;
  run(p);
}

// ---- limits ----------------------------------------------------------------------------------------

// The bytes of a contiguous tensor, for the loops that only move them.
struct Bytes {
  char* data;
  int64_t count;
};

Bytes bytes_of(const char* name, py::handle object) {
  const Matrix m = view("limits", name, object).matrix;
  const int64_t count = m.rows * m.cols * size_of(m.dtype);
  check(m.col_stride == 1 && (m.rows == 1 || m.row_stride == m.cols), "limits: ", name, " must be contiguous");
  check(count % kLimitGranule == 0 && reinterpret_cast<uintptr_t>(m.data) % 64 == 0, "limits: ", name,
        " must be a multiple of ", kLimitGranule, " bytes, 64-byte aligned");
  return {m.data, count};
}

int64_t run_multiply_add(const LimitLoops& limits) {
  const int threads = num_threads();
  py::gil_scoped_release release;
  return limits.multiply_add(threads);
}

void run_read(const LimitLoops& limits, int loop, py::handle x) {
  const Bytes src = bytes_of("x", x);
  const int threads = num_threads();
  py::gil_scoped_release release;
  limits.read(loop, src.data, src.count, threads);
}

void run_copy(const LimitLoops& limits, py::handle x, py::handle out) {
  const Bytes src = bytes_of("x", x), dst = bytes_of("out", out);
  check(src.count == dst.count, "limits: out must have as many bytes as x");
  const int threads = num_threads();
  py::gil_scoped_release release;
  limits.copy(src.data, src.count, dst.data, threads);
}

// ---- rows ----------------------------------------------------------------------------------------

py::frozenset names_of(uint64_t bits, const Table<Feature>& features) {
  py::set names;
  for (const Feature& f : features)
    if (bits & f.bit) names.add(f.name);
  return py::frozenset(names);
}

// {"features": (), "thread_team": (), "fp8_gemm_nt": [(name, needs, run, refuses)],
//  "cast": [(name, needs, cast, silu_mul_cast, dequantize)],
//  "limits": [(name, needs, multiply_add() -> flops, [read(x)], copy(x, out))]}
py::dict rows_of(const Backend& backend) {
  py::list gemm, cast, limits;
  for (const GemmKernel& k : backend.gemm) {
    py::cpp_function run([&k](py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out, py::handle) {
      run_gemm(k, a, b, c, bias, out);
    });
    py::cpp_function refuses([&k](py::handle a, py::handle b, py::handle c, py::handle bias, py::handle out,
                                  py::handle) { return refuse_gemm(k, a, b, c, bias, out); });
    gemm.append(py::make_tuple(k.name, names_of(k.needs, backend.features), run, refuses));
  }
  for (const CastKernel& k : backend.cast) {
    const auto bind = [](void (*run)(const CastProblem&), const char* op) {
      return py::cpp_function(
          [run, op](py::handle x, py::handle q, bool round_scale_up) { run_cast(run, op, x, q, round_scale_up); });
    };
    cast.append(py::make_tuple(
        k.name, names_of(k.needs, backend.features), bind(k.cast, "cast_to_fp8"),
        bind(k.silu_mul_cast, "silu_mul_cast_to_fp8"),
        py::cpp_function([run = k.dequantize](py::handle x, py::handle out) { run_dequantize(run, x, out); })));
  }
  for (const LimitLoops& l : backend.limits) {
    py::list reads;
    for (int i = 0; i < kReadLoops; ++i) reads.append(py::cpp_function([&l, i](py::handle x) { run_read(l, i, x); }));
    limits.append(py::make_tuple(l.name, names_of(l.needs, backend.features),
                                 py::cpp_function([&l] { return run_multiply_add(l); }), reads,
                                 py::cpp_function([&l](py::handle x, py::handle out) { run_copy(l, x, out); })));
  }
  py::dict rows;
  rows["features"] = py::cpp_function([&backend] { return names_of(backend.detect_features(), backend.features); });
  if (backend.thread_team) rows["thread_team"] = py::cpp_function(backend.thread_team);
  rows["fp8_gemm_nt"] = gemm;
  rows["cast"] = cast;
  rows["limits"] = limits;
  return rows;
}

void connect(py::object scaled_tensor, py::object tensor, py::object num_threads, py::object read, py::object allocate,
             py::dict dtypes) {
  Runtime& r = runtime();
  r = {scaled_tensor, tensor, num_threads, read, allocate, dtypes, nullptr};
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  if (api->header.version.major == 1) r.exchange = api;
}

}  // namespace
}  // namespace moekern

PYBIND11_MODULE(_C, m) {
  using namespace moekern;
  py::register_exception<ValueError>(m, "ValueError", PyExc_ValueError);
  py::register_exception<TypeError>(m, "TypeError", PyExc_TypeError);
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "GCC " __VERSION__;
#endif
  m.def("connect", &connect);
  m.def("uses_exchange_table", [] { return runtime().exchange != nullptr; });
  m.def("prepare_gemm", &prepare_gemm);
  m.def("prepare_cast", &prepare_cast);
  m.def("prepare_dequantize", &prepare_dequantize);
  py::dict native;
#define MOEKERN_BACKEND(NAME) native[#NAME] = rows_of(NAME::backend());
#include "moekern/backends.inc"
#undef MOEKERN_BACKEND
  m.attr("native") = native;
}
