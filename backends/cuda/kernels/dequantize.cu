// out = q * scale: each element read once and written once, a store of 16 bytes a piece.
#include "cuda/kernels/dequantize_parameters.h"
#include "cuda/kernels/from_fp8.cuh"
#include "cuda/kernels/to_fp8.cuh"

namespace moekern::cuda {
namespace {

template <Dtype Out> constexpr int kPieceElements = kDequantizePieceBytes / size_of(Out);

template <Dtype Out>
struct Place {
  uint32_t row, col;
  int count;  // of elements, 0 behind the last row

  __device__ Place(const DequantizeParameters& p, uint64_t piece) {
    const uint64_t where = piece / p.row_pieces;
    row = static_cast<uint32_t>(where);
    col = static_cast<uint32_t>(piece - where * p.row_pieces) * kPieceElements<Out>;
    count = where < p.rows ? static_cast<int>(min(p.cols - col, static_cast<uint32_t>(kPieceElements<Out>))) : 0;
  }
};

template <Dtype Out>
struct Codes {
  static constexpr int kWords = kPieceElements<Out> / 4;
  uint32_t words[kWords];

  __device__ void load(const DequantizeParameters& p, const Place<Out>& place) {
    const char* from = at(p.q, place.row, place.col);
    if (place.count == kPieceElements<Out>) {
      if constexpr (kWords == 2) {
        const uint2 both = *reinterpret_cast<const uint2*>(from);
        words[0] = both.x;
        words[1] = both.y;
      } else {
        words[0] = *reinterpret_cast<const uint32_t*>(from);
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kWords; ++i) words[i] = 0;
#pragma unroll
    for (int i = 0; i < kPieceElements<Out>; ++i)
      if (i < place.count) words[i / 4] |= static_cast<uint32_t>(static_cast<uint8_t>(from[i])) << (i % 4 * 8);
  }
};

template <Dtype Out, Dtype In>
__device__ void store(const DequantizeParameters& p, const Place<Out>& place, const Codes<Out>& codes) {
  constexpr int V = kPieceElements<Out>;
  const char* scales = at(p.scale, place.row / p.block_rows, 0);
  const auto scale = [&](int i) {
    return load_scale(scales + (place.col + i) / p.block_cols * p.scale.col_step, p.scale.dtype);
  };
  const bool one = p.block_cols % V == 0;
  const float first = scale(0);
  float y[V];
#pragma unroll
  for (int i = 0; i < V; i += 2) {
    const float2 pair = from_fp8x2<In>(codes.words[i / 4] >> (i % 4 * 8) & 0xffff);
    y[i] = __fmul_rn(pair.x, one ? first : i < place.count ? scale(i) : 0);
    y[i + 1] = __fmul_rn(pair.y, one ? first : i + 1 < place.count ? scale(i + 1) : 0);
  }
  constexpr int kBytes = kDequantizePieceBytes / V;
  char* to = at(p.out, place.row, place.col);
  if (place.count < V) {
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (i < place.count) store_float(to + i * kBytes, Out, y[i]);
    return;
  }
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (Out == Dtype::f32)
      words[i] = __float_as_uint(y[i]);
    else
      words[i] = Out == Dtype::f16 ? f32_to_f16x2(y[2 * i], y[2 * i + 1]) : f32_to_bf16x2(y[2 * i], y[2 * i + 1]);
  }
  *reinterpret_cast<uint4*>(to) = {words[0], words[1], words[2], words[3]};
}

template <Dtype Out>
__device__ void dequantize(const DequantizeParameters& p) {
  const uint64_t first = static_cast<uint64_t>(blockIdx.x) * (kDequantizeThreads * kDequantizePieces) + threadIdx.x;
  Codes<Out> codes[kDequantizePieces];
#pragma unroll
  for (int i = 0; i < kDequantizePieces; ++i)
    if (const Place<Out> place(p, first + i * kDequantizeThreads); place.count) codes[i].load(p, place);
  with_format(p.q.dtype, [&](auto format) {
#pragma unroll
    for (int i = 0; i < kDequantizePieces; ++i)
      if (const Place<Out> place(p, first + i * kDequantizeThreads); place.count)
        store<Out, decltype(format)::value>(p, place, codes[i]);
  });
}

}  // namespace

#define MOEKERN_DEQUANTIZE(DTYPE)                                          \
  extern "C" __global__ void __launch_bounds__(kDequantizeThreads)         \
      dequantize_##DTYPE(const __grid_constant__ DequantizeParameters p) { \
    dequantize<Dtype::DTYPE>(p);                                           \
  }

MOEKERN_DEQUANTIZE(f32)
MOEKERN_DEQUANTIZE(f16)
MOEKERN_DEQUANTIZE(bf16)

}  // namespace moekern::cuda
