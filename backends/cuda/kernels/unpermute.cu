// Rows of a token's experts, added up in the order of its slots: out[t] = cast(sum_j weights[t, j] y[inverse[t, j]]).
// A warp has one token, whose rows come eight at a time; every product and every sum is rounded.
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/permute_parameters.h"

namespace moekern::cuda {
namespace {

// 16 bytes of a row of y.
template <Dtype F>
struct WholePieces {
  static constexpr int V = kPerPiece<F>;
  using Term = Piece;
  __device__ static Term load(const UnpermuteParameters& p, uint32_t row, uint32_t col) {
    return load_piece(at(p.y, row, col));
  }
  __device__ static float value(const Term& x, int i) { return element<F>(x, i); }

  __device__ static void store(const UnpermuteParameters& p, uint32_t token, uint32_t col, const float (&x)[V]) {
    char* out = at(p.out, token, col);
    if (p.out.dtype == Dtype::f32) {
#pragma unroll
      for (int i = 0; i < V; i += 4) reinterpret_cast<float4*>(out)[i / 4] = {x[i], x[i + 1], x[i + 2], x[i + 3]};
      return;
    }
    uint32_t pairs[V / 2];
#pragma unroll
    for (int i = 0; i < V; i += 2)
      pairs[i / 2] = p.out.dtype == Dtype::f16 ? f32_to_f16x2(x[i], x[i + 1]) : f32_to_bf16x2(x[i], x[i + 1]);
    if constexpr (V == 8)
      *reinterpret_cast<uint4*>(out) = {pairs[0], pairs[1], pairs[2], pairs[3]};
    else
      *reinterpret_cast<uint2*>(out) = {pairs[0], pairs[1]};
  }
};

// One element, wherever it is.
struct Single {
  static constexpr int V = 1;
  using Term = float;
  __device__ static Term load(const UnpermuteParameters& p, uint32_t row, uint32_t col) {
    return load_float(at(p.y, row, col), p.y.dtype);
  }
  __device__ static float value(Term x, int) { return x; }
  __device__ static void store(const UnpermuteParameters& p, uint32_t token, uint32_t col, const float (&x)[V]) {
    store_float(at(p.out, token, col), p.out.dtype, x[0]);
  }
};

template <class Input>
__device__ inline void unpermute(const UnpermuteParameters& p) {
  constexpr int V = Input::V;
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t tokens_at_once = kUnpermuteThreads / 32 / p.row_warps;
  const uint32_t token = blockIdx.x / p.column_tiles * tokens_at_once + warp / p.row_warps;
  if (token >= p.tokens) return;
  const uint32_t col = ((blockIdx.x % p.column_tiles * p.row_warps + warp % p.row_warps) * 32 + lane) * V;
  const bool inside = col < p.cols;
  float sums[V];  // of -0, to which the first term is added as it is: a sum of -0 stays -0
#pragma unroll
  for (int i = 0; i < V; ++i) sums[i] = -0.f;
  bool some = false;
  for (uint32_t base = 0; base < p.topk; base += 32) {
    // A lane has a slot's row and weight, and hands them round.
    const bool mine = base + lane < p.topk;
    int64_t row = mine ? load_index(at(p.inverse, token, base + lane), p.inverse.dtype) : -1;
    if (row < 0 || row >= p.rows) row = -1;
    const float weight =
        row >= 0 && p.weights.data ? load_float(at(p.weights, token, base + lane), p.weights.dtype) : 1.f;
    const uint32_t count = min(p.topk - base, 32u);
    for (uint32_t first = 0; first < count; first += kSlotsInFlight) {
      typename Input::Term terms[kSlotsInFlight];
      int rows[kSlotsInFlight];
#pragma unroll
      for (int j = 0; j < kSlotsInFlight; ++j) {
        rows[j] = __shfl_sync(~0u, static_cast<int>(row), first + j);
        if (rows[j] >= 0 && inside) terms[j] = Input::load(p, rows[j], col);
      }
#pragma unroll
      for (int j = 0; j < kSlotsInFlight; ++j) {
        const float factor = __shfl_sync(~0u, weight, first + j);
        if (rows[j] < 0 || !inside) continue;
        some = true;
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float x = Input::value(terms[j], i);
          sums[i] = __fadd_rn(sums[i], p.weights.data ? __fmul_rn(factor, x) : x);
        }
      }
    }
  }
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < V; ++i) sums[i] = some ? sums[i] : 0.f;
  Input::store(p, token, col, sums);
}

}  // namespace

#define MOEKERN_UNPERMUTE(NAME, INPUT)                                  \
  extern "C" __global__ void __launch_bounds__(kUnpermuteThreads, 2)    \
      unpermute_##NAME(const __grid_constant__ UnpermuteParameters p) { \
    unpermute<INPUT>(p);                                                \
  }

MOEKERN_UNPERMUTE(f32, WholePieces<Dtype::f32>)
MOEKERN_UNPERMUTE(f16, WholePieces<Dtype::f16>)
MOEKERN_UNPERMUTE(bf16, WholePieces<Dtype::bf16>)
MOEKERN_UNPERMUTE(elements, Single)

}  // namespace moekern::cuda
