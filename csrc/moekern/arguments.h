// What every kernel may take for granted: shapes that agree, grids that cover their operand,
// outputs that alias nothing they must not. Called once a call, before any kernel.
#pragma once
#include <algorithm>
#include <array>
#include <utility>

#include "moekern/check.h"
#include "moekern/kernel.h"

namespace moekern {

inline int64_t blocks(int64_t extent, int64_t block) { return (extent + block - 1) / block; }

inline void check_grid(const char* op, const char* name, const Matrix& data, const ScaleGrid& grid) {
  check(grid.block_rows > 0 && grid.block_cols > 0, op, ": ", name, ".block is (", grid.block_rows, ", ",
        grid.block_cols, "); both must be positive");
  const int64_t rows = blocks(data.rows, grid.block_rows), cols = blocks(data.cols, grid.block_cols);
  check(grid.values.rows == rows && grid.values.cols == cols, op, ": ", name, ".scale has shape ",
        shape_of(grid.values), "; data of shape ", shape_of(data), " in blocks of (", grid.block_rows, ", ",
        grid.block_cols, ") takes [", rows, ", ", cols, "]");
  check<TypeError>(grid.values.dtype == Dtype::f32 || grid.values.dtype == Dtype::ue8m0, op, ": ", name,
                   ".scale has dtype ", name_of(grid.values.dtype), "; scales are f32 or ue8m0");
}

struct Dimension {
  int64_t extent, stride;
};

// Whether no two elements share memory: every stride steps over all that the smaller ones span.
inline bool elements_apart(std::array<Dimension, 3> dimensions) {
  std::sort(dimensions.begin(), dimensions.end(), [](auto& x, auto& y) { return x.stride < y.stride; });
  bool apart = true, empty = false;
  int64_t span = 0;
  for (const Dimension& d : dimensions) {
    empty |= d.extent == 0;
    apart &= d.extent <= 1 || d.stride > span;
    span += d.stride * (d.extent - 1);
  }
  return apart || empty;
}

inline void check_output(const char* op, const char* name, const Stack& out) {
  const Matrix& m = out.matrix;
  check(elements_apart({{{out.count, out.stride}, {m.rows, m.row_stride}, {m.cols, m.col_stride}}}), op, ": ", name,
        " of shape ", shape_of(out), " has strides (", out.stride, ", ", m.row_stride, ", ", m.col_stride,
        "): its elements share memory");
}

inline void check_output(const char* op, const char* name, const Matrix& out) {
  check(elements_apart({{{1, 0}, {out.rows, out.row_stride}, {out.cols, out.col_stride}}}), op, ": ", name,
        " of shape ", shape_of(out), " has strides (", out.row_stride, ", ", out.col_stride,
        "): its elements share memory");
}

inline void check_apart(const char* op, const char* out_name, const Matrix& out, const char* name, const Matrix& in) {
  check(!overlap(out, in), op, ": ", out_name, " overlaps ", name, " in memory");
}

inline void check_gemm(const char* op, const GemmProblem& p) {
  check<TypeError>(is_fp8(p.a.dtype) || is_float(p.a.dtype), op, ": a has dtype ", name_of(p.a.dtype),
                   "; it is e4m3fn, e4m3fnuz or e5m2 with a scale, or f32, f16 or bf16");
  check<TypeError>(is_fp8(p.b.dtype), op, ": b has dtype ", name_of(p.b.dtype), "; it is e4m3fn, e4m3fnuz or e5m2");
  check(p.a.cols == p.b.cols, op, ": a has shape ", shape_of(p.a), " and b ", shape_of(p.b),
        "; both need the same number of columns, k");
  check<TypeError>(!(is_float(p.a.dtype) && p.sa.values), op, ": a has dtype ", name_of(p.a.dtype),
                   " and a scale; only FP8 data is scaled");
  if (p.sa.values) check_grid(op, "a", p.a, p.sa);
  check_grid(op, "b", p.b, p.sb);
  if (p.c) {
    check(p.c.rows == p.m() && p.c.cols == p.n(), op, ": c has shape ", shape_of(p.c), "; the product's is [", p.m(),
          ", ", p.n(), "]");
    check<TypeError>(is_float(p.c.dtype), op, ": c has dtype ", name_of(p.c.dtype), "; it is f32, f16 or bf16");
  }
  if (p.bias) {
    check(p.bias.rows == 1 && p.bias.cols == p.n(), op, ": bias has ", p.bias.cols, " elements; b has ", p.n(),
          " rows");
    check<TypeError>(is_float(p.bias.dtype), op, ": bias has dtype ", name_of(p.bias.dtype),
                     "; it is f32, f16 or bf16");
  }
}

inline void check_gemm_output(const char* op, const GemmProblem& p) {
  check(p.out.rows == p.m() && p.out.cols == p.n(), op, ": out has shape ", shape_of(p.out), "; the product's is [",
        p.m(), ", ", p.n(), "]");
  check<TypeError>(is_float(p.out.dtype), op, ": out has dtype ", name_of(p.out.dtype), "; it is f32, f16 or bf16");
  check_output(op, "out", p.out);
  check_apart(op, "out", p.out, "a", p.a);
  check_apart(op, "out", p.out, "b", p.b);
  check_apart(op, "out", p.out, "a.scale", p.sa.values);
  check_apart(op, "out", p.out, "b.scale", p.sb.values);
  check_apart(op, "out", p.out, "bias", p.bias);
  const bool in_place = p.c && p.c.data == p.out.data && p.c.dtype == p.out.dtype &&
                        p.c.row_stride == p.out.row_stride && p.c.col_stride == p.out.col_stride;
  if (!in_place) check_apart(op, "out", p.out, "c", p.c);
}

// Groups of `rows` rows that ascend and share none. capacity: of a masked layout, negative for a contiguous one.
// Errors begin with `op` and `argument`.
inline void check_layout(const char* op, const char* argument, const int64_t* starts, const int64_t* counts,
                         int64_t groups, int64_t rows, int64_t alignment, int64_t capacity) {
  for (int64_t g = 0; g < groups; ++g)
    check(counts[g] >= 0, op, argument, "counts[", g, "] is ", counts[g], "; it must not be negative");
  int64_t end = 0;
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t start = starts[g], count = counts[g];
    if (capacity >= 0) {
      check(count <= capacity, op, argument, "counts[", g, "] is ", count, "; the capacity of a group is ", capacity);
      check(start == g * capacity, op, argument, "starts[", g, "] is ", start, "; in a masked layout it is ",
            g * capacity);
      continue;
    }
    check(start >= 0 && start <= rows, op, argument, "starts[", g, "] is ", start, "; it must be in 0 .. ", rows,
          ", the number of rows");
    check(start >= end, op, argument, "starts[", g, "] is ", start,
          "; groups must ascend without overlapping, and the one before ends at ", end);
    check(count <= rows - start, op, argument, "rows is ", rows, "; group ", g, " starts at ", start, " and has ",
          count, " of them");
    check(count == 0 || start % alignment == 0, op, argument, "alignment is ", alignment, "; group ", g, " starts at ",
          start, ", no multiple of it");
    end = start + count;
  }
}

