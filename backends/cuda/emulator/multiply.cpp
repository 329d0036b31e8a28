// The arithmetic of wgmma: operands to double, exact products, sums in double in the order of k beginning with the
// accumulator, one rounding to the accumulator's type an instruction.
#include <algorithm>
#include <cmath>

#include "formats.h"
#include "lanes.h"
#include "products.h"
#include "tensor_map.h"

namespace moekern::emulator {
namespace {

struct Tables {
  double e4m3[256], e5m2[256], s8[256], u8[256];
  Tables() {
    for (uint32_t code = 0; code < 256; ++code) {
      e4m3[code] = decode(code, kE4m3);
      e5m2[code] = decode(code, kE5m2);
      s8[code] = static_cast<int8_t>(code);
      u8[code] = code;
    }
  }
};
const Tables& tables() {
  static const Tables t;
  return t;
}

const double* table_of(Multiplicand type) {
  switch (type) {
    case Multiplicand::e4m3: return tables().e4m3;
    case Multiplicand::e5m2: return tables().e5m2;
    case Multiplicand::s8: return tables().s8;
    case Multiplicand::u8: return tables().u8;
    default: return nullptr;
  }
}

// The elements of 16 bytes.
int decode_unit(const uint8_t* bytes, Multiplicand type, double* out) {
  if (const double* table = table_of(type)) {
    for (int n = 0; n < 16; ++n) out[n] = table[bytes[n]];
    return 16;
  }
  if (type == Multiplicand::tf32) {
    for (int n = 0; n < 4; ++n) {
      uint32_t bits;
      std::memcpy(&bits, bytes + 4 * n, 4);
      out[n] = as_float(bits & 0xffffe000);  // the low 13 bits are not looked at
    }
    return 4;
  }
  for (int n = 0; n < 8; ++n) {
    uint16_t bits;
    std::memcpy(&bits, bytes + 2 * n, 2);
    out[n] = type == Multiplicand::bf16 ? from_bf16(bits) : from_f16(bits);
  }
  return 8;
}

constexpr int kMaxK = 32, kMaxN = 256;

struct Operands {
  double a[64][kMaxK];
  // Eight columns at a time, in the order of the accumulators' lanes: first the even, then the odd ones.
  double b[kMaxN / 8][kMaxK][8];
  double& at(int k, int n) { return b[n / 8][k][(n & 1) << 2 | (n & 7) >> 1]; }
  double at(int k, int n) const { return b[n / 8][k][(n & 1) << 2 | (n & 7) >> 1]; }
};

const uint8_t* bytes_at(const Cta& cta, uint32_t address, const char* operand) {
  const uint32_t at = address - kSharedBase;
  const uint8_t* valid = cta.valid.data() + at;
  for (int n = 0; n < 16; ++n)
    if (valid[n] != kWritten)
      throw Fault(std::string("wgmma reads shared memory at ") + hex(address + static_cast<uint32_t>(n)) +
                  " for its operand " + operand +
                  (valid[n] == kBarrierByte ? ", where an mbarrier is"
                                            : ", which was never written or has a copy under way to it"));
  return cta.shared.data() + at;
}

template <typename Store>
void fetch(const Cta& cta, const Tile& tile, Multiplicand type, const char* operand, Store store) {
  double values[16];
  for (int row = 0; row < tile.rows; ++row)
    for (int unit = 0; unit < tile.units; ++unit) {
      const int count = decode_unit(bytes_at(cta, tile.unit(row, unit), operand), type, values);
      for (int n = 0; n < count; ++n)
        tile.along_k ? store(row, unit * count + n, values[n]) : store(unit * count + n, row, values[n]);
    }
}

// A's fragment: register r of lane l holds row l / 4 (+ 8 where r is odd), and its part of k: four bytes at 4 (l % 4),
// the second half of k for r of 2 and 3.
void fetch_registers(const Product& p, Operands& o) {
  const Multiplicand type = p.shape->a;
  const int each = 4 / multiplicand_bytes(type);
  for (int w = 0; w < 4; ++w)
    for (int r = 0; r < 4; ++r) {
      const uint32_t* lanes = p.warps[w]->lanes<uint32_t>(p.instruction->list[p.shape->results() + r]);
      for (int l = 0; l < 32; ++l) {
        uint8_t bytes[16] = {};
        std::memcpy(bytes, &lanes[l], 4);
        double values[16];
        decode_unit(bytes, type, values);
        const int row = 16 * w + l / 4 + 8 * (r & 1), k = each * (l % 4) + (r >> 1) * 4 * each;
        for (int n = 0; n < each; ++n) o.a[row][k + n] = values[n];
      }
    }
}

using Four = double __attribute__((vector_size(32)));
using FourFloats = float __attribute__((vector_size(16)));

// Four rows of a by the eight columns of a group: registers even and odd at lanes 4 row ... Exact products make a
// fused multiplication and addition the same as the two.
MOEKERN_CLONES void block(const double (*a)[kMaxK], const double (*b)[8], int k, bool accumulates, float* even,
                          float* odd) {
  Four low[4], high[4];
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    FourFloats e{}, o{};
    if (accumulates) {
      std::memcpy(&e, even + 4 * r, 16);
      std::memcpy(&o, odd + 4 * r, 16);
    }
    low[r] = __builtin_convertvector(e, Four);
    high[r] = __builtin_convertvector(o, Four);
  }
  for (int n = 0; n < k; ++n) {
    Four x, y;
    std::memcpy(&x, &b[n][0], 32);
    std::memcpy(&y, &b[n][4], 32);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      const double f = a[r][n];
      const Four both{f, f, f, f};
      low[r] += x * both;
      high[r] += y * both;
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const FourFloats e = __builtin_convertvector(low[r], FourFloats), o = __builtin_convertvector(high[r], FourFloats);
    std::memcpy(even + 4 * r, &e, 16);
    std::memcpy(odd + 4 * r, &o, 16);
  }
}

// Hopper's tensor cores align all terms of a sum, the accumulator among them, to the largest exponent and keep so many
// bits behind its leading one; what is below is cut off. The figure is what others have published of FP8, not a
// measurement of ours.
constexpr int kKeptBits = 13;

double reduced_sum(const double* terms, int count) {
  double largest = 0;
  for (int n = 0; n < count; ++n) {
    if (!std::isfinite(terms[n])) {
      double s = 0;
      for (int m = 0; m < count; ++m) s += terms[m];
      return s;
    }
    largest = std::max(largest, std::fabs(terms[n]));
  }
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - kKeptBits);
  double sum = 0;
  for (int n = 0; n < count; ++n) sum += std::trunc(terms[n] / unit) * unit;
  return sum;
}

