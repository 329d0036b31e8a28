// The CUDA driver's functions, with their own signatures, for launchers that were written for libcuda; and the
// emulator's own. Addresses on the device are addresses of the host. A launch has ended when the call returns.
#include <cstdio>
#include <cstring>

#include "emulator.h"
#include "tensor_map.h"

using namespace moekern::emulator;

#define MOEKERN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using Result = int;
constexpr Result kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kInvalidDevice = 101, kInvalidImage = 200,
                 kInvalidPtx = 218, kNotFound = 500, kOutOfResources = 701, kLaunchFailed = 719, kInvalidCluster = 912;

struct ErrorName {
  Result result;
  const char *name, *text;
};
constexpr ErrorName kErrors[] = {
    {kSuccess, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {kInvalidPtx, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kOutOfResources, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {kInvalidCluster, "CUDA_ERROR_INVALID_CLUSTER_SIZE", "cluster misconfiguration"}};

Result failed(Result result, const std::string& what) {
  emulator().fault = what;
  return result;
}

int dummy_context;

struct LaunchAttribute {
  int id;
  int padding;
  union {
    unsigned cluster[3];
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
constexpr int kClusterDimension = 4;

// kernelParams: a pointer for each parameter; or extra: one buffer with all of them.
bool gather(const Program& p, void** parameters, void** extra, std::vector<uint8_t>& block) {
  block.assign(p.parameter_bytes, 0);
  if (extra) {
    const void* buffer = nullptr;
    size_t bytes = 0;
    for (int n = 0; extra[n]; n += 2) {
      const auto key = reinterpret_cast<uintptr_t>(extra[n]);
      if (key == 1) buffer = extra[n + 1];
      if (key == 2) bytes = *static_cast<const size_t*>(extra[n + 1]);
    }
    if (!buffer || bytes > block.size()) return false;
    std::memcpy(block.data(), buffer, bytes);
    return true;
  }
  size_t n = 0;
  for (const ptx::Variable& v : p.function->parameters) {
    if (!parameters || !parameters[n]) return false;
    std::memcpy(block.data() + p.parameter_offsets.at(v.name), parameters[n++], static_cast<size_t>(v.bytes()));
  }
  return true;
}

Result launched(void* function, const Grid& g, void** parameters, void** extra) {
  Emulator& e = emulator();
  const std::lock_guard<std::mutex> lock(e.mutex);
  auto& f = *static_cast<Function*>(function);
  if (const std::string why = refusal(f, g); !why.empty())
    return failed(why.find("cluster") != std::string::npos ? kInvalidCluster
                  : why.find("bytes") != std::string::npos ? kOutOfResources
                                                           : kInvalidValue,
                  "the launch of " + f.program.name + " was refused: " + why);
  std::vector<uint8_t> block;
  if (!gather(f.program, parameters, extra, block))
    return failed(kInvalidValue, "a parameter of " + f.program.name + " is missing");
  try {
    e.fault.clear();
    launch(f, g, block.data());
  } catch (const std::exception& fault) {
    return failed(kLaunchFailed, fault.what());
  }
  return kSuccess;
}

}  // namespace

MOEKERN_EXPORT Result cuGetErrorName(Result result, const char** name) {
  for (const ErrorName& e : kErrors)
    if (e.result == result) return *name = e.name, kSuccess;
  return *name = nullptr, kInvalidValue;
}

// For what the emulator has more to say of than the driver's text, its own words.
MOEKERN_EXPORT Result cuGetErrorString(Result result, const char** text) {
  const std::string& fault = emulator().fault;
  if (result != kSuccess && !fault.empty()) return *text = fault.c_str(), kSuccess;
  for (const ErrorName& e : kErrors)
    if (e.result == result) return *text = e.text, kSuccess;
  return *text = nullptr, kInvalidValue;
}

MOEKERN_EXPORT Result cuInit(unsigned) { return kSuccess; }
MOEKERN_EXPORT Result cuDriverGetVersion(int* version) { return *version = 13000, kSuccess; }
MOEKERN_EXPORT Result cuDeviceGetCount(int* count) { return *count = 1, kSuccess; }
MOEKERN_EXPORT Result cuDeviceGet(int* device, int ordinal) {
  if (ordinal != 0)
    return failed(kInvalidDevice, "there is one emulated device, number 0, not " + std::to_string(ordinal));
  return *device = 0, kSuccess;
}
MOEKERN_EXPORT Result cuDeviceGetName(char* name, int bytes, int) {
  return std::snprintf(name, static_cast<size_t>(bytes), "moekern emulator (sm_90a)"), kSuccess;
}
MOEKERN_EXPORT Result cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = size_t{80} << 30, kSuccess; }
MOEKERN_EXPORT Result cuDeviceComputeCapability(int* major, int* minor, int) {
  return *major = 9, *minor = 0, kSuccess;
}

MOEKERN_EXPORT Result cuDeviceGetAttribute(int* value, int attribute, int) {
  switch (attribute) {
    case 1: return *value = 1024, kSuccess;  // MAX_THREADS_PER_BLOCK
    case 2:
    case 3: return *value = 1024, kSuccess;  // MAX_BLOCK_DIM_X, _Y
    case 4: return *value = 64, kSuccess;
    case 5: return *value = 0x7fffffff, kSuccess;  // MAX_GRID_DIM_X
    case 6:
    case 7: return *value = 65535, kSuccess;
    case 8: return *value = static_cast<int>(kDefaultSharedBytes), kSuccess;
    case 10: return *value = 32, kSuccess;  // WARP_SIZE
    case 12:
    case 82: return *value = 65536, kSuccess;                    // registers of a block, of an SM
    case 13: return *value = 1980000, kSuccess;                  // CLOCK_RATE
    case 16: return *value = emulator().settings.sms, kSuccess;  // MULTIPROCESSOR_COUNT
    case 36: return *value = 2619000, kSuccess;                  // MEMORY_CLOCK_RATE
    case 37: return *value = 5120, kSuccess;                     // GLOBAL_MEMORY_BUS_WIDTH
    case 38: return *value = 50 << 20, kSuccess;                 // L2_CACHE_SIZE
    case 39: return *value = 2048, kSuccess;                     // MAX_THREADS_PER_MULTIPROCESSOR
    case 41:
    case 83: return *value = 1, kSuccess;  // UNIFIED_ADDRESSING, MANAGED_MEMORY
    case 75: return *value = 9, kSuccess;  // COMPUTE_CAPABILITY_MAJOR
    case 76: return *value = 0, kSuccess;
    case 81: return *value = 233472, kSuccess;                             // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
    case 95: return *value = 1, kSuccess;                                  // COOPERATIVE_LAUNCH
    case 97: return *value = static_cast<int>(kMaxSharedBytes), kSuccess;  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    case 106: return *value = 32, kSuccess;                                // MAX_BLOCKS_PER_MULTIPROCESSOR
    case 111: return *value = 1024, kSuccess;                              // RESERVED_SHARED_MEMORY_PER_BLOCK
    case 120: return *value = 1, kSuccess;                                 // CLUSTER_LAUNCH
    case 127: return *value = 1, kSuccess;                                 // TENSOR_MAP_ACCESS_SUPPORTED
    default: return *value = 0, kSuccess;
  }
}

MOEKERN_EXPORT Result cuDevicePrimaryCtxRetain(void** context, int) { return *context = &dummy_context, kSuccess; }
MOEKERN_EXPORT Result cuDevicePrimaryCtxRelease_v2(int) { return kSuccess; }
MOEKERN_EXPORT Result cuCtxGetCurrent(void** context) { return *context = &dummy_context, kSuccess; }
MOEKERN_EXPORT Result cuCtxSetCurrent(void*) { return kSuccess; }
MOEKERN_EXPORT Result cuCtxPushCurrent_v2(void*) { return kSuccess; }
MOEKERN_EXPORT Result cuCtxPopCurrent_v2(void** context) { return *context = &dummy_context, kSuccess; }
MOEKERN_EXPORT Result cuCtxGetDevice(int* device) { return *device = 0, kSuccess; }
MOEKERN_EXPORT Result cuCtxSynchronize() { return kSuccess; }
MOEKERN_EXPORT Result cuStreamSynchronize(void*) { return kSuccess; }
MOEKERN_EXPORT Result cuStreamIsCapturing(void*, int* status) { return *status = 0, kSuccess; }
MOEKERN_EXPORT Result cuThreadExchangeStreamCaptureMode(int*) { return kSuccess; }

MOEKERN_EXPORT Result cuModuleLoadData(void** module, const void* image) {
  const auto* text = static_cast<const char*>(image);
  if (std::strstr(text, ".version") == nullptr)
    return failed(kInvalidImage, "the image is no PTX text: the emulator runs nothing else");
  try {
    const std::lock_guard<std::mutex> lock(emulator().mutex);
    *module = load(text).release();
  } catch (const ParseError& error) {
    return failed(kInvalidPtx, error.what());
  }
  return kSuccess;
}
MOEKERN_EXPORT Result cuModuleLoadDataEx(void** module, const void* image, unsigned, void*, void**) {
  return cuModuleLoadData(module, image);
}
MOEKERN_EXPORT Result cuModuleUnload(void* module) { return delete static_cast<Module*>(module), kSuccess; }

MOEKERN_EXPORT Result cuModuleGetFunction(void** function, void* module, const char* name) {
  try {
    const std::lock_guard<std::mutex> lock(emulator().mutex);
    *function = function_of(*static_cast<Module*>(module), name);
  } catch (const ParseError& error) {
    return failed(kInvalidPtx, error.what());
  }
  if (!*function) return failed(kNotFound, std::string("the module has no kernel ") + name);
  return kSuccess;
}
MOEKERN_EXPORT Result cuModuleGetGlobal_v2(uint64_t* address, size_t* bytes, void* module, const char* name) {
  const auto& m = *static_cast<Module*>(module);
  for (const ptx::Variable& v : m.text.variables)
    if (v.name == name && m.globals.count(name)) {
      if (address) *address = m.globals.at(name);
      if (bytes) *bytes = static_cast<size_t>(v.bytes());
      return kSuccess;
    }
  return failed(kNotFound, std::string("the module has no variable ") + name);
}

MOEKERN_EXPORT Result cuFuncSetAttribute(void* function, int attribute, int value) {
  Program& p = static_cast<Function*>(function)->program;
  if (attribute == 8) {  // MAX_DYNAMIC_SHARED_SIZE_BYTES
    if (value < 0 || static_cast<uint32_t>(value) + p.static_bytes > kMaxSharedBytes)
      return failed(kInvalidValue, "dynamic shared memory of " + std::to_string(value) + " bytes: with " +
                                       std::to_string(p.static_bytes) + " static ones a CTA has at most " +
                                       std::to_string(kMaxSharedBytes));
    p.dynamic_limit = static_cast<uint32_t>(value);
  }
  if (attribute == 14) p.non_portable_cluster = value != 0;
  return kSuccess;
}
MOEKERN_EXPORT Result cuFuncGetAttribute(int* value, int attribute, void* function) {
  const Program& p = static_cast<Function*>(function)->program;
  switch (attribute) {
    case 0: return *value = p.function->max_threads ? p.function->max_threads : 1024, kSuccess;
    case 1: return *value = static_cast<int>(p.static_bytes), kSuccess;
    case 3: return *value = static_cast<int>(p.local_bytes), kSuccess;
    case 4: return *value = p.registers > 255 ? 255 : p.registers, kSuccess;
    case 8: return *value = static_cast<int>(p.dynamic_limit), kSuccess;
    default: return *value = 0, kSuccess;
  }
}

MOEKERN_EXPORT Result cuLaunchKernelEx(const LaunchConfig* c, void* function, void** parameters, void** extra) {
  Grid g{
      {c->grid[0], c->grid[1], c->grid[2]}, {c->block[0], c->block[1], c->block[2]}, {1, 1, 1}, c->shared_bytes, false};
  const int* declared = static_cast<Function*>(function)->program.function->cluster;
  if (declared[0])
    for (int d = 0; d < 3; ++d) g.cluster[d] = static_cast<uint32_t>(declared[d]), g.explicit_cluster = true;
  for (unsigned n = 0; n < c->count; ++n)
    if (c->attributes[n].id == kClusterDimension) {
      std::memcpy(g.cluster, c->attributes[n].cluster, sizeof g.cluster);
      g.explicit_cluster = true;
    }
  return launched(function, g, parameters, extra);
}

MOEKERN_EXPORT Result cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                                     unsigned bz, unsigned shared_bytes, void* stream, void** parameters,
                                     void** extra) {
  const LaunchConfig c{{gx, gy, gz}, {bx, by, bz}, shared_bytes, stream, nullptr, 0};
  return cuLaunchKernelEx(&c, function, parameters, extra);
}

MOEKERN_EXPORT Result cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* extents,
                                             const uint64_t* strides, const uint32_t* box,
                                             const uint32_t* element_strides, int interleave, int swizzle,
                                             int promotion, int fill) {
  const std::string why = encode_tiled(map, type, rank, address, extents, strides, box, element_strides, interleave,
                                       swizzle, promotion, fill);
  return why.empty() ? kSuccess : failed(kInvalidValue, "cuTensorMapEncodeTiled: " + why);
}

