// The grouped products: called from python/moekern/op.py, call the rows of backends/<device>/registry.cpp.
#include <array>
#include <memory>

#include "bindings/tensors.h"

namespace moekern {
namespace {

constexpr const char* kContiguous = "m_grouped_fp8_gemm_nt_contiguous";
constexpr const char* kMasked = "m_grouped_fp8_gemm_nt_masked";
constexpr const char* kKGrouped = "k_grouped_fp8_gemm_tn_contiguous";

// ---- operands ----------------------------------------------------------------------------------------

// Where matrices of one shape lie that are not one tensor: read once, when moekern.GroupedWeights is made, since
// reading hundreds of tensors costs as much as a small product.
struct WeightTable {
  static constexpr const char* kName = "moekern.WeightTable";  // of the capsule that holds it
  Matrix data;                                                 // the first
  ScaleGrid grid;
  int device;
  std::vector<std::pair<char*, char*>> places;
};

bool alike(const Matrix& x, const Matrix& y) {
  return x.dtype == y.dtype && x.rows == y.rows && x.cols == y.cols && (x.rows <= 1 || x.row_stride == y.row_stride) &&
         (x.cols <= 1 || x.col_stride == y.col_stride);
}

std::string layout_of(const Matrix& m) {
  return text(name_of(m.dtype), " ", shape_of(m), " with strides (", m.row_stride, ", ", m.col_stride, ")");
}

py::capsule weight_table(const std::string& op, const std::string& name, const py::list& data, const py::list& scale,
                         int64_t block_rows, int64_t block_cols) {
  auto held = std::make_unique<WeightTable>();
  WeightTable& table = *held;
  const std::string first = name + "[0]";
  for (size_t g = 0; g < data.size(); ++g) {
    const std::string at = name + "[" + std::to_string(g) + "]", scale_at = at + ".scale";
    const View v = view(op.c_str(), at.c_str(), data[g]);
    const Matrix s = matrix(op.c_str(), scale_at.c_str(), scale[g], v.device);
    if (g == 0) table = {v.matrix, {s, block_rows, block_cols}, v.device, {}};
    check(v.device == table.device, op, ": ", at, " is on another device than ", first);
    check(alike(v.matrix, table.data), op, ": ", at, " is ", layout_of(v.matrix), "; all must be alike, and ", first,
          " is ", layout_of(table.data));
    check(alike(s, table.grid.values), op, ": ", scale_at, " is ", layout_of(s), "; all must be alike, and ", first,
          ".scale is ", layout_of(table.grid.values));
    table.places.emplace_back(v.matrix.data, s.data);
  }
  check_grid(op.c_str(), first.c_str(), table.data, table.grid);
  return py::capsule(held.release(), WeightTable::kName, [](PyObject* capsule) {
    delete static_cast<WeightTable*>(PyCapsule_GetPointer(capsule, WeightTable::kName));
  });
}

// G weight matrices: a stack, or a table of separate ones.
struct Weights {
  Matrix data;
  ScaleGrid grid;
  int device;
  int64_t count;
  const WeightTable* table;
  Stack data_stack, scale_stack;

  char* at(int64_t g) const { return table ? table->places[static_cast<size_t>(g)].first : data_stack.data(g); }
  char* scale_at(int64_t g) const { return table ? table->places[static_cast<size_t>(g)].second : scale_stack.data(g); }
};

Weights weights(const char* op, py::handle b) {
  static const py::object kTable = interned("table");
  if (is_scaled(b)) {
    const ScaledStack s = scaled_stack(op, "b", b);
    return {s.data.matrix, {s.scale.matrix, s.block_rows, s.block_cols}, s.device, s.data.count, nullptr, s.data,
            s.scale};
  }
  const py::object held = b.attr(kTable);
  check<TypeError>(!held.is_none(), op, ": b has no addresses; its matrices must be plain tensors");
  const auto* table = static_cast<const WeightTable*>(PyCapsule_GetPointer(held.ptr(), WeightTable::kName));
  if (!table) throw py::error_already_set();
  return {table->data, table->grid, table->device, static_cast<int64_t>(table->places.size()), table, {}, {}};
}

// A left operand: FP8 with scales or float, a stack of matrices or one.
struct Rows {
  Stack data, scale;
  int64_t block_rows = 1, block_cols = 1;

