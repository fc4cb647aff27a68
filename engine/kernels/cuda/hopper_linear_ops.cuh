// What differs between the products of hopper_linear.h: rows of the weights and epilogues, see
// hopper_linear_kernel.cuh.
//
// Four lanes hold the sums of one row. Before they store they trade, so that each has consecutive
// elements and whole sectors are written.
#pragma once

#include "engine/kernels/cuda/hopper_linear_kernel.cuh"

namespace tandem::engine::cuda {

// Of four lanes each has pair `lane % 4` of four blocks of 8 columns; afterwards each has the four
// pairs of block `lane % 4`.
__device__ inline void TradeBlocks(uint32_t (&pairs)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(~0u, odd ? pairs[i] : pairs[i + 1], 1);
    pairs[i] = odd ? got : pairs[i];
    pairs[i + 1] = odd ? pairs[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(~0u, upper ? pairs[i] : pairs[i + 2], 2);
    pairs[i] = upper ? got : pairs[i];
    pairs[i + 2] = upper ? pairs[i + 2] : got;
  }
}

// Rounds four blocks of 8 columns of one row and stores them at `to`, the first block's place.
// `columns` is how many columns there are from there on, a multiple of 8.
__device__ inline void StoreBlocks(const float (&values)[4][2], __nv_bfloat16* to, bool valid,
                                   int columns) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = PackBFloat16(values[i][0], values[i][1]);
  TradeBlocks(pairs);
  const int first = static_cast<int>(threadIdx.x % 4) * 8;
  if (valid && first < columns) {
    *reinterpret_cast<uint4*>(to + first) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
}

// Of two neighbouring blocks each of four lanes has a pair; afterwards each has four consecutive
// columns: those from PairedColumn() on, counted from the first block.
__device__ inline float4 TradePairs(float a0, float a1, float b0, float b1) {
  const bool odd = threadIdx.x & 1;
  const float got0 = __shfl_xor_sync(~0u, odd ? a0 : b0, 1);
  const float got1 = __shfl_xor_sync(~0u, odd ? a1 : b1, 1);
  return odd ? make_float4(got0, got1, b0, b1) : make_float4(a0, a1, got0, got1);
}
__device__ inline int PairedColumn() {
  return static_cast<int>(threadIdx.x & 1) * 8 + static_cast<int>(threadIdx.x & 2) * 2;
}

// Both halves of `unit` one after the other.
struct PlainRows {
  __device__ void Prefetch(int, int) const {}
  __device__ static int BoxRow(int unit, int half) { return unit * kUnitRows + half * kBoxRows; }
};

struct HopperGateUpOp : GateUpArgs {
  static constexpr bool kNormed = true;

  __device__ void Prefetch(int, int) const {}
  __device__ int BoxRow(int unit, int half) const { return half * inner + unit * kBoxRows; }

  template <bool kFewRegisters>
  __device__ void Finish(const float (&sums)[kUnitSums], const Lines& lines, int unit) const {
    const int column = unit * kBoxRows;
#pragma unroll
    for (int b = 0; b < 8; b += 4) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        float values[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int at = (b + i) * 4 + line * 2 + e;
            const float gate = sums[at] * lines.inverse_rms[line];
            const float up = sums[at + 32] * lines.inverse_rms[line];
            values[i][e] = __fdividef(gate, 1.0f + __expf(-gate)) * up;
          }
        }
        StoreBlocks(values, out + static_cast<int64_t>(lines.row[line]) * inner + column + b * 8,
                    lines.valid[line], inner - column - b * 8);
      }
    }
  }
};

// kHeadDim is 64 or 128: a unit is two heads or one.
template <int kHeadDim>
struct HopperQkvOp : QkvArgs, PlainRows {
  static constexpr bool kNormed = true;
  static constexpr int kHalf = kHeadDim / 2, kHalfBlocks = kHalf / 8;

  template <bool kFewRegisters>
  __device__ void Finish(float (&sums)[kUnitSums], const Lines& lines, int unit) const {
#pragma unroll
    for (int h = 0; h < kUnitRows / kHeadDim; ++h) {
      const int head = unit * (kUnitRows / kHeadDim) + h;
      if (head >= heads + 2 * kv_heads) return;
      FinishHead(reinterpret_cast<float(&)[kHeadDim / 2]>(sums[h * kHeadDim / 2]), lines, head);
    }
  }

