// mov, selp, setp and set, and what packs and unpacks vectors of registers.
#include "lanes.h"

namespace moekern::emulator {
namespace {

template <typename L>
Status move(Warp& w, const Instruction& i, uint32_t lanes) {
  const L* a = w.lanes<L>(i.a);
  each(lanes, w.lanes<L>(i.d), [=](int l) { return a[l]; });
  return Status::next;
}

Status move_wide(Warp& w, const Instruction& i, uint32_t lanes) {  // .b128
  for (int half = 0; half < 2; ++half) {
    const uint64_t* a = w.lanes<uint64_t>(i.a + 2 * half);
    each(lanes, w.lanes<uint64_t>(i.d + 2 * half), [=](int l) { return a[l]; });
  }
  return Status::next;
}

Status move_predicate(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t& d = w.predicate(i.d);
  d = (d & ~lanes) | (w.predicate(i.a) & lanes);
  return Status::next;
}

Status move_parameter_address(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint64_t* a = w.lanes<uint64_t>(i.a);
  const auto offset = static_cast<uint64_t>(i.offset);
  if (i.mode) {
    each(lanes, w.lanes<uint32_t>(i.d), [=](int) { return static_cast<uint32_t>(offset); });
  } else {
    each(lanes, w.lanes<uint64_t>(i.d), [=](int l) { return a[l] + offset; });
  }
  return Status::next;
}

// Part k of a lane is bits [k * width, ...) of the whole. `list` are the parts.
Status pack(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto width = i.mode & 0xff;
  const bool wide = i.mode >> 8;
  for (const int l : Lanes(lanes)) {
    uint64_t whole = 0;
    for (uint32_t k = 0; k < i.list_size; ++k) {
      const uint64_t part = width == 64 ? w.lanes<uint64_t>(i.list[k])[l] : w.lanes<uint32_t>(i.list[k])[l];
      whole |= (width == 64 ? part : part & ((1ull << width) - 1)) << (k * width);
    }
    if (wide) {
      w.lanes<uint64_t>(i.d)[l] = whole;
    } else {
      w.lanes<uint32_t>(i.d)[l] = static_cast<uint32_t>(whole);
    }
  }
  return Status::next;
}

Status unpack(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto width = i.mode & 0xff;
  const bool wide = i.mode >> 8;
  for (const int l : Lanes(lanes)) {
    const uint64_t whole = wide ? w.lanes<uint64_t>(i.a)[l] : w.lanes<uint32_t>(i.a)[l];
    for (uint32_t k = 0; k < i.list_size; ++k)
      w.lanes<uint32_t>(i.list[k])[l] = static_cast<uint32_t>(whole >> (k * width) & ((1ull << width) - 1));
  }
  return Status::next;
}

Status pack_wide(Warp& w, const Instruction& i, uint32_t lanes) {  // two .b64 to .b128
  for (int k = 0; k < 2; ++k) {
    const uint64_t* a = w.lanes<uint64_t>(i.list[k]);
    each(lanes, w.lanes<uint64_t>(i.d + 2 * k), [=](int l) { return a[l]; });
  }
  return Status::next;
}
Status unpack_wide(Warp& w, const Instruction& i, uint32_t lanes) {
  for (int k = 0; k < 2; ++k) {
    const uint64_t* a = w.lanes<uint64_t>(i.a + 2 * k);
    each(lanes, w.lanes<uint64_t>(i.list[k]), [=](int l) { return a[l]; });
  }
  return Status::next;
}

Status read_clock(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint64_t now = w.launch->executed;
  if (i.mode == 8) {
    each(lanes, w.lanes<uint64_t>(i.d), [=](int) { return now; });
  } else {
    const auto word = static_cast<uint32_t>(i.mode == 5 ? now >> 32 : now);
    each(lanes, w.lanes<uint32_t>(i.d), [=](int) { return word; });
  }
  return Status::next;
}

bool mov(Resolver& r) {
  const std::string type = r.types();
  if (r.operands() != 2 || type.empty()) return false;
  const ptx::Operand &to = r.operand(0), &from = r.operand(1);
  const int bytes = type == "pred" ? 0 : static_cast<int>(ptx::type_bytes(type));
  r.i.moves = true;
  if (from.kind == ptx::Operand::vector) {
    const auto parts = static_cast<int>(from.parts.size());
    r.i.d = r.write(to);
    r.list(r.read_vector(from, bytes / parts));
    if (bytes == 16) return r.i.run = pack_wide, parts == 2;
    r.i.run = pack;
    r.i.mode = static_cast<uint32_t>(8 * bytes / parts) | (bytes == 8) << 8;
    return true;
  }
  if (to.kind == ptx::Operand::vector) {
    const auto parts = static_cast<int>(to.parts.size());
    r.list(r.write_vector(to));
    r.i.a = r.read(from, bytes);
    if (bytes == 16) return r.i.run = unpack_wide, parts == 2;
    r.i.run = unpack;
    r.i.mode = static_cast<uint32_t>(8 * bytes / parts) | (bytes == 8) << 8;
    return true;
  }
  if (from.kind == ptx::Operand::name) {
    const std::string& name = from.text;
    if (name == "%clock" || name == "%clock_hi" || name == "%clock64" || name == "%globaltimer" ||
        name == "%globaltimer_lo" || name == "%globaltimer_hi") {
      r.i.run = read_clock;
      r.i.mode = name == "%clock64" || name == "%globaltimer"               ? 8
                 : name.size() > 3 && name.substr(name.size() - 3) == "_hi" ? 5
                                                                            : 4;
      r.i.d = r.write(0);
      return true;
    }
    if (r.program.parameter_offsets.count(name)) {
      ptx::Operand address = from;
      address.kind = ptx::Operand::address;
      r.i.a = r.address_of(address, r.i.offset, r.i.wide_address);
      r.i.d = r.write(0);
      r.i.mode = bytes == 4;
      r.i.run = move_parameter_address;
      return true;
    }
  }
  const Handler run = bytes == 0    ? move_predicate
                      : bytes == 16 ? move_wide
                      : bytes == 8  ? move<uint64_t>
                                    : move<uint32_t>;
  return operands(r, run, 1, {bytes});
}

template <typename L>
Status select(Warp& w, const Instruction& i, uint32_t lanes) {
  const L *a = w.lanes<L>(i.a), *b = w.lanes<L>(i.b);
  const uint32_t p = w.predicate(i.c) ^ (i.mode ? ~0u : 0);
  each(lanes, w.lanes<L>(i.d), [=](int l) { return p >> l & 1 ? a[l] : b[l]; });
  return Status::next;
}

bool selp(Resolver& r) {
  const int bytes = static_cast<int>(ptx::type_bytes(r.types()));
  if (r.operands() != 4) return false;
  r.i.mode = r.operand(3).negated;
  return operands(r, bytes == 8 ? select<uint64_t> : select<uint32_t>, 1, {bytes, bytes, 0});
}

template <typename T> struct Eq {
  bool operator()(T a, T b) const { return a == b; }
};
template <typename T> struct Ne {
  bool operator()(T a, T b) const { return a != b && a == a && b == b; }
};
template <typename T> struct Lt {
  bool operator()(T a, T b) const { return a < b; }
};
template <typename T> struct Le {
  bool operator()(T a, T b) const { return a <= b; }
};
template <typename T> struct Gt {
  bool operator()(T a, T b) const { return a > b; }
};
template <typename T> struct Ge {
  bool operator()(T a, T b) const { return a >= b; }
};
template <typename T> struct Equ {
  bool operator()(T a, T b) const { return !(a == a && b == b) || a == b; }
};
template <typename T> struct Neu {
  bool operator()(T a, T b) const { return a != b; }
};
template <typename T> struct Ltu {
  bool operator()(T a, T b) const { return !(a >= b); }
};
template <typename T> struct Leu {
  bool operator()(T a, T b) const { return !(a > b); }
};
template <typename T> struct Gtu {
  bool operator()(T a, T b) const { return !(a <= b); }
};
template <typename T> struct Geu {
  bool operator()(T a, T b) const { return !(a < b); }
};
template <typename T> struct Num {
  bool operator()(T a, T b) const { return a == a && b == b; }
};
template <typename T> struct Nan {
  bool operator()(T a, T b) const { return a != a || b != b; }
};

enum : uint32_t {
  kAnd = 1,
  kOr = 2,
  kXor = 3,
  kNegatedC = 4,
  kFlush = 8,
  kHalf = 16,
  kBrain = 32,
  kPair = 64,
  kSetFloat = 128,
  kCombine = 3
};

uint32_t combine(Warp& w, const Instruction& i, uint32_t r) {
  if (!(i.mode & kCombine)) return r;
  const uint32_t c = w.predicate(i.c) ^ (i.mode & kNegatedC ? ~0u : 0);
  return (i.mode & kCombine) == kAnd ? r & c : (i.mode & kCombine) == kOr ? r | c : r ^ c;
}

void store_predicate(Warp& w, Unit unit, uint32_t lanes, uint32_t r) {
  uint32_t& d = w.predicate(unit);
  d = (d & ~lanes) | (r & lanes);
}

template <typename T, typename F>
uint32_t compared(Warp& w, const Instruction& i) {
  const auto *a = w.lanes<Lane<T>>(i.a), *b = w.lanes<Lane<T>>(i.b);
  uint32_t r = 0;
  for (int l = 0; l < 32; ++l) {
    T x = value<T>(a[l]), y = value<T>(b[l]);
    if constexpr (std::is_same_v<T, float>)
      if (i.mode & kFlush) x = flush(x), y = flush(y);
    r |= static_cast<uint32_t>(F()(x, y)) << l;
  }
  return r;
}

template <typename T, typename F>
Status set_predicate(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t r = compared<T, F>(w, i);
  store_predicate(w, i.d, lanes, combine(w, i, r));
  if (i.d2) store_predicate(w, i.d2, lanes, combine(w, i, ~r));
  return Status::next;
}

template <typename F, int which>
uint32_t compared_halves(Warp& w, const Instruction& i) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b);
  uint32_t r = 0;
  for (int l = 0; l < 32; ++l) {
    const uint32_t x = a[l] >> (16 * which) & 0xffff, y = b[l] >> (16 * which) & 0xffff;
    const bool brain = i.mode & kBrain;
    r |= static_cast<uint32_t>(F()(brain ? from_bf16(x) : from_f16(x), brain ? from_bf16(y) : from_f16(y))) << l;
  }
  return r;
}

