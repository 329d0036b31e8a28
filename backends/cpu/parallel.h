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

// body(task) for every task in [0, tasks), handed out one at a time: on a shared machine the threads
// are never equally fast. A task's result may not depend on which thread runs it.
template <class Body>
void parallel_for(int threads, int64_t tasks, const Body& body) {
  struct Context {
    const Body& body;
    int64_t tasks;
    std::atomic<int64_t> next{0};
  } context{body, tasks};
  const auto work = [](void* p) {
    auto& c = *static_cast<Context*>(p);
    for (int64_t t; (t = c.next.fetch_add(1, std::memory_order_relaxed)) < c.tasks;) c.body(t);
  };
  if (threads > tasks) threads = static_cast<int>(tasks);
  run_region(threads, work, &context);
}

// Scratch memory of the calling thread, 64-byte aligned, kept for its next call. Each slot is one
// buffer; its contents survive only until somebody asks for the slot again.
enum class Slot { shared_a, own_a, own_b, own_c, row, count };
void* scratch(Slot slot, size_t bytes);

template <class T>
T* scratch_of(Slot slot, int64_t count) {
  return static_cast<T*>(scratch(slot, static_cast<size_t>(count) * sizeof(T)));
}

}  // namespace moekern::cpu
