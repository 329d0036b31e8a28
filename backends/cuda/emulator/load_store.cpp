// ld, st, cvta, mapa and the rest of what deals with addresses.
#include "access.h"
#include "lanes.h"

namespace moekern::emulator {
namespace {

template <typename T>
inline uint64_t extended(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof(T));
  if constexpr (std::is_signed_v<T>) return static_cast<uint64_t>(static_cast<int64_t>(v));
  return static_cast<uint64_t>(v);
}

// mode: the number of elements of the vector, and bits for those whose register has 64 bits.
template <typename T>
Status load(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t n = i.list_size;
  Pointers p;
  resolve_addresses(w, lanes, i.a, i.wide_address, i.offset, i.space, static_cast<uint32_t>(sizeof(T)) * n, Use::read,
                    p);
  for (uint32_t k = 0; k < n; ++k) {
    if (i.mode >> k & 1) {
      uint64_t* d = w.lanes<uint64_t>(i.list[k]);
      for (const int l : Lanes(lanes)) d[l] = extended<T>(p.at[l] + k * sizeof(T));
    } else {
      uint32_t* d = w.lanes<uint32_t>(i.list[k]);
      for (const int l : Lanes(lanes)) d[l] = static_cast<uint32_t>(extended<T>(p.at[l] + k * sizeof(T)));
    }
  }
  return Status::next;
}

template <typename T>
bool stores_the_same(Warp& w, const Instruction& i, uint32_t lanes, const Pointers& p) {
  for (uint32_t k = 0; k < i.list_size; ++k)
    for (const int l : Lanes(lanes)) {
      const T v = static_cast<T>(i.mode >> k & 1 ? w.lanes<uint64_t>(i.list[k])[l] : w.lanes<uint32_t>(i.list[k])[l]);
      if (std::memcmp(p.at[l] + k * sizeof(T), &v, sizeof(T)) != 0) return false;
    }
  return true;
}

template <typename T>
Status store(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t n = i.list_size;
  Pointers p;
  const auto resolve = [&](Use use) {
    resolve_addresses(w, lanes, i.a, i.wide_address, i.offset, i.space, static_cast<uint32_t>(sizeof(T)) * n, use, p);
  };
  // Compilers let several warps store the same value to the same place.
  const bool maybe_shared = i.space == ptx::Space::shared || i.space == ptx::Space::generic;
  if (maybe_shared && w.launch->settings.races) {
    resolve(Use::look);
    resolve(stores_the_same<T>(w, i, lanes, p) ? Use::repeat : Use::write);
  } else {
    resolve(Use::write);
  }
  bool changed = false;
  for (uint32_t k = 0; k < n; ++k) {
    const bool wide = i.mode >> k & 1;
    const uint32_t* narrow = w.lanes<uint32_t>(i.list[k]);
    const uint64_t* long_lanes = w.lanes<uint64_t>(i.list[k]);
    for (const int l : Lanes(lanes)) {
      const T v = static_cast<T>(wide ? long_lanes[l] : narrow[l]);
      uint8_t* at = p.at[l] + k * sizeof(T);
      changed |= std::memcmp(at, &v, sizeof(T)) != 0;
      std::memcpy(at, &v, sizeof(T));
    }
  }
  w.launch->progress += changed;
  return Status::next;
}

template <bool write>
Status access_128(Warp& w, const Instruction& i, uint32_t lanes) {  // .b128, one or two
  Pointers p;
  resolve_addresses(w, lanes, i.a, i.wide_address, i.offset, i.space, 16 * i.list_size, write ? Use::write : Use::read,
                    p);
  for (uint32_t k = 0; k < 2u * i.list_size; ++k) {
    uint64_t* d = w.lanes<uint64_t>(i.list[k / 2] + static_cast<Unit>(2 * (k % 2)));
    for (const int l : Lanes(lanes))
      write ? std::memcpy(p.at[l] + 8 * k, &d[l], 8) : std::memcpy(&d[l], p.at[l] + 8 * k, 8);
  }
  w.launch->progress += write;
  return Status::next;
}

template <template <typename> class M>
Handler by_bytes(const std::string& t) {
  if (t == "s8") return M<int8_t>::run;
  if (t == "s16") return M<int16_t>::run;
  if (t == "s32") return M<int32_t>::run;
  switch (ptx::type_bytes(t)) {
    case 1: return M<uint8_t>::run;
    case 2: return M<uint16_t>::run;
    case 4: return M<uint32_t>::run;
    case 8: return M<uint64_t>::run;
    default: return nullptr;
  }
}
template <typename T> struct Load {
  static constexpr Handler run = load<T>;
};
template <typename T> struct Store {
  static constexpr Handler run = store<std::make_unsigned_t<T>>;
};

void space_and_hints(Resolver& r) {
  if (r.has("global")) r.i.space = ptx::Space::global;
  if (r.has("shared") || r.has("shared::cta") || r.has("shared::cluster")) r.i.space = ptx::Space::shared;
  if (r.has("local")) r.i.space = ptx::Space::local;
  if (r.has("param") || r.has("param::entry") || r.has("param::func")) r.i.space = ptx::Space::param;
  if (r.has("const")) r.i.space = ptx::Space::constant;
  r.ignore({"volatile",
            "relaxed",
            "acquire",
            "release",
            "weak",
            "mmio",
            "sys",
            "gpu",
            "cta",
            "cluster",
            "nc",
            "ca",
            "cg",
            "cs",
            "lu",
            "cv",
            "wb",
            "wt",
            "L1::evict_normal",
            "L1::evict_unchanged",
            "L1::evict_first",
            "L1::evict_last",
            "L1::no_allocate",
            "L2::cache_hint",
            "L2::evict_last",
            "L2::evict_normal",
            "L2::evict_first",
            "L2::64B",
            "L2::128B",
            "L2::256B",
            "unified"});
}

bool ld(Resolver& r) {
  const std::string t = r.types();
  space_and_hints(r);
  r.ignore({"v2", "v4", "v8"});
  r.list(r.write_vector(r.operand(0)));
  r.address(1);
  const ptx::Operand& d = r.operand(0);
  for (uint32_t k = 0; k < r.i.list_size; ++k)
    r.i.mode |= static_cast<uint32_t>(r.width(d.kind == ptx::Operand::vector ? d.parts[k] : d) == 8) << k;
  if (r.operands() > 2) r.read(2, 8);  // a cache policy
  r.i.run = t == "b128" ? access_128<false> : by_bytes<Load>(t);
  return true;
}

bool st(Resolver& r) {
  const std::string t = r.types();
  space_and_hints(r);
  r.ignore({"v2", "v4", "v8"});
  r.address(0);
  const ptx::Operand& v = r.operand(1);
  const int bytes = static_cast<int>(ptx::type_bytes(t));
  std::vector<Unit> units;
  for (size_t k = 0; k < (v.kind == ptx::Operand::vector ? v.parts.size() : 1); ++k) {
    const ptx::Operand& part = v.kind == ptx::Operand::vector ? v.parts[k] : v;
    const bool wide = r.width(part) == 8 || (bytes == 8);
    units.push_back(r.read(part, wide ? 8 : bytes == 16 ? 16 : bytes));
    r.i.mode |= static_cast<uint32_t>(wide) << k;
  }
  r.list(units);
  if (r.operands() > 2) r.read(2, 8);
  r.i.run = t == "b128" ? access_128<true> : by_bytes<Store>(t);
  return true;
}

// mode: what to add; the high bit, whether the result has 32 bits.
template <typename From, typename To>
Status convert_address(Warp& w, const Instruction& i, uint32_t lanes) {
  const From* a = w.lanes<From>(i.a);
  const uint64_t window = static_cast<uint64_t>(i.mode & 0xff) << 56;
  const bool to = i.mode >> 8 & 1;
  const auto offset = static_cast<uint64_t>(i.offset);
  each(lanes, w.lanes<To>(i.d), [=](int l) {
    const uint64_t x = a[l] + offset;
    return static_cast<To>(to ? x & ~window : x | window);
  });
  return Status::next;
}

bool cvta(Resolver& r) {
  const bool to = r.has("to");
  space_and_hints(r);
  const bool wide = ptx::type_bytes(r.types()) == 8;
  const uint64_t window = r.i.space == ptx::Space::shared  ? kSharedWindow
                          : r.i.space == ptx::Space::local ? kLocalWindow
                                                           : 0;
  r.i.mode = static_cast<uint32_t>(window >> 56) | static_cast<uint32_t>(to) << 8;
  if (r.operands() != 2) return false;
  r.i.d = r.write(0);
  r.i.moves = true;
  const ptx::Operand& from = r.operand(1);
  if (from.kind == ptx::Operand::name && r.program.parameter_offsets.count(from.text)) {
    ptx::Operand address = from;
    address.kind = ptx::Operand::address;
    bool wide_register;
    r.i.a = r.address_of(address, r.i.offset, wide_register);
  } else {
    r.i.a = r.read(from, wide ? 8 : 4);
  }
  r.i.run = wide ? convert_address<uint64_t, uint64_t> : convert_address<uint32_t, uint32_t>;
  return true;
}

template <bool wide>
Status mapa(Warp& w, const Instruction& i, uint32_t lanes) {
  for (const int l : Lanes(lanes)) {
    const uint64_t address = wide ? w.lanes<uint64_t>(i.a)[l] : w.lanes<uint32_t>(i.a)[l];
    const uint32_t rank = w.lanes<uint32_t>(i.b)[l];
    if (rank >= w.cta->cluster->ctas.size())
      throw Fault(
          "mapa to CTA " + std::to_string(rank) + " of a cluster of " + std::to_string(w.cta->cluster->ctas.size()), l);
    const uint32_t mapped = (rank + 1) << kRankShift | shared_offset(shared_address(address, l));
    if (wide) {
      w.lanes<uint64_t>(i.d)[l] = i.mode ? mapped : kSharedWindow | mapped;
    } else {
      w.lanes<uint32_t>(i.d)[l] = mapped;
    }
  }
  return Status::next;
}
bool resolve_mapa(Resolver& r) {
  r.i.mode = r.has("shared::cluster");
  const bool wide = ptx::type_bytes(r.types()) == 8;
  return operands(r, wide ? mapa<true> : mapa<false>, 1, {wide ? 8 : 4, 4});
}

template <bool wide>
Status rank_of(Warp& w, const Instruction& i, uint32_t lanes) {
  for (const int l : Lanes(lanes)) {
    const uint64_t address = wide ? w.lanes<uint64_t>(i.a)[l] : w.lanes<uint32_t>(i.a)[l];
    const uint32_t rank = shared_address(address, l) >> kRankShift;
    w.lanes<uint32_t>(i.d)[l] = rank ? rank - 1 : w.cta->rank;
  }
  return Status::next;
}
bool getctarank(Resolver& r) {
  r.has("shared::cluster");
  const bool wide = ptx::type_bytes(r.types()) == 8;
  return operands(r, wide ? rank_of<true> : rank_of<false>, 1, {wide ? 8 : 4});
}

Status is_in_space(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t r = 0;
  for (const int l : Lanes(lanes)) {
    const uint64_t window = w.lanes<uint64_t>(i.a)[l] & kWindowMask;
    const uint64_t wanted = i.space == ptx::Space::shared  ? kSharedWindow
                            : i.space == ptx::Space::local ? kLocalWindow
                                                           : 0;
    r |= static_cast<uint32_t>(window == wanted) << l;
  }
  uint32_t& d = w.predicate(i.d);
  d = (d & ~lanes) | r;
  return Status::next;
}
bool isspacep(Resolver& r) {
  space_and_hints(r);
  return operands(r, is_in_space, 1, {8});
}

Status nothing(Warp&, const Instruction&, uint32_t) { return Status::next; }

bool hint(Resolver& r) {  // prefetch, discard, applypriority, createpolicy: no bytes change
  space_and_hints(r);
  r.types();
  r.ignore({"L1", "L2", "tensormap", "L2::128", "L2::evict_last", "L2::evict_normal", "param", "fractional"});
  r.i.run = nothing;
  return true;
}

Status policy(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, w.lanes<uint64_t>(i.d), [](int) { return 0ull; });
  return Status::next;
}
bool createpolicy(Resolver& r) {
  r.types();
  r.ignore({"fractional", "range", "global", "cvt", "L2", "L2::evict_last", "L2::evict_normal", "L2::evict_first",
            "L2::evict_unchanged"});
  r.i.d = r.write(0);
  r.i.run = policy;
  return true;
}

}  // namespace

void add_memory(Table& t) {
  t["ld"] = t["ldu"] = ld;
  t["st"] = st;
  t["cvta"] = cvta;
  t["mapa"] = resolve_mapa;
  t["getctarank"] = getctarank;
  t["isspacep"] = isspacep;
  t["prefetch"] = t["prefetchu"] = t["discard"] = t["applypriority"] = hint;
  t["createpolicy"] = createpolicy;
}

}  // namespace moekern::emulator