template <typename F>
Status set_predicate_halves(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t low = compared_halves<F, 0>(w, i);
  store_predicate(w, i.d, lanes, combine(w, i, low));
  if (i.d2) store_predicate(w, i.d2, lanes, combine(w, i, i.mode & kPair ? compared_halves<F, 1>(w, i) : ~low));
  return Status::next;
}

template <typename T, typename F>
Status set_value(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t r = combine(w, i, compared<T, F>(w, i));
  const uint32_t yes = i.mode & kSetFloat ? 0x3f800000 : ~0u;
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) { return r >> l & 1 ? yes : 0; });
  return Status::next;
}

template <typename F>
Status set_value_halves(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t low = combine(w, i, compared_halves<F, 0>(w, i));
  const uint32_t high = i.mode & kPair ? combine(w, i, compared_halves<F, 1>(w, i)) : 0;
  const uint32_t yes = i.mode & kSetFloat ? (i.mode & kBrain ? 0x3f80 : 0x3c00) : 0xffff;
  const bool whole = !(i.mode & kPair) && !(i.mode & kSetFloat);  // set.eq.u32.f16
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    if (whole) return low >> l & 1 ? ~0u : 0;
    return (low >> l & 1 ? yes : 0) | (high >> l & 1 ? yes << 16 : 0);
  });
  return Status::next;
}

