// Products of few rows, which read the weights once and are bound by that. Operands are swapped: 64 rows of the weights
// are the 64 rows of a wgmma, and a's rows, 8 to 64 of them, its columns. A tile is one group's wgmmas, so that there
// are many of them; where they are too few to keep memory busy, the blocks of a cluster divide k. Each leaves its sums
// in its own shared memory, and every block adds up a part of the tile, in the order of the blocks: no memory to clear,
// nothing atomic, the same bits every time. How k is divided depends on the weights alone, so a row's bits do not
// change with the number of rows.
//
// Two blocks share a multiprocessor and have 100 KB and more of copies under way between them: memory of 3.35 TB/s and
// 1 us needs 25 KB.
#pragma once
#include "cuda/kernels/loading.cuh"

namespace moekern::cuda {

template <int kTileRows>
struct StreamMemory {
  static constexpr int kRows = kTileRows, kColumns = kStreamColumns, kStages = stream_stages(kRows);
  static constexpr int kA = kRows * kStep, kB = kColumns * kStep;
  static_assert(kStages >= 4 && stream_shared_bytes(kRows) <= kStreamBytes);

  uint32_t base;
  __device__ uint32_t a(int stage) const { return b(kStages) + stage * kA; }
  __device__ uint32_t b(int stage) const { return base + stage * kB; }
  __device__ uint32_t sums() const { return a(kStages); }
  __device__ uint32_t scales(int stage) const {
    return sums() + stream_sums_bytes(kRows) + stage * scale_bytes(kRows, kColumns);
  }
  __device__ uint32_t full(int stage) const { return scales(kStages) + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(kStages) + stage * 8; }
  __device__ uint32_t written() const { return empty(kStages); }  // sums of all blocks of the cluster
  __device__ uint32_t read() const { return written() + 8; }      // by all blocks
};

// What this block's warp group has done, for all blocks of the cluster.
__device__ inline void tell_cluster(const GemmParameters& p, uint32_t barrier) {
  named_barrier(1, 128);
  if (static_cast<int>(threadIdx.x) < p.cluster) mbarrier_release_cluster(map_shared(barrier, threadIdx.x));
}

template <int kRows>
__device__ inline void leave_sums(uint32_t to, const float (&sums)[kRows / 2]) {
  const int lane = threadIdx.x % 32, column = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) {
    const int row = i / 4 * 8 + lane % 4 * 2 + i % 2;
    store_shared(to + (row * kStreamPitch + column + i / 2 % 2 * 8) * 4, sums[i]);
  }
}

// This block's part of the tile.
template <int kRows>
__device__ inline void add_up(const GemmParameters& p, uint32_t sums, const Tile& tile, int rank) {
  for (int i = rank * 128 + static_cast<int>(threadIdx.x); i < kRows * kStreamColumns; i += 128 * p.cluster) {
    const int row = i / kStreamColumns, column = i % kStreamColumns;
    if (row >= tile.rows || tile.column + column >= p.n) continue;
    const uint32_t at = sums + (row * kStreamPitch + column) * 4;
    float sum = 0;
    for (int block = 0; block < p.cluster; ++block) sum += load_shared_cluster(map_shared(at, block));
    finish(p, tile, tile.row + row, tile.column + column, sum);
  }
}

template <int kRows, class Tiles>
__device__ inline void multiply_stream(const GemmParameters& p, const StreamMemory<kRows>& memory, Steps steps,
                                       int rank) {
  using Memory = StreamMemory<kRows>;
  const int lane = threadIdx.x % 32;
  const uint32_t a = descriptor(memory.a(0)), b = descriptor(memory.b(0));
  Position<Memory::kStages> at;
  uint32_t turn = 0;  // of the sums
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile); turn ^= 1) {
    float sums[kRows / 2];
#pragma unroll
    for (int i = 0; i < kRows / 2; ++i) sums[i] = 0;
    for (int s = steps.first; s < steps.last; ++s, at.advance()) {
      const uint32_t scales = memory.scales(at.stage);
      mbarrier_wait_warp(memory.full(at.stage), at.parity);
      const uint32_t a_now = uniform(a + at.stage * (Memory::kA / 16)),
                     b_now = uniform(b + at.stage * (Memory::kB / 16));
      float scale[kRows / 8][2], products[kRows / 2];
      const float sb = load_shared(scales + kRows * 4);
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) load_shared(scales + (8 * i + lane % 4 * 2) * 4, scale[i][0], scale[i][1]);
      multiply<kRows>(products, b_now, a_now);
      wgmma_wait();
      __syncwarp();
      if (lane == 0) mbarrier_arrive(memory.empty(at.stage));
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) scale[i][0] *= sb, scale[i][1] *= sb;
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sums[i] = fmaf(products[i], scale[i / 4][i % 2], sums[i]);
    }
    mbarrier_wait_cluster(memory.read(), turn ^ 1);
    leave_sums<kRows>(memory.sums(), sums);
    tell_cluster(p, memory.written());
    mbarrier_wait_cluster(memory.written(), turn);
    add_up<kRows>(p, memory.sums(), tile, rank);
    tell_cluster(p, memory.read());
  }
  mbarrier_wait_cluster(memory.read(), turn ^ 1);  // until then others read this block's memory
}

template <int kRows, class Tiles>
__device__ inline void gemm_stream(const GemmParameters& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  using Memory = StreamMemory<kRows>;
  const Memory memory{uniform(shared_address(shared))};
  const int warp = static_cast<int>(uniform(threadIdx.x / 32)), rank = static_cast<int>(cluster_rank());
  if (threadIdx.x == 0) {
    prefetch_operands(p);
    for (int i = 0; i < Memory::kStages; ++i) {
      mbarrier_init(memory.full(i), 1 + 32);  // bytes announced; lanes with scales
      mbarrier_init(memory.empty(i), 4);
    }
    mbarrier_init(memory.written(), p.cluster);
    mbarrier_init(memory.read(), p.cluster);
    fence_mbarrier_init();
  }
  cluster_sync();
  const int all = divide_up(p.k, kStep);
  const Steps steps{all * rank / p.cluster, all * (rank + 1) / p.cluster};
  if (warp == 4)
    load_tiles<Memory, Tiles>(p, memory, steps);
  else if (warp == 5)
    load_scales<Memory, Tiles>(p, memory, steps, 0);
  else
    multiply_stream<kRows, Tiles>(p, memory, steps, rank);
}

}  // namespace moekern::cuda
