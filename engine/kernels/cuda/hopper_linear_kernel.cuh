// The kernel behind hopper_linear.h: one product, the parts that differ given as an Op.
//
// The weight's rows are taken in units of 128, two boxes of 64 rows each; an epilogue works on the
// sums of 64 rows of activations x one unit. An Op is a plain struct with the arguments and
//   kNormed              constant: x needs 1 / rms in the epilogue; then `squares` and `epsilon`
//   rows, inputs
//   BoxRow(unit, half)   the first of a box's rows in the weight
//   Prefetch(row, output)   calls into L2 what Finish will read for 32 outputs of a row
//   Finish<few_registers>(sums, lines, unit)   the epilogue, run by a warpgroup
#pragma once

#include <cstdint>

#include "engine/kernels/cuda/hopper.cuh"
#include "engine/kernels/cuda/hopper_linear.h"

namespace tandem::engine::cuda {

inline constexpr int kTellBarrier = 4;      // and 5, see HopperTeller
inline constexpr int kHopperThreads = 384;  // a warpgroup that loads and two that multiply
inline constexpr int kChunk = 64;           // of K: 128 bytes, the width of the swizzle
inline constexpr int kBoxRows = 64;
inline constexpr int kUnitRows = 2 * kBoxRows;
inline constexpr int kMostParts = 8;  // of K, of a tile that a cluster computes
inline constexpr int kUnitSums = 64;  // per thread: 64 x 128 sums over 128 threads

// How a thread block's work is tied to that of others.
enum class Team {
  kNone,
  kPair,   // clusters of two: tiles that lie one above the other; each loads half of the weights
  kParts,  // clusters of HopperPlan::parts: each computes a part of K of one tile, all join them
};

// 64 * kRowGroups rows of activations x kUnits units of the weight. The two warpgroups lie one
// above the other (kRowGroups 2) or side by side (1).
template <int kRowGroups_, Team kTeam_, int kStages_>
struct HopperTile {
  static constexpr int kRowGroups = kRowGroups_, kStages = kStages_;
  static constexpr bool kParts = kTeam_ == Team::kParts;
  static constexpr int kCluster = kTeam_ == Team::kPair ? 2 : 1;  // tiles of a worker
  // Whether a warp of its own finds the norms while the products run: where these take long enough.
  static constexpr bool kHelped = kTeam_ == Team::kPair;
  static constexpr int kUnits = 2, kBoxes = 2 * kUnits;
  static constexpr int kUnitsEach = kRowGroups == 2 ? kUnits : kUnits / 2;  // per warpgroup
  static constexpr int kRows = 64 * kRowGroups;
  static constexpr int kSums = kUnitSums * kUnitsEach;     // per thread
  static constexpr int kSlices = kRowGroups * 4 * kUnits;  // of 16 rows x a unit: a warp's
  static constexpr int kXBytes = kRows * kChunk * 2;
  static constexpr int kBoxBytes = kBoxRows * kChunk * 2;
  static constexpr int kStageBytes = kXBytes + kBoxes * kBoxBytes;
  // The ring begins at a multiple of 1,024 bytes, where the swizzle's pattern begins.
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;
  static constexpr int kPartialFloats = kRows * kUnits * kUnitRows;
};

// How a product is cut. A worker is a thread block or a cluster. It takes
//  - a range of the chunks of the first `split_tiles` tiles, then every workers-th tile from there
//    on, up to `whole_tiles`; then, with tail_parts, a part of K of one of the tiles that are left;
//  - or, with `parts`, one tile, in which every thread block of the cluster has a part of K.
struct HopperPlan {
  int row_tiles = 0;     // of a cluster's height
  int column_tiles = 0;  // pairs of units
  int chunks = 0;        // of K
  int split_tiles = 0, whole_tiles = 0;
  int tail_parts = 0;  // 0, 2 or 4
  int workers = 0;
  int parts = 0;
  int band = 0;  // row tiles that are walked through before the next column
  HopperScratch scratch;
};

// Chunks [begin, end) of a tile. `part`: which of HopperPlan::tail_parts, -1 where it is none.
struct Segment {
  int tile, row_tile, column_tile, begin, end, part;
};

// A worker's segments, one after the other.
class Segments {
 public:
  __device__ Segments(const HopperPlan& plan, int worker, int rank) : plan_(plan) {
    if (plan.parts > 0) {
      at_ = worker * plan.chunks + rank * plan.chunks / plan.parts;
      end_ = worker * plan.chunks + (rank + 1) * plan.chunks / plan.parts;
    } else {
      at_ = FirstUnit(plan, worker);
      end_ = FirstUnit(plan, worker + 1);
    }
    tile_ = plan.split_tiles + worker;
    if (plan.tail_parts > 0) tail_ = plan.whole_tiles + worker / plan.tail_parts;
    part_ = plan.tail_parts > 0 ? worker % plan.tail_parts : 0;
  }

