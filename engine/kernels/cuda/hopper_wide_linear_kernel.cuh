// The kernel behind hopper_wide_linear.h: one product, the parts that differ given as an Op: one of
// hopper_linear_kernel.cuh's with another epilogue,
//   kStagingBytes        of shared memory that the epilogue of a warp uses, a multiple of 1,024
//   Ahead, Ask(lines, first_unit, &ahead)   asks for what the epilogue reads, before the last
//                        products are through
//   Finish<units>(sums, lines, first_unit, ahead, staging)   the epilogue of a tile
//   End()                after the last tile
#pragma once

#include <cstdint>

#include "engine/kernels/cuda/hopper.cuh"
#include "engine/kernels/cuda/hopper_linear_ops.cuh"

namespace tandem::engine::cuda {

inline constexpr int kWideThreads = 384;  // a warpgroup that loads and two that multiply

// A thread block's tile: 128 rows of activations x two units of the weight, or one. A warpgroup has
// 64 of the rows. Two thread blocks, a cluster, take tiles that lie one above the other or side by
// side, and each loads half of what the two share, the weights or the rows.
struct WideTile {
  static constexpr int kCluster = 2;
  static constexpr int kRows = 128, kUnits = 2, kBoxes = 2 * kUnits;
  static constexpr int kXBytes = kRows * kChunk * 2, kBoxBytes = kBoxRows * kChunk * 2;
  static constexpr int kStages = 4, kStageBytes = kXBytes + kBoxes * kBoxBytes;
  // The ring begins at a multiple of 1,024 bytes, where the swizzle's pattern begins.
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;
  static constexpr int kWarps = 8;  // that multiply
};

// Tiles of a cluster are dealt out in rounds. Those of a last round that would keep half of the
// clusters busy at most are halved: each half has half as many units.
struct WidePlan {
  bool beside = false;                  // its thread blocks' tiles lie side by side
  int row_tiles = 0, column_tiles = 0;  // of a cluster
  int whole_tiles = 0;                  // the others are halved
  int clusters = 0;
  int chunks = 0;  // of K
  int band = 0;    // row tiles that are walked through before the next column
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A cluster's tiles, one after the other, as one of its thread blocks sees them.
class WideTiles {
 public:
  __device__ WideTiles(const WidePlan& plan, int cluster, int rank)
      : plan_(plan), rank_(rank), next_(cluster) {}

  __device__ bool Next() {
    const int whole = plan_.whole_tiles;
    const int tile = next_ < whole ? next_ : whole + (next_ - whole) / 2;
    if (tile >= plan_.row_tiles * plan_.column_tiles) return false;
    units = next_ < whole ? WideTile::kUnits : 1;
    const int half = next_ < whole ? 0 : (next_ - whole) % 2;
    next_ += plan_.clusters;
    ++number;
    // Numbered so that tiles computed at the same time share rows of both matrices.
    const int per_band = plan_.band * plan_.column_tiles;
    const int band = tile / per_band, within = tile - band * per_band;
    const int height = min(plan_.band, plan_.row_tiles - band * plan_.band);
    const int column_tile = within / height;
    const int row_tile = band * plan_.band + within - column_tile * height;
    if (plan_.beside) {
      first_row = row_tile * WideTile::kRows;
      first_unit = (column_tile * WideTile::kUnits + half) * WideTile::kCluster + rank_ * units;
    } else {
      first_row = (row_tile * WideTile::kCluster + rank_) * WideTile::kRows;
      first_unit = column_tile * WideTile::kUnits + half;
    }
    return true;
  }

  int first_row, first_unit, units;
  int number = -1;  // counts them

