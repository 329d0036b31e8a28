// 1 x 128 blocks, which come one after another whatever row they are of.
#pragma once
#include "cuda/kernels/cast.cuh"

namespace moekern::cuda {

template <class Input>
__device__ inline void cast_rows(const CastParameters& p) {
  constexpr int V = Input::V, kLanes = kCastBlock / V, kSide = kCastThreads / kLanes, kPieces = kBlocksATime / kSide;
  const int lane = threadIdx.x % kLanes;
  uint32_t row[kPieces], block[kPieces];
  typename Input::Loaded loaded[kPieces];
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const uint32_t index = blockIdx.x * kBlocksATime + i * kSide + threadIdx.x / kLanes;
    row[i] = index / p.col_blocks;
    block[i] = index % p.col_blocks;
    loaded[i] = Input::load(p, row[i], block[i] * kCastBlock + lane * V);
  }
  with_format(p.q.dtype, [&](auto format) {
    constexpr Dtype F = decltype(format)::value;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const typename Input::Held x = Input::hold(loaded[i]);
      uint32_t amax = Input::amax(x);
#pragma unroll
      for (int step = kLanes / 2; step; step /= 2) amax = max(amax, __shfl_xor_sync(~0u, amax, step));
      const float scale = scale_of<F>(amax, p.round_scale_up), inverse = __frcp_rn(scale);
      if (lane == 0 && row[i] < p.rows) *reinterpret_cast<float*>(at(p.scale, row[i], block[i])) = scale;
      store_codes<Input, F>(p, row[i], block[i] * kCastBlock + lane * V, x, [&](int) { return inverse; });
    }
  });
}

}  // namespace moekern::cuda
