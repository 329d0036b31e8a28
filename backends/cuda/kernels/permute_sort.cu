// The row of every slot: a counting sort by expert that keeps the order of the slots, in one cluster.
//
// Warps have slots in their order, so a slot's row is: its expert's first, plus the expert's slots of all earlier
// blocks, of the block's earlier warps, and of the warp's own earlier slots. Counters are in shared memory, a set for
// every warp; blocks read each other's sums there. Nothing is atomic, and global memory holds no counters.
#include "cuda/kernels/elements.cuh"
#include "cuda/kernels/overlap.cuh"
#include "cuda/kernels/permute_parameters.h"
#include "cuda/kernels/ptx.cuh"

namespace moekern::cuda {
namespace {

constexpr uint32_t kNoExpert = ~0u;
constexpr int kSlotsOfLane = kSlotsATime / 32;
constexpr uint32_t kWarpsATime = 8;  // whose counters a thread reads before it writes the first

struct Slot {
  uint32_t token, choice;
  __device__ Slot(const SortParameters& p, uint32_t slot) : token(slot / p.topk), choice(slot % p.topk) {}
};

// The expert here, or kNoExpert, as for an id that no expert has.
__device__ inline uint32_t expert_of(const SortParameters& p, const Slot& slot) {
  int64_t id = load_index(at(p.ids, slot.token, slot.choice), p.ids.dtype);
  if (p.expert_map.data) id = id >= 0 && id < p.mapped ? load_index(at(p.expert_map, 0, id), p.expert_map.dtype) : -1;
  return id >= 0 && id < p.experts ? static_cast<uint32_t>(id) : kNoExpert;
}

__device__ inline int32_t& inverse_of(const SortParameters& p, const Slot& slot) {
  return *reinterpret_cast<int32_t*>(at(p.inverse, slot.token, slot.choice));
}

// Bins of kNoExpert and of experts that are counted another time are none.
__device__ inline bool in_bins(const SortParameters& p, uint32_t expert, uint32_t first) {
  return expert != kNoExpert && expert - first < p.bins;
}

// How many slots of the warp before each have its expert, until all bases are known in place of the row.
__device__ inline void count_warp(const SortParameters& p, uint32_t begin, uint32_t end, uint32_t first,
                                  uint32_t* counters) {
  const int lane = threadIdx.x % 32;
  for (uint32_t base = begin; base < end; base += kSlotsATime) {
    uint32_t experts[kSlotsOfLane];
#pragma unroll
    for (int i = 0; i < kSlotsOfLane; ++i) {
      const uint32_t slot = base + i * 32 + lane;
      experts[i] = slot < end ? expert_of(p, {p, slot}) : kNoExpert;
    }
#pragma unroll
    for (int i = 0; i < kSlotsOfLane; ++i) {
      const uint32_t slot = base + i * 32 + lane;
      const bool counts = in_bins(p, experts[i], first);
      const uint32_t bin = experts[i] - first;
      const uint32_t alike = __match_any_sync(~0u, counts ? bin : kNoExpert);
      const uint32_t earlier = __popc(alike & ((1u << lane) - 1));
      const uint32_t before = counts ? counters[bin] : 0;
      __syncwarp();
      if (counts && earlier == 0) counters[bin] = before + __popc(alike);
      __syncwarp();
      if (counts)
        inverse_of(p, {p, slot}) = static_cast<int32_t>(before + earlier);
      else if (slot < end && experts[i] == kNoExpert)
        inverse_of(p, {p, slot}) = -1;
    }
  }
}

// Exclusive prefix sums over the block's threads, and their total.
__device__ inline uint32_t scan_block(uint32_t x, uint32_t* of_warps, uint32_t* total) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  uint32_t sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) of_warps[warp] = sum;
  __syncthreads();
  uint32_t before = 0, all = 0;
  for (uint32_t w = 0; w < warps; ++w) {
    before += w < warp ? of_warps[w] : 0;
    all += of_warps[w];
  }
  __syncthreads();
  *total = all;
  return before + sum - x;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kSortWarps * 32, 1)
    permute_sort(const __grid_constant__ SortParameters p) {
  let_next_begin();
  extern __shared__ uint32_t shared[];
  __shared__ uint32_t of_block[kBins], bases[kBins], of_warps[kSortWarps];
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const uint32_t rank = blockIdx.x, blocks = gridDim.x;  // one cluster
  const uint64_t from = static_cast<uint64_t>(rank * warps + warp) * p.share;
  const uint32_t begin = min(from, static_cast<uint64_t>(p.slots)),
                 end = min(from + p.share, static_cast<uint64_t>(p.slots));
  uint32_t* counters = shared + warp * p.bins;
  uint32_t row = 0;  // the first of the bins' experts
  for (uint32_t first = 0; first < p.experts || first == 0; first += p.bins) {
    for (uint32_t bin = lane; bin < p.bins; bin += 32) counters[bin] = 0;
    __syncwarp();
    count_warp(p, begin, end, first, counters);
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin < p.bins; bin += blockDim.x) {
      uint32_t sum = 0;
      for (uint32_t w = 0; w < warps; w += kWarpsATime) {
        uint32_t counts[kWarpsATime];
#pragma unroll
        for (uint32_t i = 0; i < kWarpsATime; ++i) counts[i] = w + i < warps ? shared[(w + i) * p.bins + bin] : 0;
#pragma unroll
        for (uint32_t i = 0; i < kWarpsATime; ++i) {
          if (w + i < warps) shared[(w + i) * p.bins + bin] = sum;
          sum += counts[i];
        }
      }
      of_block[bin] = sum;
    }
    cluster_sync();
    for (uint32_t chunk = 0; chunk < p.bins; chunk += blockDim.x) {
      const uint32_t bin = chunk + threadIdx.x;
      const bool there = bin < p.bins && first + bin < p.experts;
      uint32_t earlier = 0, count = 0;
      if (there)
        for (uint32_t other = 0; other < blocks; ++other) {
          const uint32_t of_other =
              __float_as_uint(load_shared_cluster(map_shared(shared_address(of_block + bin), other)));
          earlier += other < rank ? of_other : 0;
          count += of_other;
        }
      const uint32_t padded = (count + p.alignment - 1) / p.alignment * p.alignment;
      uint32_t total;
      const uint32_t start = row + scan_block(padded, of_warps, &total);
      row += total;
      if (!there) continue;
      bases[bin] = start + earlier;
      if (rank == 0) {
        *reinterpret_cast<int64_t*>(at(p.starts, 0, first + bin)) = start;
        *reinterpret_cast<int64_t*>(at(p.counts, 0, first + bin)) = count;
      }
    }
    __syncthreads();
    for (uint32_t slot = begin + lane; slot < end; slot += 32) {
      const Slot place(p, slot);
      const uint32_t expert = expert_of(p, place);
      if (in_bins(p, expert, first)) inverse_of(p, place) += bases[expert - first] + counters[expert - first];
    }
    cluster_sync();  // nobody leaves, or counts anew, while its sums are read
  }
}

}  // namespace moekern::cuda
