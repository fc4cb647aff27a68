// What differs between the products of hopper_linear.h: rows of the weights and epilogues, see
// hopper_linear_kernel.cuh.
//
// Four lanes hold the sums of one row. Before they store they trade, so that each has consecutive
// elements and whole sectors are written.
#pragma once

#include "engine/kernels/cuda/e4m3.cuh"
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

// The same in e4m3.
__device__ inline void StoreE4M3Blocks(const float (&values)[4][2], uint8_t* to, bool valid) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = PackE4M3(values[i][0], values[i][1]);
  TradeBlocks(pairs);
  if (!valid) return;
  *reinterpret_cast<uint2*>(to + threadIdx.x % 4 * 8) =
      make_uint2(pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16);
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
  template <int kBox = kBoxRows>
  __device__ static int BoxRow(int unit, int half) {
    return (unit * 2 + half) * kBox;
  }
};

// Of every 32 columns of a unit, the first of the four that a lane of eight has.
__device__ inline int LaneColumn() { return static_cast<int>(threadIdx.x % 8) * 4; }

// The epilogue reads nothing that it could read early.
template <int kPieces>
struct NothingEarly {
  template <class Op>
  __device__ NothingEarly(const Op&, const Line&, int) {}
};

__device__ inline float4 Scale(float4 v, float by) {
  return make_float4(v.x * by, v.y * by, v.z * by, v.w * by);
}
__device__ inline float4 Add(float4 a, float4 b) {
  return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}
__device__ inline uint2 Pack(float4 v) {
  return make_uint2(PackBFloat16(v.x, v.y), PackBFloat16(v.z, v.w));
}
__device__ inline uint32_t PackE4M3(float4 v) {
  return PackE4M3(v.x, v.y) | static_cast<uint32_t>(PackE4M3(v.z, v.w)) << 16;
}

struct HopperGateUpOp : GateUpArgs {
  static constexpr bool kNormed = true, kAnyUnit = true;

  __device__ void Prefetch(int, int) const {}
  template <int kBox = kBoxRows>
  __device__ int BoxRow(int unit, int half) const {
    return half * inner + unit * kBox;
  }

  template <bool kFewRegisters, int kSums>
  __device__ void Finish(const float (&sums)[kSums], const Lines& lines, int unit) const {
    constexpr int kBlocks = kSums / 8;  // of 8 columns of a half
    const int column = unit * kBlocks * 8;
#pragma unroll
    for (int b = 0; b < kBlocks; b += 4) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        float values[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int at = min(b + i, kBlocks - 1) * 4 + line * 2 + e;
            const float gate = sums[at] * lines.inverse_rms[line];
            const float up = sums[at + kSums / 2] * lines.inverse_rms[line];
            values[i][e] = SiluTimes(gate, up);
          }
        }
        StoreBlocks(values, out + static_cast<int64_t>(lines.row[line]) * inner + column + b * 8,
                    lines.valid[line], min(inner - column, kBlocks * 8) - b * 8);
      }
    }
  }

  template <int kPieces>
  using Early = NothingEarly<kPieces>;

  template <int kPieces>
  __device__ void FinishRow(const float4 (&sums)[kPieces], const NothingEarly<kPieces>&,
                            const Line& line, int unit) const {
#pragma unroll
    for (int i = 0; i < kPieces / 2; ++i) {
      const float4 gate = Scale(sums[i], line.inverse_rms);
      const float4 up = Scale(sums[i + kPieces / 2], line.inverse_rms);
      const int column = unit * kPieces * 16 + i * 32 + LaneColumn();
      if (!line.valid || column >= inner) continue;
      *reinterpret_cast<uint2*>(out + static_cast<int64_t>(line.row) * inner + column) =
          Pack(make_float4(SiluTimes(gate.x, up.x), SiluTimes(gate.y, up.y),
                           SiluTimes(gate.z, up.z), SiluTimes(gate.w, up.w)));
    }
  }

  __device__ static float SiluTimes(float gate, float up) {
    return __fdividef(gate, 1.0f + __expf(-gate)) * up;
  }
};

