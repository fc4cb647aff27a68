// What differs between the products of hopper_wide_linear.h: the epilogues, see
// hopper_wide_linear_kernel.cuh.
#pragma once

#include "engine/kernels/cuda/hopper_wide_linear_kernel.cuh"

namespace tandem::engine::cuda {

// Results leave through shared memory, for the copy engine writes whole lines and no thread waits
// for it.
struct WideGateUpOp : HopperGateUpOp {
  struct Ahead {};
  // Of a warp: its 16 rows x 64 columns in bfloat16 for each unit, in rows of 128 bytes, swizzled.
  static constexpr int kStagedRows = 16, kStagedBytes = kStagedRows * 128;
  static constexpr int kStagingBytes = WideTile::kUnits * kStagedBytes;

  CUtensorMap out_map;  // of `out`, in boxes of kStagedRows

  __device__ void Ask(const Lines&, int, Ahead*) const {}

  template <int kUnits>
  __device__ void Finish(float (&sums)[kUnits * kUnitSums], const Lines& lines, int first_unit,
                         const Ahead&, uint32_t staging) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) WaitForReadingOfStores();
    __syncwarp();
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const uint32_t to = staging + u * kStagedBytes;
      Stage(sums + u * kUnitSums, lines, to);
      FenceForCopyEngine();
      __syncwarp();
      if (lane == 0) {
        // The warp's first row: lane 0 has it.
        StoreBox(&out_map, (first_unit + u) * kBoxRows, lines.row[0], to);
        CommitStores();
      }
    }
  }

  __device__ void End() const {
    if (threadIdx.x % 32 == 0) WaitForStores();
  }

 private:
  __device__ static void Stage(const float* sums, const Lines& lines, uint32_t to) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane % 16, next_block = lane / 16;
#pragma unroll
    for (int b = 0; b < 8; b += 2) {
      uint32_t pairs[4];  // rows 0..7 and 8..15 of block b, then of the next
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int line = 0; line < 2; ++line) {
          float values[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int at = (b + i) * 4 + line * 2 + e;
            const float gate = sums[at] * lines.inverse_rms[line];
            const float up = sums[at + kUnitSums / 2] * lines.inverse_rms[line];
            values[e] = __fdividef(gate, 1.0f + __expf(-gate)) * up;
          }
          pairs[i * 2 + line] = PackBFloat16(values[0], values[1]);
        }
      }
      StoreMatrices(to + row * 128 + ((b + next_block) ^ (row % 8)) * 16, pairs);
    }
  }
};

template <int kHeadDim>
struct WideQkvOp : HopperQkvOp<kHeadDim> {
  struct Ahead {};
  static constexpr int kStagingBytes = 0;

  __device__ void Ask(const Lines&, int, Ahead*) const {}

  template <int kUnits>
  __device__ void Finish(float (&sums)[kUnits * kUnitSums], const Lines& lines, int first_unit,
                         const Ahead&, uint32_t) const {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      HopperQkvOp<kHeadDim>::template Finish<true>(
          reinterpret_cast<float(&)[kUnitSums]>(sums[u * kUnitSums]), lines, first_unit + u);
    }
  }

  __device__ void End() const {}
};

// The residual stream is read in batches of 32 columns, kAhead of which are on their way: the first
// while the last products run, the others while those before them are worked on.
struct WideResidualOp : HopperResidualOp {
  static constexpr int kStagingBytes = 0;
  static constexpr int kBatchColumns = 32, kBatchPairs = kBatchColumns / 16;  // of 8 columns
  static constexpr int kAhead = 3;
  struct Batch {
    float4 before[kBatchPairs][2];
  };
  struct Ahead {
    int64_t at;   // this lane's first element in the first of its two rows
    int columns;  // how many there are from there on
    Batch batches[kAhead];
  };

