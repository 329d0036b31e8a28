#include "cpu/parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moekern::cpu {
namespace {

// f32 subnormals carry FP8 subnormals (gemm/decode.h), so a region runs with flush-to-zero and
// denormals-are-zero off and rounding to nearest, whatever the caller has set.
class PlainFloatMode {
 public:
#if defined(__x86_64__)
  PlainFloatMode() : saved_(_mm_getcsr()) {
    constexpr unsigned kFtz = 0x8000, kRounding = 0x6000, kDaz = 0x0040;
    _mm_setcsr(saved_ & ~(kFtz | kRounding | kDaz));
  }
  ~PlainFloatMode() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__)
  PlainFloatMode() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    constexpr uint64_t kFlushToZero = 1ull << 24, kRounding = 3ull << 22;
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_ & ~(kFlushToZero | kRounding)));
  }
  ~PlainFloatMode() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

struct Region {
  RegionFn fn;
  void* context;
  void run() const {
    PlainFloatMode mode;
    fn(context);
  }
};

void run_region_thunk(void* region) { static_cast<const Region*>(region)->run(); }

// GOMP_parallel is the entry that every compiled `#pragma omp parallel` calls (libgomp, and libomp
// and libiomp5 for compatibility). Two OpenMP runtimes in one process fight over the cores, each
// spinning while the other works; so the one that libtorch_cpu is linked to is borrowed.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_torch_openmp() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_NOLOAD | RTLD_LAZY | RTLD_LOCAL);
  return torch ? reinterpret_cast<GompParallel>(dlsym(torch, "GOMP_parallel")) : nullptr;
}

std::atomic<bool> forked{false};

// The team to borrow, or null where ours is to be used.
GompParallel torch_openmp() {
  static std::atomic<GompParallel> openmp{nullptr};
  if (forked) return nullptr;
  GompParallel parallel = openmp.load(std::memory_order_relaxed);
  if (!parallel && (parallel = find_torch_openmp())) openmp = parallel;
  return parallel;
}

// Workers that sleep on a condition variable: for a process without torch's OpenMP, and for a
// forked child, where libgomp's threads no longer exist but libgomp does not know.
class Team {
 public:
  void run(int threads, const Region& region) {
    std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
    if (!busy.owns_lock()) return region.run();  // another caller's region is under way
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back([this, id = workers_.size()] { work(id); });
      region_ = &region;
      wanted_ = threads - 1;
      pending_ = threads - 1;
      ++round_;
    }
    start_.notify_all();
    region.run();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return pending_ == 0; });
  }

 private:
  void work(size_t id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return round_ != seen; });
      seen = round_;
      if (static_cast<int>(id) >= wanted_) continue;
      const Region* region = region_;
      lock.unlock();
      region->run();
      lock.lock();
      if (--pending_ == 0) done_.notify_one();
    }
  }

  std::mutex busy_, mutex_;
  std::condition_variable start_, done_;
  std::vector<std::thread> workers_;
  const Region* region_ = nullptr;
  int wanted_ = 0, pending_ = 0;
  uint64_t round_ = 0;
};

// Never destroyed: workers sleep in it until the process ends. A forked child starts a new one.
std::atomic<Team*> team{nullptr};

void after_fork_in_child() {
  forked = true;
  team = nullptr;
}

// When the library is loaded, not at the first region: torch may use its threads, and fork, before that.
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork_in_child);

Team& own_team() {
  static std::mutex creation;
  std::lock_guard<std::mutex> lock(creation);
  if (!team) team = new Team;
  return *team;
}

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~Buffer() { std::free(data); }
};

}  // namespace

void run_region(int threads, RegionFn fn, void* context) {
  Region region{fn, context};
  if (threads <= 1) return region.run();
  if (GompParallel parallel = torch_openmp())
    return parallel(run_region_thunk, &region, static_cast<unsigned>(threads), 0);
  own_team().run(threads, region);
}

const char* thread_team() { return torch_openmp() ? "torch's OpenMP" : "moekern's own"; }

void* scratch(Slot slot, size_t bytes) {
  static thread_local Buffer buffers[static_cast<int>(Slot::count)];
  Buffer& buffer = buffers[static_cast<int>(slot)];
  if (bytes > buffer.bytes) {
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.bytes = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    buffer.data = std::aligned_alloc(4096, rounded);
    if (!buffer.data) throw std::bad_alloc();
    buffer.bytes = rounded;
  }
  return buffer.data;
}

}  // namespace moekern::cpu
