#include "bindings/tensors.h"

namespace moekern {

namespace {

Dtype dtype_of(dlpack::DataType t) {
  if (t.lanes != 1) return Dtype::other;
  switch (t.code) {
    case dlpack::kInt: return t.bits == 32 ? Dtype::i32 : t.bits == 64 ? Dtype::i64 : Dtype::other;
    case dlpack::kUInt: return t.bits == 8 ? Dtype::u8 : Dtype::other;
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
    case Dtype::ue8m0: return {dlpack::kE8m0fnu, 8, 1};
    case Dtype::i32: return {dlpack::kInt, 32, 1};
    case Dtype::i64: return {dlpack::kInt, 64, 1};
    case Dtype::u8: return {dlpack::kUInt, 8, 1};
    default: return {dlpack::kFloat, 32, 1};
  }
}

}  // namespace

py::object interned(const char* name) { return py::reinterpret_steal<py::object>(PyUnicode_InternFromString(name)); }

Runtime& runtime() {
  static Runtime* instance = new Runtime;  // leaked: Python may be gone when statics are destroyed
  return *instance;
}

namespace {

std::string attribute(py::handle object, const char* name) { return py::str(object.attr(name)).cast<std::string>(); }

// What torch says of a tensor that cannot be read: on the meta device, sparse, without storage.
[[noreturn]] void unreadable(const char* op, const char* name, py::handle object, const std::string& why) {
  throw ValueError(text(op, ": ", name, " cannot be read (device ", attribute(object, "device"), ", layout ",
                        attribute(object, "layout"), "): ", why.substr(0, why.find('\n'))));
}

// A tensor as it is: leading dimensions that it lacks have an extent of 1.
struct Tensor {
  char* data;
  Dtype dtype;
  int device;
  int64_t shape[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
};

Tensor tensor(const char* op, const char* name, py::handle object, int dimensions) {
  const Runtime& r = runtime();
  const bool exact = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == r.tensor.ptr();
  check<TypeError>(exact || PyObject_IsInstance(object.ptr(), r.tensor.ptr()) == 1, op, ": ", name, " is a ",
                   Py_TYPE(object.ptr())->tp_name, "; it must be a tensor");
  Tensor x;
  int64_t *shape = x.shape + 3 - dimensions, *strides = x.strides + 3 - dimensions;
  const auto check_dimensions = [&](int found) {
    check(found == dimensions, op, ": ", name, " has ", found, " dimensions; it must have ", dimensions);
  };
  if (r.exchange) {
    dlpack::Tensor t;
    if (r.exchange->view_of_object(object.ptr(), &t)) unreadable(op, name, object, py::error_already_set().what());
    check_dimensions(t.ndim);
    int64_t compact = 1;
    for (int d = dimensions - 1; d >= 0; --d) {
      shape[d] = t.shape[d];
      strides[d] = t.strides ? t.strides[d] : compact;
      compact *= t.shape[d];
    }
    x.data = static_cast<char*>(t.data) + t.byte_offset;
    x.dtype = dtype_of(t.dtype);
    x.device = t.device.type | t.device.id << 16;
  } else {
    const auto fields =
        r.read(object).cast<std::tuple<uintptr_t, std::vector<int64_t>, std::vector<int64_t>, std::string, int>>();
    check_dimensions(static_cast<int>(std::get<1>(fields).size()));
    std::copy(std::get<1>(fields).begin(), std::get<1>(fields).end(), shape);
    std::copy(std::get<2>(fields).begin(), std::get<2>(fields).end(), strides);
    x.data = reinterpret_cast<char*>(std::get<0>(fields));
    x.dtype = dtype_named(std::get<3>(fields));
    x.device = std::get<4>(fields);
  }
  if (x.dtype == Dtype::other)
    throw TypeError(text(op, ": ", name, " has dtype ", attribute(object, "dtype"), ", which no operand may have"));
  static char nothing;  // an empty tensor has no address, but it is there
  if (!x.data) {
    if (x.shape[0] && x.shape[1] && x.shape[2]) unreadable(op, name, object, "its storage is empty");
    x.data = &nothing;
  }
  return x;
}

// The last two dimensions.
Matrix matrix_of(const Tensor& x) {
  Matrix m;
  m.data = x.data;
  m.dtype = x.dtype;
  m.rows = x.shape[1];
  m.cols = x.shape[2];
  m.row_stride = x.strides[1];
  m.col_stride = m.cols == 1 ? 1 : x.strides[2];
  return m;
}

void check_device(const char* op, const char* name, int found, int device) {
  check(found == device, op, ": ", name, " is on another device than the other operands");
}

}  // namespace

View view(const char* op, const char* name, py::handle object, int dimensions) {
  const Tensor x = tensor(op, name, object, dimensions);
  return {matrix_of(x), x.device};
}

Matrix matrix(const char* op, const char* name, py::handle object, int device, int dimensions) {
  const View v = view(op, name, object, dimensions);
  check_device(op, name, v.device, device);
  return v.matrix;
}

Matrix optional_matrix(const char* op, const char* name, py::handle object, int device, int dimensions) {
  return object.is_none() ? Matrix{} : matrix(op, name, object, device, dimensions);
}

StackView stack_view(const char* op, const char* name, py::handle object) {
  const Tensor x = tensor(op, name, object, 3);
  return {{matrix_of(x), x.shape[0], x.strides[0]}, x.device};
}

Stack stack(const char* op, const char* name, py::handle object, int device) {
  const StackView v = stack_view(op, name, object);
  check_device(op, name, v.device, device);
  return v.stack;
}

void check_plain(const char* op, const char* name, py::handle tensor) {
  static const py::object kIsNegated = interned("is_neg");
  if (tensor.is_none()) return;
  check(!tensor.attr(kIsNegated)().cast<bool>(), op, ": ", name, " is a negated view; pass ", name, ".resolve_neg()");
}

static void set_dlpack_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

py::object allocate(py::handle like, int device, std::initializer_list<int64_t> shape, Dtype dtype) {
  const Runtime& r = runtime();
  std::vector<int64_t> extents(shape);
  if (!r.exchange) return r.allocate(like, py::tuple(py::cast(extents)), name_of(dtype));
  dlpack::Tensor prototype{nullptr,
                           {static_cast<dlpack::DeviceType>(device & 0xffff), device >> 16},
                           static_cast<int32_t>(extents.size()),
                           dlpack_type(dtype),
                           extents.data(),
                           nullptr,
                           0};
  dlpack::ManagedTensor* tensor = nullptr;
  if (r.exchange->allocate(&prototype, &tensor, nullptr, set_dlpack_error)) throw py::error_already_set();
  void* object = nullptr;
  if (r.exchange->to_object(tensor, &object)) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

Stream stream_on(int device) {
  if (readable(device)) return {};
  const Runtime& r = runtime();
  const int type = device & 0xffff, index = device >> 16;
  Stream s{index, nullptr};
  if (!r.exchange) {
    s.handle = reinterpret_cast<void*>(r.current_stream(type, index).cast<uintptr_t>());
  } else if (r.exchange->current_stream(static_cast<dlpack::DeviceType>(type), index, &s.handle)) {
    throw py::error_already_set();
  }
  return s;
}

bool is_scaled(py::handle object) {
  return Py_TYPE(object.ptr()) == reinterpret_cast<PyTypeObject*>(runtime().scaled_tensor.ptr());
}

namespace {

struct Parts {
  py::object data, scale;
  int64_t block_rows, block_cols;
};

Parts parts_of(const char* op, const char* name, py::handle object) {
  static const py::object kData = interned("data"), kScale = interned("scale"), kBlock = interned("block");
  check<TypeError>(is_scaled(object), op, ": ", name, " is a ", Py_TYPE(object.ptr())->tp_name,
                   "; it must be a ScaledTensor or a (data, scale) pair");
  const py::tuple block = object.attr(kBlock);
  return {object.attr(kData), object.attr(kScale), block[0].cast<int64_t>(), block[1].cast<int64_t>()};
}

}  // namespace

Scaled scaled(const char* op, const char* name, py::handle object) {
  const Parts parts = parts_of(op, name, object);
  const View data = view(op, name, parts.data);
  const Matrix scale = matrix(op, name, parts.scale, data.device);
  return {data.matrix, {scale, parts.block_rows, parts.block_cols}, data.device};
}

ScaledStack scaled_stack(const char* op, const char* name, py::handle object) {
  const Parts parts = parts_of(op, name, object);
  const StackView data = stack_view(op, name, parts.data);
  const Stack scale = stack(op, name, parts.scale, data.device);
  return {data.stack, scale, parts.block_rows, parts.block_cols, data.device};
}

Dtype dtype_argument(const char* op, py::handle dtype, Dtype otherwise) {
  if (dtype.is_none()) return otherwise;
  PyObject* name = PyDict_GetItem(runtime().dtypes.ptr(), dtype.ptr());
  const Dtype found = name ? dtype_named(py::handle(name).cast<std::string>()) : Dtype::other;
  check<TypeError>(is_float(found), op, ": out_dtype is ", py::str(dtype).cast<std::string>(),
                   "; it is torch.float32, torch.float16 or torch.bfloat16");
  return found;
}

Dtype format_argument(const char* op, py::handle format) {
  check<TypeError>(py::isinstance<py::str>(format), op, ": format is a ", Py_TYPE(format.ptr())->tp_name,
                   "; it is the name of one, such as \"e4m3fn\"");
  const auto name = format.cast<std::string>();
  const Dtype found = dtype_named(name);
  check(is_fp8(found), op, ": format is \"", name, "\"; it is \"e4m3fn\", \"e4m3fnuz\" or \"e5m2\"");
  return found;
}

int num_threads() { return runtime().num_threads().cast<int>(); }

// Waking a second thread takes some microseconds: as long as decoding this many weights.
constexpr int64_t kWorkWorthAThread = 1 << 18;

int threads_for(int64_t work) {
  const int available = num_threads();
  if (work < 2 * kWorkWorthAThread) return 1;
  return static_cast<int>(std::min<int64_t>(available, work / kWorkWorthAThread));
}

py::frozenset names_of(uint64_t bits, const Table<Feature>& features) {
  py::set names;
  for (const Feature& f : features)
    if (bits & f.bit) names.add(f.name);
  return py::frozenset(names);
}

}  // namespace moekern
