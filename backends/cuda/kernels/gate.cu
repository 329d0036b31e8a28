// The experts of every token. A warp takes a token, a lane K neighbouring experts, whose selection values become
// integers that order alike. Nothing is sorted: the largest are taken one by one. Each lane knows its own largest; of
// the lane that has the warp's, all lanes look at the K keys together, in shared memory.
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/exponential.cuh"
#include "cuda/kernels/gate_parameters.h"

namespace moekern::cuda {
namespace {

constexpr uint32_t kAll = ~0u, kNone = 0;  // kNone: below the key of every number

// In the order of the numbers, NaN above all. There is no -0: scores have none, and no sum with one is -0.
__device__ inline uint32_t key_of(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? ~0u : bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ inline float number_of(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

__device__ inline float sum_of_warp(float x) {
#pragma unroll
  for (int step = kWarpLanes / 2; step; step /= 2) x = __fadd_rn(x, __shfl_xor_sync(kAll, x, step));
  return x;
}

// K floats from `first` on, in units of at most 16 bytes; `missing` behind the last.
template <int K, Dtype F>
__device__ inline void load_units(const char* row, int first, int count, float missing, float (&x)[K]) {
  constexpr int kSize = F == Dtype::f32 ? 4 : 2, U = K < kPerPiece<F> ? K : kPerPiece<F>;
#pragma unroll
  for (int u = 0; u < K; u += U) {
    const bool there = first + u < count;
    const char* at = row + (first + u) * kSize;
    Piece piece{};
    if (there) {
      if constexpr (U * kSize == 16) *reinterpret_cast<uint4*>(piece.words) = *reinterpret_cast<const uint4*>(at);
      if constexpr (U * kSize == 8) *reinterpret_cast<uint2*>(piece.words) = *reinterpret_cast<const uint2*>(at);
      if constexpr (U * kSize == 4) piece.words[0] = *reinterpret_cast<const uint32_t*>(at);
      if constexpr (U * kSize == 2) piece.words[0] = *reinterpret_cast<const uint16_t*>(at);
    }
#pragma unroll
    for (int i = 0; i < U; ++i) x[u + i] = there ? element<F>(piece, i) : missing;
  }
}

template <int K>
__device__ inline void load_run(const Strided& m, uint32_t row, int first, int count, bool whole_units, float missing,
                                float (&x)[K]) {
  const char* begin = at(m, row, 0);
  if (!whole_units) {
#pragma unroll
    for (int i = 0; i < K; ++i)
      x[i] = first + i < count ? load_float(begin + (first + i) * m.col_step, m.dtype) : missing;
  } else if (m.dtype == Dtype::f32) {
    load_units<K, Dtype::f32>(begin, first, count, missing, x);
  } else if (m.dtype == Dtype::f16) {
    load_units<K, Dtype::f16>(begin, first, count, missing, x);
  } else {
    load_units<K, Dtype::bf16>(begin, first, count, missing, x);
  }
}

template <int K>
__device__ inline uint32_t largest(const uint32_t (&keys)[K]) {
  uint32_t best = keys[0];
#pragma unroll
  for (int i = 1; i < K; ++i) best = max(best, keys[i]);
  return best;
}

// The place of the largest key, of equal ones the first. It becomes kNone. Lane l has the keys from l K on, the largest
// of which is `best`.
template <int K>
__device__ inline int take(uint32_t* keys, uint32_t& best, int lane) {
  const uint32_t top = __reduce_max_sync(kAll, best);
  const int owner = __ffs(__ballot_sync(kAll, best == top)) - 1;
  uint32_t key = lane < K ? keys[owner * K + lane] : kNone;
  const int at = __ffs(__ballot_sync(kAll, key == top)) - 1;
  if (lane == at) keys[owner * K + lane] = key = kNone;
  __syncwarp();
  const uint32_t rest = __reduce_max_sync(kAll, key);
  if (lane == owner) best = rest;
  return owner * K + at;
}

// A lane's keys, to where all lanes may look at them.
template <int K>
__device__ inline void share(uint32_t* all, int lane, const uint32_t (&keys)[K]) {
  if constexpr (K % 4 == 0) {
#pragma unroll
    for (int i = 0; i < K; i += 4)
      *reinterpret_cast<uint4*>(all + lane * K + i) = {keys[i], keys[i + 1], keys[i + 2], keys[i + 3]};
  } else {
#pragma unroll
    for (int i = 0; i < K; ++i) all[lane * K + i] = keys[i];
  }
  __syncwarp();
}

// The two largest of the keys that several lanes have seen.
struct TwoBest {
  uint32_t first = kNone, second = kNone;
  __device__ void see(uint32_t key) {
    second = max(second, min(first, key));
    first = max(first, key);
  }
};

// What the groups count becomes kNone where they are kept.
template <int K>
__device__ inline void keep_groups(const GateParameters& p, uint32_t* values, int lane) {
  uint32_t mine[K];
#pragma unroll
  for (int i = 0; i < K; ++i) mine[i] = lane * K + i < p.groups ? values[lane * K + i] : kNone;
  uint32_t best = largest(mine);
  share(values, lane, mine);
  for (int n = 0; n < p.kept_groups; ++n) take<K>(values, best, lane);
}

// The experts of all but the best groups get the key of the mask.
template <int K>
__device__ inline void mask_groups(const GateParameters& p, const uint32_t* all, uint32_t* values, int lane,
                                   uint32_t (&keys)[K]) {
  const int size = p.experts / p.groups, at_once = kWarpLanes / p.group_lanes;
  const int parts = (size + p.group_lanes - 1) / p.group_lanes;
  for (int before = 0; before < p.groups; before += at_once) {
    const int g = before + lane / p.group_lanes;
    TwoBest best;
    if (g < p.groups)
      // Groups begin with different parts of theirs: those of 32 experts would all use the same banks.
      for (int i = 0, part = g % parts; i < parts; ++i, part = part + 1 < parts ? part + 1 : 0) {
        const int j = part * p.group_lanes + lane % p.group_lanes;
        if (j < size) best.see(all[g * size + j]);
      }
    for (int step = p.group_lanes / 2; step; step /= 2) {
      const uint32_t one = __shfl_xor_sync(kAll, best.first, step), other = __shfl_xor_sync(kAll, best.second, step);
      best.see(one);
      best.see(other);
    }
    if (g < p.groups && lane % p.group_lanes == 0)
      values[g] = p.bias.data ? key_of(__fadd_rn(number_of(best.first), number_of(best.second))) : best.first;
  }
  __syncwarp();
  if (p.groups <= kWarpLanes)
    keep_groups<1>(p, values, lane);
  else
    keep_groups<K>(p, values, lane);
  int group = lane * K / size, place = lane * K % size;
#pragma unroll
  for (int i = 0; i < K; ++i) {
    if (lane * K + i < p.experts && values[group] != kNone) keys[i] = key_of(p.mask_value);
    if (++place == size) {
      place = 0;
      ++group;
    }
  }
}

// A token's scores, the same bits whenever they are asked for.
struct Score {
  bool sigmoid;
  float top, inverse;
  __device__ float operator()(float x) const {
    if (sigmoid) return __frcp_rn(__fadd_rn(1.f, exponential(-x)));
    return __fmul_rn(exponential(__fsub_rn(x, top)), inverse);
  }
};

template <int K>
__device__ inline void gate(const GateParameters& p) {
  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / kWarpLanes, lane = threadIdx.x % kWarpLanes, first = lane * K;
  const uint32_t token = blockIdx.x * kGateWarps + warp;
  if (token >= p.tokens) return;
  float x[K];
  load_run(p.logits, token, first, p.experts, p.whole_logits, -INFINITY, x);
  Score score{p.sigmoid, 0, 0};
  if (!p.sigmoid) {
    float top = x[0];
#pragma unroll
    for (int i = 1; i < K; ++i) top = fmaxf(top, x[i]);
    score.top = number_of(__reduce_max_sync(kAll, key_of(top)));
    float sum = 0;
#pragma unroll
    for (int i = 0; i < K; ++i) {
      x[i] = exponential(__fsub_rn(x[i], score.top));
      sum = __fadd_rn(sum, x[i]);
    }
    score.inverse = __frcp_rn(sum_of_warp(sum));  // NaN with a NaN or an infinity among the logits
#pragma unroll
    for (int i = 0; i < K; ++i) x[i] = __fmul_rn(x[i], score.inverse);
  } else {
#pragma unroll
    for (int i = 0; i < K; ++i) x[i] = score(x[i]);
  }
  if (p.bias.data) {
    float bias[K];
    load_run(p.bias, 0, first, p.experts, p.whole_bias, 0.f, bias);
#pragma unroll
    for (int i = 0; i < K; ++i) x[i] = __fadd_rn(x[i], bias[i]);
  }
  uint32_t keys[K];
#pragma unroll
  for (int i = 0; i < K; ++i) keys[i] = first + i < p.experts ? key_of(x[i]) : kNone;
  uint32_t* all = reinterpret_cast<uint32_t*>(shared) + warp * p.shared_words;
  share(all, lane, keys);
  if (p.kept_groups < p.groups) {
    mask_groups(p, all, all + kWarpLanes * K, lane, keys);
    share(all, lane, keys);
  }
  uint32_t best = largest(keys);
  int chosen = 0;
  for (int j = 0; j < p.topk; ++j) {
    const int place = take<K>(all, best, lane);
    chosen = lane == j ? place : chosen;
  }
  // Lane j has slot j. Its score is computed again: keeping all of them would take K registers more.
  const bool mine = lane < p.topk;
  float weight = mine ? score(load_float(at(p.logits, token, chosen), p.logits.dtype)) : 0.f;
  if (p.renormalize) weight = __fdiv_rn(weight, __fadd_rn(sum_of_warp(weight), 1e-20f));
  if (mine) {
    *reinterpret_cast<float*>(at(p.weights, token, lane)) = __fmul_rn(weight, p.factor);
    *reinterpret_cast<int32_t*>(at(p.ids, token, lane)) = chosen;
  }
}

}  // namespace

#define MOEKERN_GATE(K)                                                   \
  extern "C" __global__ void __launch_bounds__(kGateWarps* kWarpLanes, 1) \
      gate_##K(const __grid_constant__ GateParameters p) {                \
    gate<K>(p);                                                           \
  }

MOEKERN_GATE(1)
MOEKERN_GATE(2)
MOEKERN_GATE(4)
MOEKERN_GATE(8)
MOEKERN_GATE(16)
MOEKERN_GATE(32)

}  // namespace moekern::cuda
