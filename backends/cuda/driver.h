// The CUDA driver: the functions of it that we call, with prototypes of our own, found at run time. Nothing of CUDA is
// needed to build this, and the first call that needs a device opens the library, not the import.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/kernels/tensor_map.h"
#include "moekern/check.h"

namespace moekern::cuda {

using Result = int;  // 0 is success; the driver knows the names of the others

struct LaunchAttribute {
  enum Id : int { kClusterDimension = 4, kProgrammaticSerialization = 6 };
  Id id;
  union alignas(8) {
    unsigned cluster[3];
    int allowed;
    char room[64];
  };
};

struct LaunchConfig {
  unsigned grid[3], block[3];
  unsigned shared_bytes;
  void* stream;
  LaunchAttribute* attributes;
  unsigned count;
};

constexpr int kProcessors = 16, kSharedBytesOptIn = 97;  // CUdevice_attribute
constexpr int kDynamicSharedBytes = 8;                   // CUfunction_attribute
constexpr int kRelaxedCapture = 2;                       // CUstreamCaptureMode

// Contexts, modules and functions are pointers to what only the driver knows.
#define MOEKERN_DRIVER_FUNCTIONS(F)                                                                             \
  F(cuGetErrorName, (Result result, const char** name))                                                         \
  F(cuGetErrorString, (Result result, const char** text))                                                       \
  F(cuDriverGetVersion, (int* version))                                                                         \
  F(cuInit, (unsigned flags))                                                                                   \
  F(cuDeviceGet, (int* device, int ordinal))                                                                    \
  F(cuDeviceGetAttribute, (int* value, int attribute, int device))                                              \
  F(cuDevicePrimaryCtxRetain, (void** context, int device))                                                     \
  F(cuCtxGetCurrent, (void** context))                                                                          \
  F(cuCtxSetCurrent, (void* context))                                                                           \
  F(cuThreadExchangeStreamCaptureMode, (int* mode))                                                             \
  F(cuModuleLoadData, (void** module, const void* image))                                                       \
  F(cuModuleGetFunction, (void** function, void* module, const char* name))                                     \
  F(cuFuncSetAttribute, (void* function, int attribute, int value))                                             \
  F(cuLaunchKernelEx, (const LaunchConfig* config, void* function, void** parameters, void** extra))            \
  F(cuTensorMapEncodeTiled,                                                                                     \
    (TensorMap * map, int type, uint32_t rank, void* address, const uint64_t* extents, const uint64_t* strides, \
     const uint32_t* box, const uint32_t* element_strides, int interleave, int swizzle, int promotion, int fill))

struct Driver {
  std::string library;  // as it was asked for
  std::string folder;   // that it was found in
#define MOEKERN_DRIVER_FUNCTION(NAME, PARAMETERS) Result(*NAME) PARAMETERS = nullptr;
  MOEKERN_DRIVER_FUNCTIONS(MOEKERN_DRIVER_FUNCTION)
#undef MOEKERN_DRIVER_FUNCTION

  // Throws with the error's name and what was tried, of which `parts` are the text.
  template <class... Parts>
  void check(Result result, const Parts&... parts) const {
    if (result) fail(result, text(parts...));
  }

 private:
  [[noreturn]] void fail(Result result, const std::string& what) const;
};

// The driver in use, opened by the first call and not initialised. Throws where there is none.
const Driver& driver();

// From now on, in the whole process: another library with the driver's functions, such as the emulator. Null: the one
// that the environment variable MOEKERN_CUDA_DRIVER names, or else libcuda.so.1. Opened at the first need.
void use_driver(const char* library);

// Why it cannot run our kernels here, in plain words; empty if it can. Asks no device.
std::string why_no_driver();

}  // namespace moekern::cuda
