// 1 x 128 blocks, which come one after another whatever row they are of. Eight threads share one.
#pragma once
#include "cuda/kernels/cast.cuh"

namespace moekern::cuda {

template <class Input>
__device__ inline void cast_rows(const CastParameters& p) {
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
  with_format(p.q.dtype, [&](auto format) {
    constexpr Dtype F = decltype(format)::value;
    const float scale = scale_of<F>(amax, p.round_scale_up), inverse = __frcp_rn(scale);
    if (lane == 0 && row < p.rows) *reinterpret_cast<float*>(at(p.scale, row, block)) = scale;
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      store_codes<Input, F>(p, row, col + i * kLanes * V, x[i], [&](int) { return inverse; });
  });
}

}  // namespace moekern::cuda
