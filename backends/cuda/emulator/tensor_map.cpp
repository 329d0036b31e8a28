#include "tensor_map.h"

#include <cstring>

#include "fault.h"

namespace moekern::emulator {

const ElementType* element_type(int type) {
  static const ElementType types[] = {{"uint8", 1, false},      {"uint16", 2, false},     {"uint32", 4, false},
                                      {"int32", 4, false},      {"uint64", 8, false},     {"int64", 8, false},
                                      {"float16", 2, true},     {"float32", 4, true},     {"float64", 8, true},
                                      {"bfloat16", 2, true},    {"float32_ftz", 4, true}, {"tfloat32", 4, true},
                                      {"tfloat32_ftz", 4, true}};
  return type >= 0 && type < static_cast<int>(sizeof types / sizeof *types) ? &types[type] : nullptr;
}

std::string encode_tiled(void* map, int type, uint32_t rank, const void* address, const uint64_t* extents,
                         const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides, int interleave,
                         int swizzle, int promotion, int fill) {
  const auto at = [](const char* name, uint32_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; };
  const auto is = [](uint64_t v) { return " is " + std::to_string(v); };
  if (!map || reinterpret_cast<uintptr_t>(map) % 64) return "the tensor map has to lie at a multiple of 64 bytes";
  const ElementType* element = element_type(type);
  if (!element) return "the data type" + is(static_cast<uint64_t>(type)) + ", which is none that is emulated";
  if (rank < 1 || rank > 5) return "the rank" + is(rank) + ", allowed are 1 to 5";
  if (interleave < 0 || interleave > 2)
    return "the interleave" + is(static_cast<uint64_t>(interleave)) + ", allowed are 0 to 2";
  if (interleave) return "interleaved layouts are not emulated";
  if (swizzle < 0 || swizzle > 3) return "the swizzle" + is(static_cast<uint64_t>(swizzle)) + ", emulated are 0 to 3";
  if (promotion < 0 || promotion > 3)
    return "the L2 promotion" + is(static_cast<uint64_t>(promotion)) + ", allowed are 0 to 3";
  if (fill < 0 || fill > 1) return "the out of bounds fill" + is(static_cast<uint64_t>(fill)) + ", allowed are 0 and 1";
  if (fill && !element->floating)
    return std::string("a fill with NaN needs a floating point type, not ") + element->name;
  const auto base = reinterpret_cast<uintptr_t>(address);
  if (base % 16) return "the address " + hex(base) + " is no multiple of 16";
  if (!extents || !box || !element_strides || (rank > 1 && !strides)) return "an array is missing";
  TiledMap m{};
  m.magic = kMapMagic, m.address = base;
  m.rank = static_cast<uint8_t>(rank), m.type = static_cast<uint8_t>(type), m.swizzle = static_cast<uint8_t>(swizzle);
  m.nan_fill = static_cast<uint8_t>(fill);
  for (uint32_t i = 0; i < rank; ++i) {
    if (extents[i] < 1 || extents[i] > 1ull << 32)
      return at("globalDim", i) + is(extents[i]) + ", allowed are 1 to 2^32";
    if (box[i] < 1 || box[i] > 256) return at("boxDim", i) + is(box[i]) + ", allowed are 1 to 256";
    if (element_strides[i] < 1 || element_strides[i] > 8)
      return at("elementStrides", i) + is(element_strides[i]) + ", allowed are 1 to 8";
    m.last[i] = static_cast<uint32_t>(extents[i] - 1);
    m.box[i] = static_cast<uint16_t>(box[i]);
    m.steps[i] = static_cast<uint8_t>(i == 0 ? 1 : element_strides[i]);  // the first is ignored without interleaving
    if (i + 1 < rank) {
      if (strides[i] % 16 || strides[i] >= 1ull << 40)
        return at("globalStrides", i) + is(strides[i]) + ", it has to be a multiple of 16 below 2^40";
      m.strides[i] = strides[i];
    }
  }
  const uint32_t inner = box[0] * element->bytes;
  if (inner % 16) return "the box has rows of " + std::to_string(inner) + " bytes, which is no multiple of 16";
  const uint32_t span = 16u << swizzle;
  if (swizzle && inner > span)
    return "the box has rows of " + std::to_string(inner) + " bytes, the swizzle allows " + std::to_string(span);
  std::memset(map, 0, 128);
  std::memcpy(map, &m, sizeof m);
  return "";
}

}  // namespace moekern::emulator
