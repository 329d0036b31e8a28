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

// Integers in the order of the numbers, NaN above all. Of zeros there is +0 only: scores are not negative, and a sum
// is -0 only if both of its terms are. A key that is no NaN's is its own inverse.
inline I32 key_of(F32 x) {
  const I32 u = bits(x);
  return if_nan(x, set1_i32(kNanKey), bit_xor(u, bit_and(sra32<31>(u), set1_i32(0x7fffffffu))));
}
inline uint32_t key_of_one(float x) {
  const uint32_t u = float_bits(x);
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

// Which of a block's keys equal `wanted`, as bits. Whole blocks, since the vector that has the key can't be predicted.
inline uint32_t equal_in_block(const int32_t* keys, I32 wanted) {
  uint32_t found = 0;
#pragma GCC unroll 16
  for (int v = 0; v < kGateBlock; v += W) found |= equal_lanes(load_i32(keys + v), wanted) << v;
  return found;
}

// The first block with a key that equals `wanted`, as one does.
inline int32_t* find_block(int32_t* keys, I32 wanted) {
  while (!equal_in_block(keys, wanted)) keys += kGateBlock;
  return keys;
}

inline int find_lane(const int32_t* block, I32 wanted) { return __builtin_ctz(equal_in_block(block, wanted)); }

// A vector is stored, not an element: what loads it next need not wait for the cache.
inline void replace(int32_t* block, int lane, uint32_t becomes) {
  int32_t* at = block + (W == kGateBlock ? 0 : lane / W * W);
  const I32 place = set1_i32(static_cast<uint32_t>(lane % W));
  store_i32(at, if_equal(load_i32(kLanes), place, set1_i32(becomes), load_i32(at)));
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

// The two largest of a group, largest first. The lanes' own two largest are kept apart, so that equal values count
// twice.
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
  F32 top = load(x);
  for (int i = W; i < n; i += W) top = max(load(x + i), top);  // top when the load is NaN, which e^x will be
  const F32 shift = set1(number_of(reduce_max_i32(key_of(top))));
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

// What selection keeps of a row: the keys, group by group, the maxima of their blocks, and the keys of the groups.
struct RowKeys {
  int32_t *keys, *maxima, *groups;
  RowKeys(const GatePlan& plan, int32_t* scratch)
      : keys(scratch), maxima(keys + plan.keys()), groups(maxima + in_blocks(plan.blocks())) {}
};

inline void make_keys(const GatePlan& plan, const float* scores, const RowKeys& row) {
  const int size = plan.group_size(), stride = plan.group_stride;
  for (int g = 0; g < plan.groups; ++g) {
    int32_t* keys = row.keys + g * stride;
    const float* first = scores + g * size;
    const float* bias = plan.bias ? plan.bias + g * size : nullptr;
    for (int i = 0; i < stride; i += W) {
      F32 value = load(first + i);
      if (bias) value = add(value, load(bias + i));
      store_i32(keys + i, key_of(value));
    }
    for (int i = size; i < stride; ++i) keys[i] = as_signed(kNone);
  }
  for (int b = 0; b < plan.blocks(); ++b) row.maxima[b] = as_signed(block_max(row.keys + b * kGateBlock));
  for (int b = plan.blocks(); b < in_blocks(plan.blocks()); ++b) row.maxima[b] = as_signed(kNone);
}

inline void make_group_keys(const GatePlan& plan, const RowKeys& row) {
  fill(row.groups, in_blocks(plan.groups), kNone);
  for (int g = 0; g < plan.groups; ++g) {
    uint32_t two[2];
    best_two(row.keys + g * plan.group_stride, plan.group_stride, two);
    row.groups[g] = as_signed(plan.bias ? key_of_one(number_of(two[0]) + number_of(two[1])) : two[0]);
  }
}

// Groups that were not taken still have their key: all of theirs become the mask's.
inline void mask_groups(const GatePlan& plan, const RowKeys& row) {
  const uint32_t mask = key_of_one(plan.mask_value);
  const int size = plan.group_size(), stride = plan.group_stride, blocks = stride / kGateBlock;
  for (int g = 0; g < plan.groups; ++g) {
    if (row.groups[g] == as_signed(kNone)) continue;
    fill(row.keys + g * stride, stride, mask);
    for (int i = size; i < stride; ++i) row.keys[g * stride + i] = as_signed(kNone);
    for (int b = 0; b < blocks; ++b) row.maxima[g * blocks + b] = as_signed(mask);
  }
}

// The first of the largest keys is taken away; its place.
inline int take_best(const RowKeys& row, int padded_blocks) {
  const uint32_t best = largest(row.maxima, padded_blocks);
  const I32 wanted = set1_i32(best);
  int32_t* maxima = find_block(row.maxima, wanted);
  const int b = find_lane(maxima, wanted);
  int32_t* block = row.keys + (maxima - row.maxima + b) * kGateBlock;
  const int lane = find_lane(block, wanted);
  replace(block, lane, kNone);
  replace(maxima, b, block_max(block));
  return static_cast<int>(block - row.keys) + lane;
}

inline void take_best_group(const GatePlan& plan, const RowKeys& row) {
  const I32 wanted = set1_i32(largest(row.groups, in_blocks(plan.groups)));
  int32_t* block = find_block(row.groups, wanted);
  replace(block, find_lane(block, wanted), kNone);
}

// Each value taken depends on the one before: rows take turns, so that they wait together.
void select(const GatePlan& plan, float* const* x, int32_t* const* scratch, int32_t* const* ids, int rows) {
  const int padded = in_blocks(plan.experts), padded_blocks = in_blocks(plan.blocks());
  for (int r = 0; r < rows; ++r) {
    plan.sigmoid ? sigmoid_row(x[r], padded) : softmax_row(x[r], padded);
    make_keys(plan, x[r], {plan, scratch[r]});
  }
  if (plan.kept_groups < plan.groups) {
    for (int r = 0; r < rows; ++r) make_group_keys(plan, {plan, scratch[r]});
    for (int n = 0; n < plan.kept_groups; ++n)
      for (int r = 0; r < rows; ++r) take_best_group(plan, {plan, scratch[r]});
    for (int r = 0; r < rows; ++r) mask_groups(plan, {plan, scratch[r]});
  }
  for (int k = 0; k < plan.topk; ++k)
    for (int r = 0; r < rows; ++r) {
      const int place = take_best({plan, scratch[r]}, padded_blocks);
      ids[r][k] = place / plan.group_stride * plan.group_size() + place % plan.group_stride;
    }
}

}  // namespace
}  // namespace moekern::cpu