  ScaleGrid grid() const { return {scale.matrix, block_rows, block_cols}; }
};

Rows rows_operand(const char* op, const char* name, py::handle object, int dimensions, int device) {
  Rows r;
  int found;
  if (!is_scaled(object)) {
    check_plain(op, name, object);
    const StackView v = dimensions == 3 ? stack_view(op, name, object) : [&] {
      const View m = view(op, name, object);
      return StackView{{m.matrix}, m.device};
    }();
    r.data = v.stack;
    found = v.device;
    check<TypeError>(is_float(r.data.matrix.dtype), op, ": ", name, " has dtype ", name_of(r.data.matrix.dtype),
                     is_fp8(r.data.matrix.dtype) ? " but no scale; pass a ScaledTensor or a (data, scale) pair"
                                                 : "; it is f32, f16 or bf16, or FP8 with a scale");
  } else if (dimensions == 3) {
    const ScaledStack s = scaled_stack(op, name, object);
    r = {s.data, s.scale, s.block_rows, s.block_cols};
    found = s.device;
  } else {
    const Scaled s = scaled(op, name, object);
    r = {{s.data}, {s.grid.values}, s.grid.block_rows, s.grid.block_cols};
    found = s.device;
  }
  check(found == device, op, ": ", name, " is on another device than b");
  return r;
}

struct Layout {
  const int64_t *starts, *counts;
  int64_t groups, rows, capacity;  // a negative capacity: contiguous
  bool known;                      // whether the host may look

  bool covers_all() const {
    if (!known) return false;
    int64_t covered = 0;
    for (int64_t g = 0; g < groups; ++g) covered += counts[g];
    return covered == rows;
  }
};

const int64_t* row_numbers(const char* op, const char* name, const Matrix& m) {
  check<TypeError>(m.dtype == Dtype::i64, op, ": ", name, " has dtype ", name_of(m.dtype), "; it must be i64");
  check(m.cols <= 1 || m.col_stride == 1, op, ": ", name, " must be contiguous");
  return reinterpret_cast<const int64_t*>(m.data);
}

// Checked again, since its tensors may have been written to: what kernels access depends on them. On an accelerator,
// kernels keep to the operand by themselves.
Layout layout(const char* op, py::handle object, int device) {
  static const py::object kStarts = interned("starts"), kCounts = interned("counts"), kRows = interned("rows"),
                          kCapacity = interned("capacity");
  const Matrix starts = matrix(op, "layout.starts", object.attr(kStarts), device, 1);
  const Matrix counts = matrix(op, "layout.counts", object.attr(kCounts), device, 1);
  const py::object capacity = object.attr(kCapacity);
  Layout l{
      row_numbers(op, "layout.starts", starts), row_numbers(op, "layout.counts", counts),           counts.cols,
      object.attr(kRows).cast<int64_t>(),       capacity.is_none() ? -1 : capacity.cast<int64_t>(), readable(device)};
  check(starts.cols == counts.cols, op, ": layout.starts has ", starts.cols, " elements and layout.counts ",
        counts.cols);
  if (l.known) check_layout(op, ": layout.", l.starts, l.counts, l.groups, l.rows, 1, l.capacity);
  return l;
}

void check_new_layout(py::handle starts, py::handle counts, int64_t rows, int64_t alignment, py::handle capacity) {
  const View s = view("GroupedLayout", "starts", starts, 1), c = view("GroupedLayout", "counts", counts, 1);
  check_layout("", "", row_numbers("GroupedLayout", "starts", s.matrix),
               row_numbers("GroupedLayout", "counts", c.matrix), c.matrix.cols, rows, alignment,
               capacity.is_none() ? -1 : capacity.cast<int64_t>());
}

// ---- problems ----------------------------------------------------------------------------------------

// One call, as prepare_* has read it, for the `refuses` and `run` that op.py calls next with the same objects.
// `run` takes it away, so it never outlives its call. Layouts that are not known have no list of groups.
struct Call {
  std::array<PyObject*, 5> operands{};
  GroupedGemmProblem problem;
  std::vector<Group> groups;
  int device = 0;

