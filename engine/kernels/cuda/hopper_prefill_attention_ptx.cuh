// What Hopper's attention kernel needs of the machine: barriers in shared memory, tensor copies and
// the warpgroup's matrix products (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions").
// Compiles for sm_90a alone.
#pragma once

#include <cstdint>
#include <cuda.h>

#include "engine/kernels/cuda/ptx.cuh"

namespace tandem::engine::cuda::hopper_attention {

// --- Barriers in shared memory -------------------------------------------------------------------

__device__ inline void InitBarrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers visible to the copy engine.
__device__ inline void FenceBarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and
// of the tensor cores (with a barrier between, other threads' ones).
__device__ inline void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and lets the phase end only when `bytes` more have been copied.
__device__ inline void ArriveExpecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void Arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits for the end of the phase of this parity.
__device__ inline void Await(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The block's numbered barriers: Sync waits until `threads` threads have come, by Sync or Signal.
__device__ inline void SyncNamed(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void SignalNamed(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// --- Copies --------------------------------------------------------------------------------------

__device__ inline void PrefetchTensorMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the map's box at (column, row) to shared memory and counts its bytes on the barrier. What
// lies outside the tensor becomes zero, and counts.
__device__ inline void CopyBox(uint32_t to, const CUtensorMap* map, int column, int row,
                               uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
__device__ inline void CopyBox(uint32_t to, const CUtensorMap* map, int column, int row, int plane,
                               uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(column), "r"(row), "r"(plane), "r"(barrier)
      : "memory");
}

// --- Registers -----------------------------------------------------------------------------------

template <int kRegisters>
__device__ inline void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- Products ------------------------------------------------------------------------------------
// d[64][N] (+)= a[64][16] b[16][N] by the four warps of a warpgroup, bfloat16 in, float32 out.
// Thread t of the warpgroup holds of d, in d[i]:
//   row 16 (t / 32) + (t % 32) / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (t % 4) + i % 2,
// and of a in registers, a[i], pairs of columns: the same row with i % 2, column 8 (i / 2) + 2 (t %
// 4): so what d holds of 16 columns is, converted, what a wants.

// The description of a matrix in shared memory in rows of 128 bytes, 8 of them a swizzled group of
// 1024 bytes (1024-byte aligned), groups following each other. Where the rows run along the sum
// (K-major), a step of 16 elements of the sum is 32 bytes on. Where they run across it (MN-major),
// a step is 2048 bytes on, and the next 64 elements of the row lie `next_columns` bytes on.
__device__ inline uint64_t DescribeMatrix(uint32_t address, uint32_t next_columns) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kGroupStride = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kGroupStride | (static_cast<uint64_t>(next_columns / 16) << 16) |
         (address / 16 & 0x3fff);
}

// Before the first product and wherever registers that a product reads or adds to were written by
// other instructions.
__device__ inline void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void CommitProducts() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most kPending committed groups are unfinished.
template <int kPending>
__device__ inline void WaitForProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving accesses of these registers across.
template <int kCount>
__device__ inline void Pin(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}
template <int kCount>
__device__ inline void Pin(uint32_t (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

#define TANDEM_D32                                                                             \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define TANDEM_D64                                                                               \
  TANDEM_D32                                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
  "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define TANDEM_F8(d, i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define TANDEM_F32(d, i) \
  TANDEM_F8(d, i), TANDEM_F8(d, i + 8), TANDEM_F8(d, i + 16), TANDEM_F8(d, i + 24)

// a and b K-major in shared memory; kAdd: d += a b, else d = a b.
#define TANDEM_PRODUCT_SHARED(N, COUNT, D, A, B, ADD, ...)                                     \
  template <bool kAdd>                                                                         \
  __device__ inline void Multiply(float(&d)[COUNT], uint64_t a, uint64_t b) {                  \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                   \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D "}, " A ", " B \
                 ", add, 1, 1, 0, 0;\n}"                                                       \
                 : __VA_ARGS__                                                                 \
                 : "l"(a), "l"(b), "n"(kAdd ? 1 : 0));                                         \
  }
TANDEM_PRODUCT_SHARED(128, 64, TANDEM_D64, "%64", "%65", "%66", TANDEM_F32(d, 0), TANDEM_F32(d, 32))
#undef TANDEM_PRODUCT_SHARED

// d (+)= a b, a in registers, b K-major (kTransposed 0) or MN-major (1) in shared memory.
#define TANDEM_PRODUCT_REGISTERS(N, COUNT, D, A, B, ADD, TRANSPOSED, ...)                      \
  template <bool kAdd, int kTransposed>                                                        \
  __device__ inline void Multiply(float(&d)[COUNT], const uint32_t* a, uint64_t b) {           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD                                   \
                 ", 0;\n"                                                                      \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" D "}, " A ", " B \
                 ", add, 1, 1, " TRANSPOSED ";\n}"                                             \
                 : __VA_ARGS__                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(kAdd ? 1 : 0),      \
                   "n"(kTransposed));                                                          \
  }
TANDEM_PRODUCT_REGISTERS(64, 32, TANDEM_D32, "{%32, %33, %34, %35}", "%36", "%37", "%38",
                         TANDEM_F32(d, 0))
TANDEM_PRODUCT_REGISTERS(128, 64, TANDEM_D64, "{%64, %65, %66, %67}", "%68", "%69", "%70",
                         TANDEM_F32(d, 0), TANDEM_F32(d, 32))
#undef TANDEM_PRODUCT_REGISTERS
#undef TANDEM_F32
#undef TANDEM_F8
#undef TANDEM_D64
#undef TANDEM_D32

}  // namespace tandem::engine::cuda::hopper_attention
