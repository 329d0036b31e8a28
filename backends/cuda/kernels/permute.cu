// Rows to where their slots went: a token's row is read once and written to all its places; the rows between an
// expert's last and the next multiple of the alignment become zero. FP8 rows and their scales are moved by one launch,
// which reads rows while permute_sort still runs.
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/overlap.cuh"
#include "cuda/kernels/permute_parameters.h"

namespace moekern::cuda {
namespace {

// The pieces of a row that a thread moves: `first`, and every row_lanes-th after it.
struct Columns {
  uint32_t first, step, end;
  __device__ Columns(const Moved& m, uint32_t tile)
      : first(tile * kMovePieces * m.row_lanes + threadIdx.x % m.row_lanes), step(m.row_lanes), end(m.pieces) {}
};

template <class Unit>
__device__ inline Unit& unit(const Strided& m, uint32_t row, uint32_t col) {
  return *reinterpret_cast<Unit*>(at(m, row, col));
}

template <class Unit>
__device__ inline void copy(const MoveParameters& p, const Moved& m, uint32_t token, const Columns& columns) {
  if (token >= p.tokens) return;
  Unit x[kMovePieces]{};
#pragma unroll
  for (int i = 0; i < kMovePieces; ++i)
    if (columns.first + i * columns.step < columns.end)
      x[i] = unit<const Unit>(m.from, token, columns.first + i * columns.step);
  wait_for_launch_ahead();
  for (uint32_t slot = 0; slot < p.topk; ++slot) {
    const int32_t row = *reinterpret_cast<const int32_t*>(at(p.inverse, token, slot));
    if (row < 0 || row >= p.rows) continue;
#pragma unroll
    for (int i = 0; i < kMovePieces; ++i)
      if (columns.first + i * columns.step < columns.end)
        unit<Unit>(m.to, row, columns.first + i * columns.step) = x[i];
  }
}

template <class Unit>
__device__ inline void clear(const MoveParameters& p, const Moved& m, uint32_t expert, const Columns& columns) {
  wait_for_launch_ahead();
  const int64_t start = *reinterpret_cast<const int64_t*>(at(p.starts, 0, expert));
  const int64_t count = *reinterpret_cast<const int64_t*>(at(p.counts, 0, expert));
  const uint32_t padded = (static_cast<uint32_t>(count) + p.alignment - 1) / p.alignment * p.alignment;
  const uint32_t end = min(static_cast<uint32_t>(start) + padded, p.rows);
  for (uint32_t row = start + count + threadIdx.x / m.row_lanes; row < end; row += kMoveThreads / m.row_lanes)
#pragma unroll
    for (int i = 0; i < kMovePieces; ++i)
      if (columns.first + i * columns.step < columns.end)
        unit<Unit>(m.to, row, columns.first + i * columns.step) = Unit{};
}

template <class Unit>
__device__ inline void move(const MoveParameters& p, const Moved& m, uint32_t block) {
  const Columns columns(m, block % m.column_tiles);
  if (block < m.row_blocks)
    copy<Unit>(p, m, block / m.column_tiles * (kMoveThreads / m.row_lanes) + threadIdx.x / m.row_lanes, columns);
  else
    clear<Unit>(p, m, (block - m.row_blocks) / m.column_tiles, columns);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kMoveThreads) permute_rows(const __grid_constant__ MoveParameters p) {
  const bool of_scales = blockIdx.x >= p.data.blocks;
  const Moved& m = of_scales ? p.scales : p.data;
  const uint32_t block = blockIdx.x - (of_scales ? p.data.blocks : 0);
  switch (m.piece_bytes) {
    case 16: return move<uint4>(p, m, block);
    case 8: return move<uint2>(p, m, block);
    case 4: return move<uint32_t>(p, m, block);
    case 2: return move<uint16_t>(p, m, block);
    default: return move<uint8_t>(p, m, block);
  }
}

}  // namespace moekern::cuda
