#include <algorithm>
#include <cmath>

#include "cpu/gemm/operands.h"
#include "cpu/moe/driver.h"
#include "cpu/parallel.h"

namespace moekern::cpu {
namespace {

// A row takes about a quarter of a microsecond: a task is long enough to hide handing it out.
constexpr int64_t kRowsPerTask = 32;

void load_row(const RowOps& rows, const Matrix& m, int64_t i, float* dst) {
  if (m.col_stride == 1) return rows.load(m.dtype, m.at(i, 0), m.cols, dst);
  for (int64_t j = 0; j < m.cols; ++j) dst[j] = element(m, i, j);
}

// The unbiased scores of the chosen; transformers' epsilon keeps a row of zeros at zero.
void write_weights(const GateProblem& p, int64_t token, const float* scores, const int32_t* ids) {
  float sum = 0;
  for (int k = 0; k < p.topk; ++k) sum += scores[ids[k]];
  const float divisor = p.renormalize ? sum + 1e-20f : 1.f;
  for (int k = 0; k < p.topk; ++k) {
    *reinterpret_cast<float*>(p.weights.at(token, k)) = scores[ids[k]] / divisor * p.routed_scaling_factor;
    *reinterpret_cast<int32_t*>(p.ids.at(token, k)) = ids[k];
  }
}

}  // namespace

void gate(const RowOps& rows, const RoutingIsa& isa, const GateProblem& p) {
  const auto experts = static_cast<int>(p.logits.cols);
  const auto padded = static_cast<int>(round_up(experts, kGateBlock)) + kGateBlock;
  float bias[kMaxExperts + kGateBlock] = {};
  if (p.correction_bias) load_row(rows, p.correction_bias, 0, bias);
  const GatePlan plan = {experts,
                         p.topk,
                         p.groups,
                         p.kept_groups,
                         static_cast<int>(round_up(experts / p.groups, kGateBlock)),
                         p.sigmoid,
                         p.correction_bias ? bias : nullptr,
                         p.mask_value};
  parallel_for(p.threads, ceil_div(p.logits.rows, kRowsPerTask), [&](int64_t task) {
    float* x = scratch_of<float>(Slot::row, padded);
    int32_t* keys = scratch_of<int32_t>(Slot::own_a, plan.keys());
    int32_t ids[kMaxTopk];
    const int64_t end = std::min((task + 1) * kRowsPerTask, p.logits.rows);
    for (int64_t t = task * kRowsPerTask; t < end; ++t) {
      load_row(rows, p.logits, t, x);
      std::fill(x + experts, x + padded, -INFINITY);
      isa.select(plan, x, keys, ids);
      write_weights(p, t, x, ids);
    }
  });
}

}  // namespace moekern::cpu
