// Of moe_gate.
#pragma once
#include "cuda/kernels/strided.h"

namespace moekern::cuda {

constexpr int kGateWarps = 4;  // of a thread block; each takes a token
constexpr int kWarpLanes = 32;

struct GateParameters {
  Strided logits, bias, weights, ids;  // bias.data: null for none
  uint32_t tokens;
  int experts, topk, groups, kept_groups;  // one group where all are kept
  int group_lanes;                         // lanes that look at a group: a power of two
  int group_stride;                        // words in shared memory from a group to the next
  bool sigmoid, renormalize;
  bool whole_logits, whole_bias;  // they lie so that a lane's run of them comes in 16-byte (or shorter) loads
  float factor, mask_value;
  int shared_words;  // of a warp: every expert's key, group by group, and every group's; 0 where all are kept
};

}  // namespace moekern::cuda
