// Integer arithmetic, logic, shifts, bit fields.
#include <limits>

#include "lanes.h"

namespace moekern::emulator {
namespace {

template <typename T>
using Unsigned = std::make_unsigned_t<T>;
template <typename T>
using Wider =
    std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                       std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                                          std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;

// Unsigned, so that overflow wraps; in 32 bits at least, since smaller types would be promoted to int.
template <typename T>
using Wrapping = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

#define MOEKERN_BINARY(NAME, EXPRESSION)                                                                         \
  template <typename T>                                                                                          \
  struct NAME {                                                                                                  \
    T operator()(T a, T b) const { return static_cast<T>(EXPRESSION); }                                          \
    static Status run(Warp& w, const Instruction& i, uint32_t lanes) { return binary<NAME, T, T>(w, i, lanes); } \
  };
#define MOEKERN_TERNARY(NAME, EXPRESSION)                                                                         \
  template <typename T>                                                                                           \
  struct NAME {                                                                                                   \
    T operator()(T a, T b, T c) const { return static_cast<T>(EXPRESSION); }                                      \
    static Status run(Warp& w, const Instruction& i, uint32_t lanes) { return ternary<NAME, T, T>(w, i, lanes); } \
  };
#define MOEKERN_UNARY(NAME, EXPRESSION)                                                                         \
  template <typename T>                                                                                         \
  struct NAME {                                                                                                 \
    T operator()(T a) const { return static_cast<T>(EXPRESSION); }                                              \
    static Status run(Warp& w, const Instruction& i, uint32_t lanes) { return unary<NAME, T, T>(w, i, lanes); } \
  };

template <typename T>
inline T high(T a, T b) {
  return static_cast<T>(static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b) >> (8 * sizeof(T)));
}
template <typename T>
inline T quotient(T a, T b) {  // by zero: all ones, as the hardware's
  if (b == 0) return static_cast<T>(~T{0});
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return static_cast<T>(0 - static_cast<Unsigned<T>>(a));
  return static_cast<T>(a / b);
}
template <typename T>
inline T remainder(T a, T b) {
  if (b == 0) return a;
  if constexpr (std::is_signed_v<T>)
    if (b == -1) return 0;
  return static_cast<T>(a % b);
}
template <typename T>
inline T saturated(Wider<T> x) {
  using Limits = std::numeric_limits<T>;
  return x > Limits::max() ? Limits::max() : x < Limits::min() ? Limits::min() : static_cast<T>(x);
}

MOEKERN_BINARY(Add, Wrapping<T>(a) + Wrapping<T>(b))
MOEKERN_BINARY(Sub, Wrapping<T>(a) - Wrapping<T>(b))
MOEKERN_BINARY(MulLow, Wrapping<T>(a) * Wrapping<T>(b))
MOEKERN_BINARY(MulHigh, high<T>(a, b))
MOEKERN_BINARY(Quotient, quotient<T>(a, b))
MOEKERN_BINARY(Remainder, remainder<T>(a, b))
MOEKERN_BINARY(Min, a < b ? a : b)
MOEKERN_BINARY(Max, a > b ? a : b)
MOEKERN_BINARY(And, a& b)
MOEKERN_BINARY(Or, a | b)
MOEKERN_BINARY(Xor, a ^ b)
MOEKERN_TERNARY(MadLow, Wrapping<T>(a) * Wrapping<T>(b) + Wrapping<T>(c))
MOEKERN_TERNARY(MadHigh, Wrapping<T>(high<T>(a, b)) + Wrapping<T>(c))
MOEKERN_TERNARY(Sad, Wrapping<T>(c) + (a < b ? Wrapping<T>(b) - Wrapping<T>(a) : Wrapping<T>(a) - Wrapping<T>(b)))
MOEKERN_UNARY(Not, ~a)
MOEKERN_UNARY(LogicalNot, a == 0)
MOEKERN_UNARY(Negate, Wrapping<T>(0) - Wrapping<T>(a))
MOEKERN_UNARY(Absolute, a < 0 ? Wrapping<T>(0) - Wrapping<T>(a) : Wrapping<T>(a))

struct AddSaturated {
  int32_t operator()(int32_t a, int32_t b) const { return saturated<int32_t>(int64_t{a} + b); }
};
struct SubSaturated {
  int32_t operator()(int32_t a, int32_t b) const { return saturated<int32_t>(int64_t{a} - b); }
};

template <typename T>
struct MulWide {
  Wider<T> operator()(T a, T b) const { return static_cast<Wider<T>>(a) * static_cast<Wider<T>>(b); }
  static Status run(Warp& w, const Instruction& i, uint32_t lanes) {
    if constexpr (sizeof(T) < 8) return binary<MulWide, Wider<T>, T>(w, i, lanes);
    return Status::next;
  }
};
template <typename T>
struct MadWide {
  using W = Wider<T>;
  W operator()(T a, T b, W c) const {
    return static_cast<W>(static_cast<Unsigned64>(static_cast<W>(a) * static_cast<W>(b)) + static_cast<Unsigned64>(c));
  }
  using Unsigned64 = uint64_t;
  static Status run(Warp& w, const Instruction& i, uint32_t lanes) {
    if constexpr (sizeof(T) < 8) return ternary<MadWide, W, T, T, W>(w, i, lanes);
    return Status::next;
  }
};
struct Mul24 {
  uint32_t operator()(uint32_t a, uint32_t b) const { return (a & 0xffffff) * (b & 0xffffff); }
};

// Shifts clamp: by the width or more they leave zeros, or signs.
template <typename T>
struct Shl {
  T operator()(T a, uint32_t b) const {
    return b >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<Wrapping<T>>(a) << b);
  }
  static Status run(Warp& w, const Instruction& i, uint32_t lanes) { return binary<Shl, T, T, uint32_t>(w, i, lanes); }
};
template <typename T>
struct Shr {
  T operator()(T a, uint32_t b) const {
    constexpr uint32_t kLast = 8 * sizeof(T) - 1;
    if constexpr (std::is_signed_v<T>) return static_cast<T>(a >> (b > kLast ? kLast : b));
    return b > kLast ? T{0} : static_cast<T>(a >> b);
  }
  static Status run(Warp& w, const Instruction& i, uint32_t lanes) { return binary<Shr, T, T, uint32_t>(w, i, lanes); }
};

