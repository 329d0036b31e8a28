// One team of threads per process: torch's own OpenMP team where torch runs one, ours otherwise.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace moekern::cpu {

using RegionFn = void (*)(void* context);

// Runs fn on up to `threads` threads at once, the caller's among them, and returns when all are done.
void run_region(int threads, RegionFn fn, void* context);

const char* thread_team();  // whose threads those are

// Each thread walks a contiguous share of the tasks, so that what it prefetches past the end of one
// is the next; a thread that is done early takes tasks from the others' shares. On a shared machine
// threads are never equally fast.
class Shares {
 public:
  Shares(int threads, int64_t tasks) : threads_(threads < kMaxShares ? threads : kMaxShares) {
    for (int i = 0; i < threads_; ++i) {
      share_[i].next = tasks * i / threads_;
      share_[i].end = tasks * (i + 1) / threads_;
    }
  }
  template <class Body>
  void work(const Body& body) {
    const int own = entered_.fetch_add(1) % threads_;
    for (int i = 0; i < threads_; ++i) {
      Share& share = share_[(own + i) % threads_];
      for (int64_t task; (task = share.next.fetch_add(1)) < share.end;) body(task);
    }
  }

 private:
  static constexpr int kMaxShares = 256;
  struct alignas(64) Share {  // a cache line each
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  Share share_[kMaxShares];
  int threads_;
  std::atomic<int> entered_{0};
};

// body(task) for every task in [0, tasks). A task's result may not depend on which thread runs it.
template <class Body>
void parallel_for(int threads, int64_t tasks, const Body& body) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads <= 1) {  // without the shares, which cost as much as a small product
    struct Context {
      const Body& body;
      int64_t tasks;
    } context{body, tasks};
    return run_region(
        1,
        [](void* p) {
          const auto& c = *static_cast<Context*>(p);
          for (int64_t task = 0; task < c.tasks; ++task) c.body(task);
        },
        &context);
  }
  struct Context {
    const Body& body;
    Shares shares;
  } context{body, {threads, tasks}};
  run_region(
      threads,
      [](void* p) {
        auto& c = *static_cast<Context*>(p);
        c.shares.work(c.body);
      },
      &context);
}

// Scratch memory of the calling thread, 64-byte aligned, kept for its next call. Each slot is one
// buffer; its contents survive only until somebody asks for the slot again.
enum class Slot { shared_a, own_a, own_b, own_c, row, experts, panel, own_sums, own_totals, count };
void* scratch(Slot slot, size_t bytes);

template <class T>
T* scratch_of(Slot slot, int64_t count) {
  return static_cast<T*>(scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace moekern::cpu
