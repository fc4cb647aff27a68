// The kernel behind int4_linear.h: one streaming product; what differs is given as an Op of
// skinny_linear_ops.cuh.
//
// A warp takes a step at a time: half a block of inputs (64 of them) or a whole one, of its kMTiles
// tiles. It copies what it multiplies itself, into a ring of its own, so that no thread waits for
// weights that another copies.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>

#include "engine/kernels/cuda/hopper.cuh"
#include "engine/kernels/cuda/int4_linear.h"
#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/skinny_linear_ops.cuh"
#include "engine/kernels/cuda/turns.cuh"

namespace tandem::engine::cuda {

// Rows from which K may be cut, and in how many parts.
inline constexpr int kInt4CutRows = 16;
inline constexpr int kMostInt4Parts = 8;

// kN x 8: columns of the tensor core's product (activation rows), of which kXRows have room in the
// ring. A row block has kWarpsM * kMTiles tiles, and kWarpsK warps share each tile's inputs. A step
// has kHalves halves of blocks. kFine: scales may change every 32 inputs, else not within a step.
// kWarpgroups: products are those of warpgroups (sm_90a), whose four warps have a tile each.
template <int kN_, int kXRows_, int kWarpsM_, int kWarpsK_, int kMTiles_, int kHalves_,
          int kStages_, bool kFine_, bool kWarpgroups_ = false>
struct Int4Tile {
  static constexpr int kN = kN_, kXRows = kXRows_, kWarpsM = kWarpsM_, kWarpsK = kWarpsK_;
  static constexpr int kMTiles = kMTiles_, kHalves = kHalves_, kStages = kStages_;
  static constexpr bool kFine = kFine_, kWarpgroups = kWarpgroups_;
  static constexpr bool kCut = kXRows >= kInt4CutRows;  // K may be
  static constexpr int kWarps = kWarpsM * kWarpsK, kThreads = 32 * kWarps;
  static constexpr int kTiles = kWarpsM * kMTiles;
  static constexpr int kNTiles = kN / 8;
  // Of a step: a tile's values, then kSets sets of its scales; and activations, which a warp has in
  // its own ring where no other reads the same.
  static constexpr int kRuns = 2 * kHalves;  // of 32 inputs
  static constexpr int kSets = kFine ? kRuns : 1;
  static constexpr int kHalfBytes = 32 * 16;
  static constexpr int kValueBytes = kHalves * kHalfBytes;
  static constexpr int kSetBytes = kInt4ScaleWords * 4;
  static constexpr int kTileBytes = kValueBytes + kSets * kSetBytes;
  static constexpr int kXHalfBytes = kXRows * kInt4Half * 2;
  static constexpr int kXBytes = kHalves * kXHalfBytes;
  static constexpr bool kOwnX = kWarpsM <= 2;
  static constexpr int kOwnXBytes = kOwnX ? kXBytes : 0;
  static constexpr int kWarpBytes = (kOwnXBytes + kMTiles * kTileBytes + 127) / 128 * 128;
  static constexpr int kSharedXBytes = kOwnX ? 0 : kWarpsK * kXBytes;
  static constexpr int kAlignment = kWarpgroups ? 1024 : 128;  // of activations in the ring
  static constexpr int kStageBytes =
      (kSharedXBytes + kWarps * kWarpBytes + kAlignment - 1) / kAlignment * kAlignment;
  // The sums pass through shared memory kOutN columns at a time, transposed, with a stride that
  // spreads a warp's accumulators over all banks.
  static constexpr int kRows = 16 * kTiles;
  static constexpr int kMostOutN = kRows > 128 ? 16 : (kRows* kWarpsK > 256 ? 4 : 32);
  static constexpr int kOutN = kN < kMostOutN ? kN : kMostOutN;
  static constexpr int kOutStride = kRows + 4;
  static constexpr int kOutFloats = (kXRows < kOutN ? kXRows : kOutN) * kOutStride;
  // Room for one partial tile per K warp where that is small; else they add in turn.
  static constexpr int kOutTiles = kWarpsK * kOutFloats * 4 <= 20480 ? kWarpsK : 1;
  static constexpr int kSharedBytes =
      kStages * kStageBytes + (kOutTiles * kOutFloats + kMaxInt4Rows) * 4;
  // Thread blocks per multiprocessor that registers are left for.
  static constexpr int kResident =
      kSharedBytes <= kHalfShared && kN <= 16 && kThreads <= 320 ? 2 : 1;
  static constexpr int kPartialFloats = kN * kRows;
  static_assert(kOutStride % 8 == 4 && kStages >= 3);
  static_assert(4 * kMTiles * kSets <= 32, "a lane copies at most one piece of scales");
  static_assert(!kWarpgroups || (kWarps % 4 == 0 && kMTiles == 1 && kN % 32 == 0));
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

// (a & b) | c. Written out: left to itself the compiler takes two instructions where b and c are
// constants.
__device__ inline uint32_t AndOr(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// (q - zero) / 4, exactly, for the eight values of a word, as the tensor core's A side wants them.
//
// First row: four bits at the end of the bfloat16 number 128 make it 128 + q. Second row: the four
// bits above these, alone, are the number 16 q 2^-133, for the smallest numbers of the format lie
// as evenly as integers, also beyond the first of them that has an exponent. So every other value
// needs no shift, which costs as much as the rest together.
__device__ inline void Unpack(uint32_t word, uint32_t less_first, uint32_t less_second,
                              uint32_t (&a)[4]) {
  constexpr uint32_t kMask = 0x000f000f, kBase = 0x43004300;
  constexpr uint32_t kQuarter = 0x3e803e80, kHuge = 0x7f007f00;  // 2^127
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = word >> (8 * i);
    const uint32_t first = AndOr(bits, kMask, kBase), second = bits & kMask << 4;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(a[2 * i])
        : "r"(first), "r"(kQuarter), "r"(less_first));
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(a[2 * i + 1])
        : "r"(second), "r"(kHuge), "r"(less_second));
  }
}
inline constexpr float kUnpackedScale = 4;
// What Unpack adds, of words with the zero points of a row: -(32 + zero / 4) and -zero / 4, twice.
__device__ inline uint32_t LessFirst(uint32_t scale_word) {
  return AndOr(scale_word, 15, 0xc200) * 0x00010001u;
}
__device__ inline uint32_t LessSecond(uint32_t scale_word) {
  constexpr uint32_t kThirtyTwo = 0x42004200, kOne = 0x3f803f80;
  uint32_t out;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(out)
      : "r"(LessFirst(scale_word)), "r"(kOne), "r"(kThirtyTwo));
  return out;
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
__device__ inline uint2 LoadShared8(uint32_t address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

// a * b / c. Called, not copied to every place: the kernels of a step take turns, and each finds
// its instructions pushed out of the caches.
inline __device__ __noinline__ int DivideProduct(int a, int b, int c) {
  return static_cast<int>(static_cast<unsigned>(a) * static_cast<unsigned>(b) /
                          static_cast<unsigned>(c));
}

// The same, in a register from here on: the compiler would compute it anew at every use.
__device__ inline uint32_t Kept(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

// One thread block's part of a product. First, when its turn has come, the ring is filled with
// weights, kStages - 1 times LoadNext, which needs no activations; then Run computes.
template <class Tile, class Op>
class Int4Linear {
 public:
  __device__ Int4Linear(const Op& op, const Int4Matrix& matrix, const Int4Plan& plan,
                        const Int4Scratch& scratch, unsigned char* shared)
      : op_(op), matrix_(matrix), plan_(plan), scratch_(scratch) {
    out_ = reinterpret_cast<float*>(shared + Tile::kStages * Tile::kStageBytes);
    inverse_rms_ = out_ + Tile::kOutTiles * Tile::kOutFloats;
    const int steps = 2 / Tile::kHalves * matrix.blocks;
    int k_begin = 0, k_end = steps;
    if (plan.parts == 1) {
      first_block_ = RowBlockOf(blockIdx.x);
      row_blocks_ = RowBlockOf(blockIdx.x + 1) - first_block_;
    } else {
      part_ = static_cast<int>(blockIdx.x) % plan.parts;
      first_block_ = static_cast<int>(blockIdx.x) / plan.parts;
      row_blocks_ = 1;
      k_begin = steps * part_ / plan.parts;
      k_end = steps * (part_ + 1) / plan.parts;
    }
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, k_warp = warp / Tile::kWarpsM;
    first_step_ = k_begin + k_warp;
    end_step_ = k_end;
    // Warps that share activations go together: the last step may be beyond the end for some.
    steps_ =
        max(0, (k_end - (Tile::kOwnX ? first_step_ : k_begin) + Tile::kWarpsK - 1) / Tile::kWarpsK);
    left_ = row_blocks_ * steps_;
    load_block_ = first_block_;

    // A stage has the activations first, or each warp's part has.
    const uint32_t ring = SharedAddress(shared), own = ring + warp * Tile::kWarpBytes;
    const uint32_t values = own + (Tile::kOwnX ? Tile::kOwnXBytes : Tile::kSharedXBytes);
    const uint32_t x = Tile::kOwnX ? own : ring;
    x_ring_ = ring;
    values_at_ = Kept(values + lane * 16);
    scales_at_ = Kept(values + Tile::kValueBytes + lane / 4 * 8);
    scales_to_ =
        Kept(values + lane / kPieces * Tile::kTileBytes + Tile::kValueBytes + lane % kPieces * 16);
    x_at_ = Kept(x + (Tile::kOwnX ? 0 : k_warp * Tile::kXBytes) +
                 XOffset(Tile::kXRows == 1 ? 0 : lane % 8, lane / 8));
    const int row = XCopier() / kXPieces, piece = XCopier() % kXPieces;
    x_to_ = Kept(x + piece / 8 * Tile::kXHalfBytes + XOffset(row, piece % 8));
    FindRowBlock();
    x_from_ = op.x + static_cast<int64_t>(row) * op.inputs;
    x_k_ = x_begin_ = (Tile::kOwnX ? first_step_ : k_begin) * kStepInputs + piece * 8;
    x_inputs_ = min(op.inputs, k_end * kStepInputs);
    x_end_ = x_begin_ + steps_ * Tile::kWarpsK * kStepInputs;
    tile_step_ = Kept(Tile::kWarpsM * matrix.blocks * 2 * 4 * matrix.height);
    sets_ = matrix.groups == 1 ? 0 : matrix.sets;
  }

  // Begins to copy the next step's weights, if there is one, into the stage that lies `stage` bytes
  // into the ring.
  __device__ void LoadNext(uint32_t stage) {
    if (left_ > 0) LoadWeights(stage);
  }

  // Calls what the epilogues will read into L2: weights have pushed it out of there.
  __device__ void PrefetchEpilogue() const {
    const int begin = FirstTile(first_block_), end = FirstTile(first_block_ + row_blocks_);
    const int first = begin * GranulesPerTile();
    op_.Prefetch(first, min(end * GranulesPerTile(), op_.granules) - first);
  }

  // Computes all row blocks. The activations are complete.
  __device__ void Run() {
    constexpr uint32_t kEnd = Tile::kStages * Tile::kStageBytes;
    const int count = row_blocks_ * steps_;
    if (left_ == 0) EndOwnTurn();
#pragma unroll 1
    for (int i = 0; i < Tile::kStages - 1; ++i) {
      if (i < count) LoadX(i * Tile::kStageBytes);
      CommitCopies();
    }
    // The norms are not needed before the first epilogue; a warp with several rows finds them now.
    constexpr bool kNormsLater = Op::kNormed && Tile::kXRows <= Tile::kWarps;
    const int warp = threadIdx.x / 32;
    if constexpr (kNormsLater) {
      CallForSquares(warp);
    } else if constexpr (Op::kNormed) {
      FindInverseRms();
    }
    ClearSums();
    uint32_t stage = 0, free = kEnd - Tile::kStageBytes;
    Cursor at = AtBlock(first_block_);
#pragma unroll 1
    for (int block = 0; block < row_blocks_; ++block) {
#pragma unroll 1
      for (int step = 0; step < steps_; ++step) {
        // The stage has arrived, and whoever reads the same has left the one that is loaded next.
        WaitForCopies<Tile::kStages - 2>();
        if constexpr (Tile::kWarpgroups) FenceForCopyEngine();
        if constexpr (Tile::kOwnX) {
          __syncwarp();
        } else {
          __syncthreads();
        }
        if (left_ > 0) {
          LoadX(free);
          LoadWeights(free);
          if (left_ == 0) EndOwnTurn();
        }
        CommitCopies();
        if constexpr (Tile::kWarpgroups) {
          MultiplyByWarpgroup(stage);
        } else {
          MultiplyStep(stage);
        }
        free = stage;
        stage = stage + Tile::kStageBytes == kEnd ? 0 : stage + Tile::kStageBytes;
      }
      if constexpr (kNormsLater) {
        if (block == 0) FindInverseRms(warp);
      }
      ScaleSums();
      FinishBlock(at);
      ClearSums();
      at = AtBlock(at.row_block + 1);
    }
    WaitForCopies<0>();
  }

 private:
  struct Cursor {
    int row_block, first_tile, tiles;
  };
  __device__ void EndOwnTurn() const {
    if (threadIdx.x == 0) EndTurn(scratch_.turns);
  }
  __device__ int RowBlockOf(int thread_block) const {
    return DivideProduct(thread_block, plan_.row_blocks, plan_.grid);
  }
  __device__ int FirstTile(int row_block) const {
    return DivideProduct(row_block, matrix_.tiles, plan_.row_blocks);
  }
  __device__ Cursor AtBlock(int row_block) const {
    const int first = FirstTile(row_block);
    return {row_block, first, FirstTile(row_block + 1) - first};
  }
  __device__ int GranulesPerTile() const {
    return Op::kPaired ? matrix_.height : 2 * matrix_.height;
  }

  // A warp's tiles are kWarpsM apart, so that a row block that is not full leaves no warp without
  // work while others have more than one.
  __device__ static int OwnTile(int m) {
    return static_cast<int>(threadIdx.x) / 32 % Tile::kWarpsM + m * Tile::kWarpsM;
  }
  // In a step.
  static constexpr int kStepInputs = Tile::kHalves * kInt4Half;
  static constexpr int kPieces = 4 * Tile::kSets;  // of a tile's scales
  // Of a row of activations that threads copy together.
  static constexpr int kXPieces = 8 * Tile::kHalves * (Tile::kOwnX ? 1 : Tile::kWarpsK);

  // Where this lane's copies of load_block_ come from.
  __device__ void FindRowBlock() {
    const int lane = threadIdx.x % 32, lanes = 4 * matrix_.height;
    const Cursor c = AtBlock(load_block_);
    values_ = matrix_.values +
              (static_cast<int64_t>(c.first_tile + OwnTile(0)) * matrix_.blocks * 2 +
               first_step_ * Tile::kHalves) *
                  lanes +
              lane;
    own_tiles_ = lane < lanes ? (c.tiles - OwnTile(0) + Tile::kWarpsM - 1) / Tile::kWarpsM : 0;
    const int scaled = OwnTile(lane / kPieces);
    scales_ = matrix_.scales +
              static_cast<int64_t>(c.first_tile + scaled) * matrix_.groups * kInt4ScaleWords +
              lane % 4 * 4;
    group_end_ = lane < Tile::kMTiles * kPieces && scaled < c.tiles ? matrix_.groups : -1;
    run_ = Tile::kRuns * first_step_ + lane % kPieces / 4;
    load_end_ = run_ + Tile::kRuns * Tile::kWarpsK * steps_;
  }

  __device__ void LoadWeights(uint32_t stage) {
    const int lanes = 4 * matrix_.height;
    constexpr bool kWhole = Tile::kOwnX || Tile::kWarpsK == 1;
    const bool inside = kWhole || run_ < end_step_ * Tile::kRuns;
#pragma unroll
    for (int m = 0; m < Tile::kMTiles; ++m) {
      if (m >= own_tiles_) continue;
#pragma unroll
      for (int half = 0; half < Tile::kHalves; ++half) {
        CopyAsync(values_at_ + stage + m * Tile::kTileBytes + half * Tile::kHalfBytes,
                  values_ + m * tile_step_ + half * lanes, kWhole || inside);
      }
    }
    values_ += Tile::kWarpsK * Tile::kHalves * lanes;
    if (group_end_ >= 0) {
      const int group = run_ * sets_ >> 2;
      CopyAsync(scales_to_ + stage, scales_ + group * kInt4ScaleWords,
                inside && group < group_end_);
    }
    --left_;
    run_ += Tile::kRuns * Tile::kWarpsK;
    if (run_ == load_end_) {
      ++load_block_;
      FindRowBlock();
    }
  }

  // Where piece `piece` of 16 bytes of a row's half block lies: eight rows' same pieces are in
  // distinct banks.
  __device__ static uint32_t XOffset(int row, int piece) {
    return static_cast<uint32_t>(row * (kInt4Half * 2) + ((piece ^ row % 8) << 4));
  }
  // Number of this thread among those that copy the same activations.
  __device__ static int XCopier() { return threadIdx.x % (Tile::kOwnX ? 32 : Tile::kThreads); }

  __device__ void LoadX(uint32_t stage) {
    constexpr int kCopiers = Tile::kOwnX ? 32 : Tile::kThreads;
    constexpr int kRowsAtOnce = Tile::kXRows == 1 ? 1 : kCopiers / kXPieces / 4 * 4;
    static_assert(kRowsAtOnce > 0, "XOffset of a row and of the fourth after it differ by one bit");
    const int first = XCopier() / kXPieces;
    const bool valid = x_k_ < x_inputs_;
    const __nv_bfloat16* from = x_from_ + (valid ? x_k_ : 0);
#pragma unroll
    for (int i = 0; i * kRowsAtOnce < Tile::kXRows; ++i) {
      const int more = i * kRowsAtOnce;
      if (first < kRowsAtOnce && first + more < op_.rows) {
        CopyAsync((x_to_ + stage + more * (kInt4Half * 2)) ^ static_cast<uint32_t>(more % 8 << 4),
                  from + more * op_.inputs, valid);
      }
    }
    x_k_ += Tile::kWarpsK * kStepInputs;
    if (x_k_ == x_end_) x_k_ = x_begin_;
  }

  // inverse_rms_ of all rows, from the shares of their sums of squares: those of a warp's rows are
  // on their way together.
  __device__ void FindInverseRms() {
    constexpr int kRowsOfWarp = (Tile::kXRows + Tile::kWarps - 1) / Tile::kWarps;
    const SquareSums& squares = op_.squares;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    float sums[kRowsOfWarp] = {};
#pragma unroll 4
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

  // What Unpack left out.
  __device__ void ScaleSums() {
#pragma unroll
    for (int m = 0; m < Tile::kMTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Tile::kNTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sums_[m][n][i] *= kUnpackedScale;
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

  __device__ void MultiplyStep(uint32_t stage) {
    constexpr int kRunsOfSet = Tile::kRuns / Tile::kSets;
    uint4 words[Tile::kMTiles];
    uint2 scales[Tile::kMTiles];
    uint32_t less_first[Tile::kMTiles], less_second[Tile::kMTiles];
    float group[Tile::kMTiles][Tile::kNTiles][4];
#pragma unroll
    for (int run = 0; run < Tile::kRuns; ++run) {
#pragma unroll
      for (int m = 0; m < Tile::kMTiles; ++m) {
        const uint32_t tile = stage + m * Tile::kTileBytes;
        if (run % 2 == 0) {
          words[m] = LoadShared16(values_at_ + tile + run / 2 * Tile::kHalfBytes);
        }
        if (run % kRunsOfSet == 0) {
          scales[m] = LoadShared8(scales_at_ + tile + run / kRunsOfSet * Tile::kSetBytes);
          less_first[m] = LessFirst(scales[m].x);
          less_second[m] = LessSecond(scales[m].y);
        }
      }
      uint32_t b[Tile::kNTiles][4];
#pragma unroll
      for (int n = 0; n < Tile::kNTiles; ++n) {
        LoadMatrices(b[n], ((x_at_ + stage) ^ static_cast<uint32_t>(run % 2 << 6)) +
                               run / 2 * Tile::kXHalfBytes + n * 8 * (kInt4Half * 2));
      }
#pragma unroll
      for (int step = 0; step < 2; ++step) {
#pragma unroll
        for (int m = 0; m < Tile::kMTiles; ++m) {
          const uint4& v = words[m];
          uint32_t a[4];
          Unpack(run % 2 == 0 ? (step == 0 ? v.x : v.y) : (step == 0 ? v.z : v.w), less_first[m],
                 less_second[m], a);
#pragma unroll
          for (int n = 0; n < Tile::kNTiles; ++n) {
            if (step == 0 && run % kRunsOfSet == 0) {
              Multiply(group[m][n], a, b[n][0], b[n][1]);
            } else {
              MultiplyAdd(group[m][n], a, b[n][2 * step], b[n][2 * step + 1]);
            }
          }
        }
      }
      if (run % kRunsOfSet == kRunsOfSet - 1) {
#pragma unroll
        for (int m = 0; m < Tile::kMTiles; ++m) {
          const float first = ScaleOf(scales[m].x), second = ScaleOf(scales[m].y);
#pragma unroll
          for (int n = 0; n < Tile::kNTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              sums_[m][n][i] += (i < 2 ? first : second) * group[m][n][i];
            }
          }
        }
      }
    }
  }

  // The same by products of warpgroups, whose four warps have a tile each: those take the
  // activations from shared memory, and 32 rows of them at a time.
  __device__ void MultiplyByWarpgroup(uint32_t stage) {
    constexpr int kProducts = Tile::kFine ? 2 : 4;  // with one scale
#pragma unroll
    for (int turn = 0; turn < 4 * Tile::kHalves / kProducts; ++turn) {
      const int set = Tile::kFine ? turn : 0;
      const uint2 scales = LoadShared8(scales_at_ + stage + set * Tile::kSetBytes);
      uint32_t a[kProducts][4];
      {
        const uint32_t less_first = LessFirst(scales.x), less_second = LessSecond(scales.y);
#pragma unroll
        for (int i = 0; i < kProducts; i += 2) {
          const int product = turn * kProducts + i;
          const uint2 words =
              LoadShared8(values_at_ + stage + product / 4 * Tile::kHalfBytes + product % 4 * 4);
          Unpack(words.x, less_first, less_second, a[i]);
          Unpack(words.y, less_first, less_second, a[i + 1]);
        }
      }
      const uint64_t b0 = OperandAt(x_ring_ + stage + turn * kProducts / 4 * Tile::kXHalfBytes) +
                          turn * kProducts % 4 * kStepOfK;
#pragma unroll
      for (int part = 0; part < Tile::kN / 32; ++part) {
        float group[16];
        FenceProducts();
#pragma unroll
        for (int i = 0; i < kProducts; ++i) {
          WarpgroupMultiply(group, a[i], b0 + part * (32 * kInt4Half * 2 >> 4) + i * kStepOfK,
                            i > 0);
        }
        CommitProducts();
        WaitForProducts<0>();
        Pin(group);
        const float first = ScaleOf(scales.x), second = ScaleOf(scales.y);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
          sums_[0][part * 4 + i / 4][i % 4] += (i % 4 < 2 ? first : second) * group[i];
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
  // This lane's places in the ring's first stage.
  uint32_t x_ring_, values_at_, scales_at_, scales_to_, x_at_, x_to_;
  float* out_;
  float* inverse_rms_;
  int part_ = 0, first_block_, row_blocks_;
  int first_step_, end_step_, steps_;  // of this warp, in each row block
  // The next step to load: see FindRowBlock. run_: of 32 inputs, by their number.
  int left_, load_block_, run_, load_end_, own_tiles_, group_end_;
  const uint4* values_;
  const uint32_t* scales_;
  int tile_step_;  // from one of this warp's tiles to the next
  int sets_;       // of scales in a block; 0: one for all inputs
  int x_k_, x_begin_, x_end_, x_inputs_;
  const __nv_bfloat16* x_from_;
  float sums_[Tile::kMTiles][Tile::kNTiles][4];
  static constexpr int kShares = 8;  // on their way at once: 256 of a row
  float squares_, shares_[kShares];  // of the row whose norm this warp finds
};

template <class Tile, class Op>
__global__ __launch_bounds__(Tile::kThreads, Tile::kResident) void Int4LinearKernel(
    const __grid_constant__ Op op, const __grid_constant__ Int4Matrix matrix,
    const __grid_constant__ Int4Plan plan, const __grid_constant__ Int4Scratch scratch) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Int4Linear<Tile, Op> linear(op, matrix, plan, scratch, shared);
  // Weights depend on nobody: the ring fills while the predecessor ends.
  TakeTurn(scratch.turns);
#pragma unroll 1
  for (int i = 0; i < Tile::kStages - 1; ++i) linear.LoadNext(i * Tile::kStageBytes);
  linear.PrefetchEpilogue();
  WaitForPredecessor();
  LetSuccessorStart();
  linear.Run();
}

}  // namespace tandem::engine::cuda
