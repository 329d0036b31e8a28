// From a warp's sums to the result, through shared memory that is the warp's own: no warp waits for another.
#pragma once
#include "cuda/kernels/scales.cuh"

namespace moekern::cuda {

__device__ inline uint32_t packed(float low, float high, __nv_bfloat16*) {
  const __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}

__device__ inline uint32_t packed(float low, float high, __half*) {
  const __half2 x = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(x);
}

// A warp's 16 rows in shared memory: pieces of kPiece columns behind one another, each as the TMA unit stores it. Its
// rows are 128, 64 or 32 bytes long, and swizzled: the number of a 16-byte chunk is XORed with bits 7 and up of the
// address, as many as it has itself. So eight rows of a chunk are in different banks.
template <int kBytes, int kPiece>
struct Staged {
  static constexpr int kRowBytes = kPiece * kBytes, kPieceBytes = 16 * kRowBytes, kChunks = kRowBytes / 16;
  static_assert(kChunks == 8 || kChunks == 4 || kChunks == 2);

  __device__ static uint32_t offset(int row, int column) {
    const uint32_t chunk = column % kPiece * kBytes / 16 ^ row * kRowBytes / 128 % kChunks;
    return column / kPiece * kPieceBytes + row * kRowBytes + chunk * 16 + column * kBytes % 16;
  }
};

// The row of the 16 that fragment row `at` of half i holds: they follow one another, or if kPaired, take turns.
template <bool kPaired>
__device__ inline int fragment_row(int at, int i) {
  return kPaired ? 2 * at + i : at + 8 * i;
}

// 16-bit results of kColumns columns.
template <class T, int kColumns, bool kPaired>
__device__ inline void stage_halves(uint32_t staging, const float (&sums)[kColumns / 2]) {
  using Layout = Staged<2, piece_columns(kColumns, 2)>;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j) {
    const float* x = sums + 8 * j;
    T* type = nullptr;
    stmatrix_x4(staging + Layout::offset(fragment_row<kPaired>(lane % 8, lane / 8 % 2), 16 * j + lane / 16 * 8),
                packed(x[0], x[1], type), packed(x[2], x[3], type), packed(x[4], x[5], type), packed(x[6], x[7], type));
  }
}

// Half of the columns of 32-bit results.
template <int kColumns>
using Staged32 = Staged<4, piece_columns(kColumns, 4)>;

template <int kColumns, int kHalf, bool kPaired>
__device__ inline void stage_floats(uint32_t staging, const float (&sums)[kColumns / 2]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < kColumns / 16; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float* x = sums + 4 * (kHalf * (kColumns / 16) + j) + 2 * i;
      store_shared(staging + Staged32<kColumns>::offset(fragment_row<kPaired>(lane / 4, i), 8 * j + lane % 4 * 2), x[0],
                   x[1]);
    }
}

// By the TMA unit. column: the first of `count` staged ones.
template <int kPiece, int kPieceBytes>
__device__ inline void store_pieces(const TensorMap* map, uint32_t staging, const Tile& tile, int row, int column,
                                    int count) {
  fence_proxy_async();
  __syncwarp();
  if (threadIdx.x % 32 == 0) {
    for (int i = 0; i < count / kPiece; ++i)
      tma_store(map, staging + i * kPieceBytes, column + i * kPiece, row, tile.slot);
    bulk_commit();
  }
}

// Until the staging memory may be written again.
__device__ inline void wait_for_stores() {
  if (threadIdx.x % 32 == 0) bulk_wait_read();
  __syncwarp();
}

// One by one: with addends, where the TMA unit would write too many rows, at any strides, and where sums are not
// finite.
template <int kColumns>
__device__ inline void store_one_by_one(const GemmParameters& p, uint32_t staging, const Tile& tile, int row, int rows,
                                        int column) {
  constexpr int kHalf = kColumns / 2;
  __syncwarp();
  for (int i = threadIdx.x % 32; i < 16 * kHalf; i += 32) {
    const int down = i / kHalf, along = i % kHalf;
    if (down < rows && column + along < p.n)
      finish(p, tile, row + down, column + along, load_shared(staging + Staged32<kColumns>::offset(down, along)));
  }
  __syncwarp();
}

// The 16 rows from `row` on of a tile's matrix, of which `rows` are the group's. clipped: the tensor map ends with
// them.
template <int kColumns, bool kPaired = false>
__device__ inline void store(const GemmParameters& p, uint32_t staging, const Tile& tile, int row, int rows,
                             bool clipped, const float (&sums)[kColumns / 2]) {
  if (rows <= 0) return;
  wait_for_stores();
  bool usual = p.out.mapped && (clipped || rows >= 16);
#pragma unroll
  for (int i = 0; i < kColumns / 2; ++i) usual = usual && finite(sums[i]);
  if (!__all_sync(~0u, usual)) {
    stage_floats<kColumns, 0, kPaired>(staging, sums);
    store_one_by_one<kColumns>(p, staging, tile, row, rows, tile.column);
    stage_floats<kColumns, 1, kPaired>(staging, sums);
    store_one_by_one<kColumns>(p, staging, tile, row, rows, tile.column + kColumns / 2);
  } else if (p.out.dtype == Dtype::f32) {
    constexpr int kPiece = piece_columns(kColumns, 4);
    stage_floats<kColumns, 0, kPaired>(staging, sums);
    store_pieces<kPiece, Staged32<kColumns>::kPieceBytes>(&p.out_map, staging, tile, row, tile.column, kColumns / 2);
    wait_for_stores();
    stage_floats<kColumns, 1, kPaired>(staging, sums);
    store_pieces<kPiece, Staged32<kColumns>::kPieceBytes>(&p.out_map, staging, tile, row, tile.column + kColumns / 2,
                                                          kColumns / 2);
  } else {
    constexpr int kPiece = piece_columns(kColumns, 2);
    if (p.out.dtype == Dtype::bf16)
      stage_halves<__nv_bfloat16, kColumns, kPaired>(staging, sums);
    else
      stage_halves<__half, kColumns, kPaired>(staging, sums);
    store_pieces<kPiece, Staged<2, kPiece>::kPieceBytes>(&p.out_map, staging, tile, row, tile.column, kColumns);
  }
}

}  // namespace moekern::cuda