template <bool left, bool wrap>
struct Funnel {
  uint32_t operator()(uint32_t low, uint32_t high, uint32_t by) const {
    const uint32_t n = wrap ? by & 31 : by > 32 ? 32 : by;
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return left ? static_cast<uint32_t>((both << n) >> 32) : static_cast<uint32_t>(both >> n);
  }
};

struct Popc32 {
  uint32_t operator()(uint32_t a) const { return static_cast<uint32_t>(__builtin_popcount(a)); }
};
struct Popc64 {
  uint32_t operator()(uint64_t a) const { return static_cast<uint32_t>(__builtin_popcountll(a)); }
};
struct Clz32 {
  uint32_t operator()(uint32_t a) const { return a ? static_cast<uint32_t>(__builtin_clz(a)) : 32; }
};
struct Clz64 {
  uint32_t operator()(uint64_t a) const { return a ? static_cast<uint32_t>(__builtin_clzll(a)) : 64; }
};
template <typename T>
struct Brev {
  T operator()(T a) const {
    T r = 0;
    for (size_t n = 0; n < 8 * sizeof(T); ++n) r |= (a >> n & 1) << (8 * sizeof(T) - 1 - n);
    return r;
  }
};

template <typename T, bool amount>
struct Bfind {  // the most significant bit that is not a sign bit
  uint32_t operator()(T a) const {
    using U = std::make_unsigned_t<T>;
    const U bits = std::is_signed_v<T> && a < 0 ? static_cast<U>(~a) : static_cast<U>(a);
    if (bits == 0) return ~0u;
    const int top = 63 - __builtin_clzll(bits);
    return static_cast<uint32_t>(amount ? static_cast<int>(8 * sizeof(T)) - 1 - top : top);
  }
};

template <typename T>
struct Bfe {
  T operator()(T a, uint32_t position, uint32_t length) const {
    using U = std::make_unsigned_t<T>;
    constexpr uint32_t kLast = 8 * sizeof(T) - 1;
    position &= 0xff, length &= 0xff;
    if (length == 0) return 0;
    const uint32_t end = position + length - 1;
    const bool sign = std::is_signed_v<T> && (static_cast<U>(a) >> (end < kLast ? end : kLast) & 1);
    U r = position > kLast ? (sign ? ~U{0} : U{0}) : static_cast<U>(a >> position);
    if (length <= kLast) {
      const U mask = (U{1} << length) - 1;
      r = sign ? r | ~mask : r & mask;
    }
    return static_cast<T>(r);
  }
};

