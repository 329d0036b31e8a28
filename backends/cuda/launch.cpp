#include "cuda/launch.h"

#include <array>
#include <atomic>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string_view>
#include <unordered_map>

#include "cuda/driver.h"
#include "cuda/modules.h"

namespace moekern::cuda {
namespace {

constexpr int kMaxDevices = 64;
constexpr unsigned kSharedWithoutAsking = 48 << 10;  // dynamic bytes that every kernel may have

struct Function {
  explicit Function(void* of) : handle(of) {}
  void* handle;
  std::atomic<unsigned> shared_bytes{kSharedWithoutAsking};
};

// Makes a device's primary context, which torch uses too, the thread's for as long as this lives.
class InContext {
 public:
  InContext(const Driver& d, void* context) : d_(d) {
    d.check(d.cuCtxGetCurrent(&before_), "cuCtxGetCurrent");
    if (before_ == context) return;
    d.check(d.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    changed_ = true;
  }
  ~InContext() {
    if (changed_) d_.cuCtxSetCurrent(before_);
  }

 private:
  const Driver& d_;
  void* before_ = nullptr;
  bool changed_ = false;
};

// Lets a thread that captures a graph do what takes no part in it, such as loading a module.
class Uncaptured {
 public:
  explicit Uncaptured(const Driver& d) : d_(d) {
    d.check(d.cuThreadExchangeStreamCaptureMode(&mode_), "cuThreadExchangeStreamCaptureMode");
  }
  ~Uncaptured() { d_.cuThreadExchangeStreamCaptureMode(&mode_); }

 private:
  const Driver& d_;
  int mode_ = kRelaxedCapture;
};

// What is loaded on one device.
class OnDevice {
 public:
  OnDevice(const Driver& d, int ordinal) : d_(d), ordinal_(ordinal) {
    int device;
    d.check(d.cuDeviceGet(&device, ordinal), "cuDeviceGet of device ", ordinal);
    const auto attribute = [&](int which) {
      int value = 0;
      d.check(d.cuDeviceGetAttribute(&value, which, device), "cuDeviceGetAttribute ", which, " of device ", ordinal);
      return value;
    };
    limits_ = {attribute(kProcessors), attribute(kSharedBytesOptIn)};
    d.check(d.cuDevicePrimaryCtxRetain(&context_, device), "cuDevicePrimaryCtxRetain of device ", ordinal);
  }

  const DeviceLimits& limits() const { return limits_; }

  void launch(const Launch& what, void* stream) {
    const InContext here(d_, context_);
    Function& f = function(what.kernel);
    if (what.shared_bytes > f.shared_bytes.load(std::memory_order_relaxed)) allow(f, what);
    LaunchAttribute attributes[2];
    unsigned count = 0;
    if (what.cluster > 1) {
      attributes[count].id = LaunchAttribute::kClusterDimension;
      attributes[count].cluster[0] = what.cluster;
      attributes[count].cluster[1] = attributes[count].cluster[2] = 1;
      ++count;
    }
    if (what.overlapped) {
      attributes[count].id = LaunchAttribute::kProgrammaticSerialization;
      attributes[count].allowed = 1;
      ++count;
    }
    const LaunchConfig config{
        {what.grid[0], what.grid[1], what.grid[2]}, {what.threads, 1, 1}, what.shared_bytes, stream, attributes, count};
    void* parameters[] = {const_cast<void*>(what.parameters)};
    d_.check(d_.cuLaunchKernelEx(&config, f.handle, parameters, nullptr), "cuLaunchKernelEx of ", what.kernel,
             " (grid ", what.grid[0], " x ", what.grid[1], " x ", what.grid[2], ", ", what.threads,
             " threads, clusters of ", what.cluster, ", ", what.shared_bytes, " bytes of shared memory) on device ",
             ordinal_);
  }