 private:
  const WidePlan& plan_;
  int rank_, next_;
};

// What the warps of a thread block share. Addresses; a barrier has 8 bytes.
struct WideShared {
  uint32_t data, full, empty;
  uint32_t staging;  // Op::kStagingBytes for each warp that multiplies
  float* norms;      // [2][kRows]: 1 / rms of the rows of every other tile
  uint32_t norms_full, norms_empty;
};

struct WideRingPlace {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void Advance() {
    if (++stage == WideTile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The thread that keeps the ring full.
template <class Op>
__device__ void FillWideRing(const CUtensorMap* x, const CUtensorMap* weight, const Op& op,
                             const WidePlan& plan, const WideShared& shared, int rank,
                             int cluster) {
  constexpr uint16_t kAll = (1 << WideTile::kCluster) - 1;
  WaitForPredecessor();
  LetSuccessorStart();
  WideRingPlace place;
  for (WideTiles tiles(plan, cluster, rank); tiles.Next();) {
    const int boxes = 2 * tiles.units;
    // What this thread block loads for both: half of the weights' boxes, or of the rows.
    const int first_box = plan.beside ? 0 : rank * tiles.units;
    const int end_box = plan.beside ? boxes : first_box + tiles.units;
    for (int c = 0; c < plan.chunks; ++c) {
      const uint32_t full = shared.full + place.stage * 8;
      const uint32_t to = shared.data + place.stage * WideTile::kStageBytes;
      WaitBarrier(shared.empty + place.stage * 8, place.phase ^ 1);
      ExpectBytes(full, WideTile::kXBytes + boxes * WideTile::kBoxBytes);
#pragma unroll
      for (int b = 0; b < WideTile::kBoxes; ++b) {
        if (b < first_box || b >= end_box) continue;
        const uint32_t box_to = to + WideTile::kXBytes + b * WideTile::kBoxBytes;
        const int row = op.BoxRow(tiles.first_unit + b / 2, b % 2);
        if (plan.beside) {
          LoadBox(box_to, weight, c * kChunk, row, full);
        } else {
          LoadBoxToAll(box_to, weight, c * kChunk, row, full, kAll);
        }
      }
      if (plan.beside) {
        LoadBoxToAll(to + rank * WideTile::kXBytes / 2, x, c * kChunk,
                     tiles.first_row + rank * WideTile::kRows / 2, full, kAll);
      } else {
        LoadBox(to, x, c * kChunk, tiles.first_row, full);
      }
      place.Advance();
    }
  }
}

// A warp that is a tile or two ahead: finds the norms of the tile's rows and calls into L2 what its
// epilogue will read.
template <class Op>
__device__ void HelpWideEpilogues(const Op& op, const WidePlan& plan, const WideShared& shared,
                                  int rank, int cluster) {
  WaitForPredecessor();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (WideTiles tiles(plan, cluster, rank); tiles.Next();) {
    const int slot = tiles.number % 2;
    WaitBarrier(shared.norms_empty + slot * 8, (tiles.number / 2 % 2) ^ 1);
    if constexpr (Op::kNormed) {
      // Every fourth share, then the four sums: the order of hopper_linear.h.
#pragma unroll 1
      for (int row = lane; row < WideTile::kRows; row += 64) {
        float sums[4][2] = {};
#pragma unroll 1
        for (int part = 0; part < op.squares.parts; part += 4) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float* shares = op.squares.shares +
                                  static_cast<int64_t>(part + k) * op.squares.stride +
                                  tiles.first_row + row;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (part + k < op.squares.parts && tiles.first_row + row + i * 32 < op.rows) {
                sums[k][i] += __ldcg(shares + i * 32);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
          shared.norms[slot * WideTile::kRows + row + i * 32] =
              rsqrtf(sum / static_cast<float>(op.inputs) + op.epsilon);
        }
      }
    }
    Arrive(shared.norms_full + slot * 8);
    const int end = min(tiles.first_row + WideTile::kRows, op.rows);
    for (int row = tiles.first_row + lane / 8; row < end; row += 4) {
      const int column = lane % 8 * 32;
      if (column < tiles.units * kUnitRows) op.Prefetch(row, tiles.first_unit * kUnitRows + column);
    }
  }
}

// A warpgroup that multiplies.
template <class Op>
class WideConsumer {
 public:
  __device__ WideConsumer(const Op& op, const WidePlan& plan, const WideShared& shared, int rank,
                          int cluster, int group)
      : op_(op),
        plan_(plan),
        shared_(shared),
        rank_(rank),
        cluster_(cluster),
        group_(group),
        thread_(static_cast<int>(threadIdx.x) % 128) {}

  __device__ void Run() {
    WaitForPredecessor();
    for (WideTiles tiles(plan_, cluster_, rank_); tiles.Next();) {
      if (tiles.units == WideTile::kUnits) {
        Compute<WideTile::kUnits>(tiles);
      } else {
        Compute<1>(tiles);
      }
    }
    op_.End();
  }

 private:
  template <int kUnits>
  __device__ void Compute(const WideTiles& tiles) {
    auto& sums = reinterpret_cast<float(&)[kUnits * kUnitSums]>(sums_);
    const int last = Multiply(sums);
    const Lines lines = FindLines(tiles);
    typename Op::Ahead ahead;
    op_.Ask(lines, tiles.first_unit, &ahead);
    WaitForProducts<0>();
    Pin(sums);
    Release(last);
    const int warp = group_ * 4 + thread_ / 32;
    op_.template Finish<kUnits>(sums, lines, tiles.first_unit, ahead,
                                shared_.staging + warp * Op::kStagingBytes);
  }

  // sums = the product of a tile, but the last products are still under way: they read the stage
  // that is returned.
  template <int kSums>
  __device__ int Multiply(float (&sums)[kSums]) {
    const int x_offset = group_ * WideTile::kXBytes / 2;
    int previous = 0;
    for (int c = 0; c < plan_.chunks; ++c) {
      WaitBarrier(shared_.full + place_.stage * 8, place_.phase);
      const uint32_t data = shared_.data + place_.stage * WideTile::kStageBytes;
      const uint64_t x = OperandAt(data + x_offset), weight = OperandAt(data + WideTile::kXBytes);
      Pin(sums);
      FenceProducts();
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        WarpgroupMultiply(sums, x + k * kStepOfK, weight + k * kStepOfK, c > 0 || k > 0);
      }
      CommitProducts();
      Pin(sums);
      if (c > 0) {
        WaitForProducts<1>();
        Release(previous);
      }
      previous = place_.stage;
      place_.Advance();
    }
    return previous;
  }

  // Every warp tells both thread blocks, which load into each other's rings.
  __device__ void Release(int stage) const {
    const int lane = thread_ % 32;
    if (lane < WideTile::kCluster) ArriveAt(shared_.empty + stage * 8, lane);
  }

  __device__ Lines FindLines(const WideTiles& tiles) const {
    const int slot = tiles.number % 2;
    const int row = group_ * 64 + thread_ / 32 * 16 + thread_ % 32 / 4;
    Lines lines;
    WaitBarrier(shared_.norms_full + slot * 8, tiles.number / 2 % 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lines.row[i] = tiles.first_row + row + i * 8;
      lines.valid[i] = lines.row[i] < op_.rows;
      lines.inverse_rms[i] =
          Op::kNormed ? shared_.norms[slot * WideTile::kRows + row + i * 8] : 1.0f;
    }
    Arrive(shared_.norms_empty + slot * 8);
    return lines;
  }

  const Op& op_;
  const WidePlan& plan_;
  const WideShared& shared_;
  WideRingPlace place_;
  int rank_, cluster_, group_, thread_;
  // Of rows lane / 4 and + 8 of the warp's 16, for block i of 8 columns: elements 4 i, 4 i + 1 of
  // the first and 4 i + 2, 4 i + 3 of the second, at columns 2 (lane % 4) and the next. Here, so
  // that tiles of both widths use the same registers.
  float sums_[WideTile::kUnits * kUnitSums];
};

#endif

template <class Op>
__global__ __launch_bounds__(kWideThreads,
                             1) void HopperWideKernel(const __grid_constant__ CUtensorMap x,
                                                      const __grid_constant__ CUtensorMap weight,
                                                      const __grid_constant__ Op op,
                                                      const __grid_constant__ WidePlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char dynamic[];
  __shared__ uint64_t barriers[2 * WideTile::kStages + 4];
  __shared__ float norms[2 * WideTile::kRows];
  WideShared shared;
  shared.data = (SharedAddress(dynamic) + 1023) & ~1023u;
  shared.staging = shared.data + WideTile::kStages * WideTile::kStageBytes;
  shared.full = SharedAddress(barriers);
  shared.empty = shared.full + WideTile::kStages * 8;
  shared.norms_full = shared.empty + WideTile::kStages * 8;
  shared.norms_empty = shared.norms_full + 2 * 8;
  shared.norms = norms;
  const int rank = static_cast<int>(ClusterRank());
  const int cluster = static_cast<int>(blockIdx.x) / WideTile::kCluster;
  if (threadIdx.x == 0) {
    PrefetchTensorMap(&x);
    PrefetchTensorMap(&weight);
    for (int i = 0; i < WideTile::kStages; ++i) {
      InitBarrier(shared.full + i * 8, 1);
      InitBarrier(shared.empty + i * 8, WideTile::kWarps * WideTile::kCluster);
    }
    for (int i = 0; i < 2; ++i) {
      // Every lane arrives for itself: racecheck does not follow what one says for its warp.
      InitBarrier(shared.norms_full + i * 8, 32);
      InitBarrier(shared.norms_empty + i * 8, 32 * WideTile::kWarps);
    }
    FenceBarrierInit();
  }
  ClusterArrive();
  ClusterWait();
  if (threadIdx.x < 128) {
    ShrinkRegisters<56>();
    if (threadIdx.x == 0) FillWideRing(&x, &weight, op, plan, shared, rank, cluster);
    if (threadIdx.x / 32 == 3) HelpWideEpilogues(op, plan, shared, rank, cluster);
  } else {
    GrowRegisters<224>();
    // Said so that the compiler knows it to be the same for the whole warp.
    const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128 - 1, 0);
    WideConsumer<Op>(op, plan, shared, rank, cluster, group).Run();
  }
  // No thread block leaves while the other may still reach into its shared memory.
  __syncwarp();
  ClusterArrive();
  ClusterWait();
#endif
}

}  // namespace tandem::engine::cuda
