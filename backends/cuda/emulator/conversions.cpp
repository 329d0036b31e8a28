// cvt: between integers, floating point formats and their packed pairs.
#include <limits>

#include "lanes.h"

namespace moekern::emulator {
namespace {

enum class Kind : uint8_t { none, s8, s16, s32, s64, u8, u16, u32, u64, f16, bf16, tf32, f32, f64, e4m3, e5m2 };

struct Conversion {
  Kind from, to;
  Rounding rounding;
  bool to_integral;  // .rni and so on
  bool saturate, satfinite, relu, flush;
  int pairs;  // 2: packed destination
  bool packed_source;
  bool wide_source;  // the register has 64 bits
  bool wide_result;
};

Kind kind_of(const std::string& t) {
  static const std::map<std::string, Kind> kinds{
      {"s8", Kind::s8},      {"s16", Kind::s16}, {"s32", Kind::s32},   {"s64", Kind::s64},     {"u8", Kind::u8},
      {"u16", Kind::u16},    {"u32", Kind::u32}, {"u64", Kind::u64},   {"f16", Kind::f16},     {"bf16", Kind::bf16},
      {"tf32", Kind::tf32},  {"f32", Kind::f32}, {"f64", Kind::f64},   {"b8", Kind::u8},       {"b16", Kind::u16},
      {"b32", Kind::u32},    {"b64", Kind::u64}, {"f16x2", Kind::f16}, {"bf16x2", Kind::bf16}, {"e4m3x2", Kind::e4m3},
      {"e5m2x2", Kind::e5m2}};
  const auto found = kinds.find(t);
  return found == kinds.end() ? Kind::none : found->second;
}

bool is_integer(Kind k) { return k >= Kind::s8 && k <= Kind::u64; }
bool is_signed(Kind k) { return k >= Kind::s8 && k <= Kind::s64; }
int bits_of(Kind k) {
  switch (k) {
    case Kind::s8:
    case Kind::u8:
    case Kind::e4m3:
    case Kind::e5m2: return 8;
    case Kind::s16:
    case Kind::u16:
    case Kind::f16:
    case Kind::bf16: return 16;
    case Kind::s64:
    case Kind::u64:
    case Kind::f64: return 64;
    default: return 32;
  }
}
const Format& format_of(Kind k) {
  switch (k) {
    case Kind::f16: return kF16;
    case Kind::bf16: return kBf16;
    case Kind::e4m3: return kE4m3;
    case Kind::e5m2: return kE5m2;
    case Kind::tf32: return kTf32;
    default: return kF32;
  }
}

double floating(uint64_t bits, Kind k) {
  switch (k) {
    case Kind::f32:
    case Kind::tf32: return as_float(static_cast<uint32_t>(bits));
    case Kind::f64: return as_double(bits);
    case Kind::bf16: return from_bf16(static_cast<uint32_t>(bits) & 0xffff);
    case Kind::f16: return from_f16(static_cast<uint32_t>(bits) & 0xffff);
    default: return decode(static_cast<uint32_t>(bits) & 0xff, format_of(k));
  }
}

double integral(double x, Rounding r) {
  switch (r) {
    case Rounding::zero: return std::trunc(x);
    case Rounding::down: return std::floor(x);
    case Rounding::up: return std::ceil(x);
    default: return std::nearbyint(x);
  }
}

uint64_t to_integer(double x, Kind k) {
  if (x != x) return 0;
  const int bits = bits_of(k);
  if (is_signed(k)) {
    const double limit = std::ldexp(1.0, bits - 1);
    if (x >= limit) return (1ull << (bits - 1)) - 1;
    if (x < -limit) return static_cast<uint64_t>(-1) << (bits - 1);
    return static_cast<uint64_t>(static_cast<int64_t>(x));
  }
  if (x <= 0) return 0;
  if (x >= std::ldexp(1.0, bits)) return bits == 64 ? ~0ull : (1ull << bits) - 1;
  return static_cast<uint64_t>(x);
}

// An integer rounded to f32 or a narrower format, through a double that is rounded to odd where 53 bits are too few.
double as_real(uint64_t bits, Kind k) {
  const bool negative = is_signed(k) && static_cast<int64_t>(bits) < 0;
  uint64_t magnitude = negative ? 0 - bits : bits;
  if (magnitude >> 53) {
    const int shift = 11;
    const bool rest = magnitude & ((1ull << shift) - 1);
    magnitude = (magnitude >> shift | rest) << shift;
  }
  const auto x = static_cast<double>(magnitude);
  return negative ? -x : x;
}

uint32_t one_float(double x, const Conversion& c) {
  if (c.flush && std::fabs(x) < 0x1p-126) x = std::copysign(0.0, x);
  if (c.saturate) x = x > 0 ? (x < 1 ? x : 1) : 0;
  if (c.relu) x = x > 0 ? x : x != x ? x : 0;
  if (c.to == Kind::f32 && c.rounding == Rounding::nearest) return canonical(static_cast<float>(x));
  if (c.to == Kind::bf16 && c.rounding == Rounding::nearest && !c.satfinite) {
    if (c.from == Kind::f32) return to_bf16(static_cast<float>(x));
  }
  if (c.to == Kind::f16 && c.rounding == Rounding::nearest && !c.satfinite && c.from == Kind::f32)
    return to_f16(static_cast<float>(x));
  const uint32_t code = encode(x, format_of(c.to), c.rounding, c.satfinite);
  return c.to == Kind::tf32 ? code << 13 : code;
}

uint64_t convert_one(uint64_t bits, const Conversion& c) {
  if (is_integer(c.from)) {
    const int n = bits_of(c.from);
    if (n < 64) {
      bits &= (1ull << n) - 1;
      if (is_signed(c.from) && bits >> (n - 1)) bits |= ~0ull << n;
    }
    if (is_integer(c.to)) {
      if (c.saturate) {
        const bool negative = is_signed(c.from) && static_cast<int64_t>(bits) < 0;
        const int to = bits_of(c.to);
        const uint64_t top = is_signed(c.to) ? (1ull << (to - 1)) - 1 : to == 64 ? ~0ull : (1ull << to) - 1;
        if (!negative && bits > top) bits = top;
        if (negative && !is_signed(c.to)) bits = 0;
        if (negative && is_signed(c.to) && to < 64 && static_cast<int64_t>(bits) < -(int64_t{1} << (to - 1)))
          bits = ~0ull << (to - 1);
      }
      return bits;
    }
    if (c.to == Kind::f64) {
      const double d = is_signed(c.from) ? static_cast<double>(static_cast<int64_t>(bits)) : static_cast<double>(bits);
      return as_bits(d);
    }
    if (c.to == Kind::f32 && c.rounding == Rounding::nearest) return as_bits(static_cast<float>(as_real(bits, c.from)));
    return encode(as_real(bits, c.from), format_of(c.to), c.rounding, false);
  }
  double x = floating(bits, c.from);
  if (is_integer(c.to)) {
    if (c.flush && std::fabs(x) < 0x1p-126) x = 0;
    return to_integer(integral(x, c.rounding), c.to);
  }
  if (c.to_integral) x = integral(x, c.rounding);
  if (c.to == Kind::f64) return canonical(x);
  return one_float(x, c);
}

// Integers keep the register's other bits in order: a result narrower than its register is extended by its sign.
uint64_t fitted(uint64_t bits, const Conversion& c) {
  if (!is_integer(c.to)) return bits;
  const int n = bits_of(c.to);
  if (n == 64) return bits;
  bits &= (1ull << n) - 1;
  if (is_signed(c.to) && bits >> (n - 1)) bits |= ~0ull << n;
  if (n == 16) bits &= 0xffff;
  return bits;
}

Status convert(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& c = *static_cast<const Conversion*>(i.extra);
  const uint64_t* wide = w.lanes<uint64_t>(i.a);
  const uint32_t* narrow = w.lanes<uint32_t>(i.a);
  for (const int l : Lanes(lanes)) {
    const uint64_t r = fitted(convert_one(c.wide_source ? wide[l] : narrow[l], c), c);
    if (c.wide_result) {
      w.lanes<uint64_t>(i.d)[l] = r;
    } else {
      w.lanes<uint32_t>(i.d)[l] = static_cast<uint32_t>(r);
    }
  }
  return Status::next;
}

template <typename T, typename R>
Status convert_integer(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto* a = w.lanes<Lane<T>>(i.a);
  each(lanes, w.lanes<Lane<R>>(i.d), [=](int l) { return lane<R>(static_cast<R>(static_cast<T>(a[l]))); });
  return Status::next;
}

Status convert_pairs(Warp& w, const Instruction& i, uint32_t lanes) {  // d = {a, b}, a in the upper half
  const auto& c = *static_cast<const Conversion*>(i.extra);
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b);
  const int half = bits_of(c.to);
  each(lanes, w.lanes<uint32_t>(i.d),
       [&](int l) { return static_cast<uint32_t>(convert_one(b[l], c) | convert_one(a[l], c) << half); });
  return Status::next;
}

Status convert_packed(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& c = *static_cast<const Conversion*>(i.extra);
  const uint32_t* a = w.lanes<uint32_t>(i.a);
  const int from = bits_of(c.from), to = bits_of(c.to);
  each(lanes, w.lanes<uint32_t>(i.d), [&](int l) {
    return static_cast<uint32_t>(convert_one(a[l] & ((1u << from) - 1), c) | convert_one(a[l] >> from, c) << to);
  });
  return Status::next;
}

template <typename T>
Handler integer_to(Kind to) {
  switch (to) {
    case Kind::s32: return convert_integer<T, int32_t>;
    case Kind::u32: return convert_integer<T, uint32_t>;
    case Kind::s64: return convert_integer<T, int64_t>;
    case Kind::u64: return convert_integer<T, uint64_t>;
    case Kind::u16: return convert_integer<T, uint16_t>;
    case Kind::s16: return convert_integer<T, int16_t>;
    default: return nullptr;
  }
}
Handler quick(const Conversion& c) {
  if (!is_integer(c.from) || c.saturate || (c.wide_source != (bits_of(c.from) == 64)) ||
      c.wide_result != (bits_of(c.to) == 64))
    return nullptr;
  switch (c.from) {
    case Kind::s8: return integer_to<int8_t>(c.to);
    case Kind::u8: return integer_to<uint8_t>(c.to);
    case Kind::s16: return integer_to<int16_t>(c.to);
    case Kind::u16: return integer_to<uint16_t>(c.to);
    case Kind::s32: return integer_to<int32_t>(c.to);
    case Kind::u32: return integer_to<uint32_t>(c.to);
    case Kind::s64: return integer_to<int64_t>(c.to);
    default: return integer_to<uint64_t>(c.to);
  }
}

bool cvt(Resolver& r) {
  if (r.has("pack")) return false;
  const std::string from = r.types(0), to = r.types(1);
  Conversion c{};
  c.from = kind_of(from), c.to = kind_of(to);
  if (c.from == Kind::none || c.to == Kind::none) return false;
  c.rounding = Rounding::nearest;
  for (const auto& [name, rounding] : {std::pair<const char*, Rounding>{"rn", Rounding::nearest},
                                       {"rz", Rounding::zero},
                                       {"rm", Rounding::down},
                                       {"rp", Rounding::up},
                                       {"rna", Rounding::nearest_away}})
    if (r.has(name)) c.rounding = rounding;
  for (const auto& [name, rounding] : {std::pair<const char*, Rounding>{"rni", Rounding::nearest},
                                       {"rzi", Rounding::zero},
                                       {"rmi", Rounding::down},
                                       {"rpi", Rounding::up}})
    if (r.has(name)) c.rounding = rounding, c.to_integral = true;
  c.saturate = r.has("sat");
  c.satfinite = r.has("satfinite");
  c.relu = r.has("relu");
  c.flush = r.has("ftz");
  const bool pair = to.find("x2") != std::string::npos;
  c.packed_source = from.find("x2") != std::string::npos;
  const auto reading = [&](const ptx::Operand& o, int bytes) {
    const int have = r.width(o);
    return r.read(o, have == 8 ? 8 : bytes);
  };
  const int bytes = static_cast<int>(ptx::type_bytes(from));
  r.i.d = r.write(0);
  c.wide_result = r.width(r.operand(0)) == 8;
  if (pair) {
    if (c.packed_source) {
      if (r.operands() != 2) return false;
      r.i.a = r.read(1, bytes);
      r.i.run = convert_packed;
    } else {
      if (r.operands() != 3) return false;
      r.i.a = r.read(1, bytes), r.i.b = r.read(2, bytes);
      r.i.run = convert_pairs;
    }
  } else {
    if (r.operands() != 2 || c.packed_source) return false;
    c.wide_source = r.width(r.operand(1)) == 8 || bytes == 8;
    r.i.a = reading(r.operand(1), bytes);
    r.i.run = quick(c);
    if (!r.i.run) r.i.run = convert;
  }
  r.extra(c);
  return true;
}

}  // namespace

void add_conversions(Table& t) { t["cvt"] = cvt; }

}  // namespace moekern::emulator