template <typename T>
Status bfi(Warp& w, const Instruction& i, uint32_t lanes) {
  const T *a = w.lanes<T>(i.a), *b = w.lanes<T>(i.b);
  const uint32_t *c = w.lanes<uint32_t>(i.c), *n = w.lanes<uint32_t>(i.list[0]);
  each(lanes, w.lanes<T>(i.d), [=](int l) -> T {
    const uint32_t position = c[l] & 0xff, length = n[l] & 0xff;
    if (length == 0 || position >= 8 * sizeof(T)) return b[l];
    const T mask = (length >= 8 * sizeof(T) ? ~T{0} : (T{1} << length) - 1) << position;
    return (b[l] & ~mask) | (a[l] << position & mask);
  });
  return Status::next;
}

Status lop3(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b), *c = w.lanes<uint32_t>(i.c);
  uint32_t term[8];  // all ones where the truth table has a one
  for (uint32_t n = 0; n < 8; ++n) term[n] = i.mode >> n & 1 ? ~0u : 0;
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    const uint32_t x = a[l], y = b[l], z = c[l];
    return (term[0] & ~x & ~y & ~z) | (term[1] & ~x & ~y & z) | (term[2] & ~x & y & ~z) | (term[3] & ~x & y & z) |
           (term[4] & x & ~y & ~z) | (term[5] & x & ~y & z) | (term[6] & x & y & ~z) | (term[7] & x & y & z);
  });
  return Status::next;
}

Status prmt(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b), *c = w.lanes<uint32_t>(i.c);
  const uint32_t mode = i.mode;
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    const uint64_t bytes = static_cast<uint64_t>(b[l]) << 32 | a[l];
    uint32_t r = 0;
    for (uint32_t n = 0; n < 4; ++n) {
      const uint32_t k = c[l] & 3;
      uint32_t from;
      bool sign = false;
      switch (mode) {
        case 1: from = (k + n) & 7; break;            // f4e
        case 2: from = (k - n) & 7; break;            // b4e
        case 3: from = k; break;                      // rc8
        case 4: from = n > k ? n : k; break;          // ecl
        case 5: from = n < k ? n : k; break;          // ecr
        case 6: from = (k & 1) * 2 + (n & 1); break;  // rc16
        default: from = c[l] >> (4 * n) & 7, sign = c[l] >> (4 * n) & 8;
      }
      uint32_t byte = static_cast<uint32_t>(bytes >> (8 * from)) & 0xff;
      if (sign) byte = byte & 0x80 ? 0xff : 0;
      r |= byte << (8 * n);
    }
    return r;
  });
  return Status::next;
}

template <bool sa, bool sb>
Status dp4a(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b), *c = w.lanes<uint32_t>(i.c);
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    uint32_t sum = c[l];
    for (int n = 0; n < 32; n += 8) {
      const int x = sa ? static_cast<int8_t>(a[l] >> n) : static_cast<int>(a[l] >> n & 0xff);
      const int y = sb ? static_cast<int8_t>(b[l] >> n) : static_cast<int>(b[l] >> n & 0xff);
      sum += static_cast<uint32_t>(x * y);
    }
    return sum;
  });
  return Status::next;
}

// Carries, one bit a lane: add.cc writes them, addc reads them. The second destination is the carry's unit.
template <typename T, bool subtract, bool use, bool set>
Status with_carry(Warp& w, const Instruction& i, uint32_t lanes) {
  const T *a = w.lanes<T>(i.a), *b = w.lanes<T>(i.b);
  T* d = w.lanes<T>(i.d);
  for (const int l : Lanes(lanes)) {
    const T carry = use ? w.carry >> l & 1 : T{0};
    const unsigned __int128 x = a[l], y = b[l];
    const unsigned __int128 r = subtract ? x - y - carry : x + y + carry;
    if (set) {
      const bool out = static_cast<uint64_t>(r >> (8 * sizeof(T)) & 1);
      w.carry = (w.carry & ~(1u << l)) | static_cast<uint32_t>(out) << l;
    }
    d[l] = static_cast<T>(r);
  }
  return Status::next;
}

template <typename T>
Handler carry_handler(bool subtract, bool use, bool set) {
  if (subtract)
    return use ? set ? with_carry<T, true, true, true> : with_carry<T, true, true, false>
               : with_carry<T, true, false, true>;
  return use ? set ? with_carry<T, false, true, true> : with_carry<T, false, true, false>
             : with_carry<T, false, false, true>;
}

int bytes_of(const std::string& type) { return static_cast<int>(ptx::type_bytes(type)); }

// Two 16-bit integers in a register.
template <template <typename> class M, typename T>
Status pairs(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b);
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    const M<T> f;
    const uint32_t low = lane<T>(f(static_cast<T>(a[l]), static_cast<T>(b[l])));
    return low | lane<T>(f(static_cast<T>(a[l] >> 16), static_cast<T>(b[l] >> 16))) << 16;
  });
  return Status::next;
}