  // The first of a worker's units (tile * chunks + chunk) in the tiles that are cut.
  __device__ static int FirstUnit(const HopperPlan& plan, int worker) {
    return static_cast<int>(static_cast<int64_t>(plan.split_tiles) * plan.chunks * worker /
                            plan.workers);
  }

  __device__ bool Next(Segment* s) {
    s->part = -1;
    if (at_ < end_) {
      s->tile = at_ / plan_.chunks;
      s->begin = at_ - s->tile * plan_.chunks;
      s->end = min(plan_.chunks, s->begin + end_ - at_);
      at_ += s->end - s->begin;
    } else if (tile_ < plan_.whole_tiles) {
      s->tile = tile_;
      s->begin = 0;
      s->end = plan_.chunks;
      tile_ += plan_.workers;
    } else {
      if (tail_ >= plan_.row_tiles * plan_.column_tiles) return false;
      s->tile = tail_;
      s->part = part_;
      s->begin = part_ * plan_.chunks / plan_.tail_parts;
      s->end = (part_ + 1) * plan_.chunks / plan_.tail_parts;
      tail_ = kNoTile;
    }
    // Tiles are numbered so that those computed at the same time share rows of both matrices.
    const int per_band = plan_.band * plan_.column_tiles;
    const int band = s->tile / per_band, within = s->tile - band * per_band;
    const int height = min(plan_.band, plan_.row_tiles - band * plan_.band);
    s->column_tile = within / height;
    s->row_tile = band * plan_.band + within - s->column_tile * height;
    return true;
  }

 private:
  static constexpr int kNoTile = 1 << 30;
  const HopperPlan& plan_;
  int at_, end_, tile_, tail_ = kNoTile, part_;
};

// Of the tile that a thread block takes of a worker's.
template <class Tile>
__device__ int FirstRow(const Segment& s, int rank) {
  return (s.row_tile * Tile::kCluster + (Tile::kCluster > 1 ? rank : 0)) * Tile::kRows;
}

// A tile's sums in the order of warps' pieces: slice i is unit i / 4 of warpgroup after warpgroup,
// of its warp i % 4. Its first row in the tile, and its unit in the tile:
template <class Tile>
__device__ int SliceRow(int slice) {
  return slice / 4 / Tile::kUnits * 64 + slice % 4 * 16;
}
template <class Tile>
__device__ int SliceUnit(int slice) {
  return slice / 4 % Tile::kUnits;
}

// Whether this thread block has a part in writing the results of a segment's tile.
template <class Tile>
__device__ bool Writes(const Segment& s) {
  return Tile::kParts || s.begin == 0 || s.part >= 0;
}

// The two rows of activations that a thread holds sums of, 8 apart.
struct Lines {
  int row[2];
  bool valid[2];
  float inverse_rms[2];
};

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

struct Ring {
  uint32_t data, full, empty;  // addresses; barriers are 8 bytes each
  const float* norms;          // [Tile::kRows]: 1 / rms of a tile's rows
  uint32_t norms_full, norms_empty;
  int stage = 0;
  uint32_t phase = 0;

