// Instructions in which lanes of a warp look at one another: shfl, vote, match, redux, elect, activemask, bar.warp.
#include "lanes.h"
#include "meeting.h"

namespace moekern::emulator {

bool met(Warp& w, uint32_t lanes, uint32_t members) {
  if (const uint32_t strangers = lanes & ~members)
    throw Fault("the lane is not in the member mask " + hex(members), __builtin_ctz(strangers));
  const uint32_t missing = members & w.live() & ~lanes;
  if (!missing) return true;
  if (const uint32_t skipped = missing & w.path().lanes)
    throw Fault("the member mask " + hex(members) + " names a lane whose guard keeps it from the instruction",
                __builtin_ctz(skipped));
  return false;
}

namespace {

uint32_t mask_of(Warp& w, Unit unit, uint32_t lanes) { return w.lanes<uint32_t>(unit)[__builtin_ctz(lanes)]; }

void write_predicate(Warp& w, Unit unit, uint32_t lanes, uint32_t r) {
  uint32_t& d = w.predicate(unit);
  d = (d & ~lanes) | (r & lanes);
}

enum : uint32_t { kUp, kDown, kBfly, kIdx };

Status shuffle(Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.list_size && !met(w, lanes, mask_of(w, i.list[0], lanes))) return Status::blocked;
  const uint32_t *a = w.lanes<uint32_t>(i.a), *b = w.lanes<uint32_t>(i.b), *c = w.lanes<uint32_t>(i.c);
  uint32_t result[32], valid = 0;
  for (const int l : Lanes(lanes)) {
    const uint32_t by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const auto lane = static_cast<uint32_t>(l);
    const uint32_t last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int64_t j = 0;
    bool inside = false;
    switch (i.mode) {
      case kUp: j = static_cast<int64_t>(lane) - by, inside = j >= static_cast<int64_t>(last); break;
      case kDown: j = lane + by, inside = j <= last; break;
      case kBfly: j = lane ^ by, inside = j <= last; break;
      default: j = first | (by & ~segment), inside = j <= last;
    }
    if (!inside) j = lane;
    if (!(lanes >> j & 1))
      throw Fault("shfl reads lane " + std::to_string(j) + ", which does not take part: the value is undefined", l);
    result[l] = a[j];
    valid |= static_cast<uint32_t>(inside) << l;
  }
  each(lanes, w.lanes<uint32_t>(i.d), [&](int l) { return result[l]; });
  if (i.d2) write_predicate(w, i.d2, lanes, valid);
  return Status::next;
}

bool shfl(Resolver& r) {
  r.types();
  const bool sync = r.has("sync");
  r.i.mode = r.has("up") ? kUp : r.has("down") ? kDown : r.has("bfly") ? kBfly : kIdx;
  r.ignore({"idx"});
  if (r.operands() != (sync ? 5u : 4u)) return false;
  r.i.run = shuffle;
  r.i.d = r.write(0);
  r.i.d2 = r.write_second(r.operand(0));
  r.i.a = r.read(1, 4), r.i.b = r.read(2, 4), r.i.c = r.read(3, 4);
  if (sync) r.list({r.read(4, 4)});
  return true;
}

enum : uint32_t { kAll, kAny, kUniform, kBallot, kNegated = 8 };

Status vote(Warp& w, const Instruction& i, uint32_t lanes) {
  if (i.list_size && !met(w, lanes, mask_of(w, i.list[0], lanes))) return Status::blocked;
  const uint32_t p = (w.predicate(i.a) ^ (i.mode & kNegated ? ~0u : 0)) & lanes;
  switch (i.mode & 7) {
    case kAll: write_predicate(w, i.d, lanes, p == lanes ? ~0u : 0); break;
    case kAny: write_predicate(w, i.d, lanes, p ? ~0u : 0); break;
    case kUniform: write_predicate(w, i.d, lanes, p == 0 || p == lanes ? ~0u : 0); break;
    default: each(lanes, w.lanes<uint32_t>(i.d), [=](int) { return p; });
  }
  return Status::next;
}
bool resolve_vote(Resolver& r) {
  r.types();
  const bool sync = r.has("sync");
  r.i.mode = r.has("all") ? kAll : r.has("any") ? kAny : r.has("uni") ? kUniform : kBallot;
  r.ignore({"ballot"});
  if (r.operands() != (sync ? 3u : 2u)) return false;
  if (r.operand(1).negated) r.i.mode |= kNegated;
  r.i.run = vote;
  r.i.d = r.write(0), r.i.a = r.read(1, 0);
  if (sync) r.list({r.read(2, 4)});
  return true;
}

template <typename L, bool all>
Status match(Warp& w, const Instruction& i, uint32_t lanes) {
  if (!met(w, lanes, mask_of(w, i.b, lanes))) return Status::blocked;
  const L* a = w.lanes<L>(i.a);
  uint32_t result[32];
  bool same = true;
  for (const int l : Lanes(lanes)) {
    result[l] = 0;
    for (const int k : Lanes(lanes)) result[l] |= static_cast<uint32_t>(a[k] == a[l]) << k;
    same &= result[l] == lanes;
  }
  if (all)
    for (const int l : Lanes(lanes)) result[l] = same ? lanes : 0;
  each(lanes, w.lanes<uint32_t>(i.d), [&](int l) { return result[l]; });
  if (all && i.d2) write_predicate(w, i.d2, lanes, same ? ~0u : 0);
  return Status::next;
}
bool resolve_match(Resolver& r) {
  const int bytes = static_cast<int>(ptx::type_bytes(r.types()));
  const bool all = r.has("all");
  r.ignore({"any", "sync"});
  r.i.d2 = r.write_second(r.operand(0));
  return operands(r,
                  bytes == 8 ? all ? match<uint64_t, true> : match<uint64_t, false>
                  : all      ? match<uint32_t, true>
                             : match<uint32_t, false>,
                  1, {bytes, 4});
}

enum Reducing : uint32_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kSigned = 8, kFloat = 16, kMagnitude = 32, kNan = 64 };

