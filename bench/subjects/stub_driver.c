// A CUDA driver that does nothing and remembers what it was asked: for tests, and to time all that comes before a
// driver. Variables that begin with `stub_` are for whoever loads it too.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { kDevices = 8, kNameBytes = 64 };

int stub_version = 13000;
char stub_fails[kNameBytes];  // the function that fails
int stub_result = 1;          // and with what
int stub_loads, stub_lookups, stub_attributes, stub_launches, stub_maps, stub_retained;
long stub_load_nanoseconds;    // that loading a module takes
unsigned char stub_image[16];  // what the last one begins with
int stub_capture_mode;         // in which it was loaded

struct {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  int device, cluster, overlapped;  // device: of the current context
  char kernel[kNameBytes];
} stub_launch;

static int contexts[kDevices];
static _Thread_local void* current;
static _Thread_local int capture_mode;

static int result_of(const char* function) { return strcmp(function, stub_fails) ? 0 : stub_result; }

int cuGetErrorName(int result, const char** name) {
  *name = result == 209   ? "CUDA_ERROR_NO_BINARY_FOR_GPU"
          : result == 500 ? "CUDA_ERROR_NOT_FOUND"
                          : "CUDA_ERROR_INVALID_VALUE";
  return 0;
}

int cuGetErrorString(int result, const char** text) {
  *text = result == 209 ? "no kernel image is available for execution on the device" : "the driver's own words";
  return 0;
}

int cuInit(unsigned flags) {
  (void)flags;
  return result_of("cuInit");
}

int cuDriverGetVersion(int* version) {
  *version = stub_version;
  return result_of("cuDriverGetVersion");
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return ordinal < kDevices ? result_of("cuDeviceGet") : 101;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
  (void)device;
  *value = attribute == 16 ? 132 : 232448;
  return result_of("cuDeviceGetAttribute");
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
  __atomic_add_fetch(&stub_retained, 1, __ATOMIC_SEQ_CST);
  *context = &contexts[device];
  return result_of("cuDevicePrimaryCtxRetain");
}

int cuCtxGetCurrent(void** context) {
  *context = current;
  return result_of("cuCtxGetCurrent");
}

int cuCtxSetCurrent(void* context) {
  current = context;
  return result_of("cuCtxSetCurrent");
}

int cuThreadExchangeStreamCaptureMode(int* mode) {
  const int before = capture_mode;
  capture_mode = *mode;
  *mode = before;
  return 0;
}

int cuModuleLoadData(void** module, const void* image) {
  const struct timespec pause = {0, stub_load_nanoseconds};
  nanosleep(&pause, NULL);
  __atomic_add_fetch(&stub_loads, 1, __ATOMIC_SEQ_CST);
  memcpy(stub_image, image, sizeof stub_image);
  stub_capture_mode = capture_mode;
  *module = (void*)image;
  return result_of("cuModuleLoadData");
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
  (void)module;
  __atomic_add_fetch(&stub_lookups, 1, __ATOMIC_SEQ_CST);
  *function = strdup(name);
  return result_of("cuModuleGetFunction");
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
  (void)function, (void)attribute, (void)value;
  __atomic_add_fetch(&stub_attributes, 1, __ATOMIC_SEQ_CST);
  return result_of("cuFuncSetAttribute");
}

typedef struct {
  int id;
  int padding;
  union {
    unsigned cluster[3];
    int allowed;
    char room[64];
  } value;
} Attribute;

typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void* stream;
  Attribute* attributes;
  unsigned count;
} Config;

int cuLaunchKernelEx(const Config* config, void* function, void** parameters, void** extra) {
  (void)parameters, (void)extra;
  __atomic_add_fetch(&stub_launches, 1, __ATOMIC_SEQ_CST);
  memcpy(stub_launch.grid, config->grid, sizeof config->grid);
  memcpy(stub_launch.block, config->block, sizeof config->block);
  stub_launch.shared_bytes = config->shared_bytes;
  stub_launch.stream = config->stream;
  stub_launch.device = current ? (int)((int*)current - contexts) : -1;
  stub_launch.cluster = 1;
  stub_launch.overlapped = 0;
  for (unsigned i = 0; i < config->count; ++i) {
    if (config->attributes[i].id == 4) stub_launch.cluster = (int)config->attributes[i].value.cluster[0];
    if (config->attributes[i].id == 6) stub_launch.overlapped = config->attributes[i].value.allowed;
  }
  strncpy(stub_launch.kernel, function, kNameBytes - 1);
  return result_of("cuLaunchKernelEx");
}

int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* address, const uint64_t* extents,
                           const uint64_t* strides, const uint32_t* box, const uint32_t* element_strides,
                           int interleave, int swizzle, int promotion, int fill) {
  (void)type, (void)rank, (void)extents, (void)strides, (void)box, (void)element_strides, (void)interleave;
  (void)swizzle, (void)promotion, (void)fill;
  __atomic_add_fetch(&stub_maps, 1, __ATOMIC_SEQ_CST);
  memset(map, 0, 128);
  memcpy(map, &address, sizeof address);
  return result_of("cuTensorMapEncodeTiled");
}
