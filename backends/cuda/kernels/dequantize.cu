// out = q * scale: each element is read once and written once, where rows allow it 16 bytes at a time.
#include "cuda/kernels/dequantize_parameters.h"
#include "cuda/kernels/from_fp8.cuh"
#include "cuda/kernels/to_fp8.cuh"

namespace moekern::cuda {
namespace {

// Where a thread's next piece lies: some elements of a row.
struct Place {
  uint32_t row, piece;  // of the row

  __device__ explicit Place(const DequantizeParameters& p) {
    const uint64_t first = static_cast<uint64_t>(blockIdx.x) * (kDequantizeThreads * kDequantizePieces) + threadIdx.x;
    const uint64_t above = first / p.row_pieces;
    row = static_cast<uint32_t>(above);
    piece = static_cast<uint32_t>(first - above * p.row_pieces);
  }

  // To the piece that lies a thread block further.
  __device__ void advance(const DequantizeParameters& p) {
    row += p.step_rows;
    piece += p.step_pieces;
    if (piece >= p.row_pieces) {
      piece -= p.row_pieces;
      ++row;
    }
  }
};

__device__ inline uint32_t load_code(const DequantizeParameters& p, uint32_t row, uint32_t col) {
  return *reinterpret_cast<const uint8_t*>(at(p.q, row, col));
}

// An element of any dtype, wherever it lies.
template <Dtype In>
__device__ inline void store_element(const DequantizeParameters& p, uint32_t row, uint32_t col, uint32_t code) {
  const float scale = load_scale(at(p.scale, row / p.block_rows, col / p.block_cols), p.scale.dtype);
  store_float(at(p.out, row, col), p.out.dtype, __fmul_rn(from_fp8x2<In>(code).x, scale));
}

struct Elements {
  static constexpr int V = 1;
  uint32_t code;

  __device__ void load(const DequantizeParameters& p, uint32_t row, uint32_t col) { code = load_code(p, row, col); }

  template <Dtype In>
  __device__ void store(const DequantizeParameters& p, uint32_t row, uint32_t col) const {
    store_element<In>(p, row, col, code);
  }
};

// 16 bytes of a row of the result: at once, but where the row ends before, or a scale.
template <Dtype Out>
struct Whole {
  static constexpr int V = kPerPiece<Out>, kWords = V / 4;
  uint32_t words[kWords];

  __device__ static bool at_once(const DequantizeParameters& p, uint32_t col) {
    return p.cols - col >= V && p.block_cols % V == 0;
  }

  __device__ void load(const DequantizeParameters& p, uint32_t row, uint32_t col) {
    if (!at_once(p, col)) return;
    const char* from = at(p.q, row, col);
    if constexpr (kWords == 2) {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      words[0] = both.x;
      words[1] = both.y;
    } else {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    }
  }

  template <Dtype In>
  __device__ void store(const DequantizeParameters& p, uint32_t row, uint32_t col) const {
    if (!at_once(p, col)) {
#pragma unroll 1
      for (uint32_t i = col; i < min(p.cols, col + V); ++i) store_element<In>(p, row, i, load_code(p, row, i));
      return;
    }
    const float scale = load_scale(at(p.scale, row / p.block_rows, col / p.block_cols), p.scale.dtype);
    float y[V];
#pragma unroll
    for (int i = 0; i < V; i += 2) {
      const float2 pair = from_fp8x2<In>(words[i / 4] >> (i % 4 * 8) & 0xffff);
      y[i] = __fmul_rn(pair.x, scale);
      y[i + 1] = __fmul_rn(pair.y, scale);
    }
    uint32_t out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (Out == Dtype::f32)
        out[i] = __float_as_uint(y[i]);
      else
        out[i] = Out == Dtype::f16 ? f32_to_f16x2(y[2 * i], y[2 * i + 1]) : f32_to_bf16x2(y[2 * i], y[2 * i + 1]);
    }
    *reinterpret_cast<uint4*>(at(p.out, row, col)) = {out[0], out[1], out[2], out[3]};
  }
};

template <class Pieces>
__device__ void dequantize(const DequantizeParameters& p) {
  Pieces pieces[kDequantizePieces];
  const auto each = [&](const auto& body) {
    Place place(p);
#pragma unroll
    for (int i = 0; i < kDequantizePieces; ++i, place.advance(p))
      if (place.row < p.rows) body(pieces[i], place.row, place.piece * Pieces::V);
  };
  each([&](Pieces& piece, uint32_t row, uint32_t col) { piece.load(p, row, col); });
  with_format(p.q.dtype, [&](auto format) {
    each([&](const Pieces& piece, uint32_t row, uint32_t col) {
      piece.template store<decltype(format)::value>(p, row, col);
    });
  });
}

}  // namespace

#define MOEKERN_DEQUANTIZE(NAME, ...)                                     \
  extern "C" __global__ void __launch_bounds__(kDequantizeThreads)        \
      dequantize_##NAME(const __grid_constant__ DequantizeParameters p) { \
    dequantize<__VA_ARGS__>(p);                                           \
  }

MOEKERN_DEQUANTIZE(f32, Whole<Dtype::f32>)
MOEKERN_DEQUANTIZE(f16, Whole<Dtype::f16>)
MOEKERN_DEQUANTIZE(bf16, Whole<Dtype::bf16>)
MOEKERN_DEQUANTIZE(elements, Elements)

}  // namespace moekern::cuda