  template <class Tile>
  __device__ void Advance() {
    if (++stage == Tile::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The thread that fills the ring.
template <class Tile, class Op>
class HopperProducer {
 public:
  __device__ HopperProducer(const CUtensorMap* x, const CUtensorMap* weight, const Op& op,
                            const HopperPlan& plan, const Ring& ring, int rank, int worker)
      : x_(x), weight_(weight), op_(op), plan_(plan), ring_(ring), rank_(rank), worker_(worker) {}

  __device__ void Run() {
    // Weights wait for nobody: the ring fills with them while the predecessor runs.
    const Ring start = ring_;
    int ahead = 0;
    Segment s;
    for (Segments all(plan_, worker_, rank_); ahead < Tile::kStages && all.Next(&s);) {
      for (int c = s.begin; c < s.end && ahead < Tile::kStages; ++c, ++ahead) {
        ExpectBytes(ring_.full + ring_.stage * 8, Tile::kStageBytes);
        LoadWeights(s, c);
        ring_.template Advance<Tile>();
      }
    }
    WaitForPredecessor();
    LetSuccessorStart();
    ring_ = start;
    for (Segments all(plan_, worker_, rank_); all.Next(&s);) {
      for (int c = s.begin; c < s.end; ++c) {
        if (ahead > 0) {
          --ahead;
        } else {
          WaitBarrier(ring_.empty + ring_.stage * 8, ring_.phase ^ 1);
          ExpectBytes(ring_.full + ring_.stage * 8, Tile::kStageBytes);
          LoadWeights(s, c);
        }
        LoadX(s, c);
        ring_.template Advance<Tile>();
      }
    }
  }

 private:
  __device__ void LoadX(const Segment& s, int chunk) const {
    LoadBox(ring_.data + ring_.stage * Tile::kStageBytes, x_, chunk * kChunk,
            FirstRow<Tile>(s, rank_), ring_.full + ring_.stage * 8);
  }

  __device__ void LoadWeights(const Segment& s, int chunk) const {
    const uint32_t to = ring_.data + ring_.stage * Tile::kStageBytes + Tile::kXBytes;
    const uint32_t barrier = ring_.full + ring_.stage * 8;
    constexpr int kOwn = Tile::kBoxes / Tile::kCluster;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int box = (Tile::kCluster > 1 ? rank_ * kOwn : 0) + i;
      const int row = op_.BoxRow(s.column_tile * Tile::kUnits + box / 2, box % 2);
      if constexpr (Tile::kCluster > 1) {
        LoadBoxToAll(to + box * Tile::kBoxBytes, weight_, chunk * kChunk, row, barrier,
                     (1 << Tile::kCluster) - 1);
      } else {
        LoadBox(to + box * Tile::kBoxBytes, weight_, chunk * kChunk, row, barrier);
      }
    }
  }

  const CUtensorMap *x_, *weight_;
  const Op& op_;
  const HopperPlan& plan_;
  Ring ring_;
  int rank_, worker_;
};

// A warp that prepares the epilogues while the products run: the norms of a tile's rows (kHelped),
// and what the epilogue reads is called into L2. It is one tile ahead at most.
template <class Tile, class Op>
__device__ void HelpEpilogues(const Op& op, const HopperPlan& plan, const Ring& ring, float* norms,
                              int rank, int worker) {
  WaitForPredecessor();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t phase = 1;
  Segment s;
  for (Segments all(plan, worker, rank); all.Next(&s);) {
    if (!Writes<Tile>(s)) continue;
    WaitBarrier(ring.norms_empty, phase);
    phase ^= 1;
    const int first_row = FirstRow<Tile>(s, rank);
    if constexpr (Op::kNormed && Tile::kHelped) {
      // In the order of FindNorms: every fourth share, then the four sums.
#pragma unroll 1
      for (int first = lane; first < Tile::kRows; first += 64) {
        float sums[4][2] = {};
#pragma unroll 1
        for (int part = 0; part < op.squares.parts; part += 4) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float* shares = op.squares.shares +
                                  static_cast<int64_t>(part + k) * op.squares.stride + first_row +
                                  first;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              if (part + k < op.squares.parts && first_row + first + i * 32 < op.rows) {
                sums[k][i] += __ldcg(shares + i * 32);
              }
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float sum = (sums[0][i] + sums[1][i]) + (sums[2][i] + sums[3][i]);
          norms[first + i * 32] = rsqrtf(sum / static_cast<float>(op.inputs) + op.epsilon);
        }
      }
    }
    __syncwarp();
    if (lane == 0) Arrive(ring.norms_full);
    const int step = Tile::kParts ? plan.parts : 1;
    for (int slice = Tile::kParts ? rank : 0; slice < Tile::kSlices; slice += step) {
      const int row = first_row + SliceRow<Tile>(slice) + lane / 2;
      if (row >= op.rows) continue;
      const int unit = s.column_tile * Tile::kUnits + SliceUnit<Tile>(slice);
      op.Prefetch(row, unit * kUnitRows + lane % 2 * 64);
      op.Prefetch(row, unit * kUnitRows + lane % 2 * 64 + 32);
    }
  }
}

// The first segment of a worker may lack a tile's first chunks: then its sums are left for another
// worker, once per kernel. One warp per warpgroup that multiplies tells of it, since the fence
// takes longer than the products can wait.
__device__ inline void TellOfPartial(const HopperPlan& plan, int group) {
  SyncThreads(kTellBarrier + group, 128 + 32);
  if (threadIdx.x % 32 == 0) {
    __threadfence();
    asm volatile("st.relaxed.gpu.global.u32 [%0], 1;" ::"l"(plan.scratch.flags +
                                                            (blockIdx.x * 2 + group) * 2)
                 : "memory");
  }
}

// A warpgroup that multiplies.
template <class Tile, class Op>
class HopperConsumer {
 public:
  __device__ HopperConsumer(const Op& op, const HopperPlan& plan, const Ring& ring, int rank,
                            int worker, int group)
      : op_(op),
        plan_(plan),
        ring_(ring),
        rank_(rank),
        worker_(worker),
        group_(group),
        thread_(threadIdx.x % 128) {}

