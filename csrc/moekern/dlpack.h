// The part of DLPack's stable C ABI (version 1) that we use: https://dmlc.github.io/dlpack.
// Field order and widths are the ABI's; names are ours where the original's would clash.
#pragma once
#include <cstdint>

namespace moekern::dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2, kCudaHost = 3, kRocm = 10, kRocmHost = 11, kExtension = 12 };

enum TypeCode : uint8_t {
  kInt = 0,
  kUInt = 1,
  kFloat = 2,
  kBfloat = 4,
  kBool = 6,
  kE4m3fn = 10,
  kE4m3fnuz = 11,
  kE5m2 = 12,
  kE8m0fnu = 14,
};

struct Device {
  DeviceType type;
  int32_t id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // elements; null for a compact tensor
  uint64_t byte_offset;
};

struct Version {
  uint32_t major, minor;
};

struct ManagedTensor {
  Version version;
  void* manager;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

struct ExchangeHeader {
  Version version;
  ExchangeHeader* previous;
};

// The capsule at type(tensor).__dlpack_c_exchange_api__, named "dlpack_exchange_api".
struct ExchangeApi {
  ExchangeHeader header;
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context,
                  void (*set_error)(void* context, const char* kind, const char* message));
  int (*managed_from_object)(void* object, ManagedTensor** out);
  int (*to_object)(ManagedTensor* tensor, void** object);
  int (*view_of_object)(void* object, Tensor* out);
  int (*current_stream)(DeviceType type, int32_t id, void** stream);
};

}  // namespace moekern::dlpack
