// Products in large tiles. Of a block's three warp groups one loads: a warp asks the TMA unit for tiles of both
// operands, another copies their scales, into a ring of stages. Two multiply, each 64 rows (or two times 64) of the
// tile. Of every 128 columns of k a group's four wgmmas sum in registers of their own, and join the float32 sums times
// both scales
// ("promotion"): while one group does that, the other's wgmmas run.
//
// Registers: 65536 / 384 threads, down to a multiple of 8, gives 168 to each at launch. setmaxnreg moves them about
// within these 384 x 168: the loaders keep 56, so that the two others can have (384 * 168 - 128 * 56) / 256 = 224.
#pragma once
#include "cuda/kernels/loading.cuh"
#include "cuda/kernels/store.cuh"

namespace moekern::cuda {

constexpr int kLoaderRegisters = 56, kMathRegisters = 224;

// Shared memory by its addresses.
template <int kTileRows, int kTileColumns>
struct GemmMemory {
  static constexpr int kRows = kTileRows, kColumns = kTileColumns;
  static constexpr int kStages = stages_of(kRows, kColumns);
  static constexpr int kA = kRows * kStep, kB = kColumns * kStep;
  static_assert(kStages >= 3 && gemm_shared_bytes(kRows, kColumns) <= kSharedBytes);

  uint32_t base;
  __device__ uint32_t a(int stage) const { return base + stage * kA; }
  __device__ uint32_t b(int stage) const { return base + kStages * kA + stage * kB; }
  __device__ uint32_t staging(int warp) const {
    return base + kStages * (kA + kB) + warp * (staging_bytes(kColumns) / kMathWarps);
  }
  __device__ uint32_t scales(int stage) const {
    return base + kStages * (kA + kB) + staging_bytes(kColumns) + stage * scale_bytes(kRows, kColumns);
  }
  __device__ uint32_t full(int stage) const { return scales(kStages) + stage * 8; }
  __device__ uint32_t empty(int stage) const { return full(kStages) + stage * 8; }
};

// One of the two warp groups that multiply.
template <int kRows, int kColumns, class Tiles, bool kClipped>
__device__ inline void multiply_tiles(const GemmParameters& p, const GemmMemory<kRows, kColumns>& memory, int warp) {
  using Memory = GemmMemory<kRows, kColumns>;
  constexpr int kBlocks = kRows / 128;  // of 64 rows, for each group
  constexpr int kGranule = granule(kColumns), kGranules = kColumns / kGranule;
  const int steps = divide_up(p.k, kStep), lane = threadIdx.x % 32, blocks = p.shared ? 2 : 1;
  const int first = warp / 4 * (64 * kBlocks),
            mine = first + warp % 4 * 16;  // rows of the tile: the group's, the warp's
  const uint32_t a = descriptor(memory.a(0) + first * kStep), b = descriptor(memory.b(0));
  Position<Memory::kStages> at;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    if (!__any_sync(~0u, tile.rows > first)) {  // none of the group's: all of its warps agree
      for (int s = 0; s < steps; ++s, at.advance()) {
        mbarrier_wait_warp(memory.full(at.stage), at.parity);
        if (lane < blocks) mbarrier_arrive_cluster(map_shared(memory.empty(at.stage), lane));
      }
      continue;
    }
    float sums[kBlocks][kColumns / 2];
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[m][i] = 0;
    for (int s = 0; s < steps; ++s, at.advance()) {
      const uint32_t scales = memory.scales(at.stage);
      mbarrier_wait_warp(memory.full(at.stage), at.parity);
      const uint32_t a_now = uniform(a + at.stage * (Memory::kA / 16)),
                     b_now = uniform(b + at.stage * (Memory::kB / 16));
      float sb[(kGranules + 3) / 4 * 4];
#pragma unroll
      for (int i = 0; i < kGranules; i += 4)
        load_shared(scales + (kRows + i) * 4, sb[i], sb[i + 1], sb[i + 2], sb[i + 3]);
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
        float sa[2], products[kColumns / 2];
#pragma unroll
        for (int i = 0; i < 2; ++i) sa[i] = load_shared(scales + (mine + 64 * m + lane / 4 + 8 * i) * 4);
        multiply<kColumns>(products, a_now + m * (64 * kStep / 16), b_now);
        wgmma_wait();
        if (m == kBlocks - 1) {  // all that is in the stage has been read
          __syncwarp();
          if (lane < blocks) mbarrier_arrive_cluster(map_shared(memory.empty(at.stage), lane));
        }
        float scale[kGranules][2];
#pragma unroll
        for (int i = 0; i < kGranules; ++i) scale[i][0] = sa[0] * sb[i], scale[i][1] = sa[1] * sb[i];
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i)
          sums[m][i] = fmaf(products[i], scale[2 * i / kGranule][i / 2 % 2], sums[m][i]);
      }
    }
#pragma unroll
    for (int m = 0; m < kBlocks; ++m)
      store<kColumns>(p, memory.staging(warp), tile, tile.row + mine + 64 * m, tile.rows - mine - 64 * m, kClipped,
                      sums[m]);
  }
  wait_for_stores();
}

template <int kRows, int kColumns, class Tiles, bool kClipped>
__device__ inline void gemm(const GemmParameters& p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  using Memory = GemmMemory<kRows, kColumns>;
  const Memory memory{uniform(shared_address(shared))};
  const int warp = static_cast<int>(uniform(threadIdx.x / 32));
  if (threadIdx.x == 0) {
    prefetch_operands(p);
    for (int i = 0; i < Memory::kStages; ++i) {
      mbarrier_init(memory.full(i), 1 + kRows / 4);  // bytes announced; lanes with scales
      mbarrier_init(memory.empty(i), kMathWarps * (p.shared ? 2 : 1));
    }
    fence_mbarrier_init();
  }
  if (p.shared)
    cluster_sync();
  else
    __syncthreads();
  if (warp >= kMathWarps) {
    setmaxnreg_dec<kLoaderRegisters>();
    const Steps all{0, divide_up(p.k, kStep)};
    if (warp == kMathWarps) load_tiles<Memory, Tiles>(p, memory, all);
    const int scale_warp = warp - kMathWarps - 1;
    if (scale_warp >= 0 && scale_warp < kRows / 128) load_scales<Memory, Tiles>(p, memory, all, 128 * scale_warp);
  } else {
    setmaxnreg_inc<kMathRegisters>();
    multiply_tiles<kRows, kColumns, Tiles, kClipped>(p, memory, warp);
  }
  if (p.shared) cluster_sync();  // the other block may still load for this one, and arrive at its barriers
}

}  // namespace moekern::cuda