  __device__ void Run() {
    WaitForPredecessor();
    Segment s;
    Segments all(plan_, worker_, rank_);
    while (all.Next(&s)) {
      const bool writes = Writes<Tile>(s);
      const int slice = Tile::kParts ? OwnSlice() : group_ * Tile::kUnitsEach * 4 + thread_ / 32;
      Lines lines;
      float shares[2][kHeldShares];
      if (writes) FindLines(s, slice, &lines, shares);
      Multiply(s.end - s.begin);
      if (writes) FindNorms(slice, shares, &lines);
      if constexpr (Tile::kParts) {
        JoinParts(s, lines);
        break;
      }
      if (Tile::kCluster > 1 && s.part >= 0) {
        TradeParts(s, lines);
        continue;
      }
      if (!writes) {
        LeavePartial();
        continue;
      }
      if (s.part < 0 && s.end < plan_.chunks) AddPartials(s.tile);
#pragma unroll
      for (int u = 0; u < Tile::kUnitsEach; ++u) {
        op_.template Finish<kFewRegisters>(
            reinterpret_cast<float(&)[kUnitSums]>(sums_[u * kUnitSums]), lines,
            UnitOf(s, group_ * Tile::kUnitsEach + u));
      }
    }
  }

 private:
  static constexpr int kOwnBarrier = 1 /* and 2 */, kJoinBarrier = 3;
  static constexpr bool kFewRegisters = Tile::kUnitsEach > 1;  // in the epilogue

  __device__ static int UnitOf(const Segment& s, int unit_in_tile) {
    return s.column_tile * Tile::kUnits + unit_in_tile % Tile::kUnits;
  }

  // Shares of square sums that one of a row's four lanes asks for before the products and adds up
  // after them; more of them are read when they are needed.
  static constexpr int kHeldShares = 8;
  static constexpr bool kFindsNorms = Op::kNormed && !Tile::kHelped;

  __device__ const float* ShareOf(int part, int row) const {
    return op_.squares.shares + static_cast<int64_t>(part) * op_.squares.stride + row;
  }

  __device__ void FindLines(const Segment& s, int slice, Lines* lines,
                            float (&shares)[2][kHeldShares]) const {
    const int lane = thread_ % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      lines->row[i] = FirstRow<Tile>(s, rank_) + SliceRow<Tile>(slice) + lane / 4 + i * 8;
      lines->valid[i] = slice < Tile::kSlices && lines->row[i] < op_.rows;
      lines->inverse_rms[i] = 1;
      if constexpr (kFindsNorms) {
#pragma unroll
        for (int k = 0; k < kHeldShares; ++k) {
          const int part = lane % 4 + k * 4;
          shares[i][k] = 0;
          if (lines->valid[i] && part < op_.squares.parts) {
            shares[i][k] = __ldcg(ShareOf(part, lines->row[i]));
          }
        }
      }
    }
  }

