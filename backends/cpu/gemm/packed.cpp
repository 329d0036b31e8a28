// The packed GEMM: loops, blocks, threads. What is ISA-dependent is behind GemmIsa (gemm/tile.h).
//
//   for each chunk of activation rows              A normalised to f32 once, shared by the threads
//     parallel over (row block, column block)      C of the task stays in the thread's L2
//       for each 128 of k                          one scale block: C += scale * (A x strip)
//         for each strip of nr weight rows         decoded to f32, k-major, in L1
//           for each tile of mr activation rows
#include "cpu/gemm/packed.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm/driver.h"
#include "cpu/parallel.h"
#include "moekern/float_formats.h"

namespace moekern::cpu {
namespace {

constexpr int64_t kSharedBytesPerThread = 8 << 20;
constexpr int kMaxStrip = 64;

struct Strip {
  const uint8_t* rows[kMaxStrip];
  alignas(64) float scale[kMaxStrip];
  alignas(64) uint8_t staged[kMaxStrip * kBlock];
};

constexpr uint8_t kZeroRow[kBlock] = {};

// Points at nr rows of kc_padded weights. Rows past n are zero; a partial or strided block is
// copied, since what lies beside it is not ours to read.
void locate(const GemmIsa& isa, const GemmProblem& p, int64_t j, int64_t k, int kc, int kc_padded, Strip& strip) {
  const auto* base = reinterpret_cast<const uint8_t*>(p.b.data);
  const bool in_place = p.b.col_stride == 1 && kc == kc_padded;
  const int columns = static_cast<int>(std::min<int64_t>(isa.nr, p.n() - j));
  float scale = 0.f;
  int64_t scale_ends = 0;  // looking a scale up takes four divisions, so once per block of rows
  for (int r = 0; r < columns; ++r) {
    if (r == scale_ends) {
      scale = scale_of(p.sb, j + r, k);
      scale_ends = r + p.sb.block_rows - (j + r) % p.sb.block_rows;
    }
    strip.scale[r] = scale;
    const uint8_t* row = base + (j + r) * p.b.row_stride + k;
    strip.rows[r] = in_place ? row : strip.staged + r * kBlock;
    if (in_place) {
      __builtin_prefetch(row + kBlock, 0, 2);
      __builtin_prefetch(row + kBlock + 64, 0, 2);
    }
  }
  for (int r = columns; r < isa.nr; ++r) {
    strip.rows[r] = kZeroRow;
    strip.scale[r] = 0.f;
  }
  if (in_place) return;
  std::memset(strip.staged, 0, sizeof strip.staged);
  for (int q = 0; q < kc; ++q)
    for (int r = 0; r < columns; ++r)
      strip.staged[r * kBlock + q] = base[(j + r) * p.b.row_stride + (k + q) * p.b.col_stride];
}

// NaN and infinities do not survive the fast decoder.
void repair(const GemmIsa& isa, Dtype format, const Strip& strip, int kc, void* values) {
  for (int r = 0; r < isa.nr; ++r)
    for (int q = 0; q < kc; ++q) {
      const float w = fp8_to_f32(format, strip.rows[r][q]);
      if (w - w == 0.f) continue;
      const int at = (q / isa.kr * isa.nr + r) * isa.kr + q % isa.kr;
      if (isa.panel == Dtype::f32) {
        static_cast<float*>(values)[at] = w;
      } else {
        static_cast<uint16_t*>(values)[at] = f32_to_bf16(w);
      }
    }
}

// What tiles will want in a while, into L2: as many lines before every tile. Hardware doesn't see it coming, since each
// row is read for 512 bytes at a time. A number that varied would be mispredicted, at 10% of a tile.
struct Ahead {
  const char* lines;
  int64_t per_tile;
  void prefetch(int64_t tile) const {
    for (int64_t l = tile * per_tile; l < (tile + 1) * per_tile; ++l) __builtin_prefetch(lines + l * 64, 0, 2);
  }
};

void strip_block(const GemmIsa& isa, const GemmProblem& p, const PackedActivations& a, int64_t i0, int64_t rows,
                 int64_t j, int64_t kb, Ahead ahead, float* sums, int64_t ld) {
  const int kc = static_cast<int>(std::min<int64_t>(kBlock, p.k() - kb * kBlock));
  const int kc_padded = static_cast<int>(round_up(kc, 4 * isa.lanes));
  void* values = scratch(Slot::own_b, static_cast<size_t>(kBlock * isa.nr * size_of(isa.panel)));
  Strip strip;
  locate(isa, p, j, kb * kBlock, kc, kc_padded, strip);
  if (isa.pack(p.b.dtype, strip.rows, kc_padded, values)) repair(isa, p.b.dtype, strip, kc, values);
  // Tiles of equal height: 16 rows in tiles of at most 6 are 6 + 5 + 5, never 6 + 6 + 4.
  const int64_t tiles = ceil_div(rows, isa.mr);
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = rows * t / tiles, next = rows * (t + 1) / tiles;
    ahead.prefetch(t);
    const float* row_scale = a.row_scales ? a.row_scales + kb * a.rows + i0 + i : nullptr;
    isa.tile(static_cast<int>(next - i), kc_padded, a.at(kb, i0 + i), kBlock, values, row_scale, strip.scale,
             sums + i * ld, ld);
  }
}

}  // namespace