// Any result type, any accumulation: an element at a time.
void slowly(const Product& p, const Operands& o, Accumulation accumulation) {
  const ProductShape& s = *p.shape;
  for (int row = 0; row < 64; ++row)
    for (int n = 0; n < s.n; ++n) {
      Warp& w = *p.warps[row / 16];
      const int h = row / 8 % 2, lane = row % 8 * 4 + n % 8 / 2;
      const int index = s.result == ProductShape::f16 ? n / 8 * 2 + h : n / 8 * 4 + 2 * h + n % 2;
      uint32_t& word = w.lanes<uint32_t>(p.instruction->list[index])[lane];
      const int shift = s.result == ProductShape::f16 ? 16 * (n % 2) : 0;
      double terms[kMaxK + 1] = {};
      if (p.accumulates)
        terms[0] = s.result == ProductShape::f32   ? as_float(word)
                   : s.result == ProductShape::f16 ? from_f16(word >> shift & 0xffff)
                                                   : static_cast<int32_t>(word);
      for (int k = 0; k < s.k; ++k) terms[k + 1] = o.a[row][k] * o.at(k, n);
      double sum = 0;
      if (accumulation == Accumulation::hopper && s.result != ProductShape::s32) {
        sum = reduced_sum(terms, s.k + 1);
      } else {
        for (int k = 0; k <= s.k; ++k) sum += terms[k];
      }
      if (s.result == ProductShape::f32) {
        word = as_bits(static_cast<float>(sum));
      } else if (s.result == ProductShape::s32) {
        word = static_cast<uint32_t>(static_cast<int64_t>(sum));
      } else {
        word = (word & ~(0xffffu << shift)) | encode(sum, kF16) << shift;
      }
    }
}

}  // namespace