// kHeadDim is 64 or 128: a unit is two heads or one.
template <int kHeadDim>
struct HopperQkvOp : QkvArgs, PlainRows {
  static constexpr bool kNormed = true, kAnyUnit = false;
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
      const bool query = head < heads;
      int64_t at = (static_cast<int64_t>(lines.row[line]) * heads + head) * kHeadDim;
      if (!query) {
        // K heads then V heads, as the pages lie in a block.
        const int64_t slot = valid ? __ldg(slots + lines.row[line]) : -1;
        valid = slot >= 0;
        at = slot + static_cast<int64_t>(head - heads) * block_size * kHeadDim;
      }
      void* const to = query ? q : kv;
#pragma unroll
      for (int b = 0; b < kHeadDim / 8; b += 4) {
        float values[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          values[i][0] = sums[(b + i) * 4 + line * 2];
          values[i][1] = sums[(b + i) * 4 + line * 2 + 1];
        }
        if (!query && fp8_kv) {
          StoreE4M3Blocks(values, static_cast<uint8_t*>(to) + at + b * 8, valid);
        } else {
          StoreBlocks(values, static_cast<__nv_bfloat16*>(to) + at + b * 8, valid, 32);
        }
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

  // The angles of a row, and where its keys and values go.
  template <int kPieces>
  struct Early {
    __device__ Early(const HopperQkvOp& op, const Line& line, int unit) {
      if (!line.valid) return;
      const int64_t at = static_cast<int64_t>(line.row) * kHalf + LaneColumn();
#pragma unroll
      for (int i = 0; i < kHalf / 32; ++i) {
        cos[i] = __ldg(reinterpret_cast<const float4*>(op.cos + at + i * 32));
        sin[i] = __ldg(reinterpret_cast<const float4*>(op.sin + at + i * 32));
      }
      if ((unit + 1) * (kUnitRows / kHeadDim) > op.heads) slot = __ldg(op.slots + line.row);
    }
    float4 cos[kHalf / 32] = {}, sin[kHalf / 32] = {};
    int64_t slot = -1;
  };

  template <int kPieces>
  __device__ void FinishRow(const float4 (&sums)[kPieces], const Early<kPieces>& early,
                            const Line& line, int unit) const {
    constexpr int kHeadPieces = kHeadDim / 32;
#pragma unroll
    for (int first = 0; first < kPieces; first += kHeadPieces) {
      const int head = unit * (kUnitRows / kHeadDim) + first / kHeadPieces;
      if (head >= heads + 2 * kv_heads) return;
      float4 v[kHeadPieces];
#pragma unroll
      for (int i = 0; i < kHeadPieces; ++i) {
        v[i] = Scale(sums[first + i], line.inverse_rms);
        if (bias != nullptr) {
          v[i] = Add(v[i], __ldg(reinterpret_cast<const float4*>(bias + head * kHeadDim + i * 32 +
                                                                 LaneColumn())));
        }
      }
      if (head < heads + kv_heads) {
#pragma unroll
        for (int i = 0; i < kHeadPieces / 2; ++i) {
          float4 &low = v[i], &high = v[i + kHeadPieces / 2];
          RotatePair(low.x, high.x, early.cos[i].x, early.sin[i].x);
          RotatePair(low.y, high.y, early.cos[i].y, early.sin[i].y);
          RotatePair(low.z, high.z, early.cos[i].z, early.sin[i].z);
          RotatePair(low.w, high.w, early.cos[i].w, early.sin[i].w);
        }
      }
      const bool query = head < heads;
      if (!line.valid || (!query && early.slot < 0)) continue;
      const int64_t at =
          LaneColumn() +
          (query ? (static_cast<int64_t>(line.row) * heads + head) * kHeadDim
                 : early.slot + static_cast<int64_t>(head - heads) * block_size * kHeadDim);
      void* const to = query ? q : kv;
#pragma unroll
      for (int i = 0; i < kHeadPieces; ++i) {
        if (!query && fp8_kv) {
          *reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(to) + at + i * 32) = PackE4M3(v[i]);
        } else {
          *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(to) + at + i * 32) = Pack(v[i]);
        }
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
  static constexpr bool kNormed = false, kAnyUnit = false;

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

  // The residual stream before.
  template <int kPieces>
  struct Early {
    __device__ Early(const HopperResidualOp& op, const Line& line, int unit) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        const int column = (unit * kPieces + i) * 32 + LaneColumn();
        if (line.valid && column < op.outputs) {
          before[i] =
              __ldcg(reinterpret_cast<const float4*>(op.residual + op.At(line.row, column)));
        }
      }
    }
    float4 before[kPieces] = {};
  };

  template <int kPieces>
  __device__ void FinishRow(const float4 (&sums)[kPieces], const Early<kPieces>& early,
                            const Line& line, int unit) const {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int column = (unit * kPieces + i) * 32 + LaneColumn();
      if (!line.valid || column >= outputs) continue;
      const float4 v = Add(sums[i], early.before[i]);
      const float4 norm = __ldg(reinterpret_cast<const float4*>(norm_weight + column));
      squares += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
      *reinterpret_cast<float4*>(residual + At(line.row, column)) = v;
      *reinterpret_cast<uint2*>(scaled + At(line.row, column)) =
          Pack(make_float4(v.x * norm.x, v.y * norm.y, v.z * norm.z, v.w * norm.w));
    }
#pragma unroll
    for (int lanes = 1; lanes < 8; lanes *= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
    if (threadIdx.x % 8 == 0 && line.valid && unit * kUnitRows < outputs) {
      square_shares[static_cast<int64_t>(unit) * square_stride + line.row] = squares;
    }
  }

  __device__ int64_t At(int row, int column) const {
    return static_cast<int64_t>(row) * outputs + column;
  }
};

struct HopperLogitsOp : LogitsArgs, PlainRows {
  static constexpr bool kNormed = true, kAnyUnit = true;

  template <bool kFewRegisters, int kSums>
  __device__ void Finish(const float (&sums)[kSums], const Lines& lines, int unit) const {
    const int first = unit * kSums * 2 + PairedColumn();
#pragma unroll
    for (int b = 0; b < kSums / 8; ++b) {
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

  template <int kPieces>
  using Early = NothingEarly<kPieces>;

  template <int kPieces>
  __device__ void FinishRow(const float4 (&sums)[kPieces], const NothingEarly<kPieces>&,
                            const Line& line, int unit) const {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const float4 value = Scale(sums[i], line.inverse_rms);
      const int column = (unit * kPieces + i) * 32 + LaneColumn();
      float* const to = logits + static_cast<int64_t>(line.row) * vocab + column;
      if (vocab % 4 == 0) {
        if (line.valid && column < vocab) *reinterpret_cast<float4*>(to) = value;
      } else if (line.valid) {
        if (column < vocab) to[0] = value.x;
        if (column + 1 < vocab) to[1] = value.y;
        if (column + 2 < vocab) to[2] = value.z;
        if (column + 3 < vocab) to[3] = value.w;
      }
    }
  }
};

}  // namespace tandem::engine::cuda
