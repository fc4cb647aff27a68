// The kernel behind int4_linear.h: one streaming product; what differs is given as an Op of
// skinny_linear_ops.cuh.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

#include "engine/kernels/cuda/int4_linear.h"
#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/skinny_linear_ops.cuh"
#include "engine/kernels/cuda/turns.cuh"

namespace tandem::engine::cuda {

// Rows from which K may be cut, and in how many parts.
inline constexpr int kInt4CutRows = 16;
inline constexpr int kMostInt4Parts = 8;

// kN x 8: columns of the tensor core's product (activation rows), of which kXRows have room in the
// ring. A row block has kWarpsM * kMTiles tiles; a stage kStageBlocks blocks of inputs of each.
// kSets: Int4Matrix::sets.
template <int kN_, int kXRows_, int kWarpsM_, int kWarpsK_, int kMTiles_, int kStageBlocks_,
          int kStages_, int kSets_>
struct Int4Tile {
  template <int kOther>
  using WithStages =
      Int4Tile<kN_, kXRows_, kWarpsM_, kWarpsK_, kMTiles_, kStageBlocks_, kOther, kSets_>;
  static constexpr int kN = kN_, kXRows = kXRows_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr int kMTiles = kMTiles_, kStageBlocks = kStageBlocks_, kStages = kStages_;
  static constexpr int kSets = kSets_;
  static constexpr bool kCut = kXRows >= kInt4CutRows;  // K may be
  // Scales change within the half of a block that a lane reads at a time.
  static constexpr bool kFine = kSets == 4;
  static constexpr int kWarps = kWarpsM * kWarpsK, kThreads = 32 * kWarps;
  static constexpr int kTiles = kWarpsM * kMTiles;
  static constexpr int kNTiles = kN / 8;
  static constexpr int kHalves = 2 * kStageBlocks;  // of blocks of inputs, in a stage
  static constexpr int kHalfBytes = 32 * 16;        // of a tile
  static constexpr int kValueBytes = kTiles * kHalves * kHalfBytes;
  static constexpr int kSetBytes = kInt4ScaleWords * 4;
  static constexpr int kScaleBytes = kTiles * kStageBlocks * kSets * kSetBytes;
  static constexpr int kXBytes = kHalves * kXRows * 128;
  static constexpr int kStageBytes = kValueBytes + kScaleBytes + kXBytes;
  // The sums pass through shared memory kOutN columns at a time, transposed, with a stride that
  // spreads a warp's accumulators over all banks.
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMostOutN = kRows > 128 ? 16 : 32;
  static constexpr int kOutN = kN < kMostOutN ? kN : kMostOutN;
  static constexpr int kOutStride = kRows + 4;
  static constexpr int kOutFloats = (kXRows < kOutN ? kXRows : kOutN) * kOutStride;
  // Room for one partial tile per K warp where that is small; else they add in turn.
  static constexpr int kOutTiles = kWarpsK * kOutFloats * 4 <= 20480 ? kWarpsK : 1;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + (kOutTiles * kOutFloats + kMaxInt4Rows) * 4;
  static constexpr int kResident = kSharedBytes <= kHalfShared ? 2 : 1;  // per multiprocessor
  static constexpr int kPartialFloats = kN * kRows;
  static_assert(kHalves % kWarpsK == 0 && kOutStride % 8 == 4);
};

// Row block b has tiles [b * tiles / row_blocks, ...). Where parts is 1 thread block i has the row
// blocks [i * row_blocks / grid, ...), else part i % parts of row block i / parts.
struct Int4Plan {
  int row_blocks = 0, parts = 1, grid = 0;
};

// c[16][8] = a[16][16] b[16][8].
__device__ inline void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
      : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.0f));
}

// q - zero for the eight values of a word, as the tensor core's A side wants them. 0x4300 | q is
// 128 + q in bfloat16, and `less` holds -(128 + zero) twice: the difference is exact.
__device__ inline void Unpack(uint32_t word, uint32_t less_first, uint32_t less_second,
                              uint32_t (&a)[4]) {
  constexpr uint32_t kMask = 0x000f000f, kBase = 0x43004300, kOnes = 0x3f803f80;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t raised = (word >> (4 * i) & kMask) | kBase;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(a[i])
        : "r"(raised), "r"(kOnes), "r"(i % 2 == 0 ? less_first : less_second));
  }
}
__device__ inline uint32_t LessZero(uint32_t scale_word) {
  return (scale_word & 15) * 0x00010001u | 0xc300c300u;
}
__device__ inline float ScaleOf(uint32_t scale_word) { return __uint_as_float(scale_word & ~15u); }

