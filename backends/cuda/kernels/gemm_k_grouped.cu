// D[g] = cast(C[g] + A[g]^T B[g]) over the rows of every group: both operands lie with k across their rows, and wgmma
// takes bytes that follow one another along k. What is transposed here are 16-bit pairs of bytes, by ldmatrix; prmt
// sorts the bytes of two such pairs. That leaves k permuted within 16, the same for both operands, which a sum does not
// mind.
//
// a goes from shared memory to the registers of the warps that multiply, where wgmma takes it; four warps transpose b,
// which wgmma takes from shared memory only. Rows behind a group's last one are another group's, or nobody's: their
// bytes become zeros on the way.
//
// Every row and every column has a scale of its own for 128 rows of k, so that a promotion takes two operations an
// element.
#include "cuda/kernels/loading.cuh"
#include "cuda/kernels/store.cuh"

namespace moekern::cuda {
namespace {

constexpr int kLoaders = kMathWarps, kTurners = kMathWarps + 4;  // the first warps of their groups
// 65536 registers: 2 x 128 x 208 + 128 x 40 + 128 x 56
constexpr int kMathRegisters = 208, kLoaderRegisters = 40, kTurnerRegisters = 56;

using Tiles = KGroupedTiles<kCross, kCross>;

struct Memory {
  uint32_t base;
  __device__ uint32_t a(int stage) const { return base + stage * kCrossTile; }
  __device__ uint32_t b(int stage) const { return a(kCrossStages) + stage * kCrossTile; }
  __device__ uint32_t turned(int turn) const { return b(kCrossStages) + turn * kCrossTile; }
  __device__ uint32_t staging(int warp) const {
    return turned(kCrossTurned) + warp * (staging_bytes(kCross) / kMathWarps);
  }
  __device__ uint32_t scales(int stage) const { return staging(kMathWarps) + stage * (2 * kCross * 4); }
  __device__ uint32_t full(int stage) const { return scales(kCrossStages) + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(kCrossStages) + stage * 8; }
  __device__ uint32_t turned_full(int turn) const { return empty(kCrossStages) + turn * 8; }
  __device__ uint32_t turned_empty(int turn) const { return turned_full(kCrossTurned) + turn * 8; }
};
static_assert(cross_shared_bytes() <= kSharedBytes);

__device__ void load_operands(const GemmParameters& p, const Memory& memory) {
  Position<kCrossStages> at;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    if (threadIdx.x % 32 == 0) {
      for (int s = 0; s < divide_up(tile.k, kStep); ++s, at.advance()) {
        const uint32_t full = memory.full(at.stage);
        mbarrier_wait(memory.empty(at.stage), at.parity ^ 1);
        mbarrier_arrive_expect_tx(full, 2 * kCrossTile);
        tma_load(memory.a(at.stage), &p.a_map, full, tile.row, tile.first + s * kStep, 0);
        tma_load(memory.b(at.stage), &p.b_map, full, tile.column, tile.first + s * kStep, 0);
      }
    }
    __syncwarp();
  }
}

// Two warps, for a and for b.
__device__ void load_scales(const GemmParameters& p, const Memory& memory, bool of_b) {
  const Scales& scales = of_b ? p.sb : p.sa;
  const int lane = threadIdx.x % 32;
  Position<kCrossStages> at;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    int64_t row[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      row[i] = scale_row(scales, 0, min((of_b ? tile.column : tile.row) + lane + 32 * i, (of_b ? p.n : p.rows) - 1));
    for (int s = 0; s < divide_up(tile.k, kStep); ++s, at.advance()) {
      const int64_t step = (tile.first / kStep + s) / scales.steps * scales.step_stride;
      mbarrier_wait_warp(memory.empty(at.stage), at.parity ^ 1);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        copy_scale(memory.scales(at.stage) + (of_b * kCross + lane + 32 * i) * 4, scales, row[i] + step);
      if (scales.ue8m0)
        mbarrier_arrive(memory.full(at.stage));
      else
        cp_async_mbarrier_arrive(memory.full(at.stage));
    }
  }
}

// Of 32 rows of k and 16 columns of a tile, as wgmma's a: x[0] and x[2] of column 2 (lane / 4), x[1] and x[3] of the
// next; x[0] and x[1] of k's first 16 rows. A lane's four bytes are of rows 2 (lane % 4), + 1, + 8 and + 9 of these.
__device__ void load_turned(uint32_t tile, int k, int column, int rows, uint32_t (&x)[4]) {
  const int lane = threadIdx.x % 32, from = k + lane;
  uint32_t pairs[4];
  ldmatrix_x4_trans(tile + from * kStep + (column / 16 ^ from % 8) * 16, pairs);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __byte_perm(pairs[i / 2 * 2], pairs[i / 2 * 2 + 1], i % 2 ? 0x7531 : 0x6420);
  if (rows >= k + 32) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t kept = 0;
#pragma unroll
    for (int byte = 0; byte < 4; ++byte)
      if (k + i / 2 * 16 + byte / 2 * 8 + lane % 4 * 2 + byte % 2 < rows) kept |= 0xFFu << 8 * byte;
    x[i] &= kept;
  }
}