// Where a group's own grid begins, whose blocks count from its first row.
inline int64_t grid_row(const char* op, const char* name, const ScaleGrid& grid, int64_t g, int64_t start) {
  check(grid.values.rows <= 1 || start % grid.block_rows == 0, op, ": layout has the first row of group ", g, " at ",
        start, "; ", name, " has a scale for every ", grid.block_rows, " rows, and a group must begin with one");
  return start / grid.block_rows;
}

// out: a Matrix or a Stack, whose shape should be `expected`.
template <class Out, class Expected>
void check_product_output(const char* op, const Out& out, Dtype dtype, const Expected& expected) {
  check(shape_of(out) == expected, op, ": out has shape ", shape_of(out), "; the product's is ", expected);
  check<TypeError>(is_float(dtype), op, ": out has dtype ", name_of(dtype), "; it is f32, f16 or bf16");
  check_output(op, "out", out);
}

inline void check_cast(const char* op, const CastProblem& p, bool to_fp8, bool gated) {
  const char* q = to_fp8 ? "out" : "x";
  const char* x = to_fp8 ? "x" : "out";
  check<TypeError>(is_float(p.x.dtype), op, ": ", x, " has dtype ", name_of(p.x.dtype), "; it is f32, f16 or bf16");
  check<TypeError>(is_fp8(p.q.dtype), op, ": ", q, " has dtype ", name_of(p.q.dtype),
                   "; it is e4m3fn, e4m3fnuz or e5m2");
  check(p.x.rows == p.q.rows && p.x.cols == p.q.cols * (gated ? 2 : 1), op, ": out has shape ",
        shape_of(to_fp8 ? p.q : p.x), " and x ", shape_of(to_fp8 ? p.x : p.q),
        gated ? "; x holds a gate and an up half for every output column" : "");
  check_grid(op, q, p.q, p.scale);
  const Matrix& out = to_fp8 ? p.q : p.x;
  check_output(op, "out", out);
  check_apart(op, "out", out, to_fp8 ? "x" : "x.data", to_fp8 ? p.x : p.q);
  check(out.cols <= 1 || out.col_stride == 1, op,
        ": out must be contiguous along its last dimension, its strides are (", out.row_stride, ", ", out.col_stride,
        ")");
  if (to_fp8) {
    check<TypeError>(p.scale.values.dtype == Dtype::f32, op, ": out.scale has dtype ", name_of(p.scale.values.dtype),
                     "; casts write f32 scales");
    check_output(op, "out.scale", p.scale.values);
    check_apart(op, "out.scale", p.scale.values, "x", p.x);
    check_apart(op, "out.scale", p.scale.values, "out", p.q);
  }
}