  __device__ void FinishHead(float (&sums)[kHeadDim / 2], const Lines& lines, int head) const {
    const int pair = static_cast<int>(threadIdx.x % 4) * 2;
    AddBias(sums, lines, head * kHeadDim + pair);
    if (head < heads + kv_heads) Rotate(sums, lines, pair);
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      bool valid = lines.valid[line];
      __nv_bfloat16* to;
      if (head < heads) {
        to = q + (static_cast<int64_t>(lines.row[line]) * heads + head) * kHeadDim;
      } else {
        // K heads then V heads, as the pages lie in a block.
        const int64_t slot = valid ? __ldg(slots + lines.row[line]) : -1;
        valid = slot >= 0;
        to = kv + slot + static_cast<int64_t>(head - heads) * block_size * kHeadDim;
      }
#pragma unroll
      for (int b = 0; b < kHeadDim / 8; b += 4) {
        float values[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[i][0] = sums[(b + i) * 4 + line * 2];
          values[i][1] = sums[(b + i) * 4 + line * 2 + 1];
        }
        StoreBlocks(values, to + b * 8, valid, 32);
      }
    }
  }

  __device__ void AddBias(float (&sums)[kHeadDim / 2], const Lines& lines, int column) const {
#pragma unroll
    for (int b = 0; b < kHeadDim / 8; ++b) {
      float2 add = make_float2(0, 0);
      if (bias != nullptr) add = __ldg(reinterpret_cast<const float2*>(bias + column + b * 8));
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        float* pair = sums + b * 4 + line * 2;
        pair[0] = pair[0] * lines.inverse_rms[line] + add.x;
        pair[1] = pair[1] * lines.inverse_rms[line] + add.y;
      }
    }
  }

  __device__ void Rotate(float (&sums)[kHeadDim / 2], const Lines& lines, int column) const {
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      // A row that is not there reads the first one's.
      const int64_t at =
          static_cast<int64_t>(lines.valid[line] ? lines.row[line] : 0) * kHalf + column;
#pragma unroll
      for (int b = 0; b < kHalfBlocks; ++b) {
        const float2 c = __ldg(reinterpret_cast<const float2*>(cos + at + b * 8));
        const float2 s = __ldg(reinterpret_cast<const float2*>(sin + at + b * 8));
        RotatePair(sums[b * 4 + line * 2], sums[(b + kHalfBlocks) * 4 + line * 2], c.x, s.x);
        RotatePair(sums[b * 4 + line * 2 + 1], sums[(b + kHalfBlocks) * 4 + line * 2 + 1], c.y,
                   s.y);
      }
    }
  }

  __device__ static void RotatePair(float& low, float& high, float c, float s) {
    const float rotated = low * c - high * s;
    high = high * c + low * s;
    low = rotated;
  }
};

struct HopperResidualOp : ResidualArgs, PlainRows {
  static constexpr bool kNormed = false;

  __device__ void Prefetch(int row, int output) const {
    if (output < outputs) PrefetchToL2(residual + At(row, output));
  }

  // Loads stand before stores, of half a unit where registers are few.
  template <bool kFewRegisters>
  __device__ void Finish(const float (&sums)[kUnitSums], const Lines& lines, int unit) const {
    constexpr int kBatch = kFewRegisters ? 4 : 8;
    const int first = unit * kUnitRows + PairedColumn();
    float* const to[2] = {residual + At(lines.row[0], first), residual + At(lines.row[1], first)};
    __nv_bfloat16* const scaled_to[2] = {scaled + At(lines.row[0], first),
                                         scaled + At(lines.row[1], first)};
    float squares[2] = {};
#pragma unroll
    for (int batch = 0; batch < 8; batch += kBatch) {
      // What lies outside counts as zeros, as it does in the products. Nothing here branches.
      float4 before[kBatch][2] = {}, norm[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int column = (batch + b) * 16;
        const bool inside = first + column < outputs;
        if (inside) norm[b] = __ldg(reinterpret_cast<const float4*>(norm_weight + first + column));
#pragma unroll
        for (int line = 0; line < 2; ++line) {
          if (inside && lines.valid[line]) {
            before[b][line] = __ldcg(reinterpret_cast<const float4*>(to[line] + column));
          }
        }
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int column = (batch + b) * 16;
#pragma unroll
        for (int line = 0; line < 2; ++line) {
          const float* s = sums + (batch + b) * 8 + line * 2;
          float4 v = TradePairs(s[0], s[1], s[4], s[5]);
          v.x += before[b][line].x;
          v.y += before[b][line].y;
          v.z += before[b][line].z;
          v.w += before[b][line].w;
          squares[line] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
          const uint2 rounded = make_uint2(PackBFloat16(v.x * norm[b].x, v.y * norm[b].y),
                                           PackBFloat16(v.z * norm[b].z, v.w * norm[b].w));
          if (first + column < outputs && lines.valid[line]) {
            *reinterpret_cast<float4*>(to[line] + column) = v;
            *reinterpret_cast<uint2*>(scaled_to[line] + column) = rounded;
          }
        }
      }
    }
#pragma unroll
    for (int line = 0; line < 2; ++line) {
      squares[line] += __shfl_xor_sync(~0u, squares[line], 1);
      squares[line] += __shfl_xor_sync(~0u, squares[line], 2);
      if (threadIdx.x % 4 == 0 && lines.valid[line] && unit * kUnitRows < outputs) {
        square_shares[static_cast<int64_t>(unit) * square_stride + lines.row[line]] = squares[line];
      }
    }
  }

  __device__ int64_t At(int row, int column) const {
    return static_cast<int64_t>(row) * outputs + column;
  }
};

struct HopperLogitsOp : LogitsArgs, PlainRows {
  static constexpr bool kNormed = true;

  template <bool kFewRegisters>
  __device__ void Finish(const float (&sums)[kUnitSums], const Lines& lines, int unit) const {
    const int first = unit * kUnitRows + PairedColumn();
#pragma unroll
    for (int b = 0; b < 8; ++b) {
      const int column = first + b * 16;
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        const float* s = sums + b * 8 + line * 2;
        const float scale = lines.inverse_rms[line];
        const float4 value = TradePairs(s[0] * scale, s[1] * scale, s[4] * scale, s[5] * scale);
        float* to = logits + static_cast<int64_t>(lines.row[line]) * vocab + column;
        if (vocab % 4 == 0) {
          if (lines.valid[line] && column < vocab) *reinterpret_cast<float4*>(to) = value;
        } else if (lines.valid[line]) {
          if (column < vocab) to[0] = value.x;
          if (column + 1 < vocab) to[1] = value.y;
          if (column + 2 < vocab) to[2] = value.z;
          if (column + 3 < vocab) to[3] = value.w;
        }
      }
    }
  }
};

}  // namespace tandem::engine::cuda
