// A launch that may begin before the one ahead of it on the stream has ended.
#pragma once

namespace moekern::cuda {

// In the launch ahead: once all of its blocks have said so, the next may begin.
__device__ inline void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// In the next: until the launch ahead has ended and its writes are there. Nothing of it may be read before.
__device__ inline void wait_for_launch_ahead() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

}  // namespace moekern::cuda