Status reduce(Warp& w, const Instruction& i, uint32_t lanes) {
  if (!met(w, lanes, mask_of(w, i.b, lanes))) return Status::blocked;
  const uint32_t* a = w.lanes<uint32_t>(i.a);
  const bool is_signed = i.mode & kSigned;
  uint32_t r = 0;
  bool first = true;
  for (const int l : Lanes(lanes)) {
    uint32_t x = a[l];
    if (i.mode & kMagnitude) x &= 0x7fffffff;
    if (first) {
      r = x, first = false;
      continue;
    }
    const bool less = i.mode & kFloat ? as_float(x) < as_float(r)
                      : is_signed     ? static_cast<int32_t>(x) < static_cast<int32_t>(r)
                                      : x < r;
    const bool replace_nan =
        i.mode & kFloat && (i.mode & kNan ? as_float(x) != as_float(x) : as_float(r) != as_float(r));
    const bool keep_nan = i.mode & kFloat && (i.mode & kNan ? as_float(r) != as_float(r) : as_float(x) != as_float(x));
    switch (i.mode & 7) {
      case kAdd: r += x; break;
      case kMin: r = keep_nan ? r : less || replace_nan ? x : r; break;
      case kMax: r = keep_nan ? r : (!less && x != r) || replace_nan ? x : r; break;
      case kAnd: r &= x; break;
      case kOr: r |= x; break;
      default: r ^= x;
    }
  }
  each(lanes, w.lanes<uint32_t>(i.d), [=](int) { return r; });
  return Status::next;
}
bool redux(Resolver& r) {
  const std::string t = r.types();
  r.i.mode = r.has("add")   ? kAdd
             : r.has("min") ? kMin
             : r.has("max") ? kMax
             : r.has("and") ? kAnd
             : r.has("or")  ? kOr
                            : kXor;
  if (t == "s32") r.i.mode |= kSigned;
  if (t == "f32") r.i.mode |= kFloat | (r.has("abs") ? kMagnitude : 0u) | (r.has("NaN") ? kNan : 0u);
  r.ignore({"xor", "sync"});
  return operands(r, reduce, 1, {4, 4});
}

Status elect(Warp& w, const Instruction& i, uint32_t lanes) {
  if (!met(w, lanes, mask_of(w, i.a, lanes))) return Status::blocked;
  const auto leader = static_cast<uint32_t>(__builtin_ctz(lanes));
  if (i.d) each(lanes, w.lanes<uint32_t>(i.d), [=](int) { return leader; });
  write_predicate(w, i.d2, lanes, 1u << leader);
  return Status::next;
}
bool resolve_elect(Resolver& r) {
  r.ignore({"sync"});
  if (r.operands() != 2) return false;
  r.i.run = elect;
  r.i.d = r.write(0);
  r.i.d2 = r.write_second(r.operand(0));
  r.i.a = r.read(1, 4);
  return true;
}

Status active(Warp& w, const Instruction& i, uint32_t lanes) {
  each(lanes, w.lanes<uint32_t>(i.d), [=](int) { return lanes; });
  return Status::next;
}
bool activemask(Resolver& r) {
  r.types();
  r.i.run = active;
  r.i.d = r.write(0);
  return r.operands() == 1;
}

}  // namespace

// Lanes of different paths may meet at different bar.warp.sync: all of the mask have to stand at one of them.
Status meet_warp(Warp& w, const Instruction& i, uint32_t lanes) {
  const uint32_t members = mask_of(w, i.a, lanes);
  if (const uint32_t strangers = lanes & ~members)
    throw Fault("the lane is not in the member mask " + hex(members), __builtin_ctz(strangers));
  Path& path = w.path();
  if (path.stage == 2) {  // others came and took us along
    path.stage = 0;
    return Status::next;
  }
  uint32_t here = lanes;
  for (const Path& other : w.paths)
    if (&other != &path && other.stage == 1 && w.code[other.pc].run == meet_warp) here |= other.lanes;
  if (members & w.live() & ~here) {
    path.stage = 1;
    return Status::blocked;
  }
  for (Path& other : w.paths)
    if (&other != &path && other.stage == 1 && w.code[other.pc].run == meet_warp) other.stage = 2;
  path.stage = 0;
  return Status::next;
}

void add_warp_wide(Table& t) {
  t["shfl"] = shfl;
  t["vote"] = resolve_vote;
  t["match"] = resolve_match;
  t["redux"] = redux;
  t["elect"] = resolve_elect;
  t["activemask"] = activemask;
}

}  // namespace moekern::emulator