template <template <typename> class M>
bool two(Resolver& r) {
  const std::string t = r.types();
  if (is_floating(t)) return resolve_floating(r);
  if (t == "u16x2") return operands(r, pairs<M, uint16_t>, 1, {4, 4});
  if (t == "s16x2") return operands(r, pairs<M, int16_t>, 1, {4, 4});
  return operands(r, by_integer<M>(t), 1, {bytes_of(t), bytes_of(t)});
}
template <template <typename> class M>
bool one(Resolver& r) {
  const std::string t = r.types();
  if (is_floating(t)) return resolve_floating(r);
  return operands(r, by_integer<M>(t), 1, {bytes_of(t)});
}

bool add_or_sub(Resolver& r) {
  const std::string t = r.types();
  if (is_floating(t)) return resolve_floating(r);
  const bool subtract = r.root()[0] == 's', use = r.root().back() == 'c', set = r.has("cc");
  if (use || set) {
    const Handler run =
        bytes_of(t) == 8 ? carry_handler<uint64_t>(subtract, use, set) : carry_handler<uint32_t>(subtract, use, set);
    return operands(r, run, 1, {bytes_of(t), bytes_of(t)});
  }
  if (r.has("sat"))
    return t == "s32" &&
           operands(r, subtract ? binary<SubSaturated, int32_t, int32_t> : binary<AddSaturated, int32_t, int32_t>, 1,
                    {4, 4});
  return subtract ? two<Sub>(r) : two<Add>(r);
}

bool mul(Resolver& r) {
  const std::string t = r.types();
  if (is_floating(t)) return resolve_floating(r);
  if (r.has("wide")) {
    return bytes_of(t) < 8 && operands(r, by_integer<MulWide>(t), 1, {bytes_of(t), bytes_of(t)});
  }
  if (r.has("hi")) return two<MulHigh>(r);
  return r.has("lo") && two<MulLow>(r);
}
bool mul24(Resolver& r) {
  return r.has("lo") && r.types() == "u32" && operands(r, binary<Mul24, uint32_t, uint32_t>, 1, {4, 4});
}
bool mad(Resolver& r) {
  const std::string t = r.types();
  if (is_floating(t)) return resolve_floating(r);
  const int n = bytes_of(t);
  if (r.has("wide")) return n < 8 && operands(r, by_integer<MadWide>(t), 1, {n, n, 2 * n});
  if (r.has("hi")) return operands(r, by_integer<MadHigh>(t), 1, {n, n, n});
  return r.has("lo") && operands(r, by_integer<MadLow>(t), 1, {n, n, n});
}
bool sad(Resolver& r) {
  const std::string t = r.types();
  const int n = bytes_of(t);
  return operands(r, by_integer<Sad>(t), 1, {n, n, n});
}

