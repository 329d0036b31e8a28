// What AMX adds to simd/avx512.h: eight tile registers of up to 16 rows of 64 bytes. The tile
// instructions name registers by literal numbers, so kernels use the intrinsics as they are.
#pragma once
#include "cpu/simd/x86.h"

#include <cstdint>

namespace moekern::cpu {
namespace {

// What LDTILECFG reads. gcc tells the optimiser of 8 of these 64 bytes only: keep configurations constant.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int tile_rows) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = tile_rows ? 64 : 0;
  }
};

}  // namespace
}  // namespace moekern::cpu
