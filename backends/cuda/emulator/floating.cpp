// Floating point arithmetic. Results are rounded once, as PTX says; what it calls approximate is computed in double and
// rounded to nearest, which is nearer than any hardware comes. NaN is the canonical one.
#include <cfenv>

#include "lanes.h"

namespace moekern::emulator {
namespace {

// A handler's modes.
enum : uint32_t { kFlush = 1, kSaturate = 2, kNanWins = 4, kXorSign = 8, kAbs = 16, kRelu = 32 };

float clamp01(float x) { return x > 0 ? (x < 1 ? x : 1.f) : 0.f; }  // NaN becomes 0

struct Round {  // PTX's rounding mode for the length of a handler
  explicit Round(Rounding r) : before(std::fegetround()), changed(r != Rounding::nearest) {
    if (changed) std::fesetround(r == Rounding::zero ? FE_TOWARDZERO : r == Rounding::down ? FE_DOWNWARD : FE_UPWARD);
  }
  ~Round() {
    if (changed) std::fesetround(before);
  }
  int before;
  bool changed;
};

MOEKERN_CLONES void fused(uint32_t lanes, const uint32_t* a, const uint32_t* b, const uint32_t* c, uint32_t* d) {
  each(lanes, d, [=](int l) { return canonical(__builtin_fmaf(as_float(a[l]), as_float(b[l]), as_float(c[l]))); });
}

Status fma32(Warp& w, const Instruction& i, uint32_t lanes) {
  fused(lanes, w.lanes<uint32_t>(i.a), w.lanes<uint32_t>(i.b), w.lanes<uint32_t>(i.c), w.lanes<uint32_t>(i.d));
  return Status::next;
}

// Anything on f32: flushing, saturating, and other rounding modes than to nearest.
template <typename F, int arity>
Status general32(Warp& w, const Instruction& i, uint32_t lanes) {
  const bool ftz = i.mode & kFlush, saturate = i.mode & kSaturate;
  const auto rounding = static_cast<Rounding>(i.mode >> 8);
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(arity > 1 ? i.b : i.a),
                 *c = w.lanes<uint32_t>(arity > 2 ? i.c : i.a);
  const auto in = [ftz](uint32_t bits) { return ftz ? flush(as_float(bits)) : as_float(bits); };
  const Round round(rounding);
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    volatile float x = in(a[l]), y = in(b[l]), z = in(c[l]);  // volatile: nothing moves across the change of rounding
    float r = F()(static_cast<float>(x), static_cast<float>(y), static_cast<float>(z));
    if (ftz) r = flush(r);
    if (saturate) r = clamp01(r);
    return canonical(r);
  });
  return Status::next;
}

template <typename F>
Status quick32(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b);
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) { return canonical(F()(as_float(a[l]), as_float(b[l]), 0.f)); });
  return Status::next;
}

template <typename F, int arity>
Status general64(Warp& w, const Instruction& i, uint32_t lanes) {
  const Round round(static_cast<Rounding>(i.mode >> 8));
  const uint64_t *a = w.lanes<uint64_t>(i.a), *b = w.lanes<uint64_t>(arity > 1 ? i.b : i.a),
                 *c = w.lanes<uint64_t>(arity > 2 ? i.c : i.a);
  each(lanes, w.lanes<uint64_t>(i.d), [=](int l) {
    volatile double x = as_double(a[l]), y = as_double(b[l]), z = as_double(c[l]);
    return canonical(F()(static_cast<double>(x), static_cast<double>(y), static_cast<double>(z)));
  });
  return Status::next;
}

struct Plus {
  template <typename T> T operator()(T a, T b, T) const { return a + b; }
};
struct Minus {
  template <typename T> T operator()(T a, T b, T) const { return a - b; }
};
struct Times {
  template <typename T> T operator()(T a, T b, T) const { return a * b; }
};
struct Over {
  template <typename T> T operator()(T a, T b, T) const { return a / b; }
};
struct Fma {
  template <typename T> T operator()(T a, T b, T c) const { return std::fma(a, b, c); }
};
struct Reciprocal {
  template <typename T> T operator()(T a, T, T) const { return T{1} / a; }
};
struct Root {
  template <typename T> T operator()(T a, T, T) const { return std::sqrt(a); }
};
struct InverseRoot {
  template <typename T> T operator()(T a, T, T) const { return static_cast<T>(1 / std::sqrt(static_cast<double>(a))); }
};
#define MOEKERN_APPROXIMATE(NAME, EXPRESSION)  \
  struct NAME {                                \
    template <typename T>                      \
    T operator()(T a, T, T) const {            \
      const double x = static_cast<double>(a); \
      return static_cast<T>(EXPRESSION);       \
    }                                          \
  };