  __device__ void FindNorms(int slice, const float (&shares)[2][kHeldShares], Lines* lines) {
    if constexpr (kFindsNorms) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float sum = 0;
#pragma unroll
        for (int k = 0; k < kHeldShares; ++k) sum += shares[i][k];
        for (int part = thread_ % 4 + kHeldShares * 4; part < op_.squares.parts; part += 4) {
          if (lines->valid[i]) sum += __ldcg(ShareOf(part, lines->row[i]));
        }
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        lines->inverse_rms[i] = rsqrtf(sum / static_cast<float>(op_.inputs) + op_.epsilon);
      }
    }
    WaitBarrier(ring_.norms_full, norms_phase_);
    norms_phase_ ^= 1;
    if constexpr (Op::kNormed && Tile::kHelped) {
      const float* norms = ring_.norms + SliceRow<Tile>(slice) + thread_ % 32 / 4;
      lines->inverse_rms[0] = norms[0];
      lines->inverse_rms[1] = norms[8];
    }
    __syncwarp();
    if (thread_ % 32 == 0) Arrive(ring_.norms_empty);
  }

  // sums_ = the product over the next `chunks` chunks of the ring.
  __device__ void Multiply(int chunks) {
    const int x_offset = Tile::kRowGroups == 2 ? group_ * Tile::kXBytes / 2 : 0;
    const int weight_offset =
        Tile::kXBytes +
        (Tile::kRowGroups == 2 ? 0 : group_ * Tile::kUnitsEach * 2 * Tile::kBoxBytes);
    int previous = 0;
    for (int c = 0; c < chunks; ++c) {
      WaitBarrier(ring_.full + ring_.stage * 8, ring_.phase);
      const uint32_t data = ring_.data + ring_.stage * Tile::kStageBytes;
      const uint64_t x = OperandAt(data + x_offset), weight = OperandAt(data + weight_offset);
      Pin(sums_);
      FenceProducts();
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
        WarpgroupMultiply(sums_, x + k * kStepOfK, weight + k * kStepOfK, c > 0 || k > 0);
      }
      CommitProducts();
      Pin(sums_);
      if (c > 0) {
        WaitForProducts<1>();
        Release(previous);
      }
      previous = ring_.stage;
      ring_.template Advance<Tile>();
    }
    WaitForProducts<0>();
    Pin(sums_);
    Release(previous);
  }

  // Every warp tells every thread block that loads into this one's ring.
  __device__ void Release(int stage) const {
    const int lane = thread_ % 32;
    if constexpr (Tile::kCluster > 1) {
      if (lane < Tile::kCluster) ArriveAt(ring_.empty + stage * 8, lane);
    } else {
      if (lane == 0) Arrive(ring_.empty + stage * 8);
    }
  }

  // Where thread block `block` leaves this warpgroup's sums of `unit` for another.
  __device__ float4* Partial(int block, int unit) const {
    return reinterpret_cast<float4*>(plan_.scratch.partial) +
           ((static_cast<int64_t>(block) * 2 + group_) * Tile::kUnitsEach + unit) *
               (kUnitSums / 4 * 128) +
           thread_;
  }
  __device__ uint32_t* Flag(int block, int unit) const {
    return plan_.scratch.flags + (block * 2 + group_) * 2 + unit;
  }

  __device__ void StorePartial(int unit) const {
    float4* to = Partial(blockIdx.x, unit);
    const float* v = sums_ + unit * kUnitSums;
#pragma unroll
    for (int i = 0; i < kUnitSums / 4; ++i) {
      __stcg(to + i * 128, make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]));
    }
  }

  // This warpgroup's partial sums are there for others to read.
  __device__ void Tell(int unit) const {
    asm volatile("st.relaxed.gpu.global.u32 [%0], 1;" ::"l"(Flag(blockIdx.x, unit)) : "memory");
  }

  // Waits for what thread block `block` tells; a flag has one reader, who resets it.
  __device__ void Await(int block, int unit) const {
    if (thread_ == 0) {
      uint32_t* const at = Flag(block, unit);
      uint32_t flag;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(flag) : "l"(at) : "memory");
      } while (flag == 0);
      *at = 0;
    }
    SyncThreads(kOwnBarrier + group_, 128);
  }

  // sums += a partial; many loads in flight, which the compiler would otherwise not leave room for.
  __device__ static void AddPartial(const float4* from, float* sums) {
    constexpr int kBatch = kFewRegisters ? 8 : 16;
#pragma unroll
    for (int first = 0; first < kUnitSums / 4; first += kBatch) {
      float4 v[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[i].x), "=f"(v[i].y), "=f"(v[i].z), "=f"(v[i].w)
                     : "l"(from + (first + i) * 128)
                     : "memory");
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        float* to = sums + (first + i) * 4;
        to[0] += v[i].x;
        to[1] += v[i].y;
        to[2] += v[i].z;
        to[3] += v[i].w;
      }
    }
  }

  // Leaves all sums for the worker that has the tile's first chunks.
  __device__ void LeavePartial() const {
#pragma unroll
    for (int u = 0; u < Tile::kUnitsEach; ++u) StorePartial(u);
    ArriveThreads(kTellBarrier + group_, 128 + 32);
  }

  // Adds what the workers after this one computed of its last tile.
  __device__ void AddPartials(int tile) {
    const int end = (tile + 1) * plan_.chunks;
    for (int worker = worker_ + 1; Segments::FirstUnit(plan_, worker) < end; ++worker) {
      const int block = worker * Tile::kCluster + (Tile::kCluster > 1 ? rank_ : 0);
      Await(block, 0);
#pragma unroll
      for (int u = 0; u < Tile::kUnitsEach; ++u) {
        AddPartial(Partial(block, u), sums_ + u * kUnitSums);
      }
    }
  }

  // The parts of a tile give each other their sums; each finishes its share: of two one unit, of
  // four one unit of one warpgroup.
  __device__ void TradeParts(const Segment& s, const Lines& lines) {
    const bool two = plan_.tail_parts == 2;
    const int own = two ? s.part : s.part % 2 == group_ ? s.part / 2 : -1;
#pragma unroll
    for (int u = 0; u < Tile::kUnitsEach; ++u) StorePartial(u);  // its own too: registers are few
    SyncThreads(kOwnBarrier + group_, 128);
    if (thread_ == 0) {
      __threadfence();
      if (own != 0) Tell(0);
      if (own != 1) Tell(1);
    }
    if (own < 0) return;
    float total[kUnitSums] = {};
    for (int part = 0; part < plan_.tail_parts; ++part) {
      const int block = (worker_ - s.part + part) * Tile::kCluster + rank_;
      if (part != s.part) Await(block, own);
      AddPartial(Partial(block, own), total);
    }
    op_.template Finish<true>(total, lines, UnitOf(s, group_ * Tile::kUnitsEach + own));
  }

  // The slice that this warp writes of a tile computed in parts.
  __device__ int OwnSlice() const { return rank_ + (group_ * 4 + thread_ / 32) * plan_.parts; }

  // Every thread block of the cluster leaves its sums in its shared memory, adds up its share of
  // the slices over all of them, in the order of K, and writes their results.
  __device__ void JoinParts(const Segment& s, const Lines& lines) {
    constexpr int kSliceBytes = kUnitSums * 32 * 4;
    const int lane = thread_ % 32, warp = thread_ / 32;
    SyncThreads(kJoinBarrier, 256);  // nobody reads the ring any more
#pragma unroll
    for (int u = 0; u < Tile::kUnitsEach; ++u) {
      const int slice = (group_ * Tile::kUnitsEach + u) * 4 + warp;
      const uint32_t to = ring_.data + slice * kSliceBytes + lane * 16;
#pragma unroll
      for (int i = 0; i < kUnitSums / 4; ++i) {
        const float* v = sums_ + u * kUnitSums + i * 4;
        StoreShared(to + i * 512, make_float4(v[0], v[1], v[2], v[3]));
      }
    }
    ClusterArrive();
    ClusterWait();
    const int thread = group_ * 128 + thread_;
    for (int slice = rank_; slice < Tile::kSlices; slice += plan_.parts) {
      const uint32_t at = ring_.data + slice * kSliceBytes + thread * 16;
      float4 v[kMostParts][2];
#pragma unroll
      for (int part = 0; part < kMostParts; ++part) {
        if (part < plan_.parts) {
          const uint32_t from = SharedAddressOf(at, part);
          v[part][0] = LoadSharedOf(from);
          v[part][1] = LoadSharedOf(from + 4096);
        }
      }
      float4 sum[2] = {};
#pragma unroll
      for (int part = 0; part < kMostParts; ++part) {
        if (part < plan_.parts) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            sum[i].x += v[part][i].x;
            sum[i].y += v[part][i].y;
            sum[i].z += v[part][i].z;
            sum[i].w += v[part][i].w;
          }
        }
      }
      // Of this slice no other thread block reads here.
      StoreShared(at, sum[0]);
      StoreShared(at + 4096, sum[1]);
    }
    SyncThreads(kJoinBarrier, 256);
    const int slice = OwnSlice();
    if (slice >= Tile::kSlices) return;
    float sums[kUnitSums];
