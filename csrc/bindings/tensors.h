// What every op's bindings share: Python objects as views, outputs allocated, the number of threads.
//
// Tensors are read, and outputs allocated, through torch's DLPack exchange table: about 0.1 us a tensor,
// and no link against libtorch, so one build serves every torch. csrc/bindings/ is all that knows pybind11.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>

#include "moekern/arguments.h"
#include "moekern/dlpack.h"

namespace moekern {

namespace py = pybind11;

// What Python hands over once, at import: classes and functions that C++ cannot name by itself.
struct Runtime {
  py::object scaled_tensor;   // the class moekern.ScaledTensor
  py::object tensor;          // the class torch.Tensor
  py::object num_threads;     // () -> int
  py::object read;            // (tensor) -> (pointer, shape, strides, format name, device type), without the table
  py::object allocate;        // (like, shape, format name) -> tensor, without the table
  py::object current_stream;  // (device type, index) -> handle, without the table
  py::dict dtypes;            // torch.dtype -> format name
  const dlpack::ExchangeApi* exchange = nullptr;
};

Runtime& runtime();

// Whether the host may look at what lies there. A call never waits for an accelerator: what depends on values there is
// its kernels' business.
inline bool readable(int device) { return (device & 0xffff) == dlpack::kCpu; }

py::object interned(const char* name);

struct View {
  Matrix matrix;
  int device = 0;  // DLPack's device type, and its index in the upper half
};

// A tensor of `dimensions`: 2, or 1, which becomes one row.
View view(const char* op, const char* name, py::handle object, int dimensions = 2);
Matrix matrix(const char* op, const char* name, py::handle object, int device, int dimensions = 2);
Matrix optional_matrix(const char* op, const char* name, py::handle object, int device, int dimensions = 2);

struct StackView {
  Stack stack;
  int device = 0;
};

// A tensor of 3 dimensions.
StackView stack_view(const char* op, const char* name, py::handle object);
Stack stack(const char* op, const char* name, py::handle object, int device);

// DLPack does not carry the bit that says "negate on reading" (the imaginary part of a conjugate has it).
void check_plain(const char* op, const char* name, py::handle tensor);

py::object allocate(py::handle like, int device, std::initializer_list<int64_t> shape, Dtype dtype);

struct Scaled {
  Matrix data;
  ScaleGrid grid;
  int device;
};

struct ScaledStack {
  Stack data, scale;
  int64_t block_rows, block_cols;
  int device;
};

bool is_scaled(py::handle object);
Scaled scaled(const char* op, const char* name, py::handle object);
ScaledStack scaled_stack(const char* op, const char* name, py::handle object);

Dtype dtype_argument(const char* op, py::handle dtype, Dtype otherwise);
Dtype format_argument(const char* op, py::handle format);  // of FP8, by its name

int num_threads();
int threads_for(int64_t work);  // work in weights decoded

py::frozenset names_of(uint64_t bits, const Table<Feature>& features);

// The current stream there, for a DLPack device as `View` has it.
Stream stream_on(int device);

// What `refuses` says, for Python.
template <class P>
py::object refusal(const Routine<P>& routine, const P& p) {
  const char* reason = routine.refuses ? routine.refuses(p) : nullptr;
  return reason ? py::object(py::str(reason)) : py::object(py::none());
}

// Runs a checked problem on the device of its operands.
template <class P>
void run_routine(const Routine<P>& routine, P& p, int device) {
  p.stream = stream_on(device);
  py::gil_scoped_release release;
  routine.run(p);
}

// Of each op, by its name: [(name, needs, run, refuses or None, workspace -> bytes or None)], best first. The functions
// take the op's parameters.
using KernelRows = std::map<std::string, py::list>;

template <class P, class Run, class Refuses>
void add_row(KernelRows& rows, const char* op, const char* name, const py::object& needs, const Routine<P>& routine,
             Run run, Refuses refuses, const py::object& workspace = py::none()) {
  if (!routine.run) return;
  const py::object reason = routine.refuses ? py::object(py::cpp_function(refuses)) : py::object(py::none());
  rows[op].append(py::make_tuple(name, needs, py::cpp_function(run), reason, workspace));
}

// Each op family adds its functions to the module, and its rows of a backend's kernels.
void bind_gemm(py::module_& m);
void bind_grouped(py::module_& m);
void bind_casts(py::module_& m);
void bind_experts(py::module_& m);
void bind_routing(py::module_& m);
void bind_choices();
void gemm_rows(const Backend& backend, KernelRows& rows);
void grouped_rows(const Backend& backend, KernelRows& rows);
void cast_rows(const Backend& backend, KernelRows& rows);
void experts_rows(const Backend& backend, KernelRows& rows);
void routing_rows(const Backend& backend, KernelRows& rows);
py::list limit_rows(const Backend& backend);

}  // namespace moekern