MOEKERN_APPROXIMATE(Exp2, std::exp2(x))
MOEKERN_APPROXIMATE(Log2, std::log2(x))
MOEKERN_APPROXIMATE(Sine, std::sin(x))
MOEKERN_APPROXIMATE(Cosine, std::cos(x))
MOEKERN_APPROXIMATE(Tanh, std::tanh(x))

// Bits of signs: NaN keeps its payload.
template <typename L, L sign, bool absolute>
Status signs(Warp& w, const Instruction& i, uint32_t lanes) {
  const L* a = w.lanes<L>(i.a);
  const bool ftz = i.mode & kFlush;
  each(lanes, w.lanes<L>(i.d), [=](int l) -> L {
    L x = a[l];
    if (sizeof(L) == 4 && ftz && (x & 0x7f800000) == 0) x &= static_cast<L>(0x80000000);
    return absolute ? x & ~sign : x ^ sign;
  });
  return Status::next;
}

template <typename T>
T smaller(T a, T b, bool maximum, uint32_t mode) {
  if (a != a || b != b) {
    if (mode & kNanWins || (a != a && b != b)) return static_cast<T>(std::nan(""));
    return a != a ? b : a;
  }
  if (a == b) return maximum == std::signbit(a) ? b : a;  // -0 < +0
  return (a < b) != maximum ? a : b;
}

template <typename T>
T chosen(T a, T b, bool maximum, uint32_t mode) {
  const bool sign = std::signbit(a) != std::signbit(b);
  if (mode & kXorSign) a = std::fabs(a), b = std::fabs(b);
  T r = smaller(a, b, maximum, mode);
  if (mode & kXorSign) r = std::copysign(r, sign ? T{-1} : T{1});
  return r;
}

template <bool maximum>
Status extremum32(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b);
  const uint32_t mode = i.mode;
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    float x = as_float(a[l]), y = as_float(b[l]);
    if (mode & kFlush) x = flush(x), y = flush(y);
    return canonical(chosen(x, y, maximum, mode));
  });
  return Status::next;
}

template <bool maximum>
Status three_extremum32(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b), *c = w.lanes<uint32_t>(i.c);
  const uint32_t mode = i.mode;
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    return canonical(chosen(chosen(as_float(a[l]), as_float(b[l]), maximum, mode), as_float(c[l]), maximum, mode));
  });
  return Status::next;
}

template <bool maximum>
Status extremum64(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint64_t *a = w.lanes<uint64_t>(i.a), *b = w.lanes<uint64_t>(i.b);
  each(lanes, w.lanes<uint64_t>(i.d),
       [=](int l) { return canonical(chosen(as_double(a[l]), as_double(b[l]), maximum, 0)); });
  return Status::next;
}

// f16 and bf16, one or two in a lane. Sums, products and quotients of two have an exact enough detour through f32 (24
// bits are at least twice 11 and two more), a fused product and sum through a double rounded to odd.
template <bool brain>
struct Half {
  static float in(uint32_t bits, bool ftz) {
    const float f = brain ? from_bf16(bits) : from_f16(bits);
    return ftz && std::fabs(f) < (brain ? 0x1p-126f : 0x1p-14f) ? std::copysign(0.f, f) : f;
  }
  static uint32_t out(double d) {
    if (d != d) return 0x7fff;
    return encode(d, brain ? kBf16 : kF16);
  }
};

enum class HalfOp : uint8_t { add, sub, mul, fma, minimum, maximum, neg, abs, ex2, tanh };