// A quarter of b's columns each.
__device__ void turn(const GemmParameters& p, const Memory& memory, int quarter) {
  const int lane = threadIdx.x % 32;
  Position<kCrossStages> at;
  Position<kCrossTurned> to;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    for (int s = 0; s < divide_up(tile.k, kStep); ++s, at.advance(), to.advance()) {
      const int rows = tile.k - s * kStep;
      mbarrier_wait_warp(memory.full(at.stage), at.parity);
      mbarrier_wait_warp(memory.turned_empty(to.stage), to.parity ^ 1);
#pragma unroll
      for (int k = 0; k < kStep; k += 32)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int first = 32 * quarter + 16 * i, column = first + lane % 8 * 2 + lane / 8 % 2;
          uint32_t x[4];
          load_turned(memory.b(at.stage), k, first, rows, x);
          stmatrix_x4(memory.turned(to.stage) + column * kStep + (k / 16 + lane / 16 ^ column % 8) * 16, x[0], x[1],
                      x[2], x[3]);
        }
      fence_proxy_async();
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(memory.empty(at.stage));
        mbarrier_arrive(memory.turned_full(to.stage));
      }
    }
  }
}

__device__ void multiply_crossed(const GemmParameters& p, const Memory& memory, int warp) {
  const int lane = threadIdx.x % 32, mine = 16 * warp;
  Position<kCrossStages> at;
  Position<kCrossTurned> from;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    float sums[kCross / 2];
#pragma unroll
    for (int i = 0; i < kCross / 2; ++i) sums[i] = 0;
    for (int s = 0; s < divide_up(tile.k, kStep); ++s, at.advance(), from.advance()) {
      const uint32_t scales = memory.scales(at.stage);
      float sa[2], sb[kCross / 4], products[kCross / 2];
      uint32_t a[4][4];
      mbarrier_wait_warp(memory.full(at.stage), at.parity);
#pragma unroll
      for (int i = 0; i < 4; ++i) load_turned(memory.a(at.stage), 32 * i, mine, tile.k - s * kStep, a[i]);
      load_shared(scales + (mine + lane / 4 * 2) * 4, sa[0], sa[1]);
      mbarrier_wait_warp(memory.turned_full(from.stage), from.parity);
      const uint32_t b = uniform(descriptor(memory.turned(from.stage)));
      wgmma_fence();
      wgmma_registers<false>(products, a[0], matrix_descriptor(b));
      wgmma_registers<true>(products, a[1], matrix_descriptor(b + 2));
      wgmma_registers<true>(products, a[2], matrix_descriptor(b + 4));
      wgmma_registers<true>(products, a[3], matrix_descriptor(b + 6));
      wgmma_commit();
#pragma unroll
      for (int i = 0; i < kCross / 8; ++i)
        load_shared(scales + (kCross + 8 * i + lane % 4 * 2) * 4, sb[2 * i], sb[2 * i + 1]);
      wgmma_wait();
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(memory.empty(at.stage));
        mbarrier_arrive(memory.turned_empty(from.stage));
      }
#pragma unroll
      for (int i = 0; i < kCross / 2; ++i) sums[i] = fmaf(products[i], sa[i / 2 % 2] * sb[i / 4 * 2 + i % 2], sums[i]);
    }
    store<kCross, true>(p, memory.staging(warp), tile, tile.row + mine, tile.rows - mine, true, sums);
  }
  wait_for_stores();
}

}  // namespace
}  // namespace moekern::cuda

using namespace moekern::cuda;

extern "C" __global__ void __launch_bounds__(kCrossThreads, 1)
    hopper_k_grouped_gemm(const __grid_constant__ GemmParameters p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  const Memory memory{uniform(shared_address(shared))};
  const int warp = static_cast<int>(uniform(threadIdx.x / 32));
  if (threadIdx.x == 0) {
    prefetch_operands(p);
    for (int i = 0; i < kCrossStages; ++i) {
      mbarrier_init(memory.full(i), 1 + 2 * 32);  // bytes announced; lanes with scales
      mbarrier_init(memory.empty(i), kMathWarps + 4);
    }
    for (int i = 0; i < kCrossTurned; ++i) {
      mbarrier_init(memory.turned_full(i), 4);
      mbarrier_init(memory.turned_empty(i), kMathWarps);
    }
    fence_mbarrier_init();
  }
  __syncthreads();
  if (warp < kLoaders) {
    setmaxnreg_inc<kMathRegisters>();
    multiply_crossed(p, memory, warp);
  } else if (warp < kTurners) {
    setmaxnreg_dec<kLoaderRegisters>();
    if (warp == kLoaders) load_operands(p, memory);
    if (warp == kLoaders + 1) load_scales(p, memory, false);
    if (warp == kLoaders + 2) load_scales(p, memory, true);
  } else {
    setmaxnreg_dec<kTurnerRegisters>();
    turn(p, memory, warp - kTurners);
  }
}
