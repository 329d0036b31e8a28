// atom and red, and the arithmetic that reducing copies share with them.
#include "access.h"
#include "lanes.h"
#include "reduce.h"

namespace moekern::emulator {
namespace {

enum class Element : uint8_t { b32, s32, u32, b64, s64, u64, f32, f64, f16, bf16, b16 };

struct Atomic {
  Reduction reduction;
  Element element;
  int bytes, elements;  // of an element; of a vector
  bool returns, pair;   // pair: two halves in 32 bits
};

template <typename T>
T integer_result(T old, T value, T compare, Reduction r) {
  switch (r) {
    case Reduction::add:
      return static_cast<T>(static_cast<std::make_unsigned_t<T>>(old) + static_cast<std::make_unsigned_t<T>>(value));
    case Reduction::minimum: return value < old ? value : old;
    case Reduction::maximum: return value > old ? value : old;
    case Reduction::increment:
      return static_cast<std::make_unsigned_t<T>>(old) >= static_cast<std::make_unsigned_t<T>>(value)
                 ? T{0}
                 : static_cast<T>(old + 1);
    case Reduction::decrement:
      return old == 0 || static_cast<std::make_unsigned_t<T>>(old) > static_cast<std::make_unsigned_t<T>>(value)
                 ? value
                 : static_cast<T>(old - 1);
    case Reduction::bit_and: return old & value;
    case Reduction::bit_or: return old | value;
    case Reduction::bit_xor: return old ^ value;
    case Reduction::exchange: return value;
    case Reduction::compare: return old == compare ? value : old;  // value is the new one here
  }
  return old;
}

double floating_result(double old, double value, Reduction r) {
  if (r == Reduction::minimum) return value < old || old != old ? value : old;
  if (r == Reduction::maximum) return value > old || old != old ? value : old;
  return old + value;
}

uint32_t half_pair(uint32_t old, uint32_t value, bool brain, Reduction r, int halves) {
  uint32_t result = 0;
  for (int k = 0; k < halves; ++k) {
    const uint32_t x = old >> (16 * k) & 0xffff, y = value >> (16 * k) & 0xffff;
    const double sum = floating_result(brain ? from_bf16(x) : from_f16(x), brain ? from_bf16(y) : from_f16(y), r);
    result |= encode(sum, brain ? kBf16 : kF16) << (16 * k);
  }
  return result;
}

uint64_t result_of(uint64_t old, uint64_t value, uint64_t compare, const Atomic& a) {
  switch (a.element) {
    case Element::s32:
      return static_cast<uint32_t>(integer_result<int32_t>(static_cast<int32_t>(old), static_cast<int32_t>(value),
                                                           static_cast<int32_t>(compare), a.reduction));
    case Element::b16:
      return integer_result<uint16_t>(static_cast<uint16_t>(old), static_cast<uint16_t>(value),
                                      static_cast<uint16_t>(compare), a.reduction);
    case Element::b32:
    case Element::u32:
      return integer_result<uint32_t>(static_cast<uint32_t>(old), static_cast<uint32_t>(value),
                                      static_cast<uint32_t>(compare), a.reduction);
    case Element::s64:
      return static_cast<uint64_t>(integer_result<int64_t>(static_cast<int64_t>(old), static_cast<int64_t>(value),
                                                           static_cast<int64_t>(compare), a.reduction));
    case Element::b64:
    case Element::u64: return integer_result<uint64_t>(old, value, compare, a.reduction);
    case Element::f32: {
      const float x = as_float(static_cast<uint32_t>(old)), y = as_float(static_cast<uint32_t>(value));
      return canonical(a.reduction == Reduction::add ? x + y : static_cast<float>(floating_result(x, y, a.reduction)));
    }
    case Element::f64: return canonical(floating_result(as_double(old), as_double(value), a.reduction));
    case Element::f16:
      return half_pair(static_cast<uint32_t>(old), static_cast<uint32_t>(value), false, a.reduction, a.pair ? 2 : 1);
    case Element::bf16:
      return half_pair(static_cast<uint32_t>(old), static_cast<uint32_t>(value), true, a.reduction, a.pair ? 2 : 1);
  }
  return old;
}

Status atomic(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto& a = *static_cast<const Atomic*>(i.extra);
  Pointers p;
  resolve_addresses(w, lanes, i.a, i.wide_address, i.offset, i.space, static_cast<uint32_t>(a.bytes * a.elements),
                    Use::update, p);
  const bool compares = a.reduction == Reduction::compare;
  bool changed = false;
  for (const int l : Lanes(lanes))
    for (int k = 0; k < a.elements; ++k) {
      const Unit value_unit = i.list[a.elements + k];
      const auto operand = [&](Unit u) {
        return a.bytes == 8 ? w.lanes<uint64_t>(u)[l] : uint64_t{w.lanes<uint32_t>(u)[l]};
      };
      uint64_t old = 0;
      uint8_t* at = p.at[l] + k * a.bytes;
      std::memcpy(&old, at, static_cast<size_t>(a.bytes));
      const uint64_t first = operand(value_unit);
      const uint64_t r = compares ? result_of(old, operand(i.c), first, a) : result_of(old, first, 0, a);
      changed |= r != old;
      std::memcpy(at, &r, static_cast<size_t>(a.bytes));
      if (a.returns) {
        if (a.bytes == 8) {
          w.lanes<uint64_t>(i.list[k])[l] = old;
        } else {
          w.lanes<uint32_t>(i.list[k])[l] = static_cast<uint32_t>(old);
        }
      }
    }
  w.launch->progress += changed;
  return Status::next;
}

bool resolve_atomic(Resolver& r) {
  Atomic a{};
  a.returns = r.root() == "atom";
  r.ignore({"relaxed", "acquire", "release", "acq_rel", "cta", "cluster", "gpu", "sys", "noftz", "L2::cache_hint",
            "L1::no_allocate"});
  if (r.has("global")) r.i.space = ptx::Space::global;
  if (r.has("shared") || r.has("shared::cta") || r.has("shared::cluster")) r.i.space = ptx::Space::shared;
  const std::string t = r.types();
  if (!reduction_of(r, a.reduction)) return false;
  static const std::map<std::string, Element> elements{
      {"b32", Element::b32}, {"s32", Element::s32},   {"u32", Element::u32},   {"b64", Element::b64},
      {"s64", Element::s64}, {"u64", Element::u64},   {"f32", Element::f32},   {"f64", Element::f64},
      {"f16", Element::f16}, {"bf16", Element::bf16}, {"f16x2", Element::f16}, {"bf16x2", Element::bf16},
      {"b16", Element::b16}};
  const auto found = elements.find(t);
  if (found == elements.end()) return false;
  a.element = found->second;
  a.pair = t == "f16x2" || t == "bf16x2";
  a.bytes = static_cast<int>(ptx::type_bytes(t));
  a.elements = r.has("v2") ? 2 : r.has("v4") ? 4 : r.has("v8") ? 8 : 1;
  size_t n = 0;
  std::vector<Unit> units;
  if (a.returns) {
    units = r.write_vector(r.operand(n++));
    if (units.size() == 1 && r.operand(0).kind == ptx::Operand::sink) a.returns = false;
  } else {
    units.assign(static_cast<size_t>(a.elements), 0);
  }
  r.address(n++);
  const std::vector<Unit> values = r.read_vector(r.operand(n++), a.bytes);
  if (values.size() != static_cast<size_t>(a.elements) || units.size() != values.size()) return false;
  units.insert(units.end(), values.begin(), values.end());
  r.list(units);
  if (a.reduction == Reduction::compare) r.i.c = r.read(n++, a.bytes);
  if (n < r.operands()) r.read(n++, 8);
  r.extra(a);
  r.i.run = atomic;
  return n == r.operands();
}

}  // namespace

bool reduction_of(Resolver& r, Reduction& reduction) {
  static const std::pair<const char*, Reduction> names[] = {
      {"add", Reduction::add},       {"min", Reduction::minimum},   {"max", Reduction::maximum},
      {"inc", Reduction::increment}, {"dec", Reduction::decrement}, {"and", Reduction::bit_and},
      {"or", Reduction::bit_or},     {"xor", Reduction::bit_xor},   {"exch", Reduction::exchange},
      {"cas", Reduction::compare}};
  for (const auto& [name, which] : names)
    if (r.has(name)) return reduction = which, true;
  return false;
}

int tensor_type_of(const std::string& t) {
  static const std::map<std::string, int> types{{"u32", 2}, {"b32", 2}, {"s32", 3}, {"u64", 4}, {"b64", 4},
                                                {"s64", 5}, {"f16", 6}, {"f32", 7}, {"f64", 8}, {"bf16", 9}};
  const auto found = types.find(t);
  return found == types.end() ? -1 : found->second;
}

void reduce_bytes(uint8_t* to, const uint8_t* from, size_t bytes, int type, Reduction reduction) {
  static const std::pair<Element, int> elements[] = {
      {Element::b16, 1}, {Element::b16, 2}, {Element::u32, 4}, {Element::s32, 4}, {Element::u64, 8},
      {Element::s64, 8}, {Element::f16, 2}, {Element::f32, 4}, {Element::f64, 8}, {Element::bf16, 2},
      {Element::f32, 4}, {Element::f32, 4}, {Element::f32, 4}};
  if (type < 0 || elements[type].second < 2) throw Fault("a reduction of elements that have no arithmetic");
  Atomic a{};
  a.reduction = reduction, a.element = elements[type].first, a.bytes = elements[type].second;
  for (size_t n = 0; n < bytes; n += static_cast<size_t>(a.bytes)) {
    uint64_t old = 0, value = 0;
    std::memcpy(&old, to + n, static_cast<size_t>(a.bytes));
    std::memcpy(&value, from + n, static_cast<size_t>(a.bytes));
    const uint64_t r = result_of(old, value, 0, a);
    std::memcpy(to + n, &r, static_cast<size_t>(a.bytes));
  }
}

void add_atomics(Table& t) { t["atom"] = t["red"] = resolve_atomic; }

}  // namespace moekern::emulator