  void begin(const GemmProblem& shared, const Layout& l, int where) {
    problem = {};
    problem.shared = shared;
    problem.there.starts = l.starts;
    problem.there.counts = l.counts;
    problem.there.count = l.groups;
    problem.there.rows = l.rows;
    problem.there.capacity = l.capacity;
    groups.clear();
    device = where;
  }
  void add(const Group& g) { groups.push_back(g); }
  void finish(std::array<PyObject*, 5> of) {
    operands = of;
    problem.groups = readable(device) ? groups.data() : nullptr;
    problem.count = static_cast<int64_t>(groups.size());
  }
};
thread_local Call current;

void check_weights(const char* op, const Weights& b, const Layout& l) {
  check(b.count == l.groups, op, ": b has ", b.count, " matrices and layout ", l.groups, " groups");
}

// out against the left operand and b; the rest is apart from it by being an output.
void check_apart_from_operands(const char* op, const Stack& out, const Rows& a, const Weights& b) {
  const Matrix d = hull(out);
  check_apart(op, "out", d, "a", hull(a.data));
  check_apart(op, "out", d, "a.scale", hull(a.scale));
  if (!b.table) {
    check_apart(op, "out", d, "b", hull(b.data_stack));
    check_apart(op, "out", d, "b.scale", hull(b.scale_stack));
    return;
  }
  Matrix data = b.data, scale = b.grid.values;
  for (const auto& [at, scale_at] : b.table->places) {
    data.data = at;
    scale.data = scale_at;
    check_apart(op, "out", d, "b", data);
    check_apart(op, "out", d, "b.scale", scale);
  }
}

void check_out_dtype(const char* op, py::handle out_dtype, Dtype found) {
  const Dtype wanted = dtype_argument(op, out_dtype, found);
  check<TypeError>(wanted == found, op, ": out has dtype ", name_of(found), " but out_dtype is ", name_of(wanted));
}

py::object tensor_of(py::handle operand) {
  return is_scaled(operand) ? py::object(operand.attr("data")) : py::reinterpret_borrow<py::object>(operand);
}

// The m-grouped operands, all but out.
struct MGrouped {
  const char* op;
  bool masked;
  Weights b;
  Layout l;
  Rows a;

  MGrouped(const char* name, py::handle a_object, py::handle b_object, py::handle layout_object)
      : op(name),
        masked(name == kMasked),
        b(weights(op, b_object)),
        l(layout(op, layout_object, b.device)),
        a(rows_operand(op, "a", a_object, masked ? 3 : 2, b.device)) {}

  GemmProblem shared() const {
    GemmProblem p;
    p.a = a.data.matrix;
    p.sa = a.grid();
    p.b = b.data;
    p.sb = b.grid;
    return p;
  }

  void check_operands() const {
    check(masked == (l.capacity >= 0), op, ": layout is ", masked ? "contiguous" : "masked", "; ",
          masked ? kContiguous : kMasked, " takes it");
    check_weights(op, b, l);
    if (masked) {
      check(a.data.count == l.groups && a.data.matrix.rows == l.capacity, op, ": a has shape ", shape_of(a.data),
            "; the layout is of ", l.groups, " groups of capacity ", l.capacity);
    } else {
      check(a.data.matrix.rows == l.rows, op, ": a has ", a.data.matrix.rows, " rows; the layout is of ", l.rows);
    }
    check_gemm(op, shared());
  }

