// The warps that load: operands through the TMA unit, scales by copies of their own, into a ring of stages.
//
// Memory says how large a tile is (kRows, kColumns), how many stages there are, and where their parts lie: a, b,
// scales, and the barriers full and empty.
#pragma once
#include "cuda/kernels/scales.cuh"

namespace moekern::cuda {

// A position in the ring. The first time round, stages are empty, as if a phase of parity 1 had ended.
template <int kStages>
struct Position {
  int stage = 0;
  uint32_t parity = 0;

  __device__ void advance() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
};

// Those of k that a block multiplies.
struct Steps {
  int first, last;
};

// The tensor maps of both operands, which are there only if k is not 0.
__device__ inline void prefetch_operands(const GemmParameters& p) {
  if (p.k > 0) {
    prefetch_tensor_map(&p.a_map);
    prefetch_tensor_map(&p.b_map);
  }
}

// One warp; one lane asks.
template <class Memory, class Tiles>
__device__ inline void load_tiles(const GemmParameters& p, const Memory& memory, Steps steps) {
  constexpr int kA = Memory::kRows * kStep, kB = Memory::kColumns * kStep;
  const bool elected = threadIdx.x % 32 == 0;
  const int rank = p.shared ? static_cast<int>(cluster_rank()) : 0;
  Position<Memory::kStages> at;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    if (elected) {
      for (int s = steps.first; s < steps.last; ++s, at.advance()) {
        const uint32_t full = memory.full(at.stage), a = memory.a(at.stage), b = memory.b(at.stage);
        mbarrier_wait(memory.empty(at.stage), at.parity ^ 1);
        mbarrier_arrive_expect_tx(full, kA + kB);
        if (p.shared == 1)
          tma_load_multicast(a + rank * (kA / 2), &p.a_map, full, 3, s * kStep, tile.row + rank * (Memory::kRows / 2),
                             tile.slot);
        else
          tma_load(a, &p.a_map, full, s * kStep, tile.row, tile.slot);
        if (p.shared == 2)
          tma_load_multicast(b + rank * (kB / 2), &p.b_map, full, 3, s * kStep,
                             tile.column + rank * (Memory::kColumns / 2), tile.group);
        else
          tma_load(b, &p.b_map, full, s * kStep, tile.column, tile.group);
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

// One warp for the tile's rows from `first` on, at most 128; that of row 0 also has a lane for every granule of b.
// Scales lie at any strides, so that no TMA copy would do for all of them; a warp has time for it.
template <class Memory, class Tiles>
__device__ inline void load_scales(const GemmParameters& p, const Memory& memory, Steps steps, int first) {
  constexpr int kRows = Memory::kRows < 128 ? Memory::kRows : 128, kEach = (kRows + 31) / 32;
  constexpr int kGranule = granule(Memory::kColumns), kGranules = Memory::kColumns / kGranule;
  constexpr int kRead = (kGranules + 3) / 4 * 4;  // four at a time
  const int lane = threadIdx.x % 32;
  Position<Memory::kStages> at;
  Tiles tiles(p);
  for (Tile tile; tiles.next(tile);) {
    // rows behind the last one have its scale, and are not stored
    int64_t of_a[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i)
      of_a[i] = scale_row(p.sa, tile.slot, max(min(tile.row + first + lane + 32 * i, p.rows - 1), 0));
    const int64_t of_b = scale_row(p.sb, tile.group, min(tile.column + lane % kGranules * kGranule, p.n - 1));
    for (int s = steps.first; s < steps.last; ++s, at.advance()) {
      const uint32_t full = memory.full(at.stage), scales = memory.scales(at.stage);
      mbarrier_wait_warp(memory.empty(at.stage), at.parity ^ 1);
      const int64_t step_a = s / p.sa.steps * p.sa.step_stride, step_b = s / p.sb.steps * p.sb.step_stride;
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (lane + 32 * i < kRows) copy_scale(scales + (first + lane + 32 * i) * 4, p.sa, of_a[i] + step_a);
      if (first == 0 && lane < kRead) copy_scale(scales + (Memory::kRows + lane) * 4, p.sb, of_b + step_b);
      if (p.sa.ue8m0 || p.sb.ue8m0) {
        cp_async_wait();
        mbarrier_arrive(full);
      } else {
        cp_async_mbarrier_arrive(full);
      }
    }
  }
}

}  // namespace moekern::cuda
