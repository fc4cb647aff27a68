// The kernel behind skinny_linear.h: one streaming product, the parts that differ given as an Op.
//
// An Op is a plain struct with the arguments and
//   kPaired, kNormed   constants: rows of the weight come in pairs; x needs 1 / rms in the epilogue
//   weight, x, rows, inputs, granules   (a granule is a row of the weight, or a pair of them)
//   FirstRow(granule), SecondRow(granule)   rows of the weight
//   Prefetch(first, count)   calls what the epilogue of these granules reads into L2
//   Before<kColumns, kTurns>(first, count, first column, columns)   the same, in registers
//   Finish(OutputTile, what Before returned)   the epilogue, run by kSkinnyThreads threads; each
//                            warp has at most kColumns columns and 32 * kTurns granules
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/skinny_linear.h"
#include "engine/kernels/cuda/turns.cuh"

namespace tandem::engine::cuda {

inline constexpr int kSkinnyThreads = 256;
inline constexpr int kSkinnyWarps = kSkinnyThreads / 32;
// Half of Hopper's shared memory: what a kernel may use so that its successor fits beside it.
inline constexpr int kHalfShared = 113 << 10;

// kHeight x kK: weights per stage. kM x kN: the tensor core's product, of as many rows as hold
// kHeight and of a multiple of 8 columns (activation rows). kXRows: how many of these have room in
// the ring. What the product has beyond kHeight and kXRows is garbage that nobody reads. Warps are
// laid out kWarpsM x kWarpsK over a stage. kCut: K may be cut between thread blocks.
template <int kN_, int kXRows_, int kHeight_, int kK_, int kStages_, int kWarpsM_,
          bool kCut_ = false>
struct SkinnyTile {
  static constexpr bool kCut = kCut_;
  template <int kOther>
  using WithStages = SkinnyTile<kN_, kXRows_, kHeight_, kK_, kOther, kWarpsM_, kCut_>;
  static constexpr int kN = kN_, kXRows = kXRows_, kHeight = kHeight_, kK = kK_, kStages = kStages_;
  static constexpr int kWarpsM = kWarpsM_, kWarpsK = kSkinnyWarps / kWarpsM_;
  static constexpr int kM = (kHeight + 16 * kWarpsM - 1) / (16 * kWarpsM) * (16 * kWarpsM);
  static constexpr int kMTiles = kM / 16 / kWarpsM;  // per warp
  static constexpr int kNTiles = kN / 8;
  static constexpr int kSteps = kK / 16;  // of the tensor core per stage
  static constexpr int kRowBytes = kK * 2;
  static constexpr int kStageBytes = (kHeight + kXRows) * kRowBytes;
  // The sums pass through shared memory kOutN columns at a time, transposed, with a stride that
  // spreads a warp's accumulators over all banks.
  static constexpr int kOutN = kN < 32 ? kN : 32;
  static constexpr int kOutStride = kM + 4;
  static constexpr int kOutFloats = kOutN * kOutStride;
  // Room for one partial tile per K warp where that is small; else they add in turn.
  static constexpr int kOutTiles = kWarpsK * kOutFloats * 4 <= 16384 ? kWarpsK : 1;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + (kOutTiles * kOutFloats + kMaxSkinnyRows) * 4;
  static constexpr int kResident = kSharedBytes <= kHalfShared ? 2 : 1;  // per multiprocessor
  static constexpr int kPartialFloats = kN * kM;
  static_assert(kSteps % kWarpsK == 0 && kK % 64 == 0);
  static_assert(!kCut || kHeight == kM);
  static_assert(kOutStride % 8 == 4, "accumulators of a warp must fall into distinct banks");
};

// How a product is cut: units u = block * slices + slice, in that order.
struct SkinnyPlan {
  int blocks = 0;  // row blocks; block b holds granules [b * granules / blocks, ...)
  int slices = 0;  // of K
  int grid = 0;    // thread blocks; block i computes units [i * units / grid, ...)
};

struct OutputTile {
  const float* sums;  // [columns][stride]
  int stride;
  int first_column, columns;  // activation rows
  int block, first_granule, granules;
  const float* inverse_rms;  // [rows]
  __device__ float Get(int column, int row) const {
    return sums[(column - first_column) * stride + row];
  }
};

// One thread block's part of a product. First, when its turn has come, the ring is filled with
// weights, kStages - 1 times LoadNext, which needs no activations; then Run computes.
template <class Tile, class Op>
class SkinnyLinear {
 public:
  __device__ SkinnyLinear(const Op& op, const SkinnyPlan& plan, const SkinnyScratch& scratch,
                          unsigned char* shared)
      : op_(op), plan_(plan), scratch_(scratch), ring_(SharedAddress(shared)) {
    out_ = reinterpret_cast<float*>(shared + Tile::kStages * Tile::kStageBytes);
    inverse_rms_ = out_ + Tile::kOutTiles * Tile::kOutFloats;
    own_offset_ = Offset(threadIdx.x / kChunks, threadIdx.x % kChunks);
    units_ = plan.blocks * plan.slices;
    first_unit_ = UnitOf(blockIdx.x);
    count_ = UnitOf(blockIdx.x + 1) - first_unit_;
    load_ = CursorAt(first_unit_);
    FindRows(load_);
  }

