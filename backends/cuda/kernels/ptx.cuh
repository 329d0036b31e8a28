// The instructions of sm_90a that have no name in CUDA C++, each under the name that the PTX manual gives it. All
// inline assembly is here. Shared memory is addressed by 32-bit numbers, as PTX does.
#pragma once
#include <cstdint>

#include "cuda/kernels/tensor_map.h"

namespace moekern::cuda {

// ---- places

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// The address in block `rank` of the cluster of what lies at `address` in this one.
__device__ inline uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ inline float load_shared_cluster(uint32_t address) {
  float x;
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

// What all lanes of a warp have alike, in a uniform register: the operands of wgmma have to be there.
__device__ inline uint32_t uniform(uint32_t x) { return __reduce_or_sync(~0u, x); }

// ---- mbarriers. A phase ends when all arrivals and all announced bytes have come.

__device__ inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// What other blocks and the asynchronous proxy need before they use barriers that were initialised here.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// barrier: an address of map_shared.
__device__ inline void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// The same, handing what this thread has seen written over to whoever waits with mbarrier_wait_cluster.
__device__ inline void mbarrier_release_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ inline void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Arrives when this thread's cp.async before it are done. noinc: the barrier was initialised to count it.
__device__ inline void cp_async_mbarrier_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Until the phase of that parity has ended.
__device__ inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

// The same for a whole warp. That all lanes go on together is plain to the compiler here, which then keeps what they
// have in common in uniform registers.
__device__ inline void mbarrier_wait_warp(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "vote.sync.all.pred ended, ended, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

// As mbarrier_wait, where threads of other blocks have arrived with what they wrote.
__device__ inline void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  do {
    asm volatile(
        "{\n.reg .pred ended;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n}"
        : "=r"(ended)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!ended);
}

// ---- other barriers and fences

__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// Of `threads` threads, which name it by the same number; 0 is __syncthreads.
__device__ inline void named_barrier(int number, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// What was written to shared memory may be read by the TMA unit and by wgmma.
__device__ inline void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers of a warp group

template <int kRegisters>
__device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- copies

__device__ inline void prefetch_tensor_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The box at (x, y, z) of a tensor to shared memory; its bytes count towards the barrier.
__device__ inline void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::
          "r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same to every block of the cluster that `blocks` has a bit for, at the same address and for the same barrier
// there.
__device__ inline void tma_load_multicast(uint32_t to, const TensorMap* map, uint32_t barrier, uint16_t blocks, int x,
                                          int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
      "l"(map), "r"(barrier), "h"(blocks), "r"(x), "r"(y), "r"(z)
      : "memory");
}

__device__ inline void tma_store(const TensorMap* map, uint32_t from, int x, int y, int z) {
  asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(from),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}

__device__ inline void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until this thread's stores have read their shared memory.
__device__ inline void bulk_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

__device__ inline void cp_async_4(uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ inline void cp_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ inline float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
}

__device__ inline void load_shared(uint32_t address, float& x, float& y) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(address) : "memory");
}

__device__ inline void load_shared(uint32_t address, float& x, float& y, float& z, float& w) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x), "=f"(y), "=f"(z), "=f"(w)
               : "r"(address)
               : "memory");
}

__device__ inline void store_shared(uint32_t address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}