MOEKERN_EXPORT Result cuMemAlloc_v2(uint64_t* address, size_t bytes) {
  if (!bytes) return failed(kInvalidValue, "cuMemAlloc of no bytes");
  Emulator& e = emulator();
  const std::lock_guard<std::mutex> lock(e.mutex);
  auto memory = std::make_unique<uint64_t[]>((bytes + 512) / 8);
  *address = (reinterpret_cast<uint64_t>(memory.get()) + 255) / 256 * 256;
  e.regions.add(*address, bytes, true);
  e.allocations[*address] = std::move(memory);
  return kSuccess;
}
MOEKERN_EXPORT Result cuMemFree_v2(uint64_t address) {
  Emulator& e = emulator();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.regions.remove(address);
  return e.allocations.erase(address) ? kSuccess : failed(kInvalidValue, "cuMemFree of what cuMemAlloc did not give");
}
MOEKERN_EXPORT Result cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  return std::memcpy(reinterpret_cast<void*>(to), from, bytes), kSuccess;
}
MOEKERN_EXPORT Result cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), kSuccess;
}
MOEKERN_EXPORT Result cuMemsetD8_v2(uint64_t to, unsigned char value, size_t bytes) {
  return std::memset(reinterpret_cast<void*>(to), value, bytes), kSuccess;
}

