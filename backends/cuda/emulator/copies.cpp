// Asynchronous copies: cp.async, cp.async.bulk, cp.async.bulk.tensor and their reductions. They land later, when the
// schedule says; until then the destination in shared memory holds NaN and counts as never written.
#include <algorithm>
#include <array>

#include "access.h"
#include "lanes.h"
#include "mbarriers.h"
#include "reduce.h"
#include "tensor_map.h"

namespace moekern::emulator {
namespace {

using Groups = Warp::Groups;

void start(Groups& g, int operations = 1) {
  if (g.left.empty() || g.left.back().first != g.open) g.left.emplace_back(g.open, 0);
  g.left.back().second += operations;
}
void finish(Groups& g, uint64_t group, Launch& launch) {
  for (auto it = g.left.begin(); it != g.left.end(); ++it)
    if (it->first == group) {
      if (--it->second == 0) g.left.erase(it);
      break;
    }
  ++launch.progress;
}
// All but the last n groups that were committed are complete.
bool all_but(const Groups& g, uint64_t n) {
  for (const auto& [group, left] : g.left)
    if (group + n < g.open) return false;
  return true;
}
// Up to which group all is complete: what a wait for all but n lets its thread see.
uint64_t complete_up_to(const Groups& g, uint64_t n) { return g.open - 1 > n ? g.open - 1 - n : 0; }

void poison(Cta& cta, uint32_t offset, uint32_t bytes) {
  if (cta.launch->settings.poison) std::memset(cta.shared.data() + (offset - kSharedBase), 0xff, bytes);
  std::memset(cta.valid.data() + (offset - kSharedBase), kUnwritten, bytes);
}
void check_barriers(Cta& cta, uint32_t offset, uint32_t bytes, int lane) {
  for (const auto& [at, b] : cta.mbarriers)
    if (at + 8 > offset && at < offset + bytes)
      throw Fault("the copy's destination, " + std::to_string(bytes) + " bytes at " + hex(offset) +
                      " of shared memory, covers the mbarrier at " + hex(at),
                  lane);
}
void put(Cta& cta, uint32_t offset, const uint8_t* from, uint32_t bytes) {
  std::memcpy(cta.shared.data() + (offset - kSharedBase), from, bytes);
  std::memset(cta.valid.data() + (offset - kSharedBase), kWritten, bytes);
}

const uint8_t* readable(Launch& launch, uint64_t address, uint64_t bytes, int lane, const char* what) {
  if (!launch.regions->find(address, bytes))
    throw Fault("out of bounds: " + std::string(what) + " reads " + std::to_string(bytes) + " bytes at " +
                    hex(address) + ", " + launch.regions->nearest(address),
                lane);
  return reinterpret_cast<const uint8_t*>(address);
}
uint8_t* writable(Launch& launch, uint64_t address, uint64_t bytes, int lane, const char* what) {
  const Region* r = launch.regions->find(address, bytes);
  if (!r)
    throw Fault("out of bounds: " + std::string(what) + " writes " + std::to_string(bytes) + " bytes at " +
                    hex(address) + ", " + launch.regions->nearest(address),
                lane);
  if (!r->writable)
    throw Fault("write to read-only memory: " + std::to_string(bytes) + " bytes at " + hex(address), lane);
  return reinterpret_cast<uint8_t*>(address);
}

// ---- cp.async: 4, 8 or 16 bytes a lane ------------------------------------------------------------------------------

struct Piece {
  Cta* cta;
  uint32_t offset;
  uint64_t source;
  uint32_t bytes, copied;
};

Status copy_async(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto bytes = static_cast<uint32_t>(i.mode & 31);
  std::vector<Piece> pieces;
  const uint64_t token = ++w.copies_issued;
  for (const int l : Lanes(lanes)) {
    const uint32_t to = shared_address(lane_address(w, i.a, i.wide_address, i.offset, l), l);
    const auto& source = *static_cast<const std::array<int64_t, 3>*>(i.extra);
    const uint64_t from = lane_address(w, static_cast<Unit>(source[0]), source[2] != 0, source[1], l);
    uint32_t copied = bytes;
    if (i.mode & 32) copied = w.lanes<uint32_t>(i.b)[l];
    if (i.mode & 64) copied = (w.predicate(i.b) ^ (i.mode & 128 ? ~0u : 0)) >> l & 1 ? 0 : bytes;
    if (copied > bytes)
      throw Fault("cp.async of " + std::to_string(bytes) + " bytes has " + std::to_string(copied) + " of source", l);
    Cta& cta = shared_cta(w, to, l);
    shared_bytes(cta, to, bytes, bytes, l, "cp.async");
    if (from % bytes)
      throw Fault("misaligned address " + hex(from) + ": cp.async of " + std::to_string(bytes) + " bytes", l);
    if (copied) readable(*w.launch, from, copied, l, "cp.async");
    pieces.push_back({&cta, shared_offset(to), from, bytes, copied});
    write_by_group(w, cta, shared_offset(to), bytes, Async::copies, token, l);
    poison(cta, shared_offset(to), bytes);
  }
  start(w.copies);
  w.copies_out.push_back(token);
  w.launch->later([&w, group = w.copies.open, token, pieces = std::move(pieces)] {
    for (const Piece& p : pieces) {
      uint8_t bytes_of[16] = {};
      std::memcpy(bytes_of, reinterpret_cast<const void*>(p.source), p.copied);
      put(*p.cta, p.offset, bytes_of, p.bytes);
    }
    finish(w.copies, group, *w.launch);
    w.copies_out.erase(std::find(w.copies_out.begin(), w.copies_out.end(), token));
    for (size_t n = 0; n < w.copies_arrivals.size();) {
      Warp::Arrival& a = w.copies_arrivals[n];
      if (std::any_of(w.copies_out.begin(), w.copies_out.end(), [&](uint64_t t) { return t <= a.token; })) {
        ++n;
        continue;
      }
      Mbarrier& b = mbarrier_at(*a.cta, a.address, a.lane);
      join(b.clock, a.clock);
      arrive(*w.launch, *a.cta, b, a.count, a.address, a.lane);
      w.copies_arrivals.erase(w.copies_arrivals.begin() + static_cast<std::ptrdiff_t>(n));
    }
  });
  return Status::next;
}

Status copies_commit(Warp& w, const Instruction&, uint32_t) {
  w.copies_tokens.push_back(w.copies_issued);
  ++w.copies.open;
  return Status::next;
}

Status copies_wait(Warp& w, const Instruction& i, uint32_t) {
  if (i.mode && w.copies.left.size()) return Status::blocked;  // wait_all, committed or not
  const auto n = i.mode ? 0 : static_cast<uint64_t>(i.offset);
  if (!all_but(w.copies, n)) return Status::blocked;
  const uint64_t group = complete_up_to(w.copies, n);
  see_group(w, Async::copies, i.mode ? w.copies_issued : group ? w.copies_tokens[group - 1] : 0, -1);
  return Status::next;
}

Status copies_arrive(Warp& w, const Instruction& i, uint32_t lanes) {
  for (const int l : Lanes(lanes)) {
    const uint32_t address = shared_address(lane_address(w, i.a, i.wide_address, i.offset, l), l);
    Cta& cta = shared_cta(w, address, l);
    Mbarrier& b = mbarrier_at(cta, address, l);
    use_mbarrier(w, b, address, l);
    if (!i.mode) ++b.pending;
    Clock clock;
    release(w, clock);
    group_clock(w, Async::copies, w.copies_issued, -1, clock);
    if (w.copies_out.empty()) {
      join(b.clock, clock);
      arrive(*w.launch, cta, b, 1, address, l);
    } else {
      w.copies_arrivals.push_back({w.copies_issued, &cta, address, 1, l, clock});
    }
  }
  return Status::next;
}

// ---- bulk copies ----------------------------------------------------------------------------------------------------

struct Bulk {
  enum Direction : uint8_t { to_shared, to_global, between_shared, prefetch } direction;
  bool tensor, multicast, has_policy, reduces;
  int rank;
  Unit destination, source, size, barrier, mask;
  int64_t destination_offset, source_offset, barrier_offset;
  bool destination_wide, source_wide, barrier_wide;
  Unit coordinates[5];
  Reduction reduction;
  int type;  // of a reduction without a tensor map
};

const TiledMap& map_at(Warp& w, uint64_t address, int rank, int lane) {
  if (address % 64) throw Fault("tensor map: its address " + hex(address) + " is no multiple of 64", lane);
  if ((address & kWindowMask) != 0)
    throw Fault("tensor map: it has to lie in parameter, constant or global memory", lane);
  const auto& map = *reinterpret_cast<const TiledMap*>(readable(*w.launch, address, 128, lane, "a tensor map"));
  if (map.magic != kMapMagic)
    throw Fault("tensor map: what lies at " + hex(address) + " was not made by cuTensorMapEncodeTiled", lane);
  if (map.rank != rank)
    throw Fault("tensor map: it has rank " + std::to_string(map.rank) + ", the instruction names " +
                    std::to_string(rank) + " coordinates",
                lane);
  return map;
}

// Rows of a tensor map's box: their place in shared memory and in the tensor.
struct Box {
  Box(const TiledMap& map, const int32_t* coordinates) : map(map), element(element_type(map.type)->bytes) {
    for (int d = 0; d < 5; ++d) {
      at[d] = d < map.rank ? coordinates[d] : 0;
      step[d] = d < map.rank ? map.steps[d] : 1;
      count[d] = d < map.rank ? (map.box[d] + step[d] - 1) / step[d] : 1;
      extent[d] = d < map.rank ? int64_t{map.last[d]} + 1 : 1;
    }
    row_bytes = static_cast<uint32_t>(count[0]) * element;
    rows = 1;
    for (int d = 1; d < 5; ++d) rows *= static_cast<uint32_t>(count[d]);
    bytes = rows * row_bytes;
    // The elements of a row that lie in the tensor.
    first = std::max<int64_t>(0, -at[0]);
    last = std::min<int64_t>(count[0], extent[0] - at[0]);
    if (last < first) last = first = 0;
  }
  // The address of row r's first element that counts, or 0 if the row lies outside.
  uint64_t row(uint32_t r) const {
    uint64_t address = map.address + static_cast<uint64_t>((at[0] + first) * element);
    for (int d = 1; d < map.rank; ++d) {
      const int64_t x = at[d] + int64_t{r % static_cast<uint32_t>(count[d])} * step[d];
      r /= static_cast<uint32_t>(count[d]);
      if (x < 0 || x >= extent[d]) return 0;
      address += static_cast<uint64_t>(x) * map.strides[d - 1];
    }
    return first < last ? address : 0;
  }
  const TiledMap& map;
  uint32_t element, row_bytes, rows, bytes;
  int64_t at[5], step[5], count[5], extent[5];
  int64_t first, last;
};

void check_box(const Box& box, uint32_t offset, int lane) {
  const uint32_t span = 16u << box.map.swizzle;
  if (offset % 128)
    throw Fault("misaligned: a tensor's tile in shared memory needs a multiple of 128, not " + hex(offset), lane);
  if (box.map.swizzle && box.row_bytes != span)
    throw Fault("tensor map: rows of " + std::to_string(box.row_bytes) + " bytes under a swizzle of " +
                    std::to_string(span) + " bytes have a layout that the emulator does not know",
                lane);
}

void nan_fill(uint8_t* row, const Box& box) {
  static const uint8_t f16[2] = {0xff, 0x7f}, f32[4] = {0xff, 0xff, 0xff, 0x7f},
                       f64[8] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f};
  const uint8_t* nan = box.element == 2 ? f16 : box.element == 4 ? f32 : f64;
  for (uint32_t k = 0; k < box.row_bytes; k += box.element) std::memcpy(row + k, nan, box.element);
}

// The tile as it lies in shared memory before swizzling.
std::vector<uint8_t> read_box(Launch& launch, const Box& box, int lane) {
  std::vector<uint8_t> tile(box.bytes, 0);
  const auto bytes = static_cast<uint64_t>(box.last - box.first) * box.element;
  for (uint32_t r = 0; r < box.rows; ++r) {
    uint8_t* row = tile.data() + size_t{r} * box.row_bytes;
    if (box.map.nan_fill) nan_fill(row, box);
    if (const uint64_t address = box.row(r))
      std::memcpy(row + box.first * box.element, readable(launch, address, bytes, lane, "a tensor's copy"), bytes);
  }
  return tile;
}

void put_tile(Cta& cta, uint32_t offset, const std::vector<uint8_t>& tile, Swizzle swizzle) {
  if (swizzle == Swizzle::none) return put(cta, offset, tile.data(), static_cast<uint32_t>(tile.size()));
  for (uint32_t k = 0; k < tile.size(); k += 16) put(cta, swizzled(offset + k, swizzle), tile.data() + k, 16);
}

// Tiles under a swizzle fill whole rows of 128, 64 or 32 bytes, but the pattern goes by addresses: a tile that begins
// within a pattern ends elsewhere than its size says. The hull of all addresses is what is checked and poisoned.
void hull(uint32_t offset, uint32_t bytes, Swizzle swizzle, uint32_t& begin, uint32_t& end) {
  begin = offset, end = offset + bytes;
  if (swizzle == Swizzle::none) return;
  for (uint32_t k = 0; k < bytes; k += 16) {
    const uint32_t at = swizzled(offset + k, swizzle);
    begin = std::min(begin, at), end = std::max(end, at + 16);
  }
}

// Of a copy without a tensor map.
void check_untiled(uint64_t from, uint64_t to, uint32_t bytes, int l) {
  if (bytes % 16 || bytes == 0)
    throw Fault("a bulk copy takes a multiple of 16 bytes, not " + std::to_string(bytes), l);
  if (from % 16 || to % 16)
    throw Fault("misaligned: a bulk copy needs multiples of 16, not " + hex(from) + " and " + hex(to), l);
}

void load_bulk(Warp& w, const Bulk& b, int l) {
  Launch& launch = *w.launch;
  const uint32_t to = shared_address(lane_address(w, b.destination, b.destination_wide, b.destination_offset, l), l);
  const uint64_t from = lane_address(w, b.source, b.source_wide, b.source_offset, l);
  const uint32_t bar = shared_address(lane_address(w, b.barrier, b.barrier_wide, b.barrier_offset, l), l);
  int32_t coordinates[5] = {};
  uint32_t bytes, begin, end;
  Swizzle swizzle = Swizzle::none;
  const TiledMap* map = nullptr;
  if (b.tensor) {
    map = &map_at(w, from, b.rank, l);
    for (int d = 0; d < b.rank; ++d) coordinates[d] = w.lanes<int32_t>(b.coordinates[d])[l];
    const Box box(*map, coordinates);
    check_box(box, shared_offset(to), l);
    bytes = box.bytes;
    swizzle = static_cast<Swizzle>(map->swizzle);
    for (uint32_t r = 0; r < box.rows; ++r)
      if (const uint64_t address = box.row(r))
        readable(launch, address, static_cast<uint64_t>(box.last - box.first) * box.element, l, "a tensor's copy");
  } else {
    bytes = w.lanes<uint32_t>(b.size)[l];
    check_untiled(from, to, bytes, l);
  }
  hull(shared_offset(to), bytes, swizzle, begin, end);
  uint32_t ranks = 0;
  if (b.multicast) {
    ranks = w.lanes<uint32_t>(b.mask)[l] & 0xffff;
    if (!ranks || ranks >> w.cta->cluster->ctas.size())
      throw Fault("multicast mask " + hex(ranks) + " in a cluster of " + std::to_string(w.cta->cluster->ctas.size()),
                  l);
  } else {
    ranks = 1u << shared_cta(w, to, l).rank;
  }
  std::vector<uint8_t> data;
  if (b.direction == Bulk::between_shared) {
    Cta& source = shared_cta(w, shared_address(from, l), l);
    shared_bytes(source, static_cast<uint32_t>(from), bytes, 16, l, "the source of a bulk copy");
    read_by_barrier(w, source, shared_offset(static_cast<uint32_t>(from)), bytes,
                    mbarrier_at(shared_cta(w, bar, l), bar, l), l);
  } else if (!b.tensor) {
    readable(launch, from, bytes, l, "a bulk copy");
  }
  struct Target {
    Cta* cta;
    uint32_t barrier;
  };
  std::vector<Target> targets;
  for (const int rank : Lanes(ranks)) {
    Cta& cta = *w.cta->cluster->ctas[static_cast<size_t>(rank)];
    if (cta.live_warps == 0)
      throw Fault("a copy to CTA " + std::to_string(rank) + " of the cluster, which has exited", l);
    shared_bytes(cta, begin, end - begin, 1, l, "the destination of a bulk copy");
    check_barriers(cta, begin, end - begin, l);
    // The barrier has the same offset in each CTA that takes part.
    Cta& barrier_cta = b.multicast ? cta : shared_cta(w, bar, l);
    if (!b.multicast && &barrier_cta != &cta)
      throw Fault("the mbarrier of a bulk copy has to lie in the same CTA's shared memory as the destination", l);
    Mbarrier& barrier = mbarrier_at(cta, shared_offset(bar), l);
    use_mbarrier(w, barrier, shared_offset(bar), l);
    write_by_barrier(w, cta, begin, end - begin, barrier, l);
    poison(cta, begin, end - begin);
    targets.push_back({&cta, shared_offset(bar)});
  }
  w.producer = true;
  ++launch.copies;
  launch.copied_bytes += bytes;
  const uint32_t offset = shared_offset(to);
  std::array<int32_t, 5> where;
  std::copy(coordinates, coordinates + 5, where.begin());
  const TiledMap copy = map ? *map : TiledMap{};
  Cta* source = b.direction == Bulk::between_shared ? &shared_cta(w, shared_address(from, l), l) : nullptr;
  launch.later([&launch, copy, where, targets, offset, bytes, swizzle, source, from, l, tensor = b.tensor] {
    std::vector<uint8_t> tile;
    if (tensor) {
      tile = read_box(launch, Box(copy, where.data()), l);
    } else if (source) {
      const uint8_t* p = source->shared.data() + (shared_offset(static_cast<uint32_t>(from)) - kSharedBase);
      tile.assign(p, p + bytes);
    } else {
      const uint8_t* p = readable(launch, from, bytes, l, "a bulk copy");
      tile.assign(p, p + bytes);
    }
    for (const Target& t : targets) {
      put_tile(*t.cta, offset, tile, swizzle);
      complete_transactions(launch, *t.cta, t.barrier, bytes);
    }
  });
}

void store_bulk(Warp& w, const Bulk& b, int l) {
  Launch& launch = *w.launch;
  const uint32_t from = shared_address(lane_address(w, b.source, b.source_wide, b.source_offset, l), l);
  const uint64_t to = lane_address(w, b.destination, b.destination_wide, b.destination_offset, l);
  std::array<int32_t, 5> where{};
  TiledMap map{};
  uint32_t bytes;
  Swizzle swizzle = Swizzle::none;
  if (b.tensor) {
    map = map_at(w, to, b.rank, l);
    for (int d = 0; d < b.rank; ++d) where[static_cast<size_t>(d)] = w.lanes<int32_t>(b.coordinates[d])[l];
    const Box box(map, where.data());
    check_box(box, shared_offset(from), l);
    bytes = box.bytes;
    swizzle = static_cast<Swizzle>(map.swizzle);
    for (uint32_t r = 0; r < box.rows; ++r)
      if (const uint64_t address = box.row(r))
        writable(launch, address, static_cast<uint64_t>(box.last - box.first) * box.element, l, "a tensor's copy");
  } else {
    bytes = w.lanes<uint32_t>(b.size)[l];
    check_untiled(from, to, bytes, l);
    writable(launch, to, bytes, l, "a bulk copy");
  }
  Cta& cta = shared_cta(w, from, l);
  const uint32_t offset = shared_offset(from);
  uint32_t begin, end;
  hull(offset, bytes, swizzle, begin, end);
  shared_bytes(cta, begin, end - begin, 1, l, "the source of a bulk copy");
  read_by_group(w, cta, begin, end - begin, Async::bulk, w.bulk[l].open, l);
  start(w.bulk[l]);
  start(w.bulk_reads[l]);
  ++launch.copies;
  launch.copied_bytes += bytes;
  const uint64_t group = w.bulk[l].open;
  // First the source is read, later the destination is written: wait_group.read waits for the first only.
  launch.later([&launch, &w, &cta, b, map, where, to, offset, bytes, swizzle, group, l] {
    auto tile = std::make_shared<std::vector<uint8_t>>(bytes);
    for (uint32_t k = 0; k < bytes; k += 16)
      std::memcpy(tile->data() + k, cta.shared.data() + (swizzled(offset + k, swizzle) - kSharedBase), 16);
    finish(w.bulk_reads[l], group, launch);
    launch.later([&launch, &w, b, map, where, to, bytes, group, l, tile] {
      const auto write = [&](uint8_t* at, const uint8_t* data, size_t n, int type) {
        if (b.reduces) {
          reduce_bytes(at, data, n, type, b.reduction);
        } else {
          std::memcpy(at, data, n);
        }
      };
      if (b.tensor) {
        const Box box(map, where.data());
        const auto n = static_cast<size_t>(box.last - box.first) * box.element;
        for (uint32_t r = 0; r < box.rows; ++r)
          if (const uint64_t address = box.row(r))
            write(writable(launch, address, n, l, "a tensor's copy"),
                  tile->data() + size_t{r} * box.row_bytes + static_cast<size_t>(box.first) * box.element, n, map.type);
      } else {
        write(writable(launch, to, bytes, l, "a bulk copy"), tile->data(), bytes, b.type);
      }
      finish(w.bulk[l], group, launch);
    });
  });
}

Status bulk(Warp& w, const Instruction& i, uint32_t lanes) {
  const Bulk& b = *static_cast<const Bulk*>(i.extra);
  for (const int l : Lanes(lanes)) {
    switch (b.direction) {
      case Bulk::prefetch: break;
      case Bulk::to_global: store_bulk(w, b, l); break;
      default: load_bulk(w, b, l);
    }
  }
  return Status::next;
}

Status bulk_commit(Warp& w, const Instruction&, uint32_t lanes) {
  for (const int l : Lanes(lanes)) ++w.bulk[l].open, ++w.bulk_reads[l].open;
  return Status::next;
}

Status bulk_wait(Warp& w, const Instruction& i, uint32_t lanes) {
  const auto n = static_cast<uint64_t>(i.offset);
  for (const int l : Lanes(lanes))
    if (!all_but(i.mode ? w.bulk_reads[l] : w.bulk[l], n)) return Status::blocked;
  for (const int l : Lanes(lanes)) see_group(w, Async::bulk, complete_up_to(w.bulk[l], n), l);
  return Status::next;
}

bool resolve_bulk(Resolver& r) {
  Bulk b{};
  b.reduces = r.root() == "cp" && r.s.opcode[1] == "reduce";
  r.ignore({"reduce", "async", "bulk", "tile"});
  b.tensor = r.has("tensor");
  if (b.tensor) {
    for (int d = 1; d <= 5; ++d)
      if (r.has(std::to_string(d) + "d")) b.rank = d;
    if (!b.rank) return false;
  }
  b.multicast = r.has("multicast::cluster");
  b.has_policy = r.has("L2::cache_hint");
  const bool barrier = r.has("mbarrier::complete_tx::bytes"), group = r.has("bulk_group");
  const bool prefetch = r.has("prefetch");
  r.has("L2");
  // Destination first, source second.
  std::vector<std::string> spaces;
  for (size_t n = 1; n < r.s.opcode.size(); ++n) {
    const std::string& o = r.s.opcode[n];
    if (o == "global" || o == "shared::cluster" || o == "shared::cta") spaces.push_back(o);
  }
  r.ignore({"global", "shared::cluster", "shared::cta"});
  r.i.run = bulk;
  if (prefetch) {
    b.direction = Bulk::prefetch;
    r.extra(b);
    return true;
  }
  if (spaces.size() != 2 || barrier == group) return false;
  b.direction = spaces[0] == "global"   ? Bulk::to_global
                : spaces[1] == "global" ? Bulk::to_shared
                                        : Bulk::between_shared;
  if (b.reduces) {
    if (!reduction_of(r, b.reduction)) return false;
    if (!b.tensor) b.type = tensor_type_of(r.types());
    if (b.direction != Bulk::to_global) return false;
  }
  size_t n = 0;
  const auto tensor = [&](const ptx::Operand& o) {  // [map, {coordinates}]
    if (o.parts.size() != 1 || o.parts[0].kind != ptx::Operand::vector ||
        o.parts[0].parts.size() != static_cast<size_t>(b.rank))
      return false;
    for (int d = 0; d < b.rank; ++d) b.coordinates[d] = r.read(o.parts[0].parts[static_cast<size_t>(d)], 4);
    return true;
  };
  const ptx::Operand& destination = r.operand(n++);
  b.destination = r.address_of(destination, b.destination_offset, b.destination_wide);
  const ptx::Operand& source = r.operand(n++);
  b.source = r.address_of(source, b.source_offset, b.source_wide);
  if (b.tensor && !tensor(b.direction == Bulk::to_global ? destination : source)) return false;
  if (!b.tensor) b.size = r.read(n++, 4);
  if (barrier) b.barrier = r.address_of(r.operand(n++), b.barrier_offset, b.barrier_wide);
  if (b.multicast) {
    const ptx::Operand& mask = r.operand(n++);
    b.mask = r.read(mask, 2);
  }
  if (b.has_policy) r.read(n++, 8);
  r.extra(b);
  return n == r.operands();
}

bool cp(Resolver& r) {
  if (r.s.opcode.size() > 1 && r.s.opcode[1] == "reduce") return resolve_bulk(r);
  if (!r.has("async")) return false;
  if (r.has("bulk")) {
    if (r.has("commit_group")) return r.i.run = bulk_commit, true;
    if (r.has("wait_group")) {
      r.i.mode = r.has("read");
      r.i.run = bulk_wait;
      return r.immediate(0, r.i.offset);
    }
    return resolve_bulk(r);
  }
  if (r.has("commit_group")) return r.i.run = copies_commit, true;
  if (r.has("wait_group")) return r.i.run = copies_wait, r.immediate(0, r.i.offset);
  if (r.has("wait_all")) return r.i.run = copies_wait, r.i.mode = 1, true;
  if (r.has("mbarrier")) {
    if (!r.has("arrive")) return false;
    r.i.mode = r.has("noinc");
    r.ignore({"shared", "shared::cta", "b64"});
    r.address(0);
    r.i.run = copies_arrive;
    return true;
  }
  r.ignore({"ca", "cg", "shared", "shared::cta", "global", "L2::cache_hint", "L2::64B", "L2::128B", "L2::256B"});
  const bool policy = r.s.text.find("L2::cache_hint") != std::string::npos;
  int64_t bytes;
  if (!r.immediate(2, bytes) || (bytes != 4 && bytes != 8 && bytes != 16)) return false;
  r.i.mode = static_cast<uint32_t>(bytes);
  r.address(0);
  std::array<int64_t, 3> source{};
  bool wide;
  source[0] = r.address_of(r.operand(1), source[1], wide);
  source[2] = wide;
  r.extra(source);
  size_t n = 3;
  if (n < r.operands() - policy) {
    const ptx::Operand& o = r.operand(n++);
    const bool number = o.kind == ptx::Operand::integer || r.width(o) == 4;
    r.i.b = r.read(o, number ? 4 : 0);
    r.i.mode |= number ? 32 : 64 | (o.negated ? 128 : 0);
  }
  if (policy) r.read(n++, 8);
  r.i.run = copy_async;
  return n == r.operands();
}

}  // namespace

void add_copies(Table& t) { t["cp"] = cp; }

}  // namespace moekern::emulator
