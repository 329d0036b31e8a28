// The AMX tile instructions that gemm/amx_bf16.cpp uses, in plain C++, from Intel's Software
// Developer's Manual. What the processor answers with #GP or #UD is an exception that says why.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "emulated_bf16.h"

namespace moekern::emulated {

constexpr int kTiles = 8, kMaxRows = 16, kMaxColumnBytes = 64;  // palette 1

struct Tile {
  int rows = 0, colsb = 0;
  uint8_t data[kMaxRows][kMaxColumnBytes] = {};
  bool valid() const { return rows > 0; }
};

struct Tiles {
  bool configured = false;
  Tile tile[kTiles];
};

inline thread_local Tiles tiles;

[[noreturn]] static inline void fault(const char* instruction, const std::string& reason) {
  throw std::logic_error(std::string(instruction) + ": " + reason);
}

static inline void require(bool ok, const char* instruction, const char* reason) {
  if (!ok) fault(instruction, reason);
}

template <int T>
static inline Tile& valid_tile(const char* instruction) {
  static_assert(T >= 0 && T < kTiles, "palette 1 has 8 tiles");
  require(tiles.configured, instruction, "no tile configuration is loaded");
  require(tiles.tile[T].valid(), instruction, "the tile is not configured");
  return tiles.tile[T];
}

static inline void tile_release() { tiles = {}; }

static inline void tile_loadconfig(const void* memory) {
  constexpr const char* kName = "ldtilecfg";
  uint8_t config[64];
  std::memcpy(config, memory, sizeof config);
  const auto zeros = [&](int first, int last) {
    for (int i = first; i <= last; ++i) require(config[i] == 0, kName, "a reserved byte is not zero");
  };
  if (config[0] == 0) return tile_release();
  require(config[0] == 1, kName, "the palette is neither 0 nor 1");
  require(config[1] == 0, kName, "the start row is not 0: only an interrupted load has one");
  zeros(2, 15);
  zeros(16 + 2 * kTiles, 47);
  zeros(48 + kTiles, 63);
  Tiles fresh;
  fresh.configured = true;
  for (int t = 0; t < kTiles; ++t) {
    fresh.tile[t].colsb = config[16 + 2 * t] | config[17 + 2 * t] << 8;
    fresh.tile[t].rows = config[48 + t];
    require(fresh.tile[t].colsb <= kMaxColumnBytes, kName, "a row has more than 64 bytes");
    require(fresh.tile[t].rows <= kMaxRows, kName, "a tile has more than 16 rows");
    require((fresh.tile[t].rows == 0) == (fresh.tile[t].colsb == 0), kName, "a tile has rows or columns, not both");
  }
  tiles = fresh;
}

template <int T>
static inline void tile_zero() {
  Tile& t = valid_tile<T>("tilezero");
  std::memset(t.data, 0, sizeof t.data);
}

template <int T>
static inline void tile_loadd(const void* base, int64_t stride) {
  Tile& t = valid_tile<T>("tileloadd");
  std::memset(t.data, 0, sizeof t.data);
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(t.data[r], static_cast<const uint8_t*>(base) + r * stride, static_cast<size_t>(t.colsb));
}

template <int T>
static inline void tile_stored(void* base, int64_t stride) {
  const Tile& t = valid_tile<T>("tilestored");
  for (int r = 0; r < t.rows; ++r)
    std::memcpy(static_cast<uint8_t*>(base) + r * stride, t.data[r], static_cast<size_t>(t.colsb));
}

// C += A B over pairs of bf16. Even and odd products have a sum each, which meet at the end.
template <int C, int A, int B>
static inline void tile_dpbf16ps() {
  constexpr const char* kName = "tdpbf16ps";
  static_assert(C != A && C != B && A != B, "the three tiles must differ");
  Tile& c = valid_tile<C>(kName);
  const Tile &a = valid_tile<A>(kName), &b = valid_tile<B>(kName);
  require(c.colsb % 4 == 0 && a.colsb % 4 == 0 && b.colsb % 4 == 0, kName, "columns are not multiples of 4 bytes");
  require(c.rows == a.rows, kName, "C and A differ in rows");
  require(c.colsb == b.colsb, kName, "C and B differ in columns");
  require(a.colsb / 4 == b.rows, kName, "A's columns are not B's rows");
  const auto bf16 = [](const Tile& t, int row, int i) {
    uint16_t x;
    std::memcpy(&x, t.data[row] + 2 * i, sizeof x);
    return x;
  };
  for (int m = 0; m < c.rows; ++m)
    for (int n = 0; n < c.colsb / 4; ++n) {
      float even = 0.f, odd = 0.f, sum;
      for (int k = 0; k < a.colsb / 4; ++k) {
        even = fma_bf16(even, bf16(a, m, 2 * k), bf16(b, k, 2 * n));
        odd = fma_bf16(odd, bf16(a, m, 2 * k + 1), bf16(b, k, 2 * n + 1));
      }
      std::memcpy(&sum, c.data[m] + 4 * n, sizeof sum);
      sum = flush(flush(sum) + flush(even + odd));
      std::memcpy(c.data[m] + 4 * n, &sum, sizeof sum);
    }
  for (int m = 0; m < kMaxRows; ++m) {  // write_row_and_zero, zero_upper_rows
    const int kept = m < c.rows ? c.colsb : 0;
    std::memset(c.data[m] + kept, 0, static_cast<size_t>(kMaxColumnBytes - kept));
  }
}

}  // namespace moekern::emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stream_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig moekern::emulated::tile_loadconfig
#define _tile_release moekern::emulated::tile_release
#define _tile_zero(T) moekern::emulated::tile_zero<(T)>()
#define _tile_loadd(T, BASE, STRIDE) moekern::emulated::tile_loadd<(T)>(BASE, STRIDE)
#define _tile_stream_loadd(T, BASE, STRIDE) moekern::emulated::tile_loadd<(T)>(BASE, STRIDE)
#define _tile_stored(T, BASE, STRIDE) moekern::emulated::tile_stored<(T)>(BASE, STRIDE)
#define _tile_dpbf16ps(C, A, B) moekern::emulated::tile_dpbf16ps<(C), (A), (B)>()
