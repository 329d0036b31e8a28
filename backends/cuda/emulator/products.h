// A wgmma under way.
#pragma once
#include <memory>

#include "program.h"

namespace moekern::emulator {

enum class Multiplicand : uint8_t { e4m3, e5m2, f16, bf16, tf32, s8, u8 };

bool multiplicand_of(const std::string& type, Multiplicand& m);
int multiplicand_bytes(Multiplicand m);
void decode_word(uint32_t word, Multiplicand type, double* out);  // the elements of a register

struct ProductShape {
  int n = 0, k = 0;
  Multiplicand a, b;
  enum Result : uint8_t { f32, f16, s32 } result;
  bool a_in_registers = false;
  bool a_transposed = false, b_transposed = false;  // MN-major
  bool a_negated = false, b_negated = false;
  Unit scale_d = kNoUnit;
  int results() const { return result == f16 ? n / 4 : n / 2; }
};

struct Product {
  const Instruction* instruction;
  const ProductShape* shape;
  uint64_t a = 0, b = 0;  // descriptors
  bool accumulates = false;
  int warps_here = 0;  // of the four, those that have issued it
  Warp* warps[4] = {};
  bool executed = false;
};

// Where the 16-byte units of an operand lie: element rows 0 to `rows` - 1, `units` of them in a row. For operands that
// are stored along k, a row is an element of m or n and has two units. For those along m or n, a row is an element of
// k.
struct Tile {
  uint32_t start, leading, stride;
  int layout;  // 0: no swizzle, 1: 128 bytes, 2: 64, 3: 32
  bool along_k;
  int rows, units;
  uint32_t unit(int row, int unit) const;  // the address in shared memory
};
Tile tile_of(uint64_t descriptor, bool along_k, int extent, int k);

// All of the product: its four warps' registers become what they are to hold.
void multiply(Cta& cta, const Product& p);

}  // namespace moekern::emulator
