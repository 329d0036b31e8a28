// What a warp does together with matrices spread over its registers: ldmatrix, stmatrix, mma.sync.
#include "access.h"
#include "lanes.h"
#include "products.h"

namespace moekern::emulator {
namespace {

// Matrices of 8 rows of 16 bytes. Lane 8 m + r has the address of row r of matrix m; register m of lane l holds
// elements 2 (l % 4) and the next of row l / 4, or of column l / 4 if transposed.
struct Rows {
  Rows(Warp& w, const Instruction& i, uint32_t matrices, Use use) {
    Pointers p;
    const uint32_t lanes = matrices == 4 ? kAllLanes : (1u << (8 * matrices)) - 1;
    resolve_addresses(w, lanes, i.a, i.wide_address, i.offset, i.space, 16, use, p);
    std::memcpy(row, p.at, 8 * matrices * sizeof(uint8_t*));
  }
  uint8_t* element(uint32_t matrix, int lane, int which, bool transposed) const {
    const int line = lane / 4, place = 2 * (lane % 4) + which;
    return row[8 * matrix + static_cast<uint32_t>(transposed ? place : line)] + 2 * (transposed ? line : place);
  }
  uint8_t* row[32];
};

void whole_warp(const Instruction& i, uint32_t lanes) {
  if (lanes != kAllLanes) throw Fault(i.statement->opcode[0] + " needs all 32 lanes of the warp");
}

Status load_matrices(Warp& w, const Instruction& i, uint32_t lanes) {
  whole_warp(i, lanes);
  const Rows rows(w, i, i.list_size, Use::read);
  for (uint32_t m = 0; m < i.list_size; ++m) {
    uint32_t* d = w.lanes<uint32_t>(i.list[m]);
    for (int l = 0; l < 32; ++l) {
      uint16_t low, high;
      std::memcpy(&low, rows.element(m, l, 0, i.mode), 2);
      std::memcpy(&high, rows.element(m, l, 1, i.mode), 2);
      d[l] = low | static_cast<uint32_t>(high) << 16;
    }
  }
  return Status::next;
}

Status store_matrices(Warp& w, const Instruction& i, uint32_t lanes) {
  whole_warp(i, lanes);
  const Rows looked(w, i, i.list_size, Use::look);
  bool same = true;
  for (uint32_t m = 0; m < i.list_size; ++m)
    for (int l = 0; l < 32; ++l)
      for (int which = 0; which < 2; ++which) {
        const auto v = static_cast<uint16_t>(w.lanes<uint32_t>(i.list[m])[l] >> (16 * which));
        same &= std::memcmp(looked.element(m, l, which, i.mode), &v, 2) == 0;
      }
  const Rows rows(w, i, i.list_size, same ? Use::repeat : Use::write);
  for (uint32_t m = 0; m < i.list_size; ++m) {
    const uint32_t* a = w.lanes<uint32_t>(i.list[m]);
    for (int l = 0; l < 32; ++l) {
      const auto low = static_cast<uint16_t>(a[l]), high = static_cast<uint16_t>(a[l] >> 16);
      std::memcpy(rows.element(m, l, 0, i.mode), &low, 2);
      std::memcpy(rows.element(m, l, 1, i.mode), &high, 2);
    }
  }
  ++w.launch->progress;
  return Status::next;
}

bool matrices(Resolver& r) {
  const bool loads = r.root() == "ldmatrix";
  r.ignore({"sync", "aligned", "shared", "shared::cta"});
  r.i.space = ptx::Space::shared;
  r.i.mode = r.has("trans");
  r.i.converged = true;
  const uint32_t count = r.has("x1") ? 1 : r.has("x2") ? 2 : r.has("x4") ? 4 : 0;
  if (!r.has("m8n8") || r.types() != "b16" || !count) return false;
  r.address(loads ? 1 : 0);
  r.list(loads ? r.write_vector(r.operand(0)) : r.read_vector(r.operand(1), 4));
  r.i.run = loads ? load_matrices : store_matrices;
  return r.operands() == 2 && r.i.list_size == count;
}

// Lane l = 4 g + t. Register r of a holds row g (+ 8 where r is odd) and, with e elements in a register, elements e t
// ... of k, 4 e further for r of 2 and 3. Register r of b holds column g and elements e t + 4 e r ... of k. c: rows g
// and g + 8, columns 2 t and 2 t + 1.
struct MmaShape {
  int k, a_registers, b_registers;
  Multiplicand a, b;
  ProductShape::Result result, addend;
};

double accumulator(uint32_t word, ProductShape::Result type, int half) {
  if (type == ProductShape::f32) return as_float(word);
  if (type == ProductShape::f16) return from_f16(word >> (16 * half) & 0xffff);
  return static_cast<int32_t>(word);
}

Status mma(Warp& w, const Instruction& i, uint32_t lanes) {
  whole_warp(i, lanes);
  const auto& s = *static_cast<const MmaShape*>(i.extra);
  const int each = 4 / multiplicand_bytes(s.a);
  const int results = s.result == ProductShape::f16 ? 2 : 4, addends = s.addend == ProductShape::f16 ? 2 : 4;
  const Unit* d = i.list;
  const Unit* a_units = d + results;
  const Unit* b_units = a_units + s.a_registers;
  const Unit* c_units = b_units + s.b_registers;
  double a[16][64], b[64][8], values[4];
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < s.a_registers; ++r) {
      decode_word(w.lanes<uint32_t>(a_units[r])[l], s.a, values);
      for (int n = 0; n < each; ++n) a[g + 8 * (r & 1)][each * t + (r >> 1) * 4 * each + n] = values[n];
    }
    for (int r = 0; r < s.b_registers; ++r) {
      decode_word(w.lanes<uint32_t>(b_units[r])[l], s.b, values);
      for (int n = 0; n < each; ++n) b[each * t + r * 4 * each + n][g] = values[n];
    }
  }
  for (int l = 0; l < 32; ++l) {
    const int g = l / 4, t = l % 4;
    uint32_t out[4] = {};
    for (int n = 0; n < 4; ++n) {
      const int row = g + 8 * (n / 2), column = 2 * t + n % 2;
      const Unit c = c_units[addends == 2 ? n / 2 : n];
      double sum = accumulator(w.lanes<uint32_t>(c)[l], s.addend, n % 2);
      for (int k = 0; k < s.k; ++k) sum += a[row][k] * b[k][column];
      if (s.result == ProductShape::f32) {
        out[n] = canonical(static_cast<float>(sum));
      } else if (s.result == ProductShape::s32) {
        out[n] = static_cast<uint32_t>(static_cast<int64_t>(sum));
      } else {
        out[n / 2] |= encode(sum, kF16) << (16 * (n % 2));
      }
    }
    for (int n = 0; n < results; ++n) w.lanes<uint32_t>(d[n])[l] = out[n];
  }
  return Status::next;
}

