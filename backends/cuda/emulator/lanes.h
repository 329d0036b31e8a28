// Handlers for instructions that treat every lane alike, made of a function of one lane's values.
#pragma once
#include <type_traits>

#include "formats.h"
#include "program.h"

// A function that is compiled for AVX with FMA as well, and chosen at run time.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__SANITIZE_ADDRESS__)
#define MOEKERN_CLONES __attribute__((target_clones("fma", "default")))
#else
#define MOEKERN_CLONES
#endif

namespace moekern::emulator {

// What a register's lane holds: 32 bits, or 64.
template <typename T>
using Lane = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;

template <typename T>
inline T value(Lane<T> lane) {
  if constexpr (std::is_same_v<T, float>) {
    return as_float(lane);
  } else if constexpr (std::is_same_v<T, double>) {
    return as_double(lane);
  } else {
    return static_cast<T>(lane);
  }
}

template <typename T>
inline Lane<T> lane(T v) {
  if constexpr (std::is_floating_point_v<T>) {
    return as_bits(v);
  } else {
    return static_cast<Lane<T>>(static_cast<std::make_unsigned_t<T>>(v));
  }
}

template <typename F, typename R, typename A>
Status unary(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto* a = w.lanes<Lane<A>>(i.a);
  each(lanes, w.lanes<Lane<R>>(i.d), [=](int l) { return lane<R>(F()(value<A>(a[l]))); });
  return Status::next;
}

template <typename F, typename R, typename A, typename B = A>
Status binary(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto* a = w.lanes<Lane<A>>(i.a);
  const auto* b = w.lanes<Lane<B>>(i.b);
  each(lanes, w.lanes<Lane<R>>(i.d), [=](int l) { return lane<R>(F()(value<A>(a[l]), value<B>(b[l]))); });
  return Status::next;
}

template <typename F, typename R, typename A, typename B = A, typename C = A>
Status ternary(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto* a = w.lanes<Lane<A>>(i.a);
  const auto* b = w.lanes<Lane<B>>(i.b);
  const auto* c = w.lanes<Lane<C>>(i.c);
  each(lanes, w.lanes<Lane<R>>(i.d),
       [=](int l) { return lane<R>(F()(value<A>(a[l]), value<B>(b[l]), value<C>(c[l]))); });
  return Status::next;
}

// The handler for an integer type, .b16 and so on being unsigned. M<T>::run is the handler.
template <template <typename> class M>
Handler by_integer(const std::string& type) {
  if (type == "u16" || type == "b16") return M<uint16_t>::run;
  if (type == "s16") return M<int16_t>::run;
  if (type == "u32" || type == "b32") return M<uint32_t>::run;
  if (type == "s32") return M<int32_t>::run;
  if (type == "u64" || type == "b64") return M<uint64_t>::run;
  if (type == "s64") return M<int64_t>::run;
  return nullptr;
}

inline bool is_floating(const std::string& type) {
  return type == "f32" || type == "f64" || type == "f16" || type == "f16x2" || type == "bf16" || type == "bf16x2";
}

bool resolve_floating(Resolver& r);  // add, sub, mul, ... of a floating point type

// i.d, i.a, i.b, i.c from the first operands.
inline bool operands(Resolver& r, Handler run, int d_operands, std::initializer_list<int> bytes) {
  if (!run || r.operands() != bytes.size() + static_cast<size_t>(d_operands)) return false;
  r.i.run = run;
  size_t n = 0;
  if (d_operands) r.i.d = r.write(n++);
  Unit* const to[] = {&r.i.a, &r.i.b, &r.i.c};
  int k = 0;
  for (const int width : bytes) *to[k++] = r.read(n++, width);
  return true;
}

}  // namespace moekern::emulator