#pragma unroll
    for (int i = 0; i < kUnitSums / 4; ++i) {
      const float4 value = LoadShared(ring_.data + slice * kSliceBytes + i * 512 + lane * 16);
      sums[4 * i] = value.x;
      sums[4 * i + 1] = value.y;
      sums[4 * i + 2] = value.z;
      sums[4 * i + 3] = value.w;
    }
    op_.template Finish<false>(sums, lines, UnitOf(s, slice / 4));
  }

  const Op& op_;
  const HopperPlan& plan_;
  Ring ring_;
  int rank_, worker_, group_, thread_;
  uint32_t norms_phase_ = 0;
  // Of rows lane / 4 and + 8 of the warp's 16, for block i of 8 columns: elements 4 i, 4 i + 1 of
  // the first and 4 i + 2, 4 i + 3 of the second, at columns 2 (lane % 4) and the next.
  float sums_[Tile::kSums];
};

#endif

template <class Tile, class Op>
__global__ __launch_bounds__(kHopperThreads,
                             1) void HopperLinearKernel(const __grid_constant__ CUtensorMap x,
                                                        const __grid_constant__ CUtensorMap weight,
                                                        const __grid_constant__ Op op,
                                                        const __grid_constant__ HopperPlan plan) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char shared[];
  __shared__ uint64_t barriers[2 * Tile::kStages + 2];
  __shared__ float norms[Tile::kRows];
  Ring ring;
  ring.data = (SharedAddress(shared) + 1023) & ~1023u;
  ring.full = SharedAddress(barriers);
  ring.empty = ring.full + Tile::kStages * 8;
  ring.norms_full = ring.empty + Tile::kStages * 8;
  ring.norms_empty = ring.norms_full + 8;
  ring.norms = norms;
  constexpr bool kClusters = Tile::kParts || Tile::kCluster > 1;
  const int rank = kClusters ? static_cast<int>(ClusterRank()) : 0;
  const int worker = static_cast<int>(blockIdx.x) / (Tile::kParts ? plan.parts : Tile::kCluster);
  if (threadIdx.x == 0) {
    PrefetchTensorMap(&x);
    PrefetchTensorMap(&weight);
    for (int i = 0; i < Tile::kStages; ++i) {
      InitBarrier(ring.full + i * 8, 1);
      InitBarrier(ring.empty + i * 8, 8 * Tile::kCluster);  // the warps that multiply
    }
    InitBarrier(ring.norms_full, 1);
    InitBarrier(ring.norms_empty, 8);
    FenceBarrierInit();
  }
  if constexpr (kClusters) {
    ClusterArrive();
    ClusterWait();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < 128) {
    ShrinkRegisters<40>();
    if (threadIdx.x == 0) {
      HopperProducer<Tile, Op>(&x, &weight, op, plan, ring, rank, worker).Run();
    }
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 3) HelpEpilogues<Tile, Op>(op, plan, ring, norms, rank, worker);
    if constexpr (!Tile::kParts) {
      if ((warp == 1 || warp == 2) && plan.split_tiles > 0 &&
          Segments::FirstUnit(plan, worker) % plan.chunks != 0) {
        TellOfPartial(plan, warp - 1);
      }
    }
    if constexpr (Tile::kParts) {  // the barrier in JoinParts is everybody's
      __syncwarp();
      ClusterArrive();
      ClusterWait();
    }
  } else {
    GrowRegisters<232>();
    const int group = static_cast<int>(threadIdx.x) / 128 - 1;
    HopperConsumer<Tile, Op>(op, plan, ring, rank, worker, group).Run();
  }
  if constexpr (kClusters) {
    // No thread block leaves while another may still reach into its shared memory.
    __syncwarp();
    ClusterArrive();
    ClusterWait();
  }
#endif
}

}  // namespace tandem::engine::cuda