template <bool brain, HalfOp op>
uint32_t half_result(uint32_t a, uint32_t b, uint32_t c, uint32_t mode) {
  using H = Half<brain>;
  if (op == HalfOp::neg) return a ^ 0x8000;
  if (op == HalfOp::abs) return a & 0x7fff;
  const bool ftz = mode & kFlush;
  const float x = H::in(a, ftz), y = H::in(b, ftz);
  double r = 0;
  if (op == HalfOp::add) r = x + y;
  if (op == HalfOp::sub) r = x - y;
  if (op == HalfOp::mul) r = x * y;
  if (op == HalfOp::fma) r = fma_to_odd(x, y, H::in(c, ftz));
  if (op == HalfOp::minimum) r = chosen(x, y, false, mode);
  if (op == HalfOp::maximum) r = chosen(x, y, true, mode);
  if (op == HalfOp::ex2) r = std::exp2(static_cast<double>(x));
  if (op == HalfOp::tanh) r = std::tanh(static_cast<double>(x));
  if (mode & kSaturate) r = clamp01(static_cast<float>(r));
  if (mode & kRelu) r = r > 0 ? r : r != r ? r : 0;
  uint32_t bits = H::out(r);
  if (ftz && !(bits & (brain ? 0x7f80 : 0x7c00))) bits &= 0x8000;
  return bits;
}

template <bool brain, HalfOp op, bool two>
Status halves(Warp& w, const Instruction& i, uint32_t lanes) {
  constexpr int arity = op == HalfOp::fma ? 3 : op >= HalfOp::neg ? 1 : 2;
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(arity > 1 ? i.b : i.a),
                 *c = w.lanes<uint32_t>(arity > 2 ? i.c : i.a);
  const uint32_t mode = i.mode;
  each(lanes, w.lanes<uint32_t>(i.d), [=](int l) {
    const uint32_t low = half_result<brain, op>(a[l] & 0xffff, b[l] & 0xffff, c[l] & 0xffff, mode);
    if (!two) return low;
    return low | half_result<brain, op>(a[l] >> 16, b[l] >> 16, c[l] >> 16, mode) << 16;
  });
  return Status::next;
}

template <HalfOp op>
Handler half_handler(const std::string& type) {
  if (type == "f16") return halves<false, op, false>;
  if (type == "f16x2") return halves<false, op, true>;
  if (type == "bf16") return halves<true, op, false>;
  if (type == "bf16x2") return halves<true, op, true>;
  return nullptr;
}

Handler half_handler(const std::string& root, const std::string& type) {
  if (root == "add") return half_handler<HalfOp::add>(type);
  if (root == "sub") return half_handler<HalfOp::sub>(type);
  if (root == "mul") return half_handler<HalfOp::mul>(type);
  if (root == "fma") return half_handler<HalfOp::fma>(type);
  if (root == "min") return half_handler<HalfOp::minimum>(type);
  if (root == "max") return half_handler<HalfOp::maximum>(type);
  if (root == "neg") return half_handler<HalfOp::neg>(type);
  if (root == "abs") return half_handler<HalfOp::abs>(type);
  if (root == "ex2") return half_handler<HalfOp::ex2>(type);
  if (root == "tanh") return half_handler<HalfOp::tanh>(type);
  return nullptr;
}

uint32_t mode_of(Resolver& r) {
  uint32_t mode = 0;
  if (r.has("ftz")) mode |= kFlush;
  if (r.has("sat")) mode |= kSaturate;
  if (r.has("NaN")) mode |= kNanWins;
  if (r.has("relu")) mode |= kRelu;
  if (r.has("xorsign")) mode |= r.has("abs") ? kXorSign : 0u;
  Rounding rounding = Rounding::nearest;
  if (r.has("rz")) rounding = Rounding::zero;
  if (r.has("rm")) rounding = Rounding::down;
  if (r.has("rp")) rounding = Rounding::up;
  r.ignore({"rn", "approx", "full"});
  return mode | static_cast<uint32_t>(rounding) << 8;
}

template <typename F>
Handler general(const std::string& type, int arity) {
  if (type == "f32") return arity == 1 ? general32<F, 1> : arity == 2 ? general32<F, 2> : general32<F, 3>;
  if (type == "f64") return arity == 1 ? general64<F, 1> : arity == 2 ? general64<F, 2> : general64<F, 3>;
  return nullptr;
}

