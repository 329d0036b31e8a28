// Kernels on a stream, and tensor maps of their operands: all that host code needs to know of the driver.
#pragma once
#include "cuda/kernels/tensor_map.h"
#include "moekern/kernel.h"

namespace moekern::cuda {

struct Launch {
  const char* kernel;  // a name in any of the modules; its module is loaded by the first launch on a device
  unsigned grid[3];
  unsigned threads;         // of a block
  unsigned cluster;         // blocks of a cluster, along x
  unsigned shared_bytes;    // dynamic
  const void* parameters;   // the one struct that the kernel takes, copied by the call
  bool overlapped = false;  // programmatic launch: may begin before the kernel ahead of it has ended, and waits itself
};

// Queues it. Waits for nothing, and may be captured in a graph. An empty grid launches nothing.
void launch(const Launch& what, Stream stream);

struct DeviceLimits {
  int processors;
  int shared_bytes;  // of a block, at most
};

const DeviceLimits& limits(int device);

enum class Swizzle : uint8_t { none, bytes_32, bytes_64, bytes_128 };

constexpr int kMaxRank = 4;

// A tensor in device memory and the box of it that one copy moves. Dimension 0 is the contiguous one.
struct Boxed {
  const void* address = nullptr;
  uint64_t extents[kMaxRank] = {1, 1, 1, 1};
  uint64_t strides[kMaxRank - 1] = {0, 0, 0};  // bytes, of the dimensions from 1 on
  uint32_t box[kMaxRank] = {1, 1, 1, 1};
  int rank = 2;
  Dtype dtype = Dtype::other;  // what lies beyond the extents is read as zeros
  Swizzle swizzle = Swizzle::none;
};

// A matrix whose box has so many rows and columns.
Boxed boxed(const Matrix& m, uint32_t box_rows, uint32_t box_cols, Swizzle swizzle);

// Matrices of one shape; the box is of one of them.
Boxed boxed(const Stack& s, uint32_t box_rows, uint32_t box_cols, Swizzle swizzle);

// Whether there is a tensor map of it: rows contiguous, 16-byte aligned and 16 bytes apart.
bool has_tensor_map(const Matrix& m);
bool has_tensor_map(const Stack& s);

// For operands that are elsewhere at every call: encoded anew.
TensorMap tensor_map(const Boxed& of);

// For weights: remembered by all that it says, so that memory which was freed and holds another tensor has another map.
TensorMap weight_map(const Boxed& of);

}  // namespace moekern::cuda
