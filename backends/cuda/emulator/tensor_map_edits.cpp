// Tensor maps that a kernel makes: tensormap.replace on an image in shared or global memory, and
// tensormap.cp_fenceproxy, which copies a finished one to where copies may use it.
#include "access.h"
#include "lanes.h"
#include "tensor_map.h"

namespace moekern::emulator {
namespace {

enum class Field : uint8_t {
  global_address,
  rank,
  box_dim,
  global_dim,
  global_stride,
  element_stride,
  elemtype,
  interleave_layout,
  swizzle_mode,
  fill_mode
};

// tensormap.replace has an order of types of its own.
int driver_type(uint64_t type) {
  static const int types[] = {0, 1, 2, 3, 4, 5, 6, 7, 10, 8, 9, 11, 12};
  return type < sizeof types / sizeof *types ? types[type] : -1;
}

struct Edit {
  Field field;
  int index;
  Unit value;
  bool wide;
};

void change(TiledMap& m, const Edit& e, uint64_t v, int lane) {
  const auto need = [&](bool holds, const std::string& what) {
    if (!holds) throw Fault("tensor map: " + what + ", not " + std::to_string(v), lane);
  };
  m.magic = kMapMagic;
  switch (e.field) {
    case Field::global_address:
      need(v % 16 == 0, "the address has to be a multiple of 16");
      m.address = v;
      break;
    case Field::rank:
      need(v < 5, "the rank less one has to be 0 to 4");
      m.rank = static_cast<uint8_t>(v + 1);
      break;
    case Field::box_dim:
      need(v >= 1 && v <= 256, "a box has 1 to 256 elements in a dimension");
      m.box[e.index] = static_cast<uint16_t>(v);
      break;
    case Field::global_dim:
      need(v >= 1 && v <= 1ull << 32, "an extent has to be 1 to 2^32");
      m.last[e.index] = static_cast<uint32_t>(v - 1);
      break;
    case Field::global_stride:
      need(v % 16 == 0 && v < 1ull << 40, "a stride has to be a multiple of 16 below 2^40");
      m.strides[e.index] = v;
      break;
    case Field::element_stride:
      need(v >= 1 && v <= 8, "an element stride has to be 1 to 8");
      m.steps[e.index] = static_cast<uint8_t>(e.index == 0 ? 1 : v);
      break;
    case Field::elemtype:
      need(driver_type(v) >= 0, "the element type has to be 0 to 12");
      m.type = static_cast<uint8_t>(driver_type(v));
      break;
    case Field::interleave_layout: need(v == 0, "interleaved layouts are not emulated: 0 was expected"); break;
    case Field::swizzle_mode:
      need(v <= 3, "the swizzle mode has to be 0 to 3");
      m.swizzle = static_cast<uint8_t>(v);
      break;
    case Field::fill_mode:
      need(v <= 1, "the fill mode has to be 0 or 1");
      m.nan_fill = static_cast<uint8_t>(v);
      break;
  }
}

Status replace(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& e = *static_cast<const Edit*>(i.extra);
  Pointers p;
  resolve_addresses(w, lanes, i.a, i.wide_address, i.offset, i.space, 128, Use::update, p);
  for (const int l : Lanes(lanes)) {
    TiledMap m;
    std::memcpy(&m, p.at[l], sizeof m);
    change(m, e, e.wide ? w.lanes<uint64_t>(e.value)[l] : w.lanes<uint32_t>(e.value)[l], l);
    std::memcpy(p.at[l], &m, sizeof m);
  }
  ++w.launch->progress;
  return Status::next;
}

Status copy_map(Warp& w, const Instruction& i, uint32_t lanes) {
  const int l = __builtin_ctz(lanes);  // all lanes name the same map
  Pointers to, from;
  const auto& source = *static_cast<const int64_t*>(i.extra);
  resolve_addresses(w, 1u << l, i.b, i.mode, source, ptx::Space::shared, 128, Use::read, from);
  resolve_addresses(w, 1u << l, i.a, i.wide_address, i.offset, ptx::Space::global, 128, Use::write, to);
  std::memcpy(to.at[l], from.at[l], 128);
  ++w.launch->progress;
  return Status::next;
}

bool tensormap(Resolver& r) {
  if (r.has("cp_fenceproxy")) {
    r.ignore(
        {"global", "shared::cta", "tensormap::generic", "release", "gpu", "cta", "cluster", "sys", "sync", "aligned"});
    r.i.converged = true;
    int64_t offset, bytes;
    bool wide;
    r.address(0);
    r.i.b = r.address_of(r.operand(1), offset, wide);
    r.i.mode = wide;
    r.extra(offset);
    r.i.run = copy_map;
    return r.immediate(2, bytes) && bytes == 128;
  }
  if (!r.has_all_of({"replace", "tile", "b1024"})) return false;
  if (r.has("shared::cta")) r.i.space = ptx::Space::shared;
  if (r.has("global")) r.i.space = ptx::Space::global;
  static const char* const fields[] = {"global_address", "rank",           "box_dim",  "global_dim",
                                       "global_stride",  "element_stride", "elemtype", "interleave_layout",
                                       "swizzle_mode",   "fill_mode"};
  Edit e{};
  bool found = false;
  for (int n = 0; n < 10; ++n)
    if (r.has(fields[n])) e.field = static_cast<Field>(n), found = true;
  e.wide = r.types() == "b64";
  r.address(0);
  size_t n = 1;
  if (r.operands() == 3) {
    int64_t index;
    if (!r.immediate(n++, index) || index < 0 || index > 4) return false;
    e.index = static_cast<int>(index);
  }
  e.value = r.read(n++, e.wide ? 8 : 4);
  r.extra(e);
  r.i.run = replace;
  return found && n == r.operands();
}

}  // namespace

void add_tensor_map_edits(Table& t) { t["tensormap"] = tensormap; }

}  // namespace moekern::emulator
