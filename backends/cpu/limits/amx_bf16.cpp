#include "cpu/simd/amx.h"
#include "cpu/simd/avx512.h"

#include "cpu/limits/loops.h"

namespace moekern::cpu {
namespace {

constexpr TileConfig all_tiles() {
  TileConfig config;
  for (int t = 0; t < 8; ++t) config.set(t, 16);
  return config;
}
constexpr TileConfig kConfig = all_tiles();

// The GEMM's four tiles of sums, on zeros: 4 chains cover a latency of 52 cycles at one product in 16.
int64_t multiply_add_tiles(int64_t rounds) {
  constexpr int64_t kFlops = 4 * 2 * 16 * 16 * 32;
  rounds /= 8;                 // a round of vectors takes about 8 cycles, one of tiles 64
  _tile_loadconfig(&kConfig);  // which clears them
  for (int64_t round = 0; round < rounds; ++round) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return rounds * kFlops;
}

}  // namespace

extern const LimitIsa k_limits_amx_bf16;
constexpr LimitIsa k_limits_amx_bf16 = {multiply_add_tiles, {read<1, 0>, read<1, 2048>, read<2, 0>}, copy};

}  // namespace moekern::cpu
