// Routing of tokens: the gate, the gathering of rows by expert, their weighted sum by token. Next: moe/gate.cpp and
// moe/permute.cpp, compiled once; they call through the tables that moe/<isa>.cpp fill from moe/select.h and
// moe/move.h.
#pragma once
#include <cstdint>

#include "cpu/gemm/ukernel.h"
#include "moekern/kernel.h"

namespace moekern::cpu {

// Keys and scores come in blocks of as many: a whole number of vectors of every ISA, so that sums have one order.
constexpr int kGateBlock = 16;
constexpr int in_blocks(int n) { return (n + kGateBlock - 1) / kGateBlock * kGateBlock; }

constexpr int kGateRows = 4;  // at once

// What all rows of a call share.
struct GatePlan {
  int experts, topk, groups, kept_groups;
  int group_stride;   // keys of one group: its experts, padded to whole blocks
  bool sigmoid;       // else softmax
  const float* bias;  // experts, and a block to read on; or null
  float mask_value;

  int group_size() const { return experts / groups; }
  int keys() const { return groups * group_stride; }
  int blocks() const { return keys() / kGateBlock; }
  int scratch() const { return keys() + in_blocks(blocks()) + in_blocks(groups); }
};

struct RoutingIsa {
  // Of up to kGateRows rows, x: logits, -infinity from `experts` to the end of its block, and a block to read on.
  // They become scores; ids are those of the topk largest selection values. scratch: plan.scratch(), by 64 bytes.
  void (*select)(const GatePlan& plan, float* const* x, int32_t* const* scratch, int32_t* const* ids, int rows);
  void (*copy_past_caches)(const char* src, int64_t bytes, char* dst);
  // dst = cast(sum_j weights[j] rows[j], j in order) of n elements; count > 0.
  void (*weighted_sum)(Dtype from, const char* const* rows, const float* weights, int count, int64_t n, Dtype to,
                       char* dst);
};

void gate(const RowOps& rows, const RoutingIsa& isa, const GateProblem& p);
void permute(const RowOps& rows, const RoutingIsa& isa, const PermuteProblem& p);
void unpermute(const RoutingIsa& isa, const UnpermuteProblem& p);

}  // namespace moekern::cpu
