// Casts to FP8: one pass over memory. A block's elements stay in registers while its largest magnitude is found.
#include "cuda/kernels/cast.cuh"
#include "cuda/kernels/cast_rows.cuh"

namespace moekern::cuda {
namespace {

// A 128 x 128 tile. A thread has the same V columns of every kRows-th row.
template <class Input>
struct Tile {
  static constexpr int V = Input::V;
  static constexpr int kLanes = kCastBlock / V, kRows = kCastThreads / kLanes, kPieces = kCastBlock / kRows;
  typename Input::Held x[kPieces];
  uint32_t row, col;  // of the first piece
  int lane;

  __device__ explicit Tile(const CastParameters& p) : lane(threadIdx.x % kLanes) {
    const uint32_t tall = blockIdx.x / p.col_blocks, wide = blockIdx.x % p.col_blocks;
    row = tall * kCastBlock + threadIdx.x / kLanes;
    col = wide * kCastBlock + lane * V;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) x[i] = Input::hold(Input::load(p, row + i * kRows, col));
  }

  __device__ typename Input::Tops tops() const {
    typename Input::Tops tops{};
#pragma unroll
    for (int i = 0; i < kPieces; ++i) Input::see(tops, x[i]);
    return tops;
  }

  template <Dtype F, class Inverse>
  __device__ void store(const CastParameters& p, const Inverse& inverse) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      if (row + i * kRows < p.rows) store_codes(p, row + i * kRows, col, codes_of<Input, F>(x[i], inverse));
  }
};

constexpr int kWarps = kCastThreads / 32;

template <class Input>
__device__ void cast_blocks(const CastParameters& p) {
  const Tile<Input> tile(p);
  uint32_t amax = __reduce_max_sync(~0u, Input::amax(tile.tops()));
  __shared__ uint32_t of_warps[kWarps];
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kWarps; ++i) amax = max(amax, of_warps[i]);
  with_format(p.q.dtype, [&](auto format) {
    constexpr Dtype F = decltype(format)::value;
    const float scale = scale_of<F>(amax, p.round_scale_up), inverse = __frcp_rn(scale);
    if (threadIdx.x == 0)
      *reinterpret_cast<float*>(at(p.scale, blockIdx.x / p.col_blocks, blockIdx.x % p.col_blocks)) = scale;
    tile.template store<F>(p, [&](int) { return inverse; });
  });
}

template <class Input>
__device__ void cast_columns(const CastParameters& p) {
  const Tile<Input> tile(p);
  const auto tops = tile.tops();
  __shared__ alignas(16) uint32_t of_rows[Tile<Input>::kRows][kCastBlock];
  __shared__ alignas(16) float inverses[kCastBlock];
  const int first = tile.lane * Input::V;
#pragma unroll
  for (int i = 0; i < Input::V; i += 4)
    *reinterpret_cast<uint4*>(&of_rows[threadIdx.x / Tile<Input>::kLanes][first + i]) = {
        Input::top(tops, i), Input::top(tops, i + 1), Input::top(tops, i + 2), Input::top(tops, i + 3)};
  __syncthreads();
  with_format(p.q.dtype, [&](auto format) {
    constexpr Dtype F = decltype(format)::value;
    if (threadIdx.x < kCastBlock) {
      uint32_t amax = 0;
#pragma unroll
      for (int i = 0; i < Tile<Input>::kRows; ++i) amax = max(amax, of_rows[i][threadIdx.x]);
      const float scale = scale_of<F>(amax, p.round_scale_up);
      const uint32_t col = blockIdx.x % p.col_blocks * kCastBlock + threadIdx.x;
      if (col < p.cols) *reinterpret_cast<float*>(at(p.scale, blockIdx.x / p.col_blocks, col)) = scale;
      inverses[threadIdx.x] = __frcp_rn(scale);
    }
    __syncthreads();
    float4 inverse[Input::V / 4];
#pragma unroll
    for (int i = 0; i < Input::V / 4; ++i) inverse[i] = *reinterpret_cast<const float4*>(&inverses[first + 4 * i]);
    tile.template store<F>(p, [&](int i) { return (&inverse[i / 4].x)[i % 4]; });
  });
}

}  // namespace

#define MOEKERN_CAST(NAME, CAST, INPUT)                                                                       \
  extern "C" __global__ void __launch_bounds__(kCastThreads) NAME(const __grid_constant__ CastParameters p) { \
    CAST<INPUT>(p);                                                                                           \
  }
#define MOEKERN_CASTS(NAME, CAST)                     \
  MOEKERN_CAST(NAME##_f32, CAST, Whole<Dtype::f32>)   \
  MOEKERN_CAST(NAME##_f16, CAST, Whole<Dtype::f16>)   \
  MOEKERN_CAST(NAME##_bf16, CAST, Whole<Dtype::bf16>) \
  MOEKERN_CAST(NAME##_elements, CAST, Elements)

MOEKERN_CASTS(cast_1x128, cast_rows)
MOEKERN_CASTS(cast_128x128, cast_blocks)
MOEKERN_CASTS(cast_128x1, cast_columns)

}  // namespace moekern::cuda