__device__ inline void store_shared(uint32_t address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// ---- matrices of 8 rows of 16 bytes between registers and shared memory, four at a time. Lane l has the address of
// row l % 8 of matrix l / 8; in registers it holds bytes 4 (l % 4) .. + 3 of row l / 4 of each.

__device__ inline void stmatrix_x4(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Transposed as matrices of 16-bit elements: lane l gets, of elements l / 4, those of rows 2 (l % 4) and + 1.
__device__ inline void ldmatrix_x4_trans(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

// ---- wgmma

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// Where wgmma finds an operand: the low half of a matrix descriptor. Bits 0 to 13: the address, in units of 16 bytes as
// all that follows, so that adding 2 goes 32 columns on. Bits 16 to 29: 1, which this layout does not use.
__device__ inline uint32_t descriptor(uint32_t address) { return (address & 0x3FFFF) >> 4 | 1 << 16; }

// The whole of it, for what TMA writes with a swizzle of 128 bytes: rows of 128 bytes, in eights of 1024 bytes (the
// stride between them, in bits 32 to 45), swizzle 1 in bits 62 and 63.
__device__ inline uint64_t matrix_descriptor(uint32_t low) { return uint64_t{1 << 30 | 1024 / 16} << 32 | low; }

// sums (+)= a [64, 32] b [N, 32]^T for four warps together, e4m3. Of warp w, lane l has rows 16 w + l / 4 and + 8 of
// columns 2 (l % 4) and + 1 of every eight: sums[4 j + 2 i + c] is row + 8 i, column 8 j + c.
template <int kColumns, bool kAdd> struct Wgmma;

#define MOEKERN_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MOEKERN_F8(i) MOEKERN_F4(i), MOEKERN_F4(i + 4)
#define MOEKERN_F16(i) MOEKERN_F8(i), MOEKERN_F8(i + 8)
#define MOEKERN_F32(i) MOEKERN_F16(i), MOEKERN_F16(i + 16)
#define MOEKERN_R4 "%0, %1, %2, %3"
#define MOEKERN_R8 MOEKERN_R4 ", %4, %5, %6, %7"
#define MOEKERN_R16 MOEKERN_R8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOEKERN_R24 MOEKERN_R16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MOEKERN_R32 MOEKERN_R24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MOEKERN_R40 MOEKERN_R32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MOEKERN_R48 MOEKERN_R40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MOEKERN_R56 MOEKERN_R48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MOEKERN_R64 MOEKERN_R56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MOEKERN_R72 MOEKERN_R64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MOEKERN_R80 MOEKERN_R72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MOEKERN_R88 MOEKERN_R80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MOEKERN_R96 MOEKERN_R88 ", %88, %89, %90, %91, %92, %93, %94, %95"

// A, B and ADD are the numbers of the operands behind the sums.
#define MOEKERN_WGMMA(N, REGISTERS, A, B, ADD, ...)                                                         \
  template <bool kAdd> struct Wgmma<N, kAdd> {                                                              \
    __device__ static void run(float (&d)[N / 2], uint64_t a, uint64_t b) {                                 \
      asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N \
                   "k32.f32.e4m3.e4m3 {" REGISTERS "}, " A ", " B ", add, 1, 1;\n}"                         \
                   : __VA_ARGS__                                                                            \
                   : "l"(a), "l"(b), "n"(int{kAdd}));                                                       \
    }                                                                                                       \
  };

MOEKERN_WGMMA(8, MOEKERN_R4, "%4", "%5", "%6", MOEKERN_F4(0))
MOEKERN_WGMMA(16, MOEKERN_R8, "%8", "%9", "%10", MOEKERN_F8(0))
MOEKERN_WGMMA(32, MOEKERN_R16, "%16", "%17", "%18", MOEKERN_F16(0))
MOEKERN_WGMMA(48, MOEKERN_R24, "%24", "%25", "%26", MOEKERN_F16(0), MOEKERN_F8(16))
MOEKERN_WGMMA(64, MOEKERN_R32, "%32", "%33", "%34", MOEKERN_F32(0))
MOEKERN_WGMMA(80, MOEKERN_R40, "%40", "%41", "%42", MOEKERN_F32(0), MOEKERN_F8(32))
MOEKERN_WGMMA(96, MOEKERN_R48, "%48", "%49", "%50", MOEKERN_F32(0), MOEKERN_F16(32))
MOEKERN_WGMMA(112, MOEKERN_R56, "%56", "%57", "%58", MOEKERN_F32(0), MOEKERN_F16(32), MOEKERN_F8(48))
MOEKERN_WGMMA(128, MOEKERN_R64, "%64", "%65", "%66", MOEKERN_F32(0), MOEKERN_F32(32))
MOEKERN_WGMMA(144, MOEKERN_R72, "%72", "%73", "%74", MOEKERN_F32(0), MOEKERN_F32(32), MOEKERN_F8(64))
MOEKERN_WGMMA(160, MOEKERN_R80, "%80", "%81", "%82", MOEKERN_F32(0), MOEKERN_F32(32), MOEKERN_F16(64))
MOEKERN_WGMMA(192, MOEKERN_R96, "%96", "%97", "%98", MOEKERN_F32(0), MOEKERN_F32(32), MOEKERN_F32(64))

#undef MOEKERN_WGMMA

// The same of 128 columns, with a in registers: of warp w's 16 rows, lane l has bytes 4 (l % 4) .. + 3 of row l / 4 in
// a[0] and of row l / 4 + 8 in a[1]; in a[2] and a[3] the bytes 16 further on.
template <bool kAdd>
__device__ inline void wgmma_registers(float (&d)[64], const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" MOEKERN_R64
      "}, {%64, %65, %66, %67}, %68, add, 1, 1;\n}"
      : MOEKERN_F32(0), MOEKERN_F32(32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int{kAdd}));
}

// sums = a [64, 128] b [kColumns, 128]^T, of `descriptor`s.
template <int kColumns>
__device__ inline void multiply(float (&sums)[kColumns / 2], uint32_t a, uint32_t b) {
  wgmma_fence();
  Wgmma<kColumns, false>::run(sums, matrix_descriptor(a), matrix_descriptor(b));
  Wgmma<kColumns, true>::run(sums, matrix_descriptor(a + 2), matrix_descriptor(b + 2));
  Wgmma<kColumns, true>::run(sums, matrix_descriptor(a + 4), matrix_descriptor(b + 4));
  Wgmma<kColumns, true>::run(sums, matrix_descriptor(a + 6), matrix_descriptor(b + 6));
  wgmma_commit();
}

}  // namespace moekern::cuda