// Logic on predicates is logic on masks; what lanes leave out keeps its bits.
template <char op>
Status predicates(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t a = w.predicate(i.a), b = op == '!' ? 0 : w.predicate(i.b);
  const uint32_t r = op == '&' ? a & b : op == '|' ? a | b : op == '^' ? a ^ b : ~a;
  uint32_t& d = w.predicate(i.d);
  d = (d & ~lanes) | (r & lanes);
  return Status::next;
}
template <template <typename> class M, char op>
bool logic(Resolver& r) {
  if constexpr (op == '!') {
    return r.types() == "pred" ? operands(r, predicates<op>, 1, {0}) : one<M>(r);
  } else {
    return r.types() == "pred" ? operands(r, predicates<op>, 1, {0, 0}) : two<M>(r);
  }
}
template <template <typename> class M>
bool shift(Resolver& r) {
  const std::string t = r.types();
  return operands(r, by_integer<M>(t), 1, {bytes_of(t), 4});
}
bool funnel(Resolver& r) {
  const bool left = r.has("l"), wrap = r.has("wrap");
  r.ignore({"r", "clamp"});
  r.types();
  return operands(
      r,
      left   ? wrap ? ternary<Funnel<true, true>, uint32_t, uint32_t> : ternary<Funnel<true, false>, uint32_t, uint32_t>
      : wrap ? ternary<Funnel<false, true>, uint32_t, uint32_t>
             : ternary<Funnel<false, false>, uint32_t, uint32_t>,
      1, {4, 4, 4});
}
template <typename F32bits, typename F64bits>
bool count(Resolver& r) {
  return bytes_of(r.types()) == 8 ? operands(r, unary<F64bits, uint32_t, uint64_t>, 1, {8})
                                  : operands(r, unary<F32bits, uint32_t, uint32_t>, 1, {4});
}
bool brev(Resolver& r) {
  return bytes_of(r.types()) == 8 ? operands(r, unary<Brev<uint64_t>, uint64_t, uint64_t>, 1, {8})
                                  : operands(r, unary<Brev<uint32_t>, uint32_t, uint32_t>, 1, {4});
}
template <bool amount>
Handler bfind_handler(const std::string& t) {
  if (t == "u32") return unary<Bfind<uint32_t, amount>, uint32_t, uint32_t>;
  if (t == "s32") return unary<Bfind<int32_t, amount>, uint32_t, int32_t>;
  if (t == "u64") return unary<Bfind<uint64_t, amount>, uint32_t, uint64_t>;
  if (t == "s64") return unary<Bfind<int64_t, amount>, uint32_t, int64_t>;
  return nullptr;
}
bool bfind(Resolver& r) {
  const std::string t = r.types();
  return operands(r, r.has("shiftamt") ? bfind_handler<true>(t) : bfind_handler<false>(t), 1, {bytes_of(t)});
}
bool bfe(Resolver& r) {
  const std::string t = r.types();
  Handler run = nullptr;
  if (t == "u32") run = ternary<Bfe<uint32_t>, uint32_t, uint32_t>;
  if (t == "s32") run = ternary<Bfe<int32_t>, int32_t, int32_t, uint32_t, uint32_t>;
  if (t == "u64") run = ternary<Bfe<uint64_t>, uint64_t, uint64_t, uint32_t, uint32_t>;
  if (t == "s64") run = ternary<Bfe<int64_t>, int64_t, int64_t, uint32_t, uint32_t>;
  return operands(r, run, 1, {bytes_of(t), 4, 4});
}
bool resolve_bfi(Resolver& r) {
  const int n = bytes_of(r.types());
  if (r.operands() != 5) return false;
  r.i.run = n == 8 ? bfi<uint64_t> : bfi<uint32_t>;
  r.i.d = r.write(0), r.i.a = r.read(1, n), r.i.b = r.read(2, n), r.i.c = r.read(3, 4);
  r.list({r.read(4, 4)});
  return true;
}
bool resolve_lop3(Resolver& r) {
  r.types();
  int64_t table;
  if (r.operands() != 5 || !r.immediate(4, table)) return false;
  r.i.run = lop3;
  r.i.d = r.write(0), r.i.a = r.read(1, 4), r.i.b = r.read(2, 4), r.i.c = r.read(3, 4);
  r.i.mode = static_cast<uint32_t>(table);
  return true;
}
bool resolve_prmt(Resolver& r) {
  static const char* const modes[] = {"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"};
  for (uint32_t n = 0; n < 6; ++n)
    if (r.has(modes[n])) r.i.mode = n + 1;
  r.types();
  return operands(r, prmt, 1, {4, 4, 4});
}
bool resolve_dp4a(Resolver& r) {
  const bool sb = r.types() == "s32", sa = r.types(1) == "s32";
  return operands(r,
                  sa   ? sb ? dp4a<true, true> : dp4a<true, false>
                  : sb ? dp4a<false, true>
                       : dp4a<false, false>,
                  1, {4, 4, 4});
}

}  // namespace

void add_integer(Table& t) {
  t["add"] = t["sub"] = t["addc"] = t["subc"] = add_or_sub;
  t["mul"] = mul;
  t["mul24"] = mul24;
  t["mad"] = mad;
  t["sad"] = sad;
  t["div"] = two<Quotient>;
  t["rem"] = two<Remainder>;
  t["min"] = two<Min>;
  t["max"] = two<Max>;
  t["neg"] = one<Negate>;
  t["abs"] = one<Absolute>;
  t["and"] = logic<And, '&'>;
  t["or"] = logic<Or, '|'>;
  t["xor"] = logic<Xor, '^'>;
  t["not"] = logic<Not, '!'>;
  t["cnot"] = one<LogicalNot>;
  t["shl"] = shift<Shl>;
  t["shr"] = shift<Shr>;
  t["shf"] = funnel;
  t["popc"] = count<Popc32, Popc64>;
  t["clz"] = count<Clz32, Clz64>;
  t["brev"] = brev;
  t["bfind"] = bfind;
  t["bfe"] = bfe;
  t["bfi"] = resolve_bfi;
  t["lop3"] = resolve_lop3;
  t["prmt"] = resolve_prmt;
  t["dp4a"] = resolve_dp4a;
}

}  // namespace moekern::emulator