  // Begins to copy the next unit's weights, if there is one, into the ring.
  __device__ void LoadNext(int stage) {
    if (loaded_ == count_) return;
    ++loaded_;
    LoadWeights(load_, stage);
    load_ = Next(load_);
    if (load_.slice == 0) FindRows(load_);
  }

  // Calls what the epilogues will read into L2: weights have pushed it out of there.
  __device__ void PrefetchEpilogue() const {
    const int begin = static_cast<int>(GranuleOf(first_unit_ / plan_.slices));
    const int end_block = (first_unit_ + count_ + plan_.slices - 1) / plan_.slices;
    op_.Prefetch(begin, static_cast<int>(GranuleOf(end_block)) - begin);
  }

  // Computes all units. The activations are complete.
  __device__ void Run() {
    int stage = 0;
    Cursor at = CursorAt(first_unit_);
    Cursor load_x = at;
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (i < count_) LoadX(load_x, i);
      load_x = Next(load_x);
      CommitCopies();
    }
    // The norms are not needed before the first epilogue; a warp with several rows finds them now.
    constexpr bool kNormsLater = Op::kNormed && Tile::kXRows <= kSkinnyWarps;
    const int warp = threadIdx.x / 32;
    if constexpr (kNormsLater) {
      CallForSquares(warp);
    } else if constexpr (Op::kNormed) {
      for (int row = warp; row < op_.rows; row += kSkinnyWarps) {
        CallForSquares(row);
        FindInverseRms(row);
      }
    }
    ClearSums();
    int slice_begin = at.slice;
    const int first_block = at.block;
#pragma unroll 1
    for (int i = 0; i < count_; ++i) {
      WaitForCopies<Tile::kStages - 2>();
      __syncthreads();  // the stage has arrived, and every warp has left the one loaded next
      const int free_stage = stage == 0 ? Tile::kStages - 1 : stage - 1;
      if (i + Tile::kStages - 1 < count_) {
        LoadX(load_, free_stage);
        LoadNext(free_stage);
      }
      CommitCopies();
      if (i == max(0, count_ - Tile::kStages) && threadIdx.x == 0) EndTurn(scratch_.turns);
      MultiplyStage(stage);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
      if (at.slice + 1 == plan_.slices || i + 1 == count_) {
        if constexpr (kNormsLater) {
          if (at.block == first_block) FindInverseRms(warp);
        }
        FinishBlock(at, slice_begin);
        slice_begin = 0;
        ClearSums();
      }
      at = Next(at);
    }
    WaitForCopies<0>();
  }

 private:
  // A unit, with the granules of its row block.
  struct Cursor {
    int block, slice, first_granule, granules;
  };

  __device__ int UnitOf(int thread_block) const {
    return static_cast<int>(static_cast<int64_t>(thread_block) * units_ / plan_.grid);
  }
  __device__ unsigned GranuleOf(int block) const {
    return static_cast<unsigned>(block) * static_cast<unsigned>(op_.granules) /
           static_cast<unsigned>(plan_.blocks);
  }
  __device__ Cursor AtBlock(int block, int slice) const {
    const int first = static_cast<int>(GranuleOf(block));
    return {block, slice, first, static_cast<int>(GranuleOf(block + 1)) - first};
  }
  __device__ Cursor CursorAt(int unit) const {
    return AtBlock(unit / plan_.slices, unit % plan_.slices);
  }
  __device__ Cursor Next(const Cursor& c) const {
    if (c.slice + 1 < plan_.slices) return {c.block, c.slice + 1, c.first_granule, c.granules};
    return AtBlock(c.block + 1, 0);
  }