  __device__ void Ask(const Lines& lines, int first_unit, Ahead* ahead) const {
    const int first = first_unit * kUnitRows + PairedColumn();
    ahead->at = At(lines.row[0], first);
    ahead->columns = outputs - first;
#pragma unroll
    for (int k = 0; k < kAhead; ++k) Load(lines, k, ahead);
  }

  template <int kUnits>
  __device__ void Finish(float (&sums)[kUnits * kUnitSums], const Lines& lines, int first_unit,
                         Ahead& ahead, uint32_t) const {
    constexpr int kUnitBatches = kUnitRows / kBatchColumns;
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      float squares[2] = {};
#pragma unroll
      for (int k = u * kUnitBatches; k < (u + 1) * kUnitBatches; ++k) {
        Add(sums + k * kBatchPairs * 8, lines, k, ahead, squares);
        if (k + kAhead < kUnits * kUnitBatches) Load(lines, k + kAhead, &ahead);
      }
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        squares[line] += __shfl_xor_sync(~0u, squares[line], 1);
        squares[line] += __shfl_xor_sync(~0u, squares[line], 2);
        const int unit = first_unit + u;
        if (threadIdx.x % 4 == 0 && lines.valid[line] && unit * kUnitRows < outputs) {
          square_shares[static_cast<int64_t>(unit) * square_stride + lines.row[line]] =
              squares[line];
        }
      }
    }
  }

  __device__ void End() const {}

 private:
  // What lies outside counts as zeros, as it does in the products.
  __device__ void Load(const Lines& lines, int k, Ahead* ahead) const {
    const float* from[2] = {residual + ahead->at, residual + ahead->at + 8 * outputs};
#pragma unroll
    for (int b = 0; b < kBatchPairs; ++b) {
      const int column = k * kBatchColumns + b * 16;
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        ahead->batches[k % kAhead].before[b][line] =
            LoadNow(from[line] + column, column < ahead->columns && lines.valid[line]);
      }
    }
  }

  // A load that the compiler does not put off; zeros if not `wanted`.
  __device__ static float4 LoadNow(const float* from, bool wanted) {
    float4 v;
    asm volatile(
        "{\n"
        ".reg .pred wanted;\n"
        "setp.ne.b32 wanted, %5, 0;\n"
        "mov.f32 %0, 0f00000000;\n"
        "mov.f32 %1, 0f00000000;\n"
        "mov.f32 %2, 0f00000000;\n"
        "mov.f32 %3, 0f00000000;\n"
        "@wanted ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];\n"
        "}\n"
        : "=&f"(v.x), "=&f"(v.y), "=&f"(v.z), "=&f"(v.w)
        : "l"(from), "r"(static_cast<int>(wanted))
        : "memory");
    return v;
  }

  // Of batch k, whose sums begin at `sums`.
  __device__ void Add(const float* sums, const Lines& lines, int k, const Ahead& ahead,
                      float (&squares)[2]) const {
    const float* norms = norm_weight + (outputs - ahead.columns);
#pragma unroll
    for (int b = 0; b < kBatchPairs; ++b) {
      const int column = k * kBatchColumns + b * 16;
      const bool inside = column < ahead.columns;
      float4 norm = {};
      if (inside) norm = __ldg(reinterpret_cast<const float4*>(norms + column));
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        const float* s = sums + b * 8 + line * 2;
        const float4& before = ahead.batches[k % kAhead].before[b][line];
        float4 v = TradePairs(s[0], s[1], s[4], s[5]);
        v.x += before.x;
        v.y += before.y;
        v.z += before.z;
        v.w += before.w;
        squares[line] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        if (inside && lines.valid[line]) {
          const int64_t at = ahead.at + line * 8 * outputs + column;
          *reinterpret_cast<float4*>(residual + at) = v;
          *reinterpret_cast<uint2*>(scaled + at) = make_uint2(
              PackBFloat16(v.x * norm.x, v.y * norm.y), PackBFloat16(v.z * norm.z, v.w * norm.w));
        }
      }
    }
  }
};

}  // namespace tandem::engine::cuda