int64_t packed_bytes(Dtype panel, int64_t rows, int64_t k) {
  const int64_t k_blocks = ceil_div(k, kBlock), scales = panel == Dtype::bf16 ? rows * k_blocks : 0;
  return round_up(rows * k_blocks * kBlock * size_of(panel), 64) +
         (scales + rows) * static_cast<int64_t>(sizeof(float));
}

PackedActivations packed_activations(Dtype panel, int64_t rows, int64_t k, char* memory) {
  const int64_t k_blocks = ceil_div(k, kBlock), scales = panel == Dtype::bf16 ? rows * k_blocks : 0;
  auto* after = reinterpret_cast<float*>(memory + round_up(rows * k_blocks * kBlock * size_of(panel), 64));
  return {panel, memory, scales ? after : nullptr, reinterpret_cast<int*>(after + scales), rows, k_blocks};
}

void pack_activations(const GemmIsa& isa, const GemmProblem& p, int64_t i, const PackedActivations& a, int64_t row) {
  const bool f32 = a.panel == Dtype::f32;
  const int64_t from = p.a_row(i);
  float* values = scratch_of<float>(Slot::row, a.k_blocks * kBlock);
  a.exponents[row] = normalised_row(*isa.rows, p, from, f32, f32 ? kTopF32 : 0, a.k_blocks * kBlock, values);
  for (int64_t kb = 0; kb < a.k_blocks; ++kb) isa.rows->store(a.panel, values + kb * kBlock, kBlock, a.at(kb, row));
  if (a.row_scales) a.exponents[row] += normalised_scales(p.sa, from, a.k_blocks, a.row_scales + row, a.rows);
}

void packed_block(const GemmIsa& isa, const GemmProblem& p, const PackedActivations& a, int64_t i0, int64_t rows,
                  int64_t j0, int64_t cols, float* sums) {
  const int64_t strips = ceil_div(cols, isa.nr), ld = strips * isa.nr;
  std::memset(sums, 0, static_cast<size_t>(rows * ld) * sizeof(float));
  const int64_t tiles = ceil_div(rows, isa.mr), lines = ceil_div(rows * kBlock * size_of(a.panel), 64);
  const int64_t per_tile = ceil_div(lines, strips * tiles);
  for (int64_t kb = 0; kb < a.k_blocks; ++kb)
    for (int64_t s = 0; s < strips; ++s) {
      const Ahead ahead{a.at(kb + 1, i0) + s * tiles * per_tile * 64, kb + 1 < a.k_blocks ? per_tile : 0};
      strip_block(isa, p, a, i0, rows, j0 + s * isa.nr, kb, ahead, sums + s * isa.nr, ld);
    }
  for (int64_t i = 0; i < rows; ++i) {
    const int e = a.exponents[i0 + i];
    scale_by_power(*isa.rows, sums + i * ld, cols, a.panel == Dtype::f32 ? result_exponent_f32(p.b.dtype, e) : e);
  }
}

const char* packed_refuses(const GemmIsa& isa, const GemmProblem& p) {
  if (const char* reason = panel_refuses(isa.panel, p)) return reason;
  if (p.sb.values && p.sb.block_cols % kBlock != 0 && p.sb.block_cols < p.k())
    return "the scale blocks of b must be a multiple of 128 wide, or as wide as k";
  return nullptr;
}

void gemm_packed(const GemmIsa& isa, const GemmProblem& p) {
  const int64_t row_bytes = std::max<int64_t>(ceil_div(p.k(), kBlock), 1) * kBlock * size_of(isa.panel);
  const int64_t fitting = std::max<int64_t>(kSharedBytesPerThread * p.threads / row_bytes, isa.mr);
  const int64_t chunk = std::min(p.m(), fitting > kTaskRows ? fitting / kTaskRows * kTaskRows : fitting);
  for (int64_t first = 0; first < p.m(); first += chunk) {
    const int64_t rows = std::min(chunk, p.m() - first);
    const PackedActivations a = packed_activations(
        isa.panel, rows, p.k(), scratch_of<char>(Slot::shared_a, packed_bytes(isa.panel, rows, p.k())));
    constexpr int64_t kRowsPerTask = 4;
    parallel_for(p.threads, ceil_div(rows, kRowsPerTask), [&](int64_t task) {
      for (int64_t i = task * kRowsPerTask; i < std::min((task + 1) * kRowsPerTask, rows); ++i)
        pack_activations(isa, p, first + i, a, i);
    });
    const int64_t row_tasks = ceil_div(rows, kTaskRows), task_rows = ceil_div(rows, row_tasks);
    // At least four tasks a thread, so that a slow one does not leave the others waiting.
    const int64_t wanted = round_up(ceil_div(p.n(), ceil_div(4 * p.threads, row_tasks)), isa.nr);
    const int64_t task_cols = std::min(wanted, kTaskCols);
    const int64_t col_tasks = ceil_div(p.n(), task_cols);
    parallel_for(p.threads, row_tasks * col_tasks, [&](int64_t task) {
      const int64_t i0 = task % row_tasks * task_rows, j0 = task / row_tasks * task_cols;
      const int64_t height = std::min(task_rows, rows - i0), cols = std::min(task_cols, p.n() - j0);
      const int64_t ld = round_up(cols, isa.nr);
      float* sums = scratch_of<float>(Slot::own_c, height * ld);
      packed_block(isa, p, a, i0, height, j0, cols, sums);
      for (int64_t i = 0; i < height; ++i) write_row(*isa.rows, p, first + i0 + i, j0, cols, sums + i * ld);
    });
  }
}

}  // namespace moekern::cpu