 private:
  Function& function(const char* name) {
    {
      const std::shared_lock<std::shared_mutex> lock(mutex_);
      if (const auto found = functions_.find(name); found != functions_.end()) return found->second;
    }
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    for (const Module* module : modules())
      for (const char* kernel : module->kernels)
        if (std::string_view(kernel) == name) {
          if (const auto found = functions_.find(name); found != functions_.end()) return found->second;
          void* handle;  // kept only where there was no error, whatever the driver has written
          d_.check(d_.cuModuleGetFunction(&handle, loaded(*module), kernel), "cuModuleGetFunction of ", kernel,
                   " in module ", module->name, " on device ", ordinal_);
          return functions_.try_emplace(kernel, handle).first->second;
        }
    throw std::runtime_error(text("no module has a kernel named ", name));
  }

  void* loaded(const Module& m) {
    if (const auto found = modules_.find(&m); found != modules_.end()) return found->second;
    void* module;
    const Uncaptured now(d_);
    const std::string ptx = d_.folder + m.name + ".ptx";
    if (std::ifstream file(ptx, std::ios::binary); file) {  // a driver with PTX beside it takes no cubins
      const std::string source((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
      d_.check(d_.cuModuleLoadData(&module, source.c_str()), "cuModuleLoadData of ", ptx, " on device ", ordinal_);
    } else {
      d_.check(d_.cuModuleLoadData(&module, m.image), "cuModuleLoadData of module ", m.name, " (", m.end - m.image,
               " bytes for sm_90a) on device ", ordinal_);
    }
    return modules_[&m] = module;
  }

  void allow(Function& f, const Launch& what) {
    const std::lock_guard<std::shared_mutex> lock(mutex_);
    if (what.shared_bytes <= f.shared_bytes.load(std::memory_order_relaxed)) return;
    d_.check(d_.cuFuncSetAttribute(f.handle, kDynamicSharedBytes, static_cast<int>(what.shared_bytes)),
             "cuFuncSetAttribute of ", what.kernel, ": ", what.shared_bytes,
             " bytes of shared memory, of which device ", ordinal_, " has ", limits_.shared_bytes);
    f.shared_bytes.store(what.shared_bytes, std::memory_order_relaxed);
  }

  const Driver& d_;
  int ordinal_;
  void* context_ = nullptr;
  DeviceLimits limits_;
  std::shared_mutex mutex_;
  std::map<const Module*, void*> modules_;
  std::unordered_map<std::string_view, Function> functions_;  // whose names the modules own; nodes stay where they are
};

// What is loaded through one driver.
struct Session {
  explicit Session(const Driver& d) : driver(d) {}
  const Driver& driver;
  std::array<std::atomic<OnDevice*>, kMaxDevices> devices{};
};

Session& session() {
  static std::atomic<Session*> current{nullptr};
  static std::mutex* mutex = new std::mutex;  // leaked, as the driver is
  static auto* sessions = new std::map<const Driver*, std::unique_ptr<Session>>;
  const Driver& d = driver();
  Session* s = current.load(std::memory_order_acquire);
  if (s && &s->driver == &d) return *s;
  const std::lock_guard<std::mutex> lock(*mutex);
  auto& found = (*sessions)[&d];
  if (!found) {
    d.check(d.cuInit(0), "cuInit of ", d.library);
    found = std::make_unique<Session>(d);
  }
  current.store(found.get(), std::memory_order_release);
  return *found;
}

OnDevice& on_device(int ordinal) {
  if (ordinal < 0 || ordinal >= kMaxDevices)
    throw std::runtime_error(text("device ", ordinal, " is none; devices are numbered from 0 to ", kMaxDevices - 1));
  Session& s = session();
  std::atomic<OnDevice*>& slot = s.devices[static_cast<size_t>(ordinal)];
  if (OnDevice* found = slot.load(std::memory_order_acquire)) return *found;
  static std::mutex* mutex = new std::mutex;
  const std::lock_guard<std::mutex> lock(*mutex);
  if (!slot.load(std::memory_order_relaxed)) slot.store(new OnDevice(s.driver, ordinal), std::memory_order_release);
  return *slot.load(std::memory_order_relaxed);
}

}  // namespace

void launch(const Launch& what, Stream stream) {
  if (!what.grid[0] || !what.grid[1] || !what.grid[2]) return;
  on_device(stream.device).launch(what, stream.handle);
}

const DeviceLimits& limits(int device) { return on_device(device).limits(); }

}  // namespace moekern::cuda