  Stack out(py::handle object) const {
    return masked ? stack(op, "out", object, b.device) : Stack{matrix(op, "out", object, b.device)};
  }

  void fill(Call& call, const Stack& out) const {
    call.begin(shared(), l, b.device);
    GemmProblem& p = call.problem.shared;
    p.out = out.matrix;
    GroupsThere& there = call.problem.there;
    there.a = a.data;
    there.sa = a.scale;
    there.b = b.table ? Stack{b.data} : b.data_stack;
    there.sb = b.table ? Stack{b.grid.values} : b.scale_stack;
    there.separate_weights = b.table;
    there.out = out;
    for (int64_t g = 0; l.known && g < l.groups; ++g) {
      const int64_t rows = l.counts[g], first = masked ? 0 : l.starts[g], at = masked ? g : 0;
      if (rows == 0 || b.data.rows == 0) continue;
      const auto begin = [&](const Stack& s, int64_t row) {
        return s.data(at) + row * s.matrix.row_stride * size_of(s.matrix.dtype);
      };
      call.add({begin(a.data, first), a.scale.matrix ? begin(a.scale, grid_row(op, "a", p.sa, g, first)) : nullptr,
                b.at(g), b.scale_at(g), nullptr, begin(out, first), rows, p.a.cols});
    }
  }
};

py::tuple prepare_m_grouped(bool masked, py::object a, py::object b, py::object layout, py::object out,
                            py::object out_dtype) {
  const char* op = masked ? kMasked : kContiguous;
  const MGrouped operands(op, a, b, layout);
  operands.check_operands();
  const Matrix& rows = operands.a.data.matrix;
  const int64_t n = operands.b.data.rows;
  const bool fresh = out.is_none();
  if (fresh) {
    const Dtype dtype = dtype_argument(op, out_dtype, is_fp8(rows.dtype) ? Dtype::bf16 : rows.dtype);
    const py::object like = tensor_of(a);
    out = masked ? allocate(like, operands.b.device, {operands.l.groups, rows.rows, n}, dtype)
                 : allocate(like, operands.b.device, {rows.rows, n}, dtype);
    // No stale memory where no group writes. On an accelerator this is queued there, whatever the groups are.
    if (!operands.l.covers_all()) out.attr("zero_")();
  }
  const Stack d = operands.out(out);
  if (!fresh) {
    check_plain(op, "out", out);
    const Shape shape{rows.rows, n};
    masked ? check_product_output(op, d, d.matrix.dtype, StackShape{operands.l.groups, shape})
           : check_product_output(op, d.matrix, d.matrix.dtype, shape);
    check_apart_from_operands(op, d, operands.a, operands.b);
    check_out_dtype(op, out_dtype, d.matrix.dtype);
  }
  operands.fill(current, d);
  current.finish({a.ptr(), b.ptr(), layout.ptr(), nullptr, out.ptr()});
  return py::make_tuple(std::move(a), std::move(b), std::move(layout), std::move(out), py::none());
}

const GroupedGemmProblem& m_grouped_problem(const char* op, py::handle a, py::handle b, py::handle layout,
                                            py::handle out) {
  const std::array<PyObject*, 5> objects{a.ptr(), b.ptr(), layout.ptr(), nullptr, out.ptr()};
  if (current.operands != objects) {
    const MGrouped operands(op, a, b, layout);
    operands.fill(current, operands.out(out));
    current.finish(objects);
  }
  return current.problem;
}

Matrix transposed(const Matrix& m) { return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride}; }
ScaleGrid transposed(const ScaleGrid& g) { return {transposed(g.values), g.block_cols, g.block_rows}; }

// The k-grouped operands, all but out: a [K, M] and b [K, N], whose rows are the groups'.
struct KGrouped {
  int device;
  Rows b, a;
  Layout l;
  Stack c;

