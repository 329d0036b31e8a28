// 1 x 128 blocks, which come one after another whatever row they are of. Eight threads share one.
#pragma once
#include "cuda/kernels/cast.cuh"

namespace moekern::cuda {

// Where a row goes: store(target) for every row of q and of the scales that it becomes.
struct SameRow {
  template <class Store>
  __device__ void operator()(uint32_t row, const Store& store) const {
    store(row);
  }
};

template <class Input, class Targets = SameRow>
__device__ inline void cast_rows(const CastParameters& p, const Targets& targets = {}) {
  constexpr int V = Input::V, kLanes = kCastThreads / kBlocksATime, kPieces = kCastBlock / kLanes / V;
  const int lane = threadIdx.x % kLanes;
  const uint32_t index = blockIdx.x * kBlocksATime + threadIdx.x / kLanes;
  const uint32_t row = index / p.col_blocks, block = index % p.col_blocks, col = block * kCastBlock + lane * V;
  typename Input::Loaded loaded[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) loaded[i] = Input::load(p, row, col + i * kLanes * V);
  typename Input::Held x[kPieces];
  typename Input::Tops tops{};
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    x[i] = Input::hold(loaded[i]);
    Input::see(tops, x[i]);
  }
  uint32_t amax = Input::amax(tops);
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) amax = max(amax, __shfl_xor_sync(~0u, amax, step));
  float scale;
  Codes<Input> codes[kPieces];
  with_format(p.q.dtype, [&](auto format) {
    constexpr Dtype F = decltype(format)::value;
    scale = scale_of<F>(amax, p.round_scale_up);
    const float inverse = __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < kPieces; ++i) codes[i] = codes_of<Input, F>(x[i], [&](int) { return inverse; });
  });
  if (row >= p.rows) return;
  targets(row, [&](uint32_t target) {
    if (lane == 0) *reinterpret_cast<float*>(at(p.scale, target, block)) = scale;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) store_codes(p, target, col + i * kLanes * V, codes[i]);
  });
}

}  // namespace moekern::cuda