template <template <typename> class F, bool value>
Handler comparison(const std::string& t) {
  const auto pick = [](Handler a, Handler b) { return value ? b : a; };
  if (t == "u16" || t == "b16") return pick(set_predicate<uint16_t, F<uint16_t>>, set_value<uint16_t, F<uint16_t>>);
  if (t == "s16") return pick(set_predicate<int16_t, F<int16_t>>, set_value<int16_t, F<int16_t>>);
  if (t == "u32" || t == "b32") return pick(set_predicate<uint32_t, F<uint32_t>>, set_value<uint32_t, F<uint32_t>>);
  if (t == "s32") return pick(set_predicate<int32_t, F<int32_t>>, set_value<int32_t, F<int32_t>>);
  if (t == "u64" || t == "b64") return pick(set_predicate<uint64_t, F<uint64_t>>, set_value<uint64_t, F<uint64_t>>);
  if (t == "s64") return pick(set_predicate<int64_t, F<int64_t>>, set_value<int64_t, F<int64_t>>);
  if (t == "f32") return pick(set_predicate<float, F<float>>, set_value<float, F<float>>);
  if (t == "f64") return pick(set_predicate<double, F<double>>, set_value<double, F<double>>);
  if (t == "f16" || t == "bf16" || t == "f16x2" || t == "bf16x2")
    return pick(set_predicate_halves<F<float>>, set_value_halves<F<float>>);
  return nullptr;
}

