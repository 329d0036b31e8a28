#include <array>
#include <cstring>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <unordered_map>

#include "cuda/driver.h"
#include "cuda/launch.h"

namespace moekern::cuda {
namespace {

constexpr int kAlignment = 16;                 // of addresses and strides, in bytes
constexpr int64_t kLargestStride = 1LL << 40;  // bytes
constexpr int kPromote256Bytes = 3;            // CUtensorMapL2promotion: what is asked for comes to L2 in such pieces

// A model has one or a few maps a weight; a layer's experts are one stack. 16384 take 5 MB, with their keys.
constexpr size_t kMostMaps = 16384;

int type_of(Dtype t) {  // CUtensorMapDataType
  switch (t) {
    case Dtype::i32: return 3;
    case Dtype::i64: return 5;
    case Dtype::f16: return 6;
    case Dtype::f32: return 7;
    case Dtype::bf16: return 9;
    default: return 0;  // bytes
  }
}

// All that a map says, and who wrote it.
using Key = std::array<uint64_t, 4 + kMaxRank + (kMaxRank - 1) + kMaxRank / 2>;

Key key_of(const Boxed& b) {
  Key key{reinterpret_cast<uintptr_t>(&driver()), reinterpret_cast<uintptr_t>(b.address),
          static_cast<uint64_t>(b.dtype) << 32 | static_cast<uint64_t>(b.swizzle), static_cast<uint64_t>(b.rank)};
  size_t at = 4;
  for (uint64_t extent : b.extents) key[at++] = extent;
  for (uint64_t stride : b.strides) key[at++] = stride;
  for (int i = 0; i < kMaxRank; i += 2) key[at++] = static_cast<uint64_t>(b.box[i]) << 32 | b.box[i + 1];
  return key;
}

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0;
    for (uint64_t word : key) {
      h = (h ^ word) * 0x9e3779b97f4a7c15;
      h ^= h >> 32;
    }
    return h;
  }
};

bool aligned(const Matrix& m, int64_t stride, int64_t count) {
  const int64_t bytes = stride * size_of(m.dtype);
  return count <= 1 || (bytes > 0 && bytes % kAlignment == 0 && bytes < kLargestStride);
}

// Where there is but one row, no stride says how far the next would be.
uint64_t stride_bytes(const Matrix& m, int64_t stride, int64_t count) {
  const uint64_t row = static_cast<uint64_t>(m.cols * size_of(m.dtype) + kAlignment - 1) / kAlignment * kAlignment;
  return count <= 1 ? row : static_cast<uint64_t>(stride * size_of(m.dtype));
}

}  // namespace

Boxed boxed(const Matrix& m, uint32_t box_rows, uint32_t box_cols, Swizzle swizzle) {
  Boxed b;
  b.address = m.data;
  b.extents[0] = static_cast<uint64_t>(m.cols);
  b.extents[1] = static_cast<uint64_t>(m.rows);
  b.strides[0] = stride_bytes(m, m.row_stride, m.rows);
  b.box[0] = box_cols;
  b.box[1] = box_rows;
  b.dtype = m.dtype;
  b.swizzle = swizzle;
  return b;
}

Boxed boxed(const Stack& s, uint32_t box_rows, uint32_t box_cols, Swizzle swizzle) {
  Boxed b = boxed(s.matrix, box_rows, box_cols, swizzle);
  b.rank = 3;
  b.extents[2] = static_cast<uint64_t>(s.count);
  b.strides[1] = stride_bytes(s.matrix, s.stride, s.count);
  return b;
}

bool has_tensor_map(const Matrix& m) {
  return (m.cols <= 1 || m.col_stride == 1) && reinterpret_cast<uintptr_t>(m.data) % kAlignment == 0 &&
         aligned(m, m.row_stride, m.rows);
}

bool has_tensor_map(const Stack& s) { return has_tensor_map(s.matrix) && aligned(s.matrix, s.stride, s.count); }

TensorMap tensor_map(const Boxed& b) {
  const Driver& d = driver();
  // gcc 12 aligns no temporary to 64 bytes that a function returns by value, and this one may be such
  uint64_t room[2 * sizeof(TensorMap) / sizeof(uint64_t)];
  void* at = room;
  size_t bytes = sizeof room;
  auto* written = static_cast<TensorMap*>(std::align(alignof(TensorMap), sizeof(TensorMap), at, bytes));
  static constexpr uint32_t kEveryElement[kMaxRank] = {1, 1, 1, 1};
  d.check(d.cuTensorMapEncodeTiled(written, type_of(b.dtype), static_cast<uint32_t>(b.rank),
                                   const_cast<void*>(b.address), b.extents, b.strides, b.box, kEveryElement, 0,
                                   static_cast<int>(b.swizzle), kPromote256Bytes, 0),
          "cuTensorMapEncodeTiled of ", name_of(b.dtype), " at ", b.address, ", extents ", b.extents[0], " x ",
          b.extents[1], " x ", b.extents[2], ", strides ", b.strides[0], " and ", b.strides[1], " bytes, box ",
          b.box[0], " x ", b.box[1], " x ", b.box[2], ", swizzle ", static_cast<int>(b.swizzle));
  TensorMap map;
  std::memcpy(&map, written, sizeof map);
  return map;
}

TensorMap weight_map(const Boxed& b) {
  static std::shared_mutex* mutex = new std::shared_mutex;  // leaked, as the driver is
  static auto* maps = new std::unordered_map<Key, TensorMap, Hash>;
  const Key key = key_of(b);
  {
    const std::shared_lock<std::shared_mutex> lock(*mutex);
    if (const auto found = maps->find(key); found != maps->end()) return found->second;
  }
  const TensorMap map = tensor_map(b);
  const std::lock_guard<std::shared_mutex> lock(*mutex);
  if (maps->size() >= kMostMaps) maps->clear();
  maps->emplace(key, map);
  return map;
}

}  // namespace moekern::cuda
