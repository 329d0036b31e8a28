// Products in large tiles. Of a block's three warp groups one loads: a warp asks the TMA unit for tiles of both
// operands, another copies their scales, into a ring of stages. Two multiply, each 64 rows (or two times 64) of the
// tile. Of every 128 columns of k a group's four wgmmas sum in registers of their own, and join the float32 sums times
// both scales
// ("promotion"): while one group does that, the other's wgmmas run.
//
// Registers: 65536 / 384 threads gives 168 to each at launch. The loaders keep 40, so that the two others can have
// (65536 - 128 * 40) / 256 = 236, rounded down to a multiple of 8: 232.
#pragma once
#include "cuda/kernels/store.cuh"

namespace moekern::cuda {

constexpr int kLoaderRegisters = 40, kMathRegisters = 232;

// A position in the ring. The first time round, stages are empty, as if a phase of parity 1 had ended.
template <int kStages>
struct Position {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Shared memory by its addresses.
template <int kRows, int kColumns>
struct GemmMemory {
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

// One warp; one lane asks.
template <int kRows, int kColumns, class Tiles>
__device__ inline void load_tiles(const GemmParameters& p, const GemmMemory<kRows, kColumns>& memory) {
  using Memory = GemmMemory<kRows, kColumns>;
  const int steps = divide_up(p.k, kStep);
  const bool elected = threadIdx.x % 32 == 0;
  const int rank = p.shared ? static_cast<int>(cluster_rank()) : 0;
  Position<Memory::kStages> at;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    if (elected) {
      for (int s = 0; s < steps; ++s, at.advance()) {
        const uint32_t full = memory.full(at.stage);
        mbarrier_wait(memory.empty(at.stage), at.parity ^ 1);
        mbarrier_arrive_expect_tx(full, Memory::kA + Memory::kB);
        if (p.shared == 1)
          tma_load_multicast(memory.a(at.stage) + rank * (Memory::kA / 2), &p.a_map, full, 3, s * kStep,
                             tile.row + rank * (kRows / 2), tile.slot);
        else
          tma_load(memory.a(at.stage), &p.a_map, full, s * kStep, tile.row, tile.slot);
        if (p.shared == 2)
          tma_load_multicast(memory.b(at.stage) + rank * (Memory::kB / 2), &p.b_map, full, 3, s * kStep,
                             tile.column + rank * (kColumns / 2), tile.group);
        else
          tma_load(memory.b(at.stage), &p.b_map, full, s * kStep, tile.column, tile.group);
      }
    }
    __syncwarp();
  }
}

// A scale to shared memory, converted if need be.
__device__ inline void copy_scale(uint32_t to, const Scales& s, int64_t i) {
  if (s.ue8m0)
    store_shared(to, scale_at(s, i));
  else
    cp_async_4(to, static_cast<const float*>(s.values) + i);
}

// A warp for every 128 rows, four a lane; of the first, a lane has those of a granule of b. They lie at any strides, so
// that no TMA copy would do for all of them; a warp has time for it.
template <int kRows, int kColumns, class Tiles>
__device__ inline void load_scales(const GemmParameters& p, const GemmMemory<kRows, kColumns>& memory, int first) {
  using Memory = GemmMemory<kRows, kColumns>;
  constexpr int kGranules = kColumns / granule(kColumns);
  const int steps = divide_up(p.k, kStep), lane = threadIdx.x % 32;
  Position<Memory::kStages> at;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    // rows behind the last one have its scale, and are not stored
    int64_t of_a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      of_a[i] = scale_row(p.sa, tile.slot, max(min(tile.row + first + lane + 32 * i, p.rows - 1), 0));
    const int64_t of_b = scale_row(p.sb, tile.group, min(tile.column + lane % kGranules * granule(kColumns), p.n - 1));
    for (int s = 0; s < steps; ++s, at.advance()) {
      const uint32_t full = memory.full(at.stage), scales = memory.scales(at.stage);
      mbarrier_wait_warp(memory.empty(at.stage), at.parity ^ 1);
      const int64_t step_a = s / p.sa.steps * p.sa.step_stride, step_b = s / p.sb.steps * p.sb.step_stride;
#pragma unroll
      for (int i = 0; i < 4; ++i) copy_scale(scales + (first + lane + 32 * i) * 4, p.sa, of_a[i] + step_a);
      if (first == 0 && lane < kGranules) copy_scale(scales + (kRows + lane) * 4, p.sb, of_b + step_b);
      if (p.sa.ue8m0 || p.sb.ue8m0) {
        cp_async_wait();
        mbarrier_arrive(full);
      } else {
        cp_async_mbarrier_arrive(full);
      }
    }
  }
}

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
    prefetch_tensor_map(&p.a_map);
    prefetch_tensor_map(&p.b_map);
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
    if (warp == kMathWarps) load_tiles<kRows, kColumns, Tiles>(p, memory);
    const int scale_warp = warp - kMathWarps - 1;
    if (scale_warp >= 0 && scale_warp < kRows / 128) load_scales<kRows, kColumns, Tiles>(p, memory, 128 * scale_warp);
  } else {
    setmaxnreg_inc<kMathRegisters>();
    multiply_tiles<kRows, kColumns, Tiles, kClipped>(p, memory, warp);
  }
  if (p.shared) cluster_sync();  // the other block may still load for this one, and arrive at its barriers
}

}  // namespace moekern::cuda