// One projection of an expert: rows of FP8 weights with their scales, `outputs` of them over `inputs` columns.
inline void check_projection(const char* op, const char* name, const Projection& w, int64_t outputs, int64_t inputs) {
  check<TypeError>(is_fp8(w.weight.dtype), op, ": ", name, " has dtype ", name_of(w.weight.dtype),
                   "; it is e4m3fn, e4m3fnuz or e5m2");
  check(w.count == outputs && w.first >= 0 && w.first + w.count <= w.weight.rows && w.weight.cols == inputs, op, ": ",
        name, " has shape ", shape_of(w.weight), "; rows [", w.first, ", ", w.first + outputs, ") of ", inputs,
        " columns are needed");
  check_grid(op, name, w.weight, w.scale);
  if (!w.bias) return;
  check(w.bias.rows == 1 && w.bias.cols == outputs, op, ": ", name, ".bias has ", w.bias.cols,
        " elements; the projection has ", outputs, " outputs");
  check<TypeError>(is_float(w.bias.dtype), op, ": ", name, ".bias has dtype ", name_of(w.bias.dtype),
                   "; it is f32, f16 or bf16");
}

inline void check_experts(const char* op, const ExpertsProblem& p) {
  check<TypeError>(is_fp8(p.x.dtype) || is_float(p.x.dtype), op, ": x has dtype ", name_of(p.x.dtype),
                   "; it is e4m3fn, e4m3fnuz or e5m2 with a scale, or f32, f16 or bf16");
  check<TypeError>(is_fp8(p.x.dtype) == static_cast<bool>(p.sx.values), op, ": x has dtype ", name_of(p.x.dtype),
                   p.sx.values ? " and a scale; only FP8 data is scaled"
                               : " but no scale; pass a ScaledTensor or a (data, scale) pair");
  const int64_t hidden = p.experts->gate.weight.cols;
  check(p.x.cols == hidden, op, ": x has shape ", shape_of(p.x), "; the experts take ", hidden, " columns");
  if (p.sx.values) {
    check(p.sx.block_rows == 1 && p.sx.block_cols == 128, op, ": x.block is (", p.sx.block_rows, ", ", p.sx.block_cols,
          "); it must be (1, 128)");
    check_grid(op, "x", p.x, p.sx);
  }
  check<TypeError>(is_index(p.ids.dtype), op, ": ids has dtype ", name_of(p.ids.dtype), "; it is i32 or i64");
  check(p.ids.rows == p.x.rows, op, ": ids has shape ", shape_of(p.ids), "; x has ", p.x.rows, " rows");
  if (p.weights) {
    check<TypeError>(p.weights.dtype == Dtype::f32, op, ": weights has dtype ", name_of(p.weights.dtype),
                     "; it must be f32");
    check(p.weights.rows == p.ids.rows && p.weights.cols == p.ids.cols, op, ": weights has shape ", shape_of(p.weights),
          "; ids has ", shape_of(p.ids));
  }
  if (p.num_shared) {
    const int64_t taken = p.shared->gate.weight.cols;
    check(taken == hidden, op, ": shared experts take ", taken, " columns; x has ", hidden);
    check(p.reduce, op, ": shared experts are added to the sum over the slots, which reduce=False leaves out");
  }
}

// What a call with these ids may read: experts, or nothing.
inline void check_ids(const char* op, const char* name, const Matrix& ids, int64_t count) {
  for (int64_t i = 0; i < ids.rows; ++i)
    for (int64_t j = 0; j < ids.cols; ++j) {
      const int64_t id = index_at(ids, i, j);
      check(id >= -1 && id < count, op, ": ", name, "[", i, ", ", j, "] is ", id, "; it must be from 0 to ", count - 1,
            ", or -1 for none");
    }
}

inline void check_experts_output(const char* op, const ExpertsProblem& p) {
  const int64_t rows = p.reduce ? p.tokens() : p.tokens() * p.top_k();
  check(p.out.rows == rows && p.out.cols == p.hidden(), op, ": out has shape ", shape_of(p.out), "; the result's is [",
        rows, ", ", p.hidden(), "]");
  check<TypeError>(is_float(p.out.dtype), op, ": out has dtype ", name_of(p.out.dtype), "; it is f32, f16 or bf16");
  check_output(op, "out", p.out);
  check<TypeError>(!p.workspace || p.workspace.dtype == Dtype::u8, op, ": workspace has dtype ",
                   name_of(p.workspace.dtype), "; it must be u8");
  check(!p.workspace || p.workspace.cols <= 1 || p.workspace.col_stride == 1, op, ": workspace must be contiguous");
  const std::pair<const char*, const Matrix*> operands[] = {
      {"x", &p.x}, {"x.scale", &p.sx.values}, {"ids", &p.ids}, {"weights", &p.weights}};
  for (const auto& [name, operand] : operands) {
    check_apart(op, "out", p.out, name, *operand);
    if (p.workspace) check_apart(op, "workspace", p.workspace, name, *operand);
  }
  if (p.workspace) check_apart(op, "workspace", p.workspace, "out", p.out);
}

}  // namespace moekern
