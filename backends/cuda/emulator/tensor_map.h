// Tensor maps as the emulated driver writes them and emulated copies read them: 128 bytes, opaque to everybody else.
#pragma once
#include <cstdint>
#include <string>

namespace moekern::emulator {

enum class Swizzle : uint8_t { none, bytes32, bytes64, bytes128 };

struct TiledMap {
  uint64_t magic;
  uint64_t address;
  uint64_t strides[4];  // bytes, of dimensions 1 to rank - 1
  uint32_t last[5];     // extent - 1
  uint16_t box[5];
  uint8_t steps[5];  // element strides
  uint8_t rank, type, swizzle, interleave, nan_fill;
};
static_assert(sizeof(TiledMap) <= 128, "a tensor map has 128 bytes");
constexpr uint64_t kMapMagic = 0x70616d2e6e6b656dull;

struct ElementType {
  const char* name;
  uint8_t bytes;
  bool floating;
};
const ElementType* element_type(int type);  // of CUtensorMapDataType; null: not known

// Empty, or what is wrong with the arguments.
std::string encode_tiled(void* map, int type, uint32_t rank, const void* address, const uint64_t* extents,
                         const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                         int swizzle, int promotion, int fill);

// An address in shared memory after swizzling: 16-byte units within 128, 64 or 32 bytes change places from row to row.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
  const uint32_t mask = (1u << static_cast<int>(swizzle)) - 1;  // 0, 1, 3, 7
  return address ^ ((address >> 7 & mask) << 4);
}

}  // namespace moekern::emulator