int multiplicand_bytes(Multiplicand type) { return table_of(type) ? 1 : type == Multiplicand::tf32 ? 4 : 2; }

void decode_word(uint32_t word, Multiplicand type, double* out) {
  uint8_t bytes[16] = {};
  double values[16];
  std::memcpy(bytes, &word, 4);
  decode_unit(bytes, type, values);
  std::memcpy(out, values, sizeof(double) * 4 / static_cast<size_t>(multiplicand_bytes(type)));
}

Tile tile_of(uint64_t d, bool along_k, int extent, int element_bytes) {
  Tile t;
  t.start = static_cast<uint32_t>(d & 0x3fff) << 4;
  t.leading = static_cast<uint32_t>(d >> 16 & 0x3fff) << 4;
  t.stride = static_cast<uint32_t>(d >> 32 & 0x3fff) << 4;
  t.layout = static_cast<int>(d >> 62);
  t.along_k = along_k;
  t.rows = along_k ? extent : 32 / element_bytes;
  t.units = along_k ? 2 : extent * element_bytes / 16;
  if (d >> 49 & 7) throw Fault("wgmma: a matrix descriptor with a base offset is not emulated: " + hex(d));
  return t;
}

uint32_t Tile::unit(int row, int unit) const {
  const auto r = static_cast<uint32_t>(row), u = static_cast<uint32_t>(unit);
  const uint32_t span = layout == 0 ? 16 : 256u >> layout;  // 128, 64, 32
  uint32_t address = start + r % 8 * span;
  if (along_k) {
    address += r / 8 * stride + (layout ? u * 16 : u * leading);
  } else if (layout) {
    const uint32_t per = span / 16;
    address += r / 8 * stride + u % per * 16 + u / per * leading;
  } else {
    address += r / 8 * leading + u * stride;
  }
  return layout ? swizzled(address, static_cast<Swizzle>(4 - layout)) : address;
}

void multiply(Cta& cta, const Product& p) {
  const ProductShape& s = *p.shape;
  static thread_local Operands o;
  const double a_sign = s.a_negated ? -1 : 1, b_sign = s.b_negated ? -1 : 1;
  if (s.a_in_registers) {
    fetch_registers(p, o);
  } else {
    fetch(cta, tile_of(p.a, !s.a_transposed, 64, multiplicand_bytes(s.a)), s.a, "a",
          [](int m, int k, double v) { o.a[m][k] = v; });
  }
  fetch(cta, tile_of(p.b, !s.b_transposed, s.n, multiplicand_bytes(s.b)), s.b, "b",
        [=](int n, int k, double v) { o.at(k, n) = v * b_sign; });
  if (s.a_negated)
    for (auto& row : o.a)
      for (double& v : row) v *= a_sign;
  const Accumulation accumulation = cta.launch->settings.accumulation;
  if (s.result != ProductShape::f32 || accumulation != Accumulation::exact) return slowly(p, o, accumulation);
  for (int w = 0; w < 4; ++w)
    for (int j = 0; j < s.n / 8; ++j)
      for (int h = 0; h < 2; ++h) {
        const Unit* d = p.instruction->list + 4 * j + 2 * h;
        auto *even = p.warps[w]->lanes<float>(d[0]), *odd = p.warps[w]->lanes<float>(d[1]);
        for (int r = 0; r < 8; r += 4)
          block(&o.a[16 * w + 8 * h + r], o.b[j], s.k, p.accumulates, even + 4 * r, odd + 4 * r);
      }
}

}  // namespace moekern::emulator
