// Four vectors as one, operation by operation: a long chain of dependent operations leaves most of a core's
// throughput unused, and out-of-order execution does not reach as far as the next elements' chain.
#pragma once

// Included after one simd/*.h: everything here is per ISA.

namespace moekern::cpu {
namespace {

struct F32s {
  F32 v[4];
  F32s() = default;
  F32s(F32 x) : v{x, x, x, x} {}  // a constant
};
struct I32s {
  I32 v[4];
  I32s() = default;
  I32s(I32 x) : v{x, x, x, x} {}
};

template <class R, class Op, class... Args>
inline R each(const Op& op, const Args&... args) {
  R r;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) r.v[i] = op(args.v[i]...);
  return r;
}

inline F32s mul(const F32s& a, const F32s& b) {
  return each<F32s>([](F32 x, F32 y) { return mul(x, y); }, a, b);
}
inline F32s add(const F32s& a, const F32s& b) {
  return each<F32s>([](F32 x, F32 y) { return add(x, y); }, a, b);
}
inline F32s sub(const F32s& a, const F32s& b) {
  return each<F32s>([](F32 x, F32 y) { return sub(x, y); }, a, b);
}
inline F32s div(const F32s& a, const F32s& b) {
  return each<F32s>([](F32 x, F32 y) { return div(x, y); }, a, b);
}
inline F32s max(const F32s& a, const F32s& b) {
  return each<F32s>([](F32 x, F32 y) { return max(x, y); }, a, b);
}
inline F32s min(const F32s& a, const F32s& b) {
  return each<F32s>([](F32 x, F32 y) { return min(x, y); }, a, b);
}
inline F32s fma(const F32s& a, const F32s& b, const F32s& c) {
  return each<F32s>([](F32 x, F32 y, F32 z) { return fma(x, y, z); }, a, b, c);
}
inline I32s bits(const F32s& a) {
  return each<I32s>([](F32 x) { return bits(x); }, a);
}
inline F32s as_f32(const I32s& a) {
  return each<F32s>([](I32 x) { return as_f32(x); }, a);
}
inline I32s bit_and(const I32s& a, const I32s& b) {
  return each<I32s>([](I32 x, I32 y) { return bit_and(x, y); }, a, b);
}
inline I32s add_i32(const I32s& a, const I32s& b) {
  return each<I32s>([](I32 x, I32 y) { return add_i32(x, y); }, a, b);
}
template <int S> inline I32s shl32(const I32s& a) {
  return each<I32s>([](I32 x) { return shl32<S>(x); }, a);
}

}  // namespace
}  // namespace moekern::cpu
