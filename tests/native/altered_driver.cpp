// The emulated driver from another folder, whose PTX the library then loads; and it may write one tensor map otherwise
// than it was asked to. tests/altered_driver.py compiles this against the emulator, which has all other functions.
#include <dlfcn.h>

#include <cstdint>
#include <cstring>

extern "C" {

enum Field { kNone, kBox, kSwizzle, kExtent, kStride };

struct Alteration {
  int map;  // counted from the first that is encoded
  int field, index;
  int64_t addend;
};

Alteration moekern_alteration = {-1, kNone, 0, 0};
int moekern_maps = 0;

int cuInit(unsigned flags) {
  static const auto next = reinterpret_cast<int (*)(unsigned)>(dlsym(RTLD_NEXT, "cuInit"));
  return next(flags);
}

int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* extents,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                           int interleave, int swizzle, int promotion, int fill) {
  static const auto next =
      reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(dlsym(RTLD_NEXT, "cuTensorMapEncodeTiled"));
  uint64_t changed_extents[5], changed_strides[4];
  uint32_t changed_box[5];
  std::memcpy(changed_extents, extents, rank * sizeof *extents);
  std::memcpy(changed_strides, strides, (rank - 1) * sizeof *strides);
  std::memcpy(changed_box, box, rank * sizeof *box);
  const Alteration& a = moekern_alteration;
  if (moekern_maps++ == a.map) {
    if (a.field == kBox) changed_box[a.index] += static_cast<uint32_t>(a.addend);
    if (a.field == kSwizzle) swizzle += static_cast<int>(a.addend);
    if (a.field == kExtent) changed_extents[a.index] += static_cast<uint64_t>(a.addend);
    if (a.field == kStride) changed_strides[a.index] += static_cast<uint64_t>(a.addend);
  }
  return next(map, type, rank, address, changed_extents, changed_strides, changed_box, element_strides, interleave,
              swizzle, promotion, fill);
}

}  // extern "C"