  KGrouped(py::handle a_object, py::handle b_object, py::handle layout_object, py::handle c_object)
      : b([&] {
          const Scaled s = scaled(kKGrouped, "b", b_object);
          device = s.device;
          return Rows{{s.data}, {s.grid.values}, s.grid.block_rows, s.grid.block_cols};
        }()),
        a(rows_operand(kKGrouped, "a", a_object, 2, device)),
        l(layout(kKGrouped, layout_object, device)) {
    if (!c_object.is_none()) c = stack(kKGrouped, "c", c_object, device);
  }

  int64_t m() const { return a.data.matrix.cols; }
  int64_t n() const { return b.data.matrix.cols; }

  GemmProblem shared() const {
    GemmProblem p;
    p.a = transposed(a.data.matrix);
    p.sa = a.scale.matrix ? transposed(a.grid()) : ScaleGrid{};
    p.b = transposed(b.data.matrix);
    p.sb = transposed(b.grid());
    p.c = c.matrix;
    return p;
  }

  void check_operands() const {
    check(l.capacity < 0, kKGrouped, ": layout is masked; it must be contiguous");
    check(a.data.matrix.rows == l.rows, kKGrouped, ": a has ", a.data.matrix.rows, " rows; the layout is of ", l.rows);
    check(b.data.matrix.rows == l.rows, kKGrouped, ": b has ", b.data.matrix.rows, " rows; the layout is of ", l.rows);
    if (c.matrix)
      check(shape_of(c) == StackShape{l.groups, {m(), n()}}, kKGrouped, ": c has shape ", shape_of(c),
            "; the product's is ", StackShape{l.groups, {m(), n()}});
    check_gemm(kKGrouped, shared());
  }