__device__ inline uint4 LoadShared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
__device__ inline uint32_t LoadShared4(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

// a * b / c. Called, not copied to every place: the kernels of a step take turns, and each finds
// its instructions pushed out of the caches.
inline __device__ __noinline__ int DivideProduct(int a, int b, int c) {
  return static_cast<int>(static_cast<unsigned>(a) * static_cast<unsigned>(b) /
                          static_cast<unsigned>(c));
}

// One thread block's part of a product. First, when its turn has come, the ring is filled with
// weights, kStages - 1 times LoadNext, which needs no activations; then Run computes.
template <class Tile, class Op>
class Int4Linear {
 public:
  __device__ Int4Linear(const Op& op, const Int4Matrix& matrix, const Int4Plan& plan,
                        const Int4Scratch& scratch, unsigned char* shared)
      : op_(op), matrix_(matrix), plan_(plan), scratch_(scratch), ring_(SharedAddress(shared)) {
    out_ = reinterpret_cast<float*>(shared + Tile::kStages * Tile::kStageBytes);
    inverse_rms_ = out_ + Tile::kOutTiles * Tile::kOutFloats;
    if (plan.parts == 1) {
      first_block_ = RowBlockOf(blockIdx.x);
      row_blocks_ = RowBlockOf(blockIdx.x + 1) - first_block_;
      k_begin_ = 0;
      k_end_ = matrix.blocks;
    } else {
      part_ = static_cast<int>(blockIdx.x) % plan.parts;
      first_block_ = static_cast<int>(blockIdx.x) / plan.parts;
      row_blocks_ = 1;
      k_begin_ = matrix.blocks * part_ / plan.parts;
      k_end_ = matrix.blocks * (part_ + 1) / plan.parts;
    }
    stages_of_block_ = (k_end_ - k_begin_ + Tile::kStageBlocks - 1) / Tile::kStageBlocks;
    count_ = row_blocks_ * stages_of_block_;
    load_ = AtBlock(first_block_);
  }

  // Begins to copy the next stage's weights, if there is one, into the ring.
  __device__ void LoadNext(int stage) {
    if (loaded_ == count_) return;
    ++loaded_;
    LoadWeights(load_, stage);
    load_ = Next(load_);
  }

  // Calls what the epilogues will read into L2: weights have pushed it out of there.
  __device__ void PrefetchEpilogue() const {
    const int begin = FirstTile(first_block_), end = FirstTile(first_block_ + row_blocks_);
    const int first = begin * GranulesPerTile();
    op_.Prefetch(first, min(end * GranulesPerTile(), op_.granules) - first);
  }

  // Computes all row blocks. The activations are complete.
  __device__ void Run() {
    Cursor at = AtBlock(first_block_);
    Cursor load_x = at;
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (i < count_) LoadX(load_x, i);
      load_x = Next(load_x);
      CommitCopies();
    }
    if constexpr (Op::kNormed) FindInverseRms();
    ClearSums();
    int stage = 0;
#pragma unroll 1
    for (int i = 0; i < count_; ++i) {
      WaitForCopies<Tile::kStages - 2>();
      __syncthreads();  // the stage has arrived, and every warp has left the one loaded next
      const int free_stage = stage == 0 ? Tile::kStages - 1 : stage - 1;
      if (loaded_ < count_) {
        LoadX(load_, free_stage);
        LoadNext(free_stage);
      }
      CommitCopies();
      if (i == max(0, count_ - Tile::kStages) && threadIdx.x == 0) EndTurn(scratch_.turns);
      MultiplyStage(stage, at.tiles);
      stage = stage + 1 == Tile::kStages ? 0 : stage + 1;
      const Cursor next = Next(at);
      if (next.row_block != at.row_block) {
        FinishBlock(at);
        ClearSums();
      }
      at = next;
    }
    WaitForCopies<0>();
  }

 private:
  // A stage's place, with the tiles of its row block.
  struct Cursor {
    int row_block, first_tile, tiles, k;  // k: block of inputs
  };

  __device__ int RowBlockOf(int thread_block) const {
    return DivideProduct(thread_block, plan_.row_blocks, plan_.grid);
  }
  __device__ int FirstTile(int row_block) const {
    return DivideProduct(row_block, matrix_.tiles, plan_.row_blocks);
  }
  __device__ Cursor AtBlock(int row_block) const {
    const int first = FirstTile(row_block);
    return {row_block, first, FirstTile(row_block + 1) - first, k_begin_};
  }
  __device__ Cursor Next(const Cursor& c) const {
    if (c.k + Tile::kStageBlocks < k_end_) {
      return {c.row_block, c.first_tile, c.tiles, c.k + Tile::kStageBlocks};
    }
    return AtBlock(c.row_block + 1);
  }
  __device__ int GranulesPerTile() const {
    return Op::kPaired ? matrix_.height : 2 * matrix_.height;
  }

  // A warp copies half a block of a tile at a time, in kSlots turns. Which ones is known when the
  // kernel is compiled but for where the first of them is, so that a copy costs an addition.
  static constexpr int kSlots = (Tile::kTiles * Tile::kHalves + Tile::kWarps - 1) / Tile::kWarps;
  static constexpr bool kOwnTiles = Tile::kTiles % Tile::kWarps == 0;
  static constexpr bool kOwnHalf = !kOwnTiles && Tile::kWarps % Tile::kHalves == 0;
  static_assert(kOwnTiles || kOwnHalf || Tile::kHalves % Tile::kWarps == 0);
  __device__ static int SlotTile(int warp, int slot) {
    if constexpr (kOwnTiles) {
      return warp + slot / Tile::kHalves * Tile::kWarps;
    } else if constexpr (kOwnHalf) {
      return warp / Tile::kHalves + slot * (Tile::kWarps / Tile::kHalves);
    } else {
      return slot / (Tile::kHalves / Tile::kWarps);
    }
  }
  __device__ static int SlotHalf(int warp, int slot) {
    if constexpr (kOwnTiles) {
      return slot % Tile::kHalves;
    } else if constexpr (kOwnHalf) {
      return warp % Tile::kHalves;
    } else {
      return warp + slot % (Tile::kHalves / Tile::kWarps) * Tile::kWarps;
    }
  }

  static constexpr int kScalePieces = Tile::kStageBlocks * Tile::kSets * 4;  // of a tile
  static constexpr int kScaleSlots =
      (Tile::kTiles * kScalePieces + Tile::kThreads - 1) / Tile::kThreads;

  // Of the row block that begins: where this thread's first copies of a stage come from.
  __device__ void FindWeights(const Cursor& c) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lanes = 4 * matrix_.height;
    const int64_t block = static_cast<int64_t>(c.first_tile) * matrix_.blocks + c.k;
    values_ = matrix_.values + block * 2 * lanes + lane +
              (SlotTile(warp, 0) * matrix_.blocks * 2 + SlotHalf(warp, 0)) * lanes;
#pragma unroll
    for (int i = 0; i < kScaleSlots; ++i) {
      const int piece = threadIdx.x + i * Tile::kThreads;
      const int set = piece % kScalePieces / 4;
      const int group = matrix_.groups == 1 ? 0 : c.k * Tile::kSets + set;
      scales_[i] =
          matrix_.scales +
          (static_cast<int64_t>(c.first_tile + piece / kScalePieces) * matrix_.groups + group) *
              kInt4ScaleWords +
          piece % 4 * 4;
    }
  }

  __device__ void LoadWeights(const Cursor& c, int stage) {
    if (c.k == k_begin_) FindWeights(c);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, lanes = 4 * matrix_.height;
    const int tile_step = matrix_.blocks * 2 * lanes;
    const uint32_t to = ring_ + stage * Tile::kStageBytes;
    const int blocks = k_end_ - c.k;  // left
    if (lane < lanes) {
      const uint32_t own = to + lane * 16;
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        const int tile = SlotTile(warp, i), half = SlotHalf(warp, i);
        if (tile >= c.tiles) continue;
        const int from =
            (tile - SlotTile(warp, 0)) * tile_step + (half - SlotHalf(warp, 0)) * lanes;
        CopyAsync(own + (tile * Tile::kHalves + half) * Tile::kHalfBytes, values_ + from,
                  half / 2 < blocks);
      }
    }
    values_ += Tile::kStageBlocks * 2 * lanes;
