// What Hopper's attention kernel needs of the machine beyond hopper.cuh: the warpgroup's matrix
// products with an operand in registers (PTX ISA, "Asynchronous Warpgroup Level Matrix
// Instructions"). Compiles for sm_90a alone.
#pragma once

#include <cstdint>
#include <cuda.h>

#include "engine/kernels/cuda/hopper.cuh"

namespace tandem::engine::cuda::hopper_attention {

// Orders this thread's ordinary accesses to shared memory before later ones of the copy engine and
// of the tensor cores (with a barrier between, other threads' ones).
__device__ inline void FenceAsyncProxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
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
TANDEM_PRODUCT_SHARED(64, 32, TANDEM_D32, "%32", "%33", "%34", TANDEM_F32(d, 0))
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