  void fill(Call& call, const Stack& out) const {
    call.begin(shared(), l, device);
    GemmProblem& p = call.problem.shared;
    p.out = out.matrix;
    GroupsThere& there = call.problem.there;
    there.a = a.data;
    there.sa = a.scale;
    there.b = b.data;
    there.sb = b.scale;
    there.c = c;
    there.out = out;
    if (!l.known || m() == 0 || n() == 0) return;
    p.a.cols = p.b.cols = 0;
    for (int64_t g = 0; g < l.groups; ++g) {
      const int64_t k = l.counts[g], first = k ? l.starts[g] : 0;
      p.a.cols = p.b.cols = std::max(p.a.cols, k);
      call.add({a.data.matrix.at(first, 0),
                a.scale.matrix ? a.scale.matrix.at(grid_row(kKGrouped, "a", a.grid(), g, first), 0) : nullptr,
                b.data.matrix.at(first, 0), b.scale.matrix.at(grid_row(kKGrouped, "b", b.grid(), g, first), 0),
                c.matrix ? c.data(g) : nullptr, out.data(g), m(), k});
    }
  }
};

py::tuple prepare_k_grouped(py::object a, py::object b, py::object layout, py::object c, py::object out,
                            py::object out_dtype) {
  const KGrouped operands(a, b, layout, c);
  check_plain(kKGrouped, "c", c);
  operands.check_operands();
  const Shape shape{operands.m(), operands.n()};
  const bool fresh = out.is_none();
  if (fresh)
    out = allocate(tensor_of(a), operands.device, {operands.l.groups, shape.rows, shape.cols},
                   dtype_argument(kKGrouped, out_dtype, Dtype::f32));
  const Stack d = stack(kKGrouped, "out", out, operands.device);
  if (!fresh) {
    check_plain(kKGrouped, "out", out);
    check_product_output(kKGrouped, d, d.matrix.dtype, StackShape{operands.l.groups, shape});
    const Matrix whole = hull(d), addend = hull(operands.c);
    check_apart(kKGrouped, "out", whole, "a", operands.a.data.matrix);
    check_apart(kKGrouped, "out", whole, "a.scale", operands.a.scale.matrix);
    check_apart(kKGrouped, "out", whole, "b", operands.b.data.matrix);
    check_apart(kKGrouped, "out", whole, "b.scale", operands.b.scale.matrix);
    const bool in_place = addend.data == whole.data && alike(operands.c.matrix, d.matrix) &&
                          (d.count <= 1 || operands.c.stride == d.stride);
    if (!in_place) check_apart(kKGrouped, "out", whole, "c", addend);
    check_out_dtype(kKGrouped, out_dtype, d.matrix.dtype);
  }
  operands.fill(current, d);
  current.finish({a.ptr(), b.ptr(), layout.ptr(), c.ptr(), out.ptr()});
  return py::make_tuple(std::move(a), std::move(b), std::move(layout), std::move(c), std::move(out), py::none());
}

const GroupedGemmProblem& k_grouped_problem(py::handle a, py::handle b, py::handle layout, py::handle c,
                                            py::handle out) {
  const std::array<PyObject*, 5> objects{a.ptr(), b.ptr(), layout.ptr(), c.ptr(), out.ptr()};
  if (current.operands != objects) {
    const KGrouped operands(a, b, layout, c);
    operands.fill(current, stack(kKGrouped, "out", out, operands.device));
    current.finish(objects);
  }
  return current.problem;
}

// ---- kernels -----------------------------------------------------------------------------------------

// Whether no group can have anything to compute.
bool nothing_to_do(const GroupedGemmProblem& p) {
  return p.groups ? p.count == 0 : p.there.count == 0 || p.shared.out.rows == 0 || p.shared.out.cols == 0;
}

void run_grouped(const Routine<GroupedGemmProblem>& routine, const GroupedGemmProblem& problem) {
  GroupedGemmProblem p = problem;
  current.operands = {};
  if (nothing_to_do(p)) return;
  int64_t work = 0;
  for (int64_t g = 0; g < p.count; ++g)
    work += p.shared.n() * std::max<int64_t>(p.groups[g].k, 1) * (1 + p.groups[g].m / 4);
  p.threads = threads_for(work);
  run_routine(routine, p, current.device);
}

py::object refuse_grouped(const Routine<GroupedGemmProblem>& routine, const GroupedGemmProblem& problem) {
  return nothing_to_do(problem) ? py::object(py::none()) : refusal(routine, problem);
}

}  // namespace

void grouped_rows(const Backend& backend, KernelRows& rows) {
  for (const GroupedGemmKernel& k : backend.grouped_gemm) {
    const py::object needs = names_of(k.needs, backend.features);
    for (const char* op : {kContiguous, kMasked})
      add_row(
          rows, op, k.name, needs, k.m_grouped,
          [&k, op](py::handle a, py::handle b, py::handle layout, py::handle out, py::handle) {
            run_grouped(k.m_grouped, m_grouped_problem(op, a, b, layout, out));
          },
          [&k, op](py::handle a, py::handle b, py::handle layout, py::handle out, py::handle) {
            return refuse_grouped(k.m_grouped, m_grouped_problem(op, a, b, layout, out));
          });
    add_row(
        rows, kKGrouped, k.name, needs, k.k_grouped,
        [&k](py::handle a, py::handle b, py::handle layout, py::handle c, py::handle out, py::handle) {
          run_grouped(k.k_grouped, k_grouped_problem(a, b, layout, c, out));
        },
        [&k](py::handle a, py::handle b, py::handle layout, py::handle c, py::handle out, py::handle) {
          return refuse_grouped(k.k_grouped, k_grouped_problem(a, b, layout, c, out));
        });
  }
}

void bind_grouped(py::module_& m) {
  m.def("weight_table", &weight_table);
  m.def("check_layout", &check_new_layout);
  m.def("prepare_m_grouped", &prepare_m_grouped);
  m.def("prepare_k_grouped", &prepare_k_grouped);
}

}  // namespace moekern
