// Their kernels: kernels/gemm_grouped.cu, gemm_stream.cu and gemm_k_grouped.cu.
#include "cuda/gemm/grouped.h"

#include <algorithm>

#include "cuda/gemm/operands.h"
#include "cuda/gemm/tiles.h"
#include "moekern/arguments.h"

namespace moekern::cuda {
namespace {

bool masked(const GroupsThere& there) { return there.capacity >= 0; }

// Of a group: of its slot, or on average.
int64_t group_rows(const GroupsThere& there) {
  return masked(there) ? there.capacity : blocks(there.rows, std::max<int64_t>(there.count, 1));
}

ScaleGrid grid(const Stack& values, const ScaleGrid& like) {
  ScaleGrid of = like;
  of.values = values.matrix;
  return of;
}

void set_layout(GemmParameters& p, const GroupsThere& there) {
  p.starts = there.starts;
  p.counts = there.counts;
  p.groups = static_cast<int32_t>(there.count);
  p.masked = masked(there);
}

GemmParameters parameters(const GroupedGemmProblem& of) {
  const GroupsThere& there = of.there;
  GemmParameters p;
  p.a = rows_of(there.a);
  p.b = rows_of(there.b);
  p.sa = scales_of(grid(there.sa, of.shared.sa), there.sa.stride);
  p.sb = scales_of(grid(there.sb, of.shared.sb), there.sb.stride);
  p.out = result_of(there.out);
  set_layout(p, there);
  p.rows = static_cast<int32_t>(there.a.matrix.rows);
  p.n = static_cast<int32_t>(there.b.matrix.rows);
  p.k = static_cast<int32_t>(there.b.matrix.cols);
  return p;
}

PlanCase plan_case(const GroupedGemmProblem& of) {
  const Matrix& b = of.there.b.matrix;
  return {limits(of.stream.device).processors, group_rows(of.there), b.rows, b.cols, of.there.count,
          size_of(of.there.out.matrix.dtype)};
}

// Tiles of so many rows that groups have at most: each may end with a part of one.
int64_t heights(const GroupsThere& there, int64_t rows) {
  return masked(there) ? there.count * blocks(there.capacity, rows) : blocks(there.rows, rows) + there.count;
}

}  // namespace

const char* m_grouped_refuses(const GroupedGemmProblem& p) {
  const GroupsThere& there = p.there;
  if (there.separate_weights) return "takes weights that are one tensor";
  for (const Stack& x : {there.a, there.b})
    if (const char* reason = operand_refused(x)) return reason;
  const Matrix& b = there.b.matrix;
  if (const char* reason = scales_refused(p.shared.sa, b.cols)) return reason;
  return weight_scales_refused(p.shared.sb, b.rows, b.cols);
}

void m_grouped(const GroupedGemmProblem& of) {
  GemmParameters p = parameters(of);
  const GroupsThere& there = of.there;
  const TilePlan plan = tile_plan(plan_case(of));
  const int64_t high = plan.rows * (plan.shared == 2 ? 2 : 1);
  launch_tiles(kGroupedKernels, plan, p, there.a, there.b, there.out, heights(there, high) * units_of(plan, 1, p.n),
               of.stream);
}

const char* m_grouped_stream_refuses(const GroupedGemmProblem& p) {
  return group_rows(p.there) > kMostStreamRows ? "takes groups of up to 64 rows on average" : m_grouped_refuses(p);
}

void m_grouped_stream(const GroupedGemmProblem& of) {
  GemmParameters p = parameters(of);
  const GroupsThere& there = of.there;
  const StreamPlan plan = stream_plan(plan_case(of));
  launch_stream(kGroupedStreamKernels, plan, p, there.a, there.b,
                heights(there, plan.tokens) * blocks(p.n, kStreamColumns), of.stream);
}

namespace {

// An operand whose rows are those of k.
Rows rows_across(const Stack& x) {
  return {reinterpret_cast<const uint8_t*>(x.matrix.data), 1, x.matrix.row_stride, 0};
}

// like: has the blocks of the transposed operand.
Scales scales_across(const Stack& values, const ScaleGrid& like) {
  ScaleGrid turned{values.matrix, like.block_rows, like.block_cols};
  std::swap(turned.values.row_stride, turned.values.col_stride);
  return scales_of(turned, 0);
}

}  // namespace

const char* k_grouped_refuses(const GroupedGemmProblem& p) {
  const GroupsThere& there = p.there;
  for (const Stack& x : {there.a, there.b})
    if (const char* reason = operand_refused(x)) return reason;
  for (const ScaleGrid& s : {p.shared.sa, p.shared.sb})
    if (const char* reason = scales_refused(s, there.rows)) return reason;
  return nullptr;
}

void k_grouped(const GroupedGemmProblem& of) {
  const GroupsThere& there = of.there;
  GemmParameters p;
  p.a = rows_across(there.a);
  p.b = rows_across(there.b);
  p.sa = scales_across(there.sa, of.shared.sa);
  p.sb = scales_across(there.sb, of.shared.sb);
  p.c = addend_of(there.c);
  p.out = result_of(there.out);
  set_layout(p, there);
  p.rows = static_cast<int32_t>(there.a.matrix.cols);
  p.n = static_cast<int32_t>(there.b.matrix.cols);
  p.k = static_cast<int32_t>(there.rows);
  launch_cross(p, there.a, there.b, there.out, of.stream);
}

}  // namespace moekern::cuda
