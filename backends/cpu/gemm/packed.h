// The packed GEMM by blocks of columns, for the drivers that hand them out as tasks.
#pragma once
#include "cpu/gemm/operands.h"

namespace moekern::cpu {

// Rows of a product's activations, normalised, block-major: [k_blocks][rows][128] values of the ISA's panel
// type, so that a tile's rows lie close together.
struct PackedActivations {
  Dtype panel;
  char* values;
  float* row_scales;  // [k_blocks][rows] for bf16 panels: a's scales, normalised likewise; null otherwise
  int* exponents;     // [rows], of the two powers of two taken out
  int64_t rows, k_blocks;
  char* at(int64_t kb, int64_t row) const { return values + (kb * rows + row) * kBlock * size_of(panel); }
};

int64_t packed_bytes(Dtype panel, int64_t rows, int64_t k);
PackedActivations packed_activations(Dtype panel, int64_t rows, int64_t k, char* memory);  // 64-byte aligned

// Fills row `row` of `a` with row i of the product's activations.
void pack_activations(const GemmIsa& isa, const GemmProblem& p, int64_t i, const PackedActivations& a, int64_t row);

// sums[i][j] = row i0 + i of `a` times b's row j0 + j, for i < rows and j < cols. A row of sums is
// round_up(cols, isa.nr) floats.
void packed_block(const GemmIsa& isa, const GemmProblem& p, const PackedActivations& a, int64_t i0, int64_t rows,
                  int64_t j0, int64_t cols, float* sums);

// More rows than this are split into tasks: a block of A (256 x 128 f32 = 128 KiB) and of C (256 x 128 f32) fill
// half of a 512 KiB L2; 256 rows make the decoding of a strip (about 2 cycles per 8 weights) 1.5% of its 128
// cycles of FMA.
constexpr int64_t kTaskRows = 256, kTaskCols = 128;

}  // namespace moekern::cpu
