// Its kernels: kernels/gemm.cu.
#include "cuda/gemm/dense.h"

#include "cuda/gemm/operands.h"
#include "cuda/gemm/tiles.h"
#include "moekern/arguments.h"

namespace moekern::cuda {

const char* gemm_refuses(const GemmProblem& p) {
  if (p.a_rows) return "takes rows of a in their order";
  for (const Matrix& x : {p.a, p.b})
    if (const char* reason = operand_refused({x})) return reason;
  if (const char* reason = scales_refused(p.sa, p.k())) return reason;
  return weight_scales_refused(p.sb, p.n(), p.k());
}

namespace {

GemmParameters parameters(const GemmProblem& of) {
  GemmParameters p;
  p.a = rows_of({of.a});
  p.b = rows_of({of.b});
  p.sa = scales_of(of.sa, 0);
  p.sb = scales_of(of.sb, 0);
  p.c = addend_of({of.c});
  p.bias = addend_of({of.bias});
  p.out = result_of({of.out});
  p.rows = static_cast<int32_t>(of.m());
  p.n = static_cast<int32_t>(of.n());
  p.k = static_cast<int32_t>(of.k());
  return p;
}

PlanCase plan_case(const GemmProblem& of) {
  return {limits(of.stream.device).processors, of.m(), of.n(), of.k(), 1, size_of(of.out.dtype)};
}

}  // namespace

void gemm(const GemmProblem& of) {
  GemmParameters p = parameters(of);
  const TilePlan plan = tile_plan(plan_case(of));
  launch_tiles(kDenseKernels, plan, p, {of.a}, {of.b}, {of.out}, units_of(plan, of.m(), of.n()), of.stream);
}

const char* gemm_stream_refuses(const GemmProblem& p) {
  return p.m() > kMostStreamRows ? "takes up to 64 rows" : gemm_refuses(p);
}

void gemm_stream(const GemmProblem& of) {
  GemmParameters p = parameters(of);
  const StreamPlan plan = stream_plan(plan_case(of));
  launch_stream(kDenseStreamKernels, plan, p, {of.a}, {of.b},
                blocks(of.m(), plan.tokens) * blocks(of.n(), kStreamColumns), of.stream);
}

}  // namespace moekern::cuda
