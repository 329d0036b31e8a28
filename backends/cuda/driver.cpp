#include "cuda/driver.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>

namespace moekern::cuda {
namespace {

constexpr const char* kVariable = "MOEKERN_CUDA_DRIVER";
constexpr const char* kLibrary = "libcuda.so.1";

// Libraries stay open: contexts and modules belong to them for the rest of the process.
struct Drivers {
  std::mutex mutex;
  std::string wanted;  // by use_driver; empty: the environment's, or the vendor's
  std::map<std::string, std::unique_ptr<const Driver>> open;
  std::atomic<const Driver*> current{nullptr};
};

Drivers& drivers() {
  static Drivers* instance = new Drivers;  // leaked: threads may still launch while statics are destroyed
  return *instance;
}

// dlopen's own words begin with the name of what is missing.
std::unique_ptr<const Driver> opened(const std::string& library) {
  void* handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) throw std::runtime_error(text("no CUDA driver: ", dlerror()));
  auto found = std::make_unique<Driver>();
  found->library = library;
#define MOEKERN_DRIVER_FUNCTION(NAME, PARAMETERS)                                                              \
  found->NAME = reinterpret_cast<Result(*) PARAMETERS>(dlsym(handle, #NAME));                                  \
  if (!found->NAME)                                                                                            \
    throw std::runtime_error(text(library, " has no function " #NAME "; is it a CUDA driver of release 12 or " \
                                           "later?"));
  MOEKERN_DRIVER_FUNCTIONS(MOEKERN_DRIVER_FUNCTION)
#undef MOEKERN_DRIVER_FUNCTION
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(found->cuInit), &info) && info.dli_fname) {
    const std::string path = info.dli_fname;
    found->folder = path.substr(0, path.rfind('/') + 1);
  }
  return found;
}

}  // namespace

void Driver::fail(Result result, const std::string& what) const {
  const char *name = nullptr, *words = nullptr;
  cuGetErrorName(result, &name);
  cuGetErrorString(result, &words);
  throw std::runtime_error(text(what, ": ", name ? name : text("CUDA error ", result), words ? " (" : "",
                                words ? words : "", words ? ")" : ""));
}

const Driver& driver() {
  Drivers& all = drivers();
  if (const Driver* current = all.current.load(std::memory_order_acquire)) return *current;
  const std::lock_guard<std::mutex> lock(all.mutex);
  const char* named = std::getenv(kVariable);
  const std::string library = !all.wanted.empty() ? all.wanted : named && *named ? named : kLibrary;
  auto& found = all.open[library];
  if (!found) found = opened(library);
  all.current.store(found.get(), std::memory_order_release);
  return *found;
}

void use_driver(const char* library) {
  Drivers& all = drivers();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.wanted = library ? library : "";
  all.current.store(nullptr, std::memory_order_release);
}

std::string why_no_driver() {
  try {
    int version = 0;
    const Driver& d = driver();
    d.check(d.cuDriverGetVersion(&version), "cuDriverGetVersion of ", d.library);
    if (version / 1000 >= MOEKERN_CUDA_MAJOR) return "";
    return text("the driver is of CUDA ", version / 1000, ".", version % 1000 / 10,
                "; these kernels are compiled for a driver of CUDA ", MOEKERN_CUDA_MAJOR, ".0 or later");
  } catch (const std::runtime_error& error) {
    return error.what();
  }
}

}  // namespace moekern::cuda
