// Which tiles a block computes, in which order. Blocks persist: as many as there are multiprocessors, or clusters of
// two, take tiles in turn. All warps of a block go through the same tiles, each for itself, and all lanes of a warp
// together.
#pragma once
#include "cuda/kernels/gemm_parameters.h"
#include "cuda/kernels/ptx.cuh"

namespace moekern::cuda {

struct Tile {
  int group = 0;     // whose weights
  int slot = 0;      // matrix of a and out
  int row = 0;       // the first in it
  int rows = 0;      // from there on, that are the group's: may be more than a tile's, or none
  int column = 0;    // the first
  int first = 0, k;  // columns of k: from the first on, so many
};

__device__ inline int divide_up(int x, int y) { return (x + y - 1) / y; }

// Units of one product: tiles, or pairs of tiles if a cluster shares an operand. `band` rows of units go column by
// column: those that are under way together share a's rows and b's in L2.
template <int kRows, int kColumns>
class Raster {
 public:
  __device__ explicit Raster(const GemmParameters& p)
      : band_(p.band),
        rank_(p.shared ? static_cast<int>(cluster_rank()) : 0),
        pair_m_(p.shared == 2 ? 2 : 1),
        pair_n_(p.shared == 1 ? 2 : 1),
        units_n_(divide_up(p.n, kColumns * pair_n_)),
        first(static_cast<int>(blockIdx.x) / p.cluster),
        step(static_cast<int>(gridDim.x) / p.cluster) {}

  __device__ int height(int rows) const { return divide_up(rows, kRows * pair_m_); }
  __device__ int units(int rows) const { return height(rows) * units_n_; }

  // Unit i of a product of so many rows.
  __device__ void place(int i, int rows, Tile& tile) const {
    const int above = i / (band_ * units_n_) * band_;
    const int inner = i - above * units_n_;
    const int high = min(height(rows) - above, band_);
    const int column = inner / high;
    const int row = above + inner - column * high;
    const int from = (row * pair_m_ + (pair_m_ == 2 ? rank_ : 0)) * kRows;
    tile.row += from;
    tile.rows = rows - from;
    tile.column = (column * pair_n_ + (pair_n_ == 2 ? rank_ : 0)) * kColumns;
  }

 private:
  int band_, rank_, pair_m_, pair_n_, units_n_;

 public:
  const int first, step;  // of the units, for this block or its cluster
};

template <int kRows, int kColumns>
class DenseTiles {
 public:
  __device__ explicit DenseTiles(const GemmParameters& p) : raster_(p), rows_(p.rows), k_(p.k), at_(raster_.first) {}

  __device__ bool next(Tile& tile) {
    if (!__any_sync(~0u, at_ < raster_.units(rows_))) return false;
    tile = Tile{};
    tile.k = k_;
    raster_.place(at_, rows_, tile);
    at_ += raster_.step;
    return true;
  }

 private:
  Raster<kRows, kColumns> raster_;
  int rows_, k_, at_;
};

// Groups come one after another. A warp looks at 32 of them at a time, a lane each; all lanes have to call.
template <int kRows, int kColumns>
class GroupedTiles {
 public:
  __device__ explicit GroupedTiles(const GemmParameters& p) : p_(p), raster_(p), at_(raster_.first) { look(); }

  __device__ bool next(Tile& tile) {
    while (at_ >= before_ + total_ && base_ < p_.groups) {
      before_ += total_;
      base_ += 32;
      look();
    }
    if (!__any_sync(~0u, base_ < p_.groups)) return false;
    const int in = at_ - before_;
    const int lane = __ffs(__ballot_sync(~0u, end_ > in)) - 1;
    const int end = __shfl_sync(~0u, end_, lane), rows = __shfl_sync(~0u, count_, lane);
    tile.group = base_ + lane;
    tile.slot = p_.masked ? tile.group : 0;
    tile.row = __shfl_sync(~0u, start_, lane);
    tile.first = 0;
    tile.k = p_.k;
    raster_.place(in - (end - raster_.units(rows)), rows, tile);
    at_ += raster_.step;
    return true;
  }

 private:
  // Rows that the operand does not have are left out.
  __device__ void look() {
    const int lane = threadIdx.x % 32, g = base_ + lane;
    start_ = count_ = 0;
    if (g < p_.groups) {
      const int64_t rows = p_.rows;
      const int64_t start = p_.masked ? 0 : min(max(p_.starts[g], int64_t{0}), rows);
      start_ = static_cast<int>(start);
      count_ = static_cast<int>(min(max(p_.counts[g], int64_t{0}), rows - start));
    }
    end_ = raster_.units(count_);
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(~0u, end_, distance);
      if (lane >= distance) end_ += other;
    }
    total_ = __shfl_sync(~0u, end_, 31);
  }

  const GemmParameters& p_;
  Raster<kRows, kColumns> raster_;
  int at_, base_ = 0, before_ = 0, total_ = 0;  // units: this block's next, and those of the groups before `base_`
  int start_ = 0, count_ = 0, end_ = 0;         // of this lane's group; where its units end
};

// A product for every group, of the rows of both operands that are its own.
template <int kRows, int kColumns>
class KGroupedTiles {
 public:
  __device__ explicit KGroupedTiles(const GemmParameters& p) : p_(p), raster_(p), at_(raster_.first) {}

  __device__ bool next(Tile& tile) {
    const int each = raster_.units(p_.rows);
    if (!__any_sync(~0u, at_ < each * p_.groups)) return false;
    tile = Tile{};
    tile.group = tile.slot = at_ / each;
    const int64_t k = p_.k, first = min(max(p_.starts[tile.group], int64_t{0}), k);
    tile.first = static_cast<int>(first);
    tile.k = static_cast<int>(min(max(p_.counts[tile.group], int64_t{0}), k - first));
    raster_.place(at_ - tile.group * each, p_.rows, tile);
    at_ += raster_.step;
    return true;
  }

 private:
  const GemmParameters& p_;
  Raster<kRows, kColumns> raster_;
  int at_;
};

}  // namespace moekern::cuda