template <bool value>
Handler comparison(Resolver& r, const std::string& t) {
  const bool is_unsigned = t[0] == 'u' || t[0] == 'b';
  if (r.has("eq")) return comparison<Eq, value>(t);
  if (r.has("ne")) return comparison<Ne, value>(t);
  if (r.has("lt")) return comparison<Lt, value>(t);
  if (r.has("le")) return comparison<Le, value>(t);
  if (r.has("gt")) return comparison<Gt, value>(t);
  if (r.has("ge")) return comparison<Ge, value>(t);
  if (is_unsigned && t[1] != 'f') {
    if (r.has("lo")) return comparison<Lt, value>(t);
    if (r.has("ls")) return comparison<Le, value>(t);
    if (r.has("hi")) return comparison<Gt, value>(t);
    if (r.has("hs")) return comparison<Ge, value>(t);
  }
  if (r.has("equ")) return comparison<Equ, value>(t);
  if (r.has("neu")) return comparison<Neu, value>(t);
  if (r.has("ltu")) return comparison<Ltu, value>(t);
  if (r.has("leu")) return comparison<Leu, value>(t);
  if (r.has("gtu")) return comparison<Gtu, value>(t);
  if (r.has("geu")) return comparison<Geu, value>(t);
  if (r.has("num")) return comparison<Num, value>(t);
  if (r.has("nan")) return comparison<Nan, value>(t);
  return nullptr;
}

uint32_t comparison_mode(Resolver& r, const std::string& type) {
  uint32_t mode = 0;
  if (r.has("and")) mode |= kAnd;
  if (r.has("or")) mode |= kOr;
  if (r.has("xor")) mode |= kXor;
  if (r.has("ftz")) mode |= kFlush;
  if (type == "bf16" || type == "bf16x2") mode |= kBrain;
  if (type == "f16x2" || type == "bf16x2") mode |= kPair;
  return mode;
}

// All but the second result of setp. value: into a register, not a predicate.
template <bool value>
bool compares(Resolver& r, const std::string& type) {
  const int bytes = static_cast<int>(ptx::type_bytes(type));
  r.i.mode |= comparison_mode(r, type);
  r.i.run = comparison<value>(r, type);
  if (!r.i.run || r.operands() != (r.i.mode & kCombine ? 4u : 3u)) return false;
  r.i.a = r.read(1, bytes), r.i.b = r.read(2, bytes);
  if (r.i.mode & kCombine) {
    r.i.c = r.read(3, 0);
    if (r.operand(3).negated) r.i.mode |= kNegatedC;
  }
  r.i.d = r.write(0);
  return true;
}

bool setp(Resolver& r) {
  if (!compares<false>(r, r.types())) return false;
  r.i.d2 = r.write_second(r.operand(0));
  return true;
}

bool set(Resolver& r) {
  const std::string t = r.types(), result = r.types(1);
  if (result == "f32" || result == "f16" || result == "bf16" || result == "f16x2" || result == "bf16x2")
    r.i.mode |= kSetFloat;
  return compares<true>(r, t);
}

template <typename L>
Status sign_choice(Warp& w, const Instruction& i, uint32_t lanes) {  // slct: by the sign of c
  const L *a = w.lanes<L>(i.a), *b = w.lanes<L>(i.b);
  const uint32_t* c = w.lanes<uint32_t>(i.c);
  const bool floating = i.mode;
  each(lanes, w.lanes<L>(i.d),
       [=](int l) { return (floating ? as_float(c[l]) >= 0 : static_cast<int32_t>(c[l]) >= 0) ? a[l] : b[l]; });
  return Status::next;
}
bool slct(Resolver& r) {
  r.i.mode = r.types() == "f32";
  const int bytes = static_cast<int>(ptx::type_bytes(r.types(1)));
  r.ignore({"ftz"});
  return operands(r, bytes == 8 ? sign_choice<uint64_t> : sign_choice<uint32_t>, 1, {bytes, bytes, 4});
}

}  // namespace

void add_moves(Table& t) {
  t["mov"] = mov;
  t["selp"] = selp;
  t["setp"] = setp;
  t["set"] = set;
  t["slct"] = slct;
}

}  // namespace moekern::emulator
