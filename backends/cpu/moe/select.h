// One row of the gate: scores, selection values as integers that order like them, and the largest of those.
//
// Values are taken one by one from maxima of blocks, never sorted: with 256 experts, 16 reductions make
// the maxima, and each expert taken costs two more. Equal keys are found from the front: the lowest index first.
#pragma once

// Included after one simd/*.h: everything here is per ISA.
#include "cpu/moe/driver.h"
#include "cpu/rows.h"

namespace moekern::cpu {
namespace {

static_assert(kGateBlock % W == 0, "whole vectors");
constexpr uint32_t kNone = 0x80000000u;  // below the key of every number
constexpr uint32_t kNanKey = 0x7fffffffu;
alignas(64) constexpr uint32_t kLanes[kGateBlock] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Integers in the order of the numbers: both zeros alike, NaN above all. A key that is no NaN's is its own inverse.
inline I32 key_of(F32 x) {
  const I32 u = bits(add(x, zero()));  // -0 + 0 is 0
  return if_nan(x, set1_i32(kNanKey), bit_xor(u, bit_and(sra32<31>(u), set1_i32(0x7fffffffu))));
}
inline uint32_t key_of_one(float x) {
  const uint32_t u = float_bits(x + 0.f);
  return x != x ? kNanKey : u ^ (u >> 31 ? 0x7fffffffu : 0);
}
inline float number_of(uint32_t key) { return bits_float(key ^ (key >> 31 ? 0x7fffffffu : 0)); }

inline int32_t as_signed(uint32_t x) { return static_cast<int32_t>(x); }

// The largest key of a block.
inline uint32_t block_max(const int32_t* keys) {
  I32 top = load_i32(keys);
#pragma GCC unroll 16
  for (int v = W; v < kGateBlock; v += W) top = max_i32(top, load_i32(keys + v));
  return reduce_max_i32(top);
}

// The place of the first of `keys` that equals `key`, which then becomes `becomes`. A vector is stored, not an
// element: what loads it next need not wait for the cache.
inline int replace_first(int32_t* keys, uint32_t key, uint32_t becomes) {
  const I32 wanted = set1_i32(key);
  for (int v = 0;; v += W) {
    const I32 x = load_i32(keys + v);
    const uint32_t found = equal_lanes(x, wanted);
    if (!found) continue;
    const int lane = __builtin_ctz(found);
    store_i32(keys + v, if_equal(load_i32(kLanes), set1_i32(static_cast<uint32_t>(lane)), set1_i32(becomes), x));
    return v + lane;
  }
}

inline uint32_t largest(const int32_t* keys, int n) {
  I32 top = load_i32(keys);
  for (int i = W; i < n; i += W) top = max_i32(top, load_i32(keys + i));
  return reduce_max_i32(top);
}

inline void fill(int32_t* keys, int n, uint32_t key) {
  const I32 value = set1_i32(key);
  for (int i = 0; i < n; i += W) store_i32(keys + i, value);
}

// The two largest of a group, largest first. The lanes' own two largest are kept apart, so that equal values count twice.
inline void best_two(const int32_t* keys, int n, uint32_t* two) {
  I32 first = load_i32(keys), second = set1_i32(kNone);
  for (int i = W; i < n; i += W) {
    const I32 x = load_i32(keys + i);
    second = max_i32(second, min_i32(first, x));
    first = max_i32(first, x);
  }
  two[0] = reduce_max_i32(first);
  const I32 top = set1_i32(two[0]);
  const uint32_t holders = equal_lanes(first, top);
  two[1] = holders & (holders - 1) ? two[0] : reduce_max_i32(if_equal(first, top, second, first));
}

inline void sigmoid_row(float* x, int n) {
  const F32 one = set1(1.f);
  for (int i = 0; i < n; i += W) store(x + i, div(one, add(one, exp_to_infinity(sub(zero(), load(x + i))))));
}

// The sum has the order of sixteen lanes whatever W is.
inline void softmax_row(float* x, int n) {
  I32 top = key_of(load(x));
  for (int i = W; i < n; i += W) top = max_i32(top, key_of(load(x + i)));
  const F32 shift = set1(number_of(reduce_max_i32(top)));
  F32 sums[kGateBlock / W];
#pragma GCC unroll 16
  for (F32& sum : sums) sum = zero();
  for (int i = 0; i < n; i += kGateBlock) {
#pragma GCC unroll 16
    for (int v = 0; v < kGateBlock / W; ++v) {
      const F32 e = exp_to_zero(sub(load(x + i + v * W), shift));
      store(x + i + v * W, e);
      sums[v] = add(sums[v], e);
    }
  }
  alignas(64) float lanes[kGateBlock];
#pragma GCC unroll 16
  for (int v = 0; v < kGateBlock / W; ++v) store(lanes + v * W, sums[v]);
  for (int half = kGateBlock / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  const F32 sum = set1(lanes[0]);
  for (int i = 0; i < n; i += W) store(x + i, div(load(x + i), sum));
}

// Keys of the selection values, group by group, and the maxima of their blocks.
inline void make_keys(const GatePlan& plan, const float* scores, int32_t* keys, int32_t* maxima) {
  const int size = plan.group_size(), stride = plan.group_stride;
  for (int g = 0; g < plan.groups; ++g, scores += size, keys += stride) {
    const float* bias = plan.bias ? plan.bias + g * size : nullptr;
    for (int i = 0; i < stride; i += W) {
      F32 value = load(scores + i);
      if (bias) value = add(value, load(bias + i));
      store_i32(keys + i, key_of(value));
    }
    for (int i = size; i < stride; ++i) keys[i] = as_signed(kNone);
    for (int b = 0; b < stride; b += kGateBlock) *maxima++ = as_signed(block_max(keys + b));
  }
}

// All keys outside of the best groups become the mask's.
inline void mask_groups(const GatePlan& plan, int32_t* keys, int32_t* maxima, int32_t* group_keys) {
  const int stride = plan.group_stride, padded = (plan.groups + kGateBlock - 1) / kGateBlock * kGateBlock;
  fill(group_keys, padded, kNone);
  for (int g = 0; g < plan.groups; ++g) {
    uint32_t two[2];
    best_two(keys + g * stride, stride, two);
    group_keys[g] = as_signed(plan.bias ? key_of_one(number_of(two[0]) + number_of(two[1])) : two[0]);
  }
  for (int n = 0; n < plan.kept_groups; ++n) replace_first(group_keys, largest(group_keys, padded), kNone);
  const uint32_t mask = key_of_one(plan.mask_value);
  for (int g = 0; g < plan.groups; ++g) {
    if (group_keys[g] == as_signed(kNone)) continue;
    const int size = plan.group_size();
    fill(keys + g * stride, stride, mask);
    for (int i = size; i < stride; ++i) keys[g * stride + i] = as_signed(kNone);
    for (int b = 0; b < stride / kGateBlock; ++b) maxima[g * stride / kGateBlock + b] = as_signed(mask);
  }
}

void select(const GatePlan& plan, float* x, int32_t* keys, int32_t* ids) {
  const int padded = (plan.experts + kGateBlock - 1) / kGateBlock * kGateBlock;
  plan.sigmoid ? sigmoid_row(x, padded) : softmax_row(x, padded);
  const int stride = plan.group_stride, blocks = plan.keys() / kGateBlock;
  const int padded_blocks = (blocks + kGateBlock - 1) / kGateBlock * kGateBlock;
  alignas(64) int32_t maxima[kMaxExperts], group_keys[kMaxExperts];  // a group has at least one block
  make_keys(plan, x, keys, maxima);
  if (plan.kept_groups < plan.groups) mask_groups(plan, keys, maxima, group_keys);
  for (int b = blocks; b < padded_blocks; ++b) maxima[b] = as_signed(kNone);
  for (int k = 0; k < plan.topk; ++k) {
    const uint32_t best = largest(maxima, padded_blocks);
    // The maximum of the block is replaced once the expert is taken: until then it is found by its value.
    int b = 0;
    for (const I32 wanted = set1_i32(best);; b += W)
      if (const uint32_t found = equal_lanes(load_i32(maxima + b), wanted)) {
        b += __builtin_ctz(found);
        break;
      }
    const int place = b * kGateBlock + replace_first(keys + b * kGateBlock, best, kNone);
    replace_first(maxima + b / W * W, best, block_max(keys + b * kGateBlock));
    ids[k] = place / stride * plan.group_size() + place % stride;
  }
}

}  // namespace
}  // namespace moekern::cpu