// mul.f32 and so on; a mode of 0 has the quick ones.
Handler handler(const std::string& root, const std::string& type, uint32_t mode) {
  const bool f32 = type == "f32";
  if (root == "add") return f32 && !mode ? quick32<Plus> : general<Plus>(type, 2);
  if (root == "sub") return f32 && !mode ? quick32<Minus> : general<Minus>(type, 2);
  if (root == "mul") return f32 && !mode ? quick32<Times> : general<Times>(type, 2);
  if (root == "fma" || root == "mad") return f32 && !mode ? fma32 : general<Fma>(type, 3);
  if (root == "div") return general<Over>(type, 2);
  if (root == "rcp") return general<Reciprocal>(type, 1);
  if (root == "sqrt") return general<Root>(type, 1);
  if (root == "rsqrt") return general<InverseRoot>(type, 1);
  if (root == "ex2") return general<Exp2>(type, 1);
  if (root == "lg2") return general<Log2>(type, 1);
  if (root == "sin") return general<Sine>(type, 1);
  if (root == "cos") return general<Cosine>(type, 1);
  if (root == "tanh") return general<Tanh>(type, 1);
  if (root == "neg") return f32 ? signs<uint32_t, 1u << 31, false> : signs<uint64_t, 1ull << 63, false>;
  if (root == "abs") return f32 ? signs<uint32_t, 1u << 31, true> : signs<uint64_t, 1ull << 63, true>;
  if (root == "min") return f32 ? extremum32<false> : extremum64<false>;
  if (root == "max") return f32 ? extremum32<true> : extremum64<true>;
  return nullptr;
}

struct TestNan {
  bool operator()(double x) const { return x != x; }
};
struct TestNumber {
  bool operator()(double x) const { return x == x; }
};
struct TestFinite {
  bool operator()(double x) const { return std::isfinite(x); }
};
struct TestInfinite {
  bool operator()(double x) const { return std::isinf(x); }
};

template <typename F, bool wide>
Status test(Warp& w, const Instruction& i, uint32_t lanes) {
  uint32_t r = 0;
  for (const int l : Lanes(lanes)) {
    const double x = wide ? as_double(w.lanes<uint64_t>(i.a)[l]) : as_float(w.lanes<uint32_t>(i.a)[l]);
    r |= static_cast<uint32_t>(F()(x)) << l;
  }
  uint32_t& d = w.predicate(i.d);
  d = (d & ~lanes) | r;
  return Status::next;
}

bool testp(Resolver& r) {
  const bool wide = r.types() == "f64";
  Handler run = nullptr;
  if (r.has("notanumber")) run = wide ? test<TestNan, true> : test<TestNan, false>;
  if (r.has("number")) run = wide ? test<TestNumber, true> : test<TestNumber, false>;
  if (r.has("finite")) run = wide ? test<TestFinite, true> : test<TestFinite, false>;
  if (r.has("infinite")) run = wide ? test<TestInfinite, true> : test<TestInfinite, false>;
  return operands(r, run, 1, {wide ? 8 : 4});
}

template <typename L, int sign>
Status copy_sign(Warp& w, const Instruction& i, uint32_t lanes) {
  const L *a = w.lanes<L>(i.a), *b = w.lanes<L>(i.b);
  constexpr L kSign = L{1} << sign;
  each(lanes, w.lanes<L>(i.d), [=](int l) { return (a[l] & kSign) | (b[l] & ~kSign); });
  return Status::next;
}
bool copysign(Resolver& r) {
  return r.types() == "f64" ? operands(r, copy_sign<uint64_t, 63>, 1, {8, 8})
                            : operands(r, copy_sign<uint32_t, 31>, 1, {4, 4});
}

}  // namespace

bool resolve_floating(Resolver& r) {
  const std::string type = r.types();
  const int n = static_cast<int>(ptx::type_bytes(type));
  r.i.mode = mode_of(r);
  if (n == 2 || type == "f16x2" || type == "bf16x2") {
    if (r.i.mode >> 8) return false;
    Handler run = half_handler(r.root(), type);
    if (r.operands() == 2) return operands(r, run, 1, {n});
    if (r.operands() == 3) return operands(r, run, 1, {n, n});
    return operands(r, run, 1, {n, n, n});
  }
  const Handler run = handler(r.root(), type, r.i.mode);
  if (r.operands() == 2) return operands(r, run, 1, {n});
  if (r.operands() == 3) return operands(r, run, 1, {n, n});
  if (type == "f32" && r.root() == "min") return operands(r, three_extremum32<false>, 1, {n, n, n});
  if (type == "f32" && r.root() == "max") return operands(r, three_extremum32<true>, 1, {n, n, n});
  return operands(r, run, 1, {n, n, n});
}

void add_floating(Table& t) {
  for (const char* root : {"fma", "rcp", "sqrt", "rsqrt", "ex2", "lg2", "sin", "cos", "tanh"})
    t[root] = resolve_floating;
  t["testp"] = testp;
  t["copysign"] = copysign;
}

}  // namespace moekern::emulator
