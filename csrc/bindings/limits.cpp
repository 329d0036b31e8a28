// The loops that bench/ measures a device's own limits with.
#include "bindings/tensors.h"

namespace moekern {
namespace {

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

}  // namespace

// [(name, needs, multiply_add() -> flops, [read(x)], copy(x, out))]
py::list limit_rows(const Backend& backend) {
  py::list rows;
  for (const LimitLoops& l : backend.limits) {
    py::list reads;
    for (int i = 0; i < kReadLoops; ++i) reads.append(py::cpp_function([&l, i](py::handle x) { run_read(l, i, x); }));
    rows.append(py::make_tuple(l.name, names_of(l.needs, backend.features),
                               py::cpp_function([&l] { return run_multiply_add(l); }), reads,
                               py::cpp_function([&l](py::handle x, py::handle out) { run_copy(l, x, out); })));
  }
  return rows;
}

}  // namespace moekern
