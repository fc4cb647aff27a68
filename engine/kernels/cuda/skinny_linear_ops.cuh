// What differs between the products of skinny_linear.h: rows of the weights and epilogues, see
// skinny_linear_kernel.cuh; and how a product is cut.
//
// Epilogues load before they store, many values at a time: they stand at the end of a kernel, where
// nothing else hides their latency.
#pragma once

#include <algorithm>

#include "engine/kernels/cuda/argmax.cuh"
#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/skinny_linear_kernel.cuh"

namespace tandem::engine::cuda {

struct Nothing {};

struct GateUpOp : GateUpArgs {
  static constexpr bool kPaired = true, kNormed = true;
  int granules = 0;

  __device__ int FirstRow(int granule) const { return granule; }
  __device__ int SecondRow(int granule) const { return inner + granule; }

  __device__ void Prefetch(int, int) const {}
  template <int, int>
  __device__ Nothing Before(int, int, int, int) const {
    return {};
  }

  template <class Output>
  __device__ void Finish(const Output& t, Nothing) const {
    for (int i = threadIdx.x; i < t.columns * t.granules; i += kSkinnyThreads) {
      const int row = t.first_column + i / t.granules, g = i % t.granules;
      const float scale = t.inverse_rms[row];
      const float gate = t.Get(row, g) * scale, up = t.Get(row, t.granules + g) * scale;
      const float value = gate / (1.0f + __expf(-gate)) * up;
      out[static_cast<int64_t>(row) * inner + t.first_granule + g] = __float2bfloat16_rn(value);
    }
  }
};

struct QkvOp : QkvArgs {
  static constexpr bool kPaired = true, kNormed = true;
  int granules = 0;

  // Granule g is the pair (i, i + half) of head g / half, with i = g % half.
  __device__ int FirstRow(int granule) const { return granule + granule / Half() * Half(); }
  __device__ int SecondRow(int granule) const { return FirstRow(granule) + Half(); }
  __device__ int Half() const { return head_dim / 2; }

  __device__ void Prefetch(int first_granule, int granules) const {
    const int i = threadIdx.x;
    if (bias != nullptr && i < granules) {
      PrefetchToL2(bias + FirstRow(first_granule + i));
      PrefetchToL2(bias + SecondRow(first_granule + i));
    }
    if (i < rows * Half() / 32) {
      PrefetchToL2(cos + i * 32);
      PrefetchToL2(sin + i * 32);
    }
    if (i < rows) PrefetchToL2(slots + i);
  }

  // Of this thread's first pair.
  struct Factors {
    float low_bias = 0, high_bias = 0, cos = 1, sin = 0;
    int64_t slot = -1;
  };
  template <int, int>
  __device__ Factors Before(int first_granule, int granules, int first_column, int columns) const {
    const int i = threadIdx.x;
    if (i >= columns * granules) return {};
    return FactorsOf(first_column + i / granules, first_granule + i % granules);
  }

  __device__ Factors FactorsOf(int row, int granule) const {
    const int half = Half(), head = granule / half, element = granule % half;
    Factors f;
    if (bias != nullptr) {
      f.low_bias = __ldg(bias + FirstRow(granule));
      f.high_bias = __ldg(bias + SecondRow(granule));
    }
    if (head < heads + kv_heads) {
      f.cos = __ldg(cos + row * half + element);
      f.sin = __ldg(sin + row * half + element);
    }
    if (head >= heads) f.slot = __ldg(slots + row);
    return f;
  }

  template <class Output>
  __device__ void Finish(const Output& t, const Factors& first) const {
    const int pairs = t.columns * t.granules;
    int i = threadIdx.x;
    if (i < pairs) FinishPair(t, t.first_column + i / t.granules, i % t.granules, first);
#pragma unroll 4
    for (i += kSkinnyThreads; i < pairs; i += kSkinnyThreads) {
      const int row = t.first_column + i / t.granules, g = i % t.granules;
      FinishPair(t, row, g, FactorsOf(row, t.first_granule + g));
    }
  }

  template <class Output>
  __device__ void FinishPair(const Output& t, int row, int g, const Factors& f) const {
    const int half = Half(), granule = t.first_granule + g;
    const int head = granule / half, element = granule % half;
    float low = t.Get(row, g) * t.inverse_rms[row] + f.low_bias;
    float high = t.Get(row, t.granules + g) * t.inverse_rms[row] + f.high_bias;
    if (head < heads + kv_heads) {
      const float rotated = low * f.cos - high * f.sin;
      high = high * f.cos + low * f.sin;
      low = rotated;
    }
    const bool query = head < heads;
    if (!query && f.slot < 0) return;
    // K heads then V heads, as the pages lie in a block.
    const int64_t at =
        element + (query ? (static_cast<int64_t>(row) * heads + head) * head_dim
                         : f.slot + static_cast<int64_t>(head - heads) * block_size * head_dim);
    void* const to = query ? q : kv;
    StoreElement(to, !query && fp8_kv, at, low);
    StoreElement(to, !query && fp8_kv, at + half, high);
  }
};

struct ResidualOp : ResidualArgs {
  static constexpr bool kPaired = false, kNormed = false;
  int granules = 0;

