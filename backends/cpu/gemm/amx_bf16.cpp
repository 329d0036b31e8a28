// Packed GEMM over bf16 pairs for AMX (Sapphire Rapids and later).
//
// TDPBF16PS multiplies 16 rows x 32 k by 32 k x 16 columns: 8192 multiply-adds in 16 cycles, 8 times
// the rate of VDPBF16PS. Two by two tiles of sums + 2 of a + 2 of b are all eight registers; 4 loads
// feed 4 products. A scale block ends every four of those steps, and vectors add it up.
#include "cpu/simd/amx.h"
#include "cpu/simd/avx512.h"

#include <array>

#include "cpu/gemm/pack_bf16.h"
#include "cpu/gemm/ukernel.h"
#include "cpu/rows.h"

namespace moekern::cpu {
namespace {

constexpr int kTileRows = 16, kTileK = 32, MR = 2 * kTileRows, NV = 2, NR = NV * W;

// Tiles 0 1 are sums of the upper 16 rows of a, 2 3 of the lower, 4 and 5 those rows, 6 7 columns of b.
constexpr std::array<TileConfig, MR + 1> configs() {
  std::array<TileConfig, MR + 1> all{};
  for (int mr = 1; mr <= MR; ++mr) {
    const int upper = mr < kTileRows ? mr : kTileRows, lower = mr - upper;
    const int rows[] = {upper, upper, lower, lower, upper, lower, kTileK / 2, kTileK / 2};
    for (int t = 0; t < 8; ++t) all[mr].set(t, rows[t]);
  }
  return all;
}

constexpr std::array<TileConfig, MR + 1> kConfigs = configs();

// sums[16][NR] of one half of the rows, or of both.
template <bool kBoth>
inline void multiply(int kc, const uint16_t* a, int64_t a_stride, const uint32_t* b, float* sums) {
  const int64_t a_bytes = a_stride * static_cast<int64_t>(sizeof *a);
  constexpr int64_t kStripBytes = NR * sizeof *b, kSumBytes = NR * sizeof *sums;
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kBoth) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int p = 0; p < kc; p += kTileK, a += kTileK, b += kTileK / 2 * NR) {
    _tile_loadd(4, a, a_bytes);
    _tile_loadd(6, b, kStripBytes);
    _tile_loadd(7, b + W, kStripBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kBoth) {
      _tile_loadd(5, a + kTileRows * a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kSumBytes);
  _tile_stored(1, sums + W, kSumBytes);
  if constexpr (kBoth) {
    _tile_stored(2, sums + kTileRows * NR, kSumBytes);
    _tile_stored(3, sums + kTileRows * NR + W, kSumBytes);
  }
}

// Configured and released every time: another library's kernels may use the tiles of this thread in
// between, and tiles in use are 8 KiB of state at every context switch.
void tile(int mr, int kc, const void* a, int64_t a_stride, const void* b, const float* row_scale, const float* scale,
          float* c, int64_t ldc) {
  alignas(64) float sums[MR * NR];
  _tile_loadconfig(&kConfigs[static_cast<size_t>(mr)]);
  const auto run = mr > kTileRows ? multiply<true> : multiply<false>;
  run(kc, static_cast<const uint16_t*>(a), a_stride, static_cast<const uint32_t*>(b), sums);
  _tile_release();
  for (int i = 0; i < mr; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < NV; ++v) {
      float* out = c + i * ldc + v * W;
      store(out, fma(mul(load(sums + i * NR + v * W), set1(row_scale[i])), load(scale + v * W), load(out)));
    }
}

}  // namespace

extern const GemmIsa k_amx_bf16;
constexpr GemmIsa k_amx_bf16 = {&kRowOps, Dtype::bf16, W, MR, NR, 2, pack<NV>, tile, nullptr};

}  // namespace moekern::cpu