  static constexpr int kChunks = Tile::kRowBytes / 16;  // 16-byte pieces of a stage's row
  static constexpr int kRowsAtOnce = kSkinnyThreads / kChunks;
  static constexpr int kWeightCopies = (Tile::kHeight + kRowsAtOnce - 1) / kRowsAtOnce;  // a thread
  static_assert(kRowsAtOnce % 8 == 0, "a thread's rows share their permutation");

  // Rows are permuted within so that 8 rows of one chunk fall into distinct banks.
  __device__ static uint32_t Offset(int row, int chunk) {
    return static_cast<uint32_t>(row * Tile::kRowBytes + ((chunk ^ (row & 7)) << 4));
  }

  __device__ const __nv_bfloat16* WeightRow(const Cursor& c, int row) const {
    int64_t global;
    if constexpr (Op::kPaired) {
      global = row < c.granules ? op_.FirstRow(c.first_granule + row)
                                : op_.SecondRow(c.first_granule + row - c.granules);
    } else {
      global = c.first_granule + row;
    }
    return op_.weight + global * op_.inputs;
  }

  // Finds the rows of a block that this thread copies; rows beyond the block become null.
  __device__ void FindRows(const Cursor& c) {
    const int rows = Op::kPaired ? 2 * c.granules : c.granules;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      const int row = threadIdx.x / kChunks + i * kRowsAtOnce;
      rows_[i] = row < rows ? WeightRow(c, row) + threadIdx.x % kChunks * 8 : nullptr;
    }
  }

  // FindRows has been called for the cursor's block.
  __device__ void LoadWeights(const Cursor& c, int stage) const {
    const int k = c.slice * Tile::kK;
    const bool inside = k + static_cast<int>(threadIdx.x) % kChunks * 8 < op_.inputs;
    const uint32_t to = ring_ + stage * Tile::kStageBytes + own_offset_;
#pragma unroll
    for (int i = 0; i < kWeightCopies; ++i) {
      if (rows_[i] != nullptr) {
        CopyAsync(to + i * kRowsAtOnce * Tile::kRowBytes, rows_[i] + k, inside);
      }
    }
  }

  __device__ void LoadX(const Cursor& c, int stage) const {
    const int k = c.slice * Tile::kK + static_cast<int>(threadIdx.x) % kChunks * 8;
    const int first_row = threadIdx.x / kChunks;
    const uint32_t to =
        ring_ + stage * Tile::kStageBytes + Tile::kHeight * Tile::kRowBytes + own_offset_;
    const __nv_bfloat16* x = op_.x + first_row * op_.inputs + k;
#pragma unroll
    for (int i = 0; i < (Tile::kXRows + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
      if (first_row + i * kRowsAtOnce < op_.rows) {
        CopyAsync(to + i * kRowsAtOnce * Tile::kRowBytes, x + i * kRowsAtOnce * op_.inputs,
                  k < op_.inputs);
      }
    }
  }

  // Calls for a row's shares of the sum of squares; a warp.
  __device__ void CallForSquares(int row) {
    const SquareSums& squares = op_.squares;
    squares_ = 0;
    for (int first = threadIdx.x % 32;; first += 32 * kShares) {
#pragma unroll
      for (int i = 0; i < kShares; ++i) {
        const int part = first + i * 32;
        shares_[i] = row < op_.rows && part < squares.parts
                         ? __ldcg(squares.shares + part * squares.stride + row)
                         : 0.0f;
      }
      if (first + 32 * kShares >= squares.parts) break;
      AddShares();
    }
  }
  __device__ void AddShares() {
#pragma unroll
    for (int i = 0; i < kShares; ++i) squares_ += shares_[i];
  }

  // inverse_rms_[row] from the shares that were called for, added in order.
  __device__ void FindInverseRms(int row) {
    AddShares();
    const float sum = WarpSum(squares_);
    if (row < op_.rows && threadIdx.x % 32 == 0) {
      inverse_rms_[row] = rsqrtf(sum / static_cast<float>(op_.inputs) + op_.epsilon);
    }
  }

  __device__ void ClearSums() {
#pragma unroll
    for (int m = 0; m < Tile::kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] = 0;
      }
    }
  }

  __device__ void MultiplyStage(int stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = warp % Tile::kWarpsM * (Tile::kMTiles * 16);
    const uint32_t w = ring_ + stage * Tile::kStageBytes;
    const uint32_t x = w + Tile::kHeight * Tile::kRowBytes;
#pragma unroll
    for (int i = 0; i < Tile::kSteps / Tile::kWarpsK; ++i) {
      const int step = warp / Tile::kWarpsM + i * Tile::kWarpsK;
      uint32_t a[Tile::kMTiles][4];
#pragma unroll
      for (int m = 0; m < Tile::kMTiles; ++m) {
        const int row = min(first_row + m * 16 + lane % 16, Tile::kHeight - 1);
        LoadMatrices(a[m], w + Offset(row, step * 2 + lane / 16));
      }
      // Two tiles of 8 activation rows at once; with a single tile the upper two matrices repeat
      // it.
#pragma unroll
      for (int n = 0; n < Tile::kNTiles; n += 2) {
        uint32_t b[4];
        const int column = n * 8 + (Tile::kNTiles > 1 ? lane / 16 * 8 : 0) + lane % 8;
        LoadMatrices(b, x + Offset(Tile::kXRows == 1 ? 0 : column, step * 2 + lane / 8 % 2));
#pragma unroll
        for (int m = 0; m < Tile::kMTiles; ++m) {
          MultiplyAdd(sums_[m][n], a[m], b[0], b[1]);
          if constexpr (Tile::kNTiles > 1) MultiplyAdd(sums_[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Brings columns [first_column, first_column + kOutN) of all warps' sums into out_, added in the
  // order of the K warps. All threads; ends with a barrier.
  __device__ void GatherSums(int first_column) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int k_warp = warp / Tile::kWarpsM;
    const int first_row = warp % Tile::kWarpsM * (Tile::kMTiles * 16);
    for (int turn = 0; turn < Tile::kWarpsK / Tile::kOutTiles; ++turn) {
      if (k_warp / Tile::kOutTiles == turn) {
        float* out = out_ + k_warp % Tile::kOutTiles * Tile::kOutFloats;
#pragma unroll
        for (int n = 0; n < Tile::kNTiles; ++n) {
          const int column = n * 8 + lane % 4 * 2 - first_column;
          if (column < 0 || column >= Tile::kOutN) continue;
#pragma unroll
          for (int m = 0; m < Tile::kMTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int row = first_row + m * 16 + lane / 4 + i / 2 * 8;
              float* to = out + (column + i % 2) * Tile::kOutStride + row;
              *to = turn == 0 ? sums_[m][n][i] : *to + sums_[m][n][i];
            }
          }
        }
      }
      __syncthreads();
    }
    if constexpr (Tile::kOutTiles > 1) {
      for (int i = threadIdx.x; i < Tile::kOutFloats; i += kSkinnyThreads) {
        float sum = out_[i];
#pragma unroll
        for (int k = 1; k < Tile::kOutTiles; ++k) sum += out_[k * Tile::kOutFloats + i];
        out_[i] = sum;
      }
      __syncthreads();
    }
  }

  // Where thread block `owner` left its part of a row block. A thread block shares at most two row
  // blocks with others: its first (begun by another) and its last (begun by itself).
  __device__ float* Partial(int owner, bool begun_here) const {
    return scratch_.partial + (static_cast<int64_t>(owner) * 2 + begun_here) * Tile::kPartialFloats;
  }
  __device__ int OwnerOf(int unit) const {
    return static_cast<int>(((static_cast<int64_t>(unit) + 1) * plan_.grid - 1) / units_);
  }

  // Leaves this thread block's part for the last of the block's owners. True for that one.
  __device__ bool LeavePartial(const Cursor& at, bool begun_here, int owners) {
    float* partial = Partial(blockIdx.x, begun_here);
    for (int first = 0; first < Tile::kN; first += Tile::kOutN) {
      if (first >= op_.rows) break;
      GatherSums(first);
      for (int i = threadIdx.x; i < Tile::kOutN * Tile::kM / 4; i += kSkinnyThreads) {
        __stcg(reinterpret_cast<float4*>(partial + first * Tile::kM) + i, *OutQuad(i));
      }
      __syncthreads();
    }
    __threadfence();
    __syncthreads();
    bool* is_last = reinterpret_cast<bool*>(out_);
    if (threadIdx.x == 0) {
      const bool last = atomicAdd(scratch_.counters + at.block, 1u) + 1 == owners;
      if (last) scratch_.counters[at.block] = 0;
      *is_last = last;
    }
    __syncthreads();
    const bool last = *is_last;
    __syncthreads();
    if (last) __threadfence();
    return last;
  }

  // out_ = the owners' parts of kOutN columns, added in order. All loads of an owner are in flight
  // at once.
  __device__ void SumPartials(int first_owner, int owners, int first_column) {
    constexpr int kQuads = Tile::kOutN * Tile::kM / 4;
    constexpr int kPerThread = (kQuads + kSkinnyThreads - 1) / kSkinnyThreads;
    float4 sums[kPerThread] = {};
#pragma unroll 2
    for (int k = 0; k < owners; ++k) {
      const float4* part = reinterpret_cast<const float4*>(Partial(first_owner + k, k == 0) +
                                                           first_column * Tile::kM);
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int quad = threadIdx.x + i * kSkinnyThreads;
        if (kQuads % kSkinnyThreads != 0 && quad >= kQuads) continue;
        const float4 value = __ldcg(part + quad);
        sums[i].x += value.x;
        sums[i].y += value.y;
        sums[i].z += value.z;
        sums[i].w += value.w;
      }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int quad = threadIdx.x + i * kSkinnyThreads;
      if (kQuads % kSkinnyThreads != 0 && quad >= kQuads) continue;
      *OutQuad(quad) = sums[i];
    }
    __syncthreads();
  }

  // Four rows of out_, numbered without its padding.
  __device__ float4* OutQuad(int quad) const {
    constexpr int kPerColumn = Tile::kM / 4;
    return reinterpret_cast<float4*>(out_ + quad / kPerColumn * Tile::kOutStride +
                                     quad % kPerColumn * 4);
  }

  __device__ void FinishBlock(const Cursor& at, int slice_begin) {
    const bool whole = slice_begin == 0 && at.slice + 1 == plan_.slices;
    int first_owner = 0, owners = 1;
    if (!whole) {
      first_owner = OwnerOf(at.block * plan_.slices);
      owners = OwnerOf(at.block * plan_.slices + plan_.slices - 1) - first_owner + 1;
      if (!LeavePartial(at, slice_begin == 0, owners)) return;
    }
    for (int first = 0; first < Tile::kN; first += Tile::kOutN) {
      if (first >= op_.rows) break;
      if (whole) {
        GatherSums(first);
      } else {
        SumPartials(first_owner, owners, first);
      }
      const int columns = min(Tile::kOutN, op_.rows - first);
      constexpr int kColumns = (Tile::kOutN + kSkinnyWarps - 1) / kSkinnyWarps;
      constexpr int kTurns = (Tile::kM + 31) / 32;
      const auto before =
          op_.template Before<kColumns, kTurns>(at.first_granule, at.granules, first, columns);
      op_.Finish(OutputTile{out_, Tile::kOutStride, first, columns, at.block, at.first_granule,
                            at.granules, inverse_rms_},
                 before);
      __syncthreads();
    }
  }

  const Op op_;
  const SkinnyPlan plan_;
  const SkinnyScratch scratch_;
  const uint32_t ring_;
  float* out_;
  float* inverse_rms_;
  int units_, first_unit_, count_;
  int loaded_ = 0;                            // units
  Cursor load_;                               // the next to load
  const __nv_bfloat16* rows_[kWeightCopies];  // of load_'s block: see FindRows
  uint32_t own_offset_;                       // of this thread's first copy within a stage
  float sums_[Tile::kMTiles][Tile::kNTiles][4];
  static constexpr int kShares = 8;  // on their way at once: 256 of a row
  float squares_, shares_[kShares];  // of the row whose norm this warp finds
};

template <class Tile, class Op>
__global__ __launch_bounds__(kSkinnyThreads, Tile::kResident) void SkinnyLinearKernel(
    const __grid_constant__ Op op, const __grid_constant__ SkinnyPlan plan,
    const __grid_constant__ SkinnyScratch scratch) {
  extern __shared__ __align__(128) unsigned char shared[];
  SkinnyLinear<Tile, Op> linear(op, plan, scratch, shared);
  // Weights depend on nobody: the ring fills while the predecessor ends.
  TakeTurn(scratch.turns);
  for (int i = 0; i < Tile::kStages - 1; ++i) linear.LoadNext(i);
  linear.PrefetchEpilogue();
  WaitForPredecessor();
  LetSuccessorStart();
  linear.Run();
}

}  // namespace tandem::engine::cuda