#pragma unroll
    for (int i = 0; i < kScaleSlots; ++i) {
      const int piece = threadIdx.x + i * Tile::kThreads, set = piece % kScalePieces / 4;
      if (piece < c.tiles * kScalePieces) {
        const bool inside = matrix_.groups == 1 || c.k * Tile::kSets + set < matrix_.groups;
        CopyAsync(to + Tile::kValueBytes + piece * 16, scales_[i],
                  inside && set / Tile::kSets < blocks);
      }
      if (matrix_.groups != 1) scales_[i] += Tile::kStageBlocks * Tile::kSets * kInt4ScaleWords;
    }
  }

  // Where piece `piece` of 16 bytes of a row's half block lies: two rows that a warp reads at once
  // have theirs in distinct banks.
  __device__ static uint32_t XOffset(int half, int row, int piece) {
    return static_cast<uint32_t>((half * Tile::kXRows + row) * 128 +
                                 ((piece ^ (row & 1) << 2) << 4));
  }

  __device__ void LoadX(const Cursor& c, int stage) const {
    constexpr int kPieces = Tile::kStageBlocks * 16;  // of a row
    constexpr int kRowsAtOnce = Tile::kThreads / kPieces > 0 ? Tile::kThreads / kPieces : 1;
    static_assert(Tile::kThreads % kPieces == 0 || Tile::kXRows == 1);
    const uint32_t to = ring_ + stage * Tile::kStageBytes + Tile::kValueBytes + Tile::kScaleBytes;
    const int first = threadIdx.x / kPieces, piece = threadIdx.x % kPieces;
    const int k = c.k * kInt4Block + piece * 8;
    const bool valid = k < op_.inputs && c.k + piece / 16 < k_end_;
    const __nv_bfloat16* from = op_.x + first * op_.inputs + (valid ? k : 0);
#pragma unroll
    for (int i = 0; i < (Tile::kXRows + kRowsAtOnce - 1) / kRowsAtOnce; ++i) {
      const int row = first + i * kRowsAtOnce;
      if (row >= op_.rows) continue;
      CopyAsync(to + XOffset(piece / 8, row, piece % 8), from + i * kRowsAtOnce * op_.inputs,
                valid);
    }
  }

  // inverse_rms_ of all rows, from the shares of their sums of squares: those of a warp's rows are
  // on their way together.
  __device__ void FindInverseRms() {
    constexpr int kRowsOfWarp = (Tile::kXRows + Tile::kWarps - 1) / Tile::kWarps;
    const SquareSums& squares = op_.squares;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[kRowsOfWarp] = {};
#pragma unroll 2
    for (int part = lane; part < squares.parts; part += 32) {
#pragma unroll
      for (int i = 0; i < kRowsOfWarp; ++i) {
        const int row = warp + i * Tile::kWarps;
        if (row < op_.rows) sums[i] += __ldcg(squares.shares + part * squares.stride + row);
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int row = warp + i * Tile::kWarps;
      const float sum = WarpSum(sums[i]);
      if (lane == 0 && row < op_.rows) {
        inverse_rms_[row] = rsqrtf(sum / static_cast<float>(op_.inputs) + op_.epsilon);
      }
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

  // A warp's tiles are kWarpsM apart, so that a row block that is not full leaves no warp without
  // work while others have more than one.
  __device__ void MultiplyStage(int stage, int tiles) {
    if constexpr (Tile::kN >= 32 && Tile::kMTiles == 2) {
      const int own =
          (tiles - static_cast<int>(threadIdx.x) / 32 % Tile::kWarpsM + Tile::kWarpsM - 1) /
          Tile::kWarpsM;
      if (own == 1) MultiplyTiles<1>(stage);
      if (own == 2) MultiplyTiles<2>(stage);
    } else {
      MultiplyTiles<Tile::kMTiles>(stage);
    }
  }

  template <int kOwn>
  __device__ void MultiplyTiles(int stage) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_tile = warp % Tile::kWarpsM, g = lane / 4, t = lane % 4;
    const uint32_t values = ring_ + stage * Tile::kStageBytes;
    const uint32_t scales = values + Tile::kValueBytes, x = scales + Tile::kScaleBytes;
#pragma unroll
    for (int j = 0; j < Tile::kHalves / Tile::kWarpsK; ++j) {
      const int half = warp / Tile::kWarpsM + j * Tile::kWarpsK;
      uint4 words[kOwn];
      uint32_t less_first[kOwn], less_second[kOwn];
      float first_scale[kOwn], second_scale[kOwn];
      float group[kOwn][Tile::kNTiles][4];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        const int tile = first_tile + m * Tile::kWarpsM;
        words[m] =
            LoadShared16(values + (tile * Tile::kHalves + half) * Tile::kHalfBytes + lane * 16);
      }
#pragma unroll
      for (int run = 0; run < 2; ++run) {
        if (Tile::kFine || run == 0) {
          const int set = Tile::kFine ? half % 2 * 2 + run : Tile::kSets == 2 ? half % 2 : 0;
#pragma unroll
          for (int m = 0; m < kOwn; ++m) {
            const int tile = first_tile + m * Tile::kWarpsM;
            const uint32_t at =
                scales +
                ((tile * Tile::kStageBlocks + half / 2) * Tile::kSets + set) * Tile::kSetBytes +
                g * 4;
            const uint32_t first = LoadShared4(at), second = LoadShared4(at + 32);
            less_first[m] = LessZero(first);
            less_second[m] = LessZero(second);
            first_scale[m] = ScaleOf(first);
            second_scale[m] = ScaleOf(second);
          }
        }
        uint4 b[Tile::kNTiles];
#pragma unroll
        for (int n = 0; n < Tile::kNTiles; ++n) {
          const int row = Tile::kXRows == 1 ? 0 : n * 8 + g;
          b[n] = LoadShared16(x + XOffset(half, row, t + 4 * run));
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int m = 0; m < kOwn; ++m) {
            uint32_t a[4];
            Unpack(run == 0 ? (step == 0 ? words[m].x : words[m].y)
                            : (step == 0 ? words[m].z : words[m].w),
                   less_first[m], less_second[m], a);
#pragma unroll
            for (int n = 0; n < Tile::kNTiles; ++n) {
              const uint32_t b0 = step == 0 ? b[n].x : b[n].z, b1 = step == 0 ? b[n].y : b[n].w;
              if (step == 0 && (Tile::kFine || run == 0)) {
                Multiply(group[m][n], a, b0, b1);
              } else {
                MultiplyAdd(group[m][n], a, b0, b1);
              }
            }
          }
        }
        if (Tile::kFine || run == 1) {
#pragma unroll
          for (int m = 0; m < kOwn; ++m) {
#pragma unroll
            for (int n = 0; n < Tile::kNTiles; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                sums_[m][n][i] += (i < 2 ? first_scale : second_scale)[m] * group[m][n][i];
              }
            }
          }
        }
      }
    }
  }

  // Where a row of a tile stands among a row block's sums; -1: beyond the weight's rows. Pairs have
  // all first rows before all second ones.
  __device__ int OutRow(const Cursor& at, int granules, int tile, int g, bool second) const {
    const int h = matrix_.height;
    if (g >= h) return -1;
    const int granule = Op::kPaired ? tile * h + g : (2 * tile + second) * h + g;
    if (tile >= at.tiles || granule >= granules) return -1;
    return Op::kPaired && second ? granules + granule : granule;
  }

  // Brings columns [first_column, first_column + kOutN) of all warps' sums into out_, added in the
  // order of the K warps. All threads; ends with a barrier.
  __device__ void GatherSums(const Cursor& at, int granules, int first_column) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, k_warp = warp / Tile::kWarpsM;
    for (int turn = 0; turn < Tile::kWarpsK / Tile::kOutTiles; ++turn) {
      if (k_warp / Tile::kOutTiles == turn) {
        float* out = out_ + k_warp % Tile::kOutTiles * Tile::kOutFloats;
#pragma unroll
        for (int m = 0; m < Tile::kMTiles; ++m) {
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            const int row = OutRow(at, granules, warp % Tile::kWarpsM + m * Tile::kWarpsM, lane / 4,
                                   second != 0);
            if (row < 0) continue;
#pragma unroll
            for (int n = 0; n < Tile::kNTiles; ++n) {
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                const int column = n * 8 + lane % 4 * 2 + i - first_column;
                if (column < 0 || column >= Tile::kOutN || column >= Tile::kXRows) continue;
                float* to = out + column * Tile::kOutStride + row;
                const float sum = sums_[m][n][2 * second + i];
                *to = turn == 0 ? sum : *to + sum;
              }
            }
          }
        }
      }
      __syncthreads();
    }
    if constexpr (Tile::kOutTiles > 1) {
      for (int i = threadIdx.x; i < Tile::kOutFloats; i += Tile::kThreads) {
        float sum = out_[i];
#pragma unroll
        for (int k = 1; k < Tile::kOutTiles; ++k) sum += out_[k * Tile::kOutFloats + i];
        out_[i] = sum;
      }
      __syncthreads();
    }
  }

  __device__ float* Partial(int thread_block) const {
    return scratch_.partial + static_cast<int64_t>(thread_block) * Tile::kPartialFloats;
  }

  // Leaves this thread block's part in global memory and waits until all others of the row block
  // have done so.
  __device__ void LeavePart(const Cursor& at, int granules, int rows) {
    float* partial = Partial(blockIdx.x);
    if constexpr (Tile::kWarpsK == 1) {
      StoreSums(at, granules, partial);
    } else {
      for (int first = 0; first < op_.rows; first += Tile::kOutN) {
        GatherSums(at, granules, first);
        const int columns = min(Tile::kOutN, op_.rows - first);
        for (int i = threadIdx.x; i < columns * Tile::kRows; i += Tile::kThreads) {
          const int column = i / Tile::kRows, row = i % Tile::kRows;
          if (row < rows) {
            __stcg(partial + (first + column) * Tile::kRows + row,
                   out_[column * Tile::kOutStride + row]);
          }
        }
        __syncthreads();
      }
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      volatile uint32_t* arrived = scratch_.counters + 2 * at.row_block;
      const auto parts = static_cast<uint32_t>(plan_.parts);
      atomicAdd(scratch_.counters + 2 * at.row_block, 1u);
      while (*arrived < parts) {
      }
      // The last one to see that leaves the counters as they were.
      if (atomicAdd(scratch_.counters + 2 * at.row_block + 1, 1u) + 1 == parts) {
        scratch_.counters[2 * at.row_block] = 0;
        scratch_.counters[2 * at.row_block + 1] = 0;
      }
      __threadfence();
    }
    __syncthreads();
  }

  // This warp's sums, where no other has a part in them.
  __device__ void StoreSums(const Cursor& at, int granules, float* partial) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int m = 0; m < Tile::kMTiles; ++m) {
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const int row = OutRow(at, granules, warp + m * Tile::kWarpsM, lane / 4, second != 0);
        if (row < 0) continue;
#pragma unroll
        for (int n = 0; n < Tile::kNTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int column = n * 8 + lane % 4 * 2 + i;
            if (column < op_.rows) {
              __stcg(partial + column * Tile::kRows + row, sums_[m][n][2 * second + i]);
            }
          }
        }
      }
    }
  }

  // out_ = the sum of all parts, of granules [begin, end) of the row block's.
  __device__ void SumParts(int granules, int begin, int end, int first_column, int columns) {
    const int own = end - begin, rows = Op::kPaired ? 2 * own : own;
    const float* parts = Partial(static_cast<int>(blockIdx.x) - part_);
#pragma unroll 2
    for (int i = threadIdx.x; i < columns * rows; i += Tile::kThreads) {
      const int column = i / rows, row = i % rows;
      const int from = row < own ? begin + row : granules + begin + row - own;
      const float* at = parts + (first_column + column) * Tile::kRows + from;
      float values[kMostInt4Parts];
#pragma unroll
      for (int part = 0; part < kMostInt4Parts; ++part) {
        values[part] = part < plan_.parts
                           ? __ldcg(at + static_cast<int64_t>(part) * Tile::kPartialFloats)
                           : 0.0f;
      }
      float sum = values[0];
#pragma unroll
      for (int part = 1; part < kMostInt4Parts; ++part) sum += values[part];
      out_[i] = sum;
    }
    __syncthreads();
  }

  __device__ void FinishBlock(const Cursor& at) {
    const int first_granule = at.first_tile * GranulesPerTile();
    const int granules = min(at.tiles * GranulesPerTile(), op_.granules - first_granule);
    if constexpr (Tile::kCut) {
      if (plan_.parts > 1) return FinishPart(at, first_granule, granules);
    }
    for (int first = 0; first < op_.rows; first += Tile::kOutN) {
      GatherSums(at, granules, first);
      Finish<Tile::kOutN, Tile::kRows>({out_, Tile::kOutStride, first,
                                        min(Tile::kOutN, op_.rows - first), at.row_block,
                                        first_granule, granules, inverse_rms_});
    }
  }
  // This thread block's share of a row block that is cut.
  __device__ void FinishPart(const Cursor& at, int first_granule, int granules) {
    LeavePart(at, granules, Op::kPaired ? 2 * granules : granules);
    const int begin = granules * part_ / plan_.parts, end = granules * (part_ + 1) / plan_.parts;
    const int rows = max(1, Op::kPaired ? 2 * (end - begin) : end - begin);
    const int most = min(Tile::kXRows, Tile::kOutFloats / rows);  // columns at a time
    for (int first = 0; first < op_.rows; first += most) {
      const int columns = min(most, op_.rows - first);
      SumParts(granules, begin, end, first, columns);
      Finish<Tile::kXRows, Tile::kRows / 2 + 2>({out_, rows, first, columns,
                                                 at.row_block * plan_.parts + part_,
                                                 first_granule + begin, end - begin, inverse_rms_});
    }
  }
  // Ops know kSkinnyThreads threads.
  template <int kMostColumns, int kMostRows>
  __device__ void Finish(const OutputTile& tile) const {
    if (threadIdx.x < kSkinnyThreads) {
      constexpr int kColumns = (kMostColumns + kSkinnyWarps - 1) / kSkinnyWarps;
      constexpr int kTurns = (kMostRows + 31) / 32;
      op_.Finish(tile, op_.template Before<kColumns, kTurns>(tile.first_granule, tile.granules,
                                                             tile.first_column, tile.columns));
    }
    __syncthreads();
  }

  const Op op_;
  const Int4Matrix matrix_;
  const Int4Plan plan_;
  const Int4Scratch scratch_;
  const uint32_t ring_;
  float* out_;
  float* inverse_rms_;
  int part_ = 0, first_block_, row_blocks_, k_begin_, k_end_, stages_of_block_, count_;
  int loaded_ = 0;                 // stages
  Cursor load_;                    // the next to load
  const uint4* values_ = nullptr;  // of it: see FindWeights
  const uint32_t* scales_[kScaleSlots] = {};
  float sums_[Tile::kMTiles][Tile::kNTiles][4];
};

template <class Tile, class Op>
__global__ __launch_bounds__(Tile::kThreads, Tile::kResident) void Int4LinearKernel(
    const __grid_constant__ Op op, const __grid_constant__ Int4Matrix matrix,
    const __grid_constant__ Int4Plan plan, const __grid_constant__ Int4Scratch scratch) {
  extern __shared__ __align__(128) unsigned char shared[];
  Int4Linear<Tile, Op> linear(op, matrix, plan, scratch, shared);
  // Weights depend on nobody: the ring fills while the predecessor ends.
  TakeTurn(scratch.turns);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) linear.LoadNext(i);
  linear.PrefetchEpilogue();
  WaitForPredecessor();
  if constexpr (!Tile::kCut) LetSuccessorStart();
  linear.Run();
}

}  // namespace tandem::engine::cuda