  __device__ void Prefetch(int first_granule, int granules) const {
    const int i = threadIdx.x;
    if (i < granules) PrefetchToL2(norm_weight + first_granule + i);
    // The ends of a row's share: it is two lines at most where few rows make this worth while.
    for (int row = i; row < rows; row += kSkinnyThreads) {
      PrefetchToL2(residual + At(row, first_granule));
      PrefetchToL2(residual + At(row, first_granule + granules - 1));
    }
  }

  // A warp takes every eighth column, at most kColumns of them, and all their rows.
  template <int kColumns, int kTurns>
  struct Residuals {
    static constexpr int kWarpColumns = kColumns, kWarpTurns = kTurns;
    float values[kColumns][kTurns];
    float weights[kTurns];  // of the norm
  };
  template <int kColumns, int kTurns>
  __device__ Residuals<kColumns, kTurns> Before(int first_granule, int granules, int first_column,
                                                int columns) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Residuals<kColumns, kTurns> before = {};
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int g = lane + i * 32;
      if (g >= granules) continue;
      before.weights[i] = __ldg(norm_weight + first_granule + g);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int column = warp + c * kSkinnyWarps;
        if (column >= columns) continue;
        before.values[c][i] = __ldcg(residual + At(first_column + column, first_granule + g));
      }
    }
    return before;
  }

  template <class Output, class Before>
  __device__ void Finish(const Output& t, const Before& before) const {
#pragma unroll
    for (int c = 0; c < Before::kWarpColumns; ++c) {
      const int column = threadIdx.x / 32 + c * kSkinnyWarps;
      if (column < t.columns) {
        FinishColumn(t, t.first_column + column, before.values[c], before.weights);
      }
    }
  }

  __device__ int64_t At(int row, int output) const {
    return static_cast<int64_t>(row) * outputs + output;
  }

  template <class Output, int kTurns>
  __device__ void FinishColumn(const Output& t, int row, const float (&before)[kTurns],
                               const float (&weights)[kTurns]) const {
    const int lane = threadIdx.x % 32;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      const int g = lane + i * 32, output = t.first_granule + g;
      if (g >= t.granules) continue;
      const float value = before[i] + t.Get(row, g);
      residual[At(row, output)] = value;
      scaled[At(row, output)] = __float2bfloat16_rn(value * weights[i]);
      squares += value * value;
    }
    squares = WarpSum(squares);
    if (lane == 0) square_shares[t.block * square_stride + row] = squares;
  }
};

struct LogitsOp : LogitsArgs {
  static constexpr bool kPaired = false, kNormed = true;
  int granules = 0;

  __device__ void Prefetch(int, int) const {}
  template <int, int>
  __device__ Nothing Before(int, int, int, int) const {
    return {};
  }

  template <class Output>
  __device__ void Finish(const Output& t, Nothing) const {
    const int lane = threadIdx.x % 32;
    for (int c = threadIdx.x / 32; c < t.columns; c += kSkinnyWarps) {
      const int row = t.first_column + c;
      uint64_t winner = 0;
      for (int g = lane; g < t.granules; g += 32) {
        const int token = t.first_granule + g;
        const float value = t.Get(row, g) * t.inverse_rms[row];
        if (logits != nullptr) logits[static_cast<int64_t>(row) * vocab + token] = value;
        winner = max(winner, RankOf(value, token));
      }
      winner = WarpBest(winner);
      if (lane == 0 && best != nullptr) best[t.block * kMaxSkinnyRows + row] = winner;
    }
  }
};

inline int CeilDiv(int a, int b) { return (a + b - 1) / b; }

// Where K is not cut, row blocks are cut so that every thread block has the same number of whole
// ones, and no sum is shared. Else blocks are as high as the tile, for the sake of the activations
// that each of them reads again.
template <class Tile>
SkinnyPlan PlanFor(int granules, bool paired, int inputs, int multiprocessors) {
  const int height = paired ? Tile::kHeight / 2 : Tile::kHeight;
  SkinnyPlan plan;
  plan.blocks = CeilDiv(granules, height);
  if (!Tile::kCut) {
    plan.blocks = std::min(granules, multiprocessors * CeilDiv(plan.blocks, multiprocessors));
  }
  plan.slices = CeilDiv(inputs, Tile::kK);
  plan.grid = std::min(multiprocessors, plan.blocks * plan.slices);
  return plan;
}

}  // namespace tandem::engine::cuda
