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
  const int width = in_blocks(experts) + kGateBlock;
  float bias[kMaxExperts + kGateBlock] = {};
  if (p.correction_bias) load_row(rows, p.correction_bias, 0, bias);
  const GatePlan plan = {experts,
                         p.topk,
                         p.groups,
                         p.kept_groups,
                         in_blocks(experts / p.groups),
                         p.sigmoid,
                         p.correction_bias ? bias : nullptr,
                         p.mask_value + 0.f};  // 0 of either sign is 0
  parallel_for(p.threads, ceil_div(p.logits.rows, kRowsPerTask), [&](int64_t task) {
    float* values = scratch_of<float>(Slot::row, kGateRows * width);
    int32_t* keys = scratch_of<int32_t>(Slot::own_a, kGateRows * plan.scratch());
    int32_t ids[kGateRows][kMaxTopk];
    float* x[kGateRows];
    int32_t *scratch[kGateRows], *chosen[kGateRows];
    for (int r = 0; r < kGateRows; ++r) {
      x[r] = values + r * width;
      scratch[r] = keys + r * plan.scratch();
      chosen[r] = ids[r];
    }
    const int64_t end = std::min((task + 1) * kRowsPerTask, p.logits.rows);
    for (int64_t t = task * kRowsPerTask; t < end; t += kGateRows) {
      const auto count = static_cast<int>(std::min<int64_t>(kGateRows, end - t));
      for (int r = 0; r < count; ++r) {
        load_row(rows, p.logits, t + r, x[r]);
        std::fill(x[r] + experts, x[r] + width, -INFINITY);
      }
      isa.select(plan, x, scratch, chosen, count);
      for (int r = 0; r < count; ++r) write_weights(p, t + r, x[r], ids[r]);
    }
  });
}

}  // namespace moekern::cpu