MOEKERN_EXPORT Result cuGetProcAddress_v2(const char* symbol, void** function, int version, uint64_t flags,
                                          int* status);
MOEKERN_EXPORT Result cuGetProcAddress(const char* symbol, void** function, int version, uint64_t flags) {
  return cuGetProcAddress_v2(symbol, function, version, flags, nullptr);
}
MOEKERN_EXPORT Result cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* status) {
  static const std::map<std::string, void*> functions{
#define MOEKERN_NAMED(NAME) {#NAME, reinterpret_cast<void*>(NAME)}
#define MOEKERN_VERSIONED(NAME) \
  {#NAME, reinterpret_cast<void*>(NAME##_v2)}, {#NAME "_v2", reinterpret_cast<void*>(NAME##_v2)}
      MOEKERN_NAMED(cuGetErrorName),
      MOEKERN_NAMED(cuGetErrorString),
      MOEKERN_NAMED(cuInit),
      MOEKERN_NAMED(cuDriverGetVersion),
      MOEKERN_NAMED(cuDeviceGetCount),
      MOEKERN_NAMED(cuDeviceGet),
      MOEKERN_NAMED(cuDeviceGetName),
      MOEKERN_VERSIONED(cuDeviceTotalMem),
      MOEKERN_NAMED(cuDeviceComputeCapability),
      MOEKERN_NAMED(cuDeviceGetAttribute),
      MOEKERN_NAMED(cuDevicePrimaryCtxRetain),
      MOEKERN_VERSIONED(cuDevicePrimaryCtxRelease),
      MOEKERN_NAMED(cuCtxGetCurrent),
      MOEKERN_NAMED(cuCtxSetCurrent),
      MOEKERN_VERSIONED(cuCtxPushCurrent),
      MOEKERN_VERSIONED(cuCtxPopCurrent),
      MOEKERN_NAMED(cuCtxGetDevice),
      MOEKERN_NAMED(cuCtxSynchronize),
      MOEKERN_NAMED(cuStreamSynchronize),
      MOEKERN_NAMED(cuStreamIsCapturing),
      MOEKERN_NAMED(cuThreadExchangeStreamCaptureMode),
      MOEKERN_NAMED(cuModuleLoadData),
      MOEKERN_NAMED(cuModuleLoadDataEx),
      MOEKERN_NAMED(cuModuleUnload),
      MOEKERN_NAMED(cuModuleGetFunction),
      MOEKERN_VERSIONED(cuModuleGetGlobal),
      MOEKERN_NAMED(cuFuncSetAttribute),
      MOEKERN_NAMED(cuFuncGetAttribute),
      MOEKERN_NAMED(cuLaunchKernelEx),
      MOEKERN_NAMED(cuLaunchKernel),
      MOEKERN_NAMED(cuTensorMapEncodeTiled),
      MOEKERN_VERSIONED(cuMemAlloc),
      MOEKERN_VERSIONED(cuMemFree),
      MOEKERN_VERSIONED(cuMemcpyHtoD),
      MOEKERN_VERSIONED(cuMemcpyDtoH),
      MOEKERN_VERSIONED(cuMemsetD8)};
  const auto found = functions.find(symbol);
  *function = found == functions.end() ? nullptr : found->second;
  if (status) *status = *function ? 0 : 1;
  return *function ? kSuccess : failed(kNotFound, std::string("the emulated driver has no function ") + symbol);
}

// ---- the emulator's own ---------------------------------------------------------------------------------------------

// Kernels may touch these bytes. As long as nothing was allowed, and "strict" is off, they may touch all.
MOEKERN_EXPORT void moekern_emulator_allow(uint64_t address, uint64_t bytes, int writable) {
  Emulator& e = emulator();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.regions.add(address, bytes, writable != 0);
}
MOEKERN_EXPORT int moekern_emulator_forget(uint64_t address) {
  Emulator& e = emulator();
  const std::lock_guard<std::mutex> lock(e.mutex);
  return e.regions.remove(address);
}
MOEKERN_EXPORT void moekern_emulator_forget_all() {
  Emulator& e = emulator();
  const std::lock_guard<std::mutex> lock(e.mutex);
  e.regions.clear();
  for (const auto& [address, memory] : e.allocations) e.regions.add(address, 1, true);
}

// sms, seed, schedule, races, poison, accumulation, patience, strict. 0: no such name, or no such value.
MOEKERN_EXPORT int moekern_emulator_set(const char* name, const char* value) { return set(name, value); }

// Why the last call failed. Empty if it did not.
MOEKERN_EXPORT const char* moekern_emulator_fault() { return emulator().fault.c_str(); }
// The last launch, as JSON.
MOEKERN_EXPORT const char* moekern_emulator_statistics() { return emulator().statistics.c_str(); }

// A module's kernels, as JSON: parameters with their offsets and sizes, registers, memory, opcodes that are not known.
MOEKERN_EXPORT const char* moekern_emulator_describe(void* module) {
  Emulator& e = emulator();
  auto& m = *static_cast<Module*>(module);
  std::string text = "[";
  try {
    for (const ptx::Function& f : m.text.functions) {
      if (!f.is_entry || !f.has_body) continue;
      const Program& p = function_of(m, f.name)->program;
      text += (text.size() > 1 ? ", {" : "{") + std::string("\"name\": \"") + f.name +
              "\", \"threads\": " + std::to_string(f.max_threads) + ", \"registers\": " + std::to_string(p.registers) +
              ", \"instructions\": " + std::to_string(p.code.size()) +
              ", \"shared_bytes\": " + std::to_string(p.static_bytes) +
              ", \"local_bytes\": " + std::to_string(p.local_bytes) + ", \"parameters\": [";
      bool first = true;
      for (const ptx::Variable& v : f.parameters) {
        text += (first ? "{" : ", {") + std::string("\"name\": \"") + v.name + "\", \"type\": \"" + v.type +
                "\", \"offset\": " + std::to_string(p.parameter_offsets.at(v.name)) +
                ", \"bytes\": " + std::to_string(v.bytes()) + "}";
        first = false;
      }
      text += "], \"unknown\": [";
      first = true;
      for (const std::string& name : p.unknown) {
        text += (first ? "\"" : ", \"") + name + "\"";
        first = false;
      }
      text += "]}";
    }
  } catch (const ParseError& error) {
    e.fault = error.what();
    return nullptr;
  }
  e.description = text + "]";
  return e.description.c_str();
}
