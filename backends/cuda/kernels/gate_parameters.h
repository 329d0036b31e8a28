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
  bool sigmoid, renormalize;
  bool whole_logits, whole_bias;  // they lie so that a lane's run of them comes in 16-byte (or shorter) loads
  float factor, mask_value;
  int shared_words;  // of a warp: the keys of its lanes' experts, and of the groups
};

}  // namespace moekern::cuda