bool result_type(const std::string& t, ProductShape::Result& result) {
  result = t == "f32" ? ProductShape::f32 : t == "f16" ? ProductShape::f16 : ProductShape::s32;
  return t == "f32" || t == "f16" || t == "s32";
}

bool resolve_mma(Resolver& r) {  // mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
  r.ignore({"sync", "aligned", "row", "col"});
  r.i.converged = true;
  const auto& o = r.s.opcode;
  if (o.size() != 10) return false;
  MmaShape s{};
  if (std::sscanf(o[3].c_str(), "m16n8k%d", &s.k) != 1) return false;
  if (!result_type(o[6], s.result) || !multiplicand_of(o[7], s.a) || !multiplicand_of(o[8], s.b) ||
      !result_type(o[9], s.addend))
    return false;
  const int bytes = multiplicand_bytes(s.a);
  if (bytes != multiplicand_bytes(s.b) || s.k > 32) return false;
  s.a_registers = s.k * bytes / 8, s.b_registers = s.k * bytes / 16;
  for (size_t n = 3; n < 10; ++n) r.has(o[n]);
  if (r.operands() != 4 || s.b_registers < 1) return false;
  std::vector<Unit> units = r.write_vector(r.operand(0));
  const size_t sizes[4] = {s.result == ProductShape::f16 ? 2u : 4u, static_cast<size_t>(s.a_registers),
                           static_cast<size_t>(s.b_registers), s.addend == ProductShape::f16 ? 2u : 4u};
  if (units.size() != sizes[0]) return false;
  for (size_t n = 1; n < 4; ++n) {
    const std::vector<Unit> more = r.read_vector(r.operand(n), 4);
    if (more.size() != sizes[n]) return false;
    units.insert(units.end(), more.begin(), more.end());
  }
  r.list(units);
  r.extra(s);
  r.i.run = mma;
  return true;
}

}  // namespace

void add_fragments(Table& t) {
  t["ldmatrix"] = t["stmatrix"] = matrices;
  t["mma"] = resolve_mma;
}

}  // namespace moekern::emulator
