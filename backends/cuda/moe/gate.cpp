// Its kernels: kernels/gate.cu.
#include "cuda/moe/gate.h"

#include <algorithm>

#include "cuda/kernels/gate_parameters.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/strided.h"

namespace moekern::cuda {
namespace {

constexpr const char* kKernels[] = {"gate_1", "gate_2", "gate_4", "gate_8", "gate_16", "gate_32"};
static_assert(kMaxExperts <= 32 * kWarpLanes && kMaxTopk <= kWarpLanes, "a lane has 32 experts, and one slot");

// Whether runs of K elements come in loads of at most 16 bytes, none of which passes the end of a row.
bool whole(const Matrix& m, int k) {
  const int64_t unit = std::min<int64_t>(k, kPieceBytes / size_of(m.dtype));
  return has_rows_at(m, unit * size_of(m.dtype)) && m.cols % unit == 0;
}

}  // namespace

const char* gate_refuses(const GateProblem& p) {
  return p.logits.rows > INT32_MAX ? "takes fewer than 2^31 tokens" : nullptr;
}

void gate(const GateProblem& p) {
  const int experts = static_cast<int>(p.logits.cols), warps = static_cast<int>(p.logits.rows);
  int kernel = 0;
  while (kWarpLanes << kernel < experts) ++kernel;
  const bool masked = p.kept_groups < p.groups;
  const int groups = masked ? p.groups : 1;
  int lanes = kWarpLanes;
  while (lanes > 1 && lanes * groups > kWarpLanes) lanes /= 2;
  const int keys = kWarpLanes << kernel, words = keys + (!masked ? 0 : groups <= kWarpLanes ? kWarpLanes : keys);
  const GateParameters parameters{strided(p.logits),
                                  strided(p.correction_bias),
                                  strided(p.weights),
                                  strided(p.ids),
                                  static_cast<uint32_t>(warps),
                                  experts,
                                  p.topk,
                                  groups,
                                  masked ? p.kept_groups : 1,
                                  lanes,
                                  p.sigmoid,
                                  p.renormalize,
                                  whole(p.logits, 1 << kernel),
                                  p.correction_bias && whole(p.correction_bias, 1 << kernel),
                                  p.routed_scaling_factor,
                                  p.mask_value + 0.f,  // 0 of either sign is 0
                                  words};
  const auto blocks = static_cast<unsigned>(ceil_div(warps, kGateWarps));
  launch({kKernels[kernel],
          {blocks, 1, 1},
          kGateWarps * kWarpLanes,
          1,
          static_cast<unsigned>(kGateWarps * words * sizeof(uint32_t)),
          &parameters},
         p.stream);
}

}  // namespace moekern::cuda
