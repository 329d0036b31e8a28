// wgmma: issue, groups and fences. What it computes is in multiply.cpp. A product is issued warp by warp, computed some
// time after the last of its four warps has issued it, and its registers belong to it until a wait_group.
#include "products.h"

#include "access.h"
#include "lanes.h"

namespace moekern::emulator {
namespace {

std::string register_name(const Instruction& i, size_t n) {
  size_t at = 0;
  for (const ptx::Operand& o : i.statement->operands) {
    if (o.kind != ptx::Operand::vector) continue;
    if (n < at + o.parts.size()) return o.parts[n - at].text;
    at += o.parts.size();
  }
  return "?";
}

// What the instruction reads of shared memory, as far as can be told when it is issued.
void check_operand(Warp& w, uint64_t descriptor, bool along_k, int extent, Multiplicand type, const char* name,
                   int first_row, int rows) {
  const Tile tile = tile_of(descriptor, along_k, extent, multiplicand_bytes(type));
  const bool part = along_k && rows < tile.rows;
  for (int row = part ? first_row : 0; row < (part ? first_row + rows : tile.rows); ++row)
    for (int unit = 0; unit < tile.units; ++unit) {
      const uint32_t address = tile.unit(row, unit);
      if (address < kSharedBase || address + 16 > kSharedBase + w.cta->shared_bytes)
        throw Fault(std::string("wgmma: the descriptor of operand ") + name + ", " + hex(descriptor) + ", leads to " +
                    hex(address) + " of shared memory, which has " + std::to_string(w.cta->shared_bytes) +
                    " bytes from " + hex(kSharedBase) + " on");
      const uint8_t* valid = w.cta->valid.data() + (address - kSharedBase);
      for (int n = 0; n < 16; ++n)
        if (valid[n] != kWritten)
          throw Fault(std::string("wgmma reads shared memory at ") + hex(address + static_cast<uint32_t>(n)) +
                      " for its operand " + name +
                      (valid[n] == kBarrierByte ? ", where an mbarrier is"
                                                : ", which was never written or has a copy under way to it"));
      read_by_group(w, *w.cta, address, 16, Async::products, w.products.open, 0);
    }
}

void execute(Cta& cta, size_t group, const Product* upto) {
  auto& queue = cta.products[group];
  while (!queue.empty()) {
    const std::shared_ptr<Product> p = queue.front();
    if (p->warps_here < 4) break;
    multiply(cta, *p);
    queue.pop_front();
    for (Warp* w : p->warps) ++w->executed_products;
    ++cta.launch->progress;
    ++cta.launch->products;
    if (p.get() == upto) break;
  }
}

Status issue(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& s = *static_cast<const ProductShape*>(i.extra);
  Cta& cta = *w.cta;
  const auto group = static_cast<size_t>(w.index / 4);
  if (lanes != kAllLanes) throw Fault("wgmma needs all 32 lanes of its warps");
  if (cta.warps.size() < 4 * (group + 1)) throw Fault("wgmma needs four warps, from a multiple of four on");
  if (w.fences == 0) throw Fault("wgmma without a wgmma.fence before it");
  bool accumulates = true;
  if (s.scale_d != kNoUnit) {
    const uint32_t p = w.predicate(s.scale_d);
    if (p != 0 && p != kAllLanes) throw Fault("wgmma: scale-d differs among the lanes of the warp");
    accumulates = p != 0;
  }
  const size_t results = static_cast<size_t>(s.results());
  for (size_t n = 0; n < i.list_size; ++n) {
    const Unit u = i.list[n];
    if (w.touched[u] == w.fences)
      throw Fault("wgmma: " + register_name(i, n) +
                  " was used since the last wgmma.fence, which has to come in between");
    if ((n >= results || accumulates) && !w.in_flight[u] && w.defined[u] != kAllLanes)
      throw Fault(
          "wgmma reads " + register_name(i, n) + ", which has no value" + (n < results ? " (scale-d is true)" : ""),
          __builtin_ctz(~w.defined[u]));
  }
  const auto uniform = [&](Unit unit, const char* what) {
    const uint64_t* d = w.lanes<uint64_t>(unit);
    for (int l = 1; l < 32; ++l)
      if (d[l] != d[0])
        throw Fault(std::string("wgmma: the descriptor of operand ") + what + " differs among lanes", l);
    return d[0];
  };
  const uint64_t a = s.a_in_registers ? 0 : uniform(i.a, "a"), b = uniform(i.b, "b");
  const int quarter = w.index % 4;
  if (!s.a_in_registers) check_operand(w, a, !s.a_transposed, 64, s.a, "a", 16 * quarter, 16);
  check_operand(w, b, !s.b_transposed, s.n, s.b, "b", 0, s.n);

  // The product that the other warps of the group issue at the same place in their order.
  auto& queue = cta.products[group];
  ++w.issued_products;
  std::shared_ptr<Product> p;
  for (const auto& other : queue)
    if (!other->warps[quarter]) {
      p = other;
      break;
    }
  if (!p) {
    p = std::make_shared<Product>();
    p->instruction = &i, p->shape = &s, p->a = a, p->b = b, p->accumulates = accumulates;
    queue.push_back(p);
  } else if (p->instruction != &i || p->a != a || p->b != b || p->accumulates != accumulates) {
    throw Fault("wgmma: warps of one warpgroup issue different products: here " + hex(a) + ", " + hex(b) + " in line " +
                std::to_string(i.line) + ", another warp " + hex(p->a) + ", " + hex(p->b) + " in line " +
                std::to_string(p->instruction->line));
  }
  p->warps[quarter] = &w;
  ++w.pending;
  w.products_out.push_back({&i, w.products.open, w.issued_products});
  for (size_t n = 0; n < i.list_size; ++n) {
    ++w.in_flight[i.list[n]];
    if (n < results) w.defined[i.list[n]] = kAllLanes;
  }
  ++w.launch->progress;
  if (++p->warps_here == 4)
    w.launch->later([&cta, group, p] {
      bool queued = false;
      for (const auto& other : cta.products[group]) queued |= other == p;
      if (queued) execute(cta, group, p.get());
    });
  return Status::next;
}

Status fence(Warp& w, const Instruction&, uint32_t) {
  ++w.fences;
  return Status::next;
}

Status commit(Warp& w, const Instruction&, uint32_t) {
  ++w.products.open;
  return Status::next;
}

Status wait(Warp& w, const Instruction& i, uint32_t) {
  const uint64_t n = static_cast<uint64_t>(i.offset), open = w.products.open;
  const uint64_t last = open - 1 > n ? open - 1 - n : 0;
  uint64_t needed = 0;
  for (const Warp::ProductOut& p : w.products_out)
    if (p.group <= last) needed = p.number;
  if (w.executed_products < needed) return Status::blocked;
  while (!w.products_out.empty() && w.products_out.front().group <= last) {
    const Instruction& done = *w.products_out.front().instruction;
    for (size_t k = 0; k < done.list_size; ++k) --w.in_flight[done.list[k]];
    w.products_out.pop_front();
    --w.pending;
  }
  see_group(w, Async::products, last, 0);
  return Status::next;
}

bool wgmma(Resolver& r) {
  r.i.converged = true;
  r.ignore({"sync", "aligned"});
  if (r.has("fence")) return r.i.run = fence, true;
  if (r.has("commit_group")) return r.i.run = commit, true;
  if (r.has("wait_group")) return r.i.run = wait, r.immediate(0, r.i.offset);
  if (!r.has("mma_async")) return false;
  r.i.asynchronous = true;
  // wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3
  const auto& o = r.s.opcode;
  if (o.size() < 8) return false;
  ProductShape s{};
  if (std::sscanf(o[4].c_str(), "m64n%dk%d", &s.n, &s.k) != 2 || s.n % 8 || s.n < 8 || s.n > 256) return false;
  const bool saturates = r.has("satfinite");
  if (saturates) return false;
  s.result = o[5] == "f32" ? ProductShape::f32 : o[5] == "f16" ? ProductShape::f16 : ProductShape::s32;
  if (!multiplicand_of(o[6], s.a) || !multiplicand_of(o[7], s.b)) return false;
  if (s.k != 32 / multiplicand_bytes(s.a) || multiplicand_bytes(s.a) != multiplicand_bytes(s.b)) return false;
  for (size_t n = 4; n < 8; ++n) r.has(o[n]);
  const ptx::Operand &d = r.operand(0), &a = r.operand(1);
  s.a_in_registers = a.kind == ptx::Operand::vector;
  if (d.kind != ptx::Operand::vector || d.parts.size() != static_cast<size_t>(s.results())) return false;
  if (s.a_in_registers && a.parts.size() != 4) return false;
  // Its registers are not checked as others': see `issue`.
  std::vector<Unit> units;
  for (const ptx::Operand& part : d.parts) units.push_back(r.unchecked(part));
  if (s.a_in_registers)
    for (const ptx::Operand& part : a.parts) units.push_back(r.unchecked(part));
  r.list(units);
  if (!s.a_in_registers) r.i.a = r.read(a, 8);
  r.i.b = r.read(2, 8);
  size_t n = 3;
  if (r.operands() > n) {
    const ptx::Operand& scale = r.operand(n++);
    if (scale.kind == ptx::Operand::integer) {
      s.scale_d = scale.bits ? kNoUnit : r.constant(0, 0);
    } else if (scale.text == "true" || scale.text == "false") {
      s.scale_d = scale.text == "true" ? kNoUnit : r.constant(0, 0);
    } else {
      s.scale_d = r.read(scale, 0);
    }
  }
  int64_t value = 1;
  const bool scales = s.result != ProductShape::s32;
  if (scales && r.operands() > n && r.immediate(n++, value)) s.a_negated = value == -1;
  if (scales && r.operands() > n && r.immediate(n++, value)) s.b_negated = value == -1;
  if (r.operands() > n && !s.a_in_registers && r.immediate(n++, value)) s.a_transposed = value == 1;
  if (r.operands() > n && r.immediate(n++, value)) s.b_transposed = value == 1;
  if ((s.a_transposed || s.b_transposed) && multiplicand_bytes(s.a) != 2) return false;
  r.extra(s);
  r.i.run = issue;
  return n == r.operands();
}

}  // namespace

bool multiplicand_of(const std::string& t, Multiplicand& m) {
  static const std::map<std::string, Multiplicand> types{{"e4m3", Multiplicand::e4m3}, {"e5m2", Multiplicand::e5m2},
                                                         {"f16", Multiplicand::f16},   {"bf16", Multiplicand::bf16},
                                                         {"tf32", Multiplicand::tf32}, {"s8", Multiplicand::s8},
                                                         {"u8", Multiplicand::u8}};
  const auto found = types.find(t);
  if (found == types.end()) return false;
  m = found->second;
  return true;
}

void add_products(Table& t) { t["wgmma"] = wgmma; }

}  // namespace moekern::emulator
