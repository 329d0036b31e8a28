// Routing of tokens: the gate, the gathering of rows by expert, their weighted sum by token. Next: moe/gate.cpp and
// moe/permute.cpp, compiled once; they call through the tables that moe/<isa>.cpp fill from moe/select.h and moe/move.h.
#pragma once
#include <cstdint>

#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

// Keys and scores come in blocks of as many: a whole number of vectors of every ISA, so that sums have one order.
constexpr int kGateBlock = 16;

// What all rows of a call share.
struct GatePlan {
  int experts, topk, groups, kept_groups;
  int group_stride;   // keys of one group: its experts, padded to whole blocks
  bool sigmoid;       // else softmax
  const float* bias;  // experts, and a block to read on; or null
  float mask_value;

  int group_size() const { return experts / groups; }
  int keys() const { return groups * group_stride; }
};

struct RoutingIsa {
  // x: logits, -infinity from `experts` to the end of its block, and a block to read on. They become scores; ids
  // are those of the topk largest selection values. keys: plan.keys() of scratch, 64-byte aligned.
  void (*select)(const GatePlan& plan, float* x, int32_t* keys, int32_t* ids);
  void (*copy_past_caches)(const char* src, int64_t bytes, char* dst);
  // dst = cast(sum_j weights[j] rows[j], j in order) of n elements; count > 0.
  void (*weighted_sum)(Dtype from, const char* const* rows, const float* weights, int count, int64_t n, Dtype to,
                       char* dst);
};

void gate(const RowOps& rows, const RoutingIsa& isa, const GateProblem& p);
void permute(const RoutingIsa& isa, const PermuteProblem& p);
void unpermute(const RoutingIsa& isa, const UnpermuteProblem& p);

}  // namespace moekern::cpu
