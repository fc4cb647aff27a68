// The kernel behind hopper_linear.h: one product, the parts that differ given as an Op.
//
// The weight's rows are taken in units, of 128 as a rule, two boxes of half a unit each; an
// epilogue works on the sums of 64 rows of activations x one unit. An Op is a plain struct with the
// arguments and
//   kNormed              constant: x needs 1 / rms in the epilogue; then `squares` and `epsilon`
//   kAnyUnit             constant: units may be of other than 128 rows, where parts are not joined
//   rows, inputs
//   BoxRow<box_rows>(unit, half)   the first of a box's rows in the weight
//   Prefetch(row, output)   calls into L2 what the epilogue will read for 32 outputs of a row
//   Finish<few_registers>(sums, lines, unit)   the epilogue, run by a warpgroup
//   Early<pieces>, FinishRow(sums, early, line, unit)   the epilogue where parts are joined: eight
//       lanes have a unit of a row, each 4 columns of every 32. Early is what can be read before
//       the products.
#pragma once

#include <cstdint>

#include "engine/kernels/cuda/hopper.cuh"
#include "engine/kernels/cuda/hopper_linear.h"

namespace tandem::engine::cuda {

inline constexpr int kTellBarrier = 4;  // and 5, see TellOfPartial
inline constexpr int kChunk = 64;       // of K: 128 bytes, the width of the swizzle
// The unit, unless a tile says otherwise.
inline constexpr int kUnitRows = 128, kBoxRows = kUnitRows / 2;
inline constexpr int kUnitSums = kUnitRows / 2;  // per thread: 64 x a unit over 128 threads
inline constexpr int kMostParts = 8;  // of K, of a tile that a cluster computes: its size

// What a thread block computes at a time, and what ties it to the others of its cluster.
struct TileShape {
  int rows;              // of activations: 16 or 64, multiplied as 64, or 128
  int units;             // of the weight: 1 or 2
  int stages;            // of the ring
  int unit = kUnitRows;  // rows of the weight that make a unit
  int high = 1;        // tiles of a cluster, one above the other, which share the loads of weights
  bool parts = false;  // a cluster has HopperPlan::parts times as many thread blocks, each computes
                       // a part of K, and they join their sums
};

template <TileShape kShape>
struct HopperTile {
  static constexpr int kRows = kShape.rows, kUnits = kShape.units, kStages = kShape.stages;
  static constexpr int kHigh = kShape.high;
  static constexpr bool kParts = kShape.parts;
  static constexpr int kUnitRows = kShape.unit, kBoxRows = kUnitRows / 2;
  static constexpr int kColumns = kUnits * kUnitRows;
  static constexpr int kUnitSums = kUnitRows / 2;  // per thread: 64 x a unit over 128 threads
  // The warpgroups that multiply lie one above the other, or side by side.
  static constexpr int kWarpgroups = kRows == 128 ? 2 : kUnits;
  static constexpr int kThreads = 128 * (1 + kWarpgroups);      // and one that loads
  static constexpr int kUnitsEach = kRows == 128 ? kUnits : 1;  // per warpgroup
  static constexpr int kSums = kUnitSums * kUnitsEach;          // per thread
  static constexpr int kSlices = kWarpgroups * 4 * kUnitsEach;  // of 16 rows x a unit: a warp's
  // Whether a warp of its own finds the norms while the products run: where these take long enough.
  static constexpr bool kHelped = kHigh > 1;
  // Threads hold all parts of what they join.
  static constexpr int kMostParts = (kUnits == 1 ? 4 : 8) / (kUnits == 1 ? 1 : kHigh);
  static constexpr int kBoxes = 2 * kUnits;
  static constexpr int kXBytes = kRows * kChunk * 2;  // what is missing to 64 rows is not looked at
  static constexpr int kBoxBytes = kBoxRows * kChunk * 2;
  static constexpr int kStageBytes = kXBytes + kBoxes * kBoxBytes;
  // The ring begins at a multiple of 1,024 bytes, where the swizzle's pattern begins.
  static constexpr int kSharedBytes = kStages * kStageBytes + 1024;
  static constexpr int kPartialFloats = kWarpgroups * 128 * kSums;
  // Where the parts of a tile are joined, in place of the ring: row after row, each 8 longer than
  // it needs to be, so that 8 rows lie in different banks.
  static constexpr int kJoinStride = kColumns + 8;
  static_assert(!kParts || kRows * kJoinStride * 4 <= kStages * kStageBytes);
};

// Where a thread block stands: its worker (a cluster), and there its part of K and its row.
struct Place {
  int worker, part, row;

  template <class Tile>
  __device__ static Place Of(int block, int rank, int parts) {
    return {block / (Tile::kHigh * parts), Tile::kParts ? rank / Tile::kHigh : 0,
            Tile::kHigh > 1 ? rank % Tile::kHigh : 0};
  }
  // The rank in its cluster.
  template <class Tile>
  __device__ static int Rank(int part, int row) {
    return part * Tile::kHigh + row;
  }
};

// How a product is cut. A worker is a thread block or a cluster. It takes
//  - a range of the chunks of the first `split_tiles` tiles, then every workers-th tile from there
//    on, up to `whole_tiles`; then, with tail_parts, a part of K of one of the tiles that are left;
//  - or, with `parts`, one tile, in which every thread block of the cluster has a part of K.
struct HopperPlan {
  int row_tiles = 0;  // of a cluster's height
  int column_tiles = 0;
  int chunks = 0;  // of K
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
  __device__ Segments(const HopperPlan& plan, const Place& place) : plan_(plan) {
    const int worker = place.worker;
    if (plan.parts > 0) {
      at_ = worker * plan.chunks + place.part * plan.chunks / plan.parts;
      end_ = worker * plan.chunks + (place.part + 1) * plan.chunks / plan.parts;
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
__device__ int FirstRow(const Segment& s, const Place& place) {
  return (s.row_tile * Tile::kHigh + place.row) * Tile::kRows;
}
template <class Tile>
__device__ int FirstUnit(const Segment& s) {
  return s.column_tile * Tile::kUnits;
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

// The row that a thread has a part of where parts are joined.
struct Line {
  int row;
  bool valid;
  float inverse_rms;
};

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
                            const HopperPlan& plan, const Ring& ring, const Place& place)
      : x_(x), weight_(weight), op_(op), plan_(plan), ring_(ring), place_(place) {}

  __device__ void Run() {
    // Weights wait for nobody: the ring fills with them while the predecessor runs.
    const Ring start = ring_;
    int ahead = 0;
    Segment s;
    for (Segments all(plan_, place_); ahead < Tile::kStages && all.Next(&s);) {
      for (int c = s.begin; c < s.end && ahead < Tile::kStages; ++c, ++ahead) {
        ExpectBytes(ring_.full + ring_.stage * 8, Tile::kStageBytes);
        LoadWeights(s, c);
        ring_.template Advance<Tile>();
      }
    }
    WaitForPredecessor();
    LetSuccessorStart();
    ring_ = start;
    for (Segments all(plan_, place_); all.Next(&s);) {
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
            FirstRow<Tile>(s, place_), ring_.full + ring_.stage * 8);
  }

  // A thread block loads its share of the weights for all tiles one above the other.
  __device__ void LoadWeights(const Segment& s, int chunk) const {
    const uint32_t to = ring_.data + ring_.stage * Tile::kStageBytes + Tile::kXBytes;
    const uint32_t barrier = ring_.full + ring_.stage * 8;
    constexpr int kOwn = Tile::kBoxes / Tile::kHigh;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int box = place_.row * kOwn + i;
      const int row = op_.template BoxRow<Tile::kBoxRows>(FirstUnit<Tile>(s) + box / 2, box % 2);
      if constexpr (Tile::kHigh > 1) {
        const uint32_t blocks = ((1u << Tile::kHigh) - 1) << Place::Rank<Tile>(place_.part, 0);
        LoadBoxToAll(to + box * Tile::kBoxBytes, weight_, chunk * kChunk, row, barrier,
                     static_cast<uint16_t>(blocks));
      } else {
        LoadBox(to + box * Tile::kBoxBytes, weight_, chunk * kChunk, row, barrier);
      }
    }
  }

  const CUtensorMap *x_, *weight_;
  const Op& op_;
  const HopperPlan& plan_;
  Ring ring_;
  const Place place_;
};

// A warp that prepares the epilogues while the products run: the norms of a tile's rows (kHelped),
// and what the epilogue reads is called into L2. It is one tile ahead at most.
template <class Tile, class Op>
__device__ void HelpEpilogues(const Op& op, const HopperPlan& plan, const Ring& ring, float* norms,
                              const Place& place) {
  WaitForPredecessor();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t phase = 1;
  Segment s;
  for (Segments all(plan, place); all.Next(&s);) {
    if (!Writes<Tile>(s)) continue;
    if constexpr (!Tile::kParts) WaitBarrier(ring.norms_empty, phase);
    phase ^= 1;
    const int first_row = FirstRow<Tile>(s, place);
    if constexpr (Op::kNormed && Tile::kHelped && !Tile::kParts) {
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
    if (!Tile::kParts && lane == 0) Arrive(ring.norms_full);
    const int step = Tile::kParts ? plan.parts : 1;
    for (int slice = place.part; slice < Tile::kSlices; slice += step) {
      const int row = first_row + SliceRow<Tile>(slice) + lane / 2;
      if (row >= op.rows) continue;
      const int unit = FirstUnit<Tile>(s) + SliceUnit<Tile>(slice);
      for (int column = lane % 2 * 32; column < Tile::kUnitRows; column += 64) {
        op.Prefetch(row, unit * Tile::kUnitRows + column);
      }
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
  __device__ HopperConsumer(const Op& op, const HopperPlan& plan, const Ring& ring,
                            const Place& place, int group)
      : op_(op),
        plan_(plan),
        ring_(ring),
        place_(place),
        group_(group),
        thread_(threadIdx.x % 128) {}

  __device__ void Run() {
    WaitForPredecessor();
    if constexpr (Tile::kParts) {
      RunPart();
    } else {
      RunTiles();
    }
  }

 private:
  __device__ void RunTiles() {
    Segment s;
    Segments all(plan_, place_);
    while (all.Next(&s)) {
      const bool writes = Writes<Tile>(s);
      const int slice = group_ * Tile::kUnitsEach * 4 + thread_ / 32;
      Lines lines;
      float shares[2][kHeldShares];
      if (writes) FindLines(s, slice, &lines, shares);
      Multiply(s.end - s.begin);
      if (writes) FindNorms(slice, shares, &lines);
      if (Tile::kHigh > 1 && s.part >= 0) {
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

  static constexpr int kUnitSums = Tile::kUnitSums;
  static constexpr int kOwnBarrier = 1 /* and 2 */, kJoinBarrier = 3;
  static constexpr bool kFewRegisters = Tile::kUnitsEach > 1;  // in the epilogue

  __device__ int UnitOf(const Segment& s, int unit_in_tile) const {
    return FirstUnit<Tile>(s) + unit_in_tile % Tile::kUnits;
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
      lines->row[i] = FirstRow<Tile>(s, place_) + SliceRow<Tile>(slice) + lane / 4 + i * 8;
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

  // A product of the tensor cores is at most 256 wide.
  static constexpr int kProducts = Tile::kSums > 128 ? Tile::kUnitsEach : 1;
  static constexpr int kProductSums = Tile::kSums / kProducts;

  // sums_ = the product over the next `chunks` chunks of the ring.
  __device__ void Multiply(int chunks) {
    const int x_offset = Tile::kRows == 128 ? group_ * Tile::kXBytes / 2 : 0;
    const int weight_offset =
        Tile::kXBytes + (Tile::kRows == 128 ? 0 : group_ * Tile::kUnitsEach * 2 * Tile::kBoxBytes);
    int previous = 0;
    for (int c = 0; c < chunks; ++c) {
      WaitBarrier(ring_.full + ring_.stage * 8, ring_.phase);
      const uint32_t data = ring_.data + ring_.stage * Tile::kStageBytes;
      const uint64_t x = OperandAt(data + x_offset), weight = OperandAt(data + weight_offset);
      Pin(sums_);
      FenceProducts();
#pragma unroll
      for (int k = 0; k < kChunk / 16; ++k) {
#pragma unroll
        for (int u = 0; u < kProducts; ++u) {
          WarpgroupMultiply(reinterpret_cast<float(&)[kProductSums]>(sums_[u * kProductSums]),
                            x + k * kStepOfK,
                            weight + u * (2 * Tile::kBoxBytes >> 4) + k * kStepOfK, c > 0 || k > 0);
        }
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
    if constexpr (Tile::kHigh > 1) {
      const int rank = Place::Rank<Tile>(place_.part, lane);
      if (lane < Tile::kHigh) ArriveAt(ring_.empty + stage * 8, rank);
    } else {
      if (lane == 0) Arrive(ring_.empty + stage * 8);
    }
  }

  __device__ int Rank() const { return Place::Rank<Tile>(place_.part, place_.row); }

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
      for (int i = 0; i < kBatch && first + i < kUnitSums / 4; ++i) {
        asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(v[i].x), "=f"(v[i].y), "=f"(v[i].z), "=f"(v[i].w)
                     : "l"(from + (first + i) * 128)
                     : "memory");
      }
#pragma unroll
      for (int i = 0; i < kBatch && first + i < kUnitSums / 4; ++i) {
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
    for (int worker = place_.worker + 1; Segments::FirstUnit(plan_, worker) < end; ++worker) {
      const int block = worker * Tile::kHigh + Rank();
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
      const int block = (place_.worker - s.part + part) * Tile::kHigh + Rank();
      if (part != s.part) Await(block, own);
      AddPartial(Partial(block, own), total);
    }
    op_.template Finish<true>(total, lines, UnitOf(s, group_ * Tile::kUnitsEach + own));
  }

  static constexpr int kPieces = Tile::kUnitRows / 32;
  using Early = typename Op::template Early<kPieces>;

  // This thread block's part of its only tile.
  __device__ void RunPart() {
    Segment s;
    Segments(plan_, place_).Next(&s);
    // What the first of this warp's rows needs is read before the products.
    const int first = place_.part + (group_ * 4 + thread_ / 32) * plan_.parts;
    Line line = LineOf(s, first);
    float shares[kHeldShares / 2];
#pragma unroll
    for (int k = 0; k < kHeldShares / 2; ++k) shares[k] = ShareOrZero(line, k);
    Early early(op_, line, JoinedUnit(s, first));
    Multiply(s.end - s.begin);
    FindNorm(shares, &line);
    StoreSums(s);
    ClusterArrive();
    ClusterWait();
    constexpr int kItems = Tile::kRows / 4 * Tile::kUnits;
    for (int item = first; item < kItems; item += 4 * Tile::kWarpgroups * plan_.parts) {
      if (item != first) {
        line = LineOf(s, item);
#pragma unroll
        for (int k = 0; k < kHeldShares / 2; ++k) shares[k] = ShareOrZero(line, k);
        early = Early(op_, line, JoinedUnit(s, item));
        FindNorm(shares, &line);
      }
      if (FirstRow<Tile>(s, place_) + item / Tile::kUnits * 4 >= op_.rows) break;
      float4 sums[kPieces];
      AddParts(item, sums);
      op_.FinishRow(sums, early, line, JoinedUnit(s, item));
    }
  }

  // Four rows of a unit are joined at a time, an eighth of a warp has a row.
  __device__ Line LineOf(const Segment& s, int item) const {
    const int row = item / Tile::kUnits * 4 + thread_ % 32 / 8;
    Line line{FirstRow<Tile>(s, place_) + row, false, 1};
    line.valid = row < Tile::kRows && line.row < op_.rows;
    return line;
  }
  __device__ int JoinedUnit(const Segment& s, int item) const {
    return FirstUnit<Tile>(s) + item % Tile::kUnits;
  }
  __device__ float ShareOrZero(const Line& line, int k) const {
    if constexpr (Op::kNormed) {
      const int part = thread_ % 8 + k * 8;
      if (line.valid && part < op_.squares.parts) return __ldcg(ShareOf(part, line.row));
    }
    return 0;
  }
  __device__ void FindNorm(const float (&shares)[kHeldShares / 2], Line* line) const {
    if constexpr (Op::kNormed) {
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kHeldShares / 2; ++k) sum += shares[k];
      for (int k = kHeldShares / 2; k * 8 < op_.squares.parts; ++k) sum += ShareOrZero(*line, k);
#pragma unroll
      for (int lanes = 1; lanes < 8; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
      line->inverse_rms = rsqrtf(sum / static_cast<float>(op_.inputs) + op_.epsilon);
    }
  }

  // Leaves this part's sums for the thread blocks of the cluster, where the ring was.
  __device__ void StoreSums(const Segment& s) const {
    SyncThreads(kJoinBarrier, 128 * Tile::kWarpgroups);  // nobody reads the ring any more
    constexpr bool kBelow = Tile::kRows == 128;  // the second warpgroup's rows, or its columns
    const int row = (kBelow ? group_ * 64 : 0) + thread_ / 32 * 16;
    if (FirstRow<Tile>(s, place_) + row >= op_.rows) return;
    const int column = (kBelow ? 0 : group_ * 2 * Tile::kSums) + thread_ % 4 * 2;
    const uint32_t to = ring_.data + ((row + thread_ % 32 / 4) * Tile::kJoinStride + column) * 4;
#pragma unroll
    for (int i = 0; i < Tile::kSums / 4; ++i) {
#pragma unroll
      for (int line = 0; line < 2; ++line) {
        StoreShared(to + (line * 8 * Tile::kJoinStride + i * 8) * 4, sums_[i * 4 + line * 2],
                    sums_[i * 4 + line * 2 + 1]);
      }
    }
  }

  // The sums of all parts, in the order of K.
  __device__ void AddParts(int item, float4 (&sums)[kPieces]) const {
    constexpr int kMost = Tile::kMostParts;
    const int row = item / Tile::kUnits * 4 + thread_ % 32 / 8;
    const int column = item % Tile::kUnits * Tile::kUnitRows + thread_ % 8 * 4;
    const uint32_t at = ring_.data + (row * Tile::kJoinStride + column) * 4;
    float4 v[kMost][kPieces];
#pragma unroll
    for (int part = 0; part < kMost; ++part) {
      if (part >= plan_.parts) break;
      const uint32_t from = SharedAddressOf(at, Place::Rank<Tile>(part, place_.row));
#pragma unroll
      for (int i = 0; i < kPieces; ++i) v[part][i] = LoadSharedOf(from + i * 128);
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) sums[i] = v[0][i];
#pragma unroll
    for (int part = 1; part < kMost; ++part) {
      if (part >= plan_.parts) break;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        sums[i].x += v[part][i].x;
        sums[i].y += v[part][i].y;
        sums[i].z += v[part][i].z;
        sums[i].w += v[part][i].w;
      }
    }
  }

  const Op& op_;
  const HopperPlan& plan_;
  Ring ring_;
  const Place place_;
  int group_, thread_;
  uint32_t norms_phase_ = 0;
  // Of rows lane / 4 and + 8 of the warp's 16, for block i of 8 columns: elements 4 i, 4 i + 1 of
  // the first and 4 i + 2, 4 i + 3 of the second, at columns 2 (lane % 4) and the next.
  float sums_[Tile::kSums];
};

#endif

template <class Tile, class Op>
__global__ __launch_bounds__(Tile::kThreads,
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
  constexpr bool kClusters = Tile::kParts || Tile::kHigh > 1;
  const Place place =
      Place::Of<Tile>(static_cast<int>(blockIdx.x), kClusters ? static_cast<int>(ClusterRank()) : 0,
                      Tile::kParts ? plan.parts : 1);
  if (threadIdx.x == 0) {
    PrefetchTensorMap(&x);
    PrefetchTensorMap(&weight);
    constexpr int kWarps = 4 * Tile::kWarpgroups;  // that multiply
    for (int i = 0; i < Tile::kStages; ++i) {
      InitBarrier(ring.full + i * 8, 1);
      InitBarrier(ring.empty + i * 8, kWarps * Tile::kHigh);
    }
    InitBarrier(ring.norms_full, 1);
    InitBarrier(ring.norms_empty, kWarps);
    FenceBarrierInit();
  }
  if constexpr (kClusters) {
    ClusterArrive();
    ClusterWait();
  } else {
    __syncthreads();
  }
  // Registers go from those that load to those that multiply, where there are not enough for all.
  constexpr bool kTrade = Tile::kWarpgroups > 1;
  if (threadIdx.x < 128) {
    if constexpr (kTrade) ShrinkRegisters<40>();
    if (threadIdx.x == 0) HopperProducer<Tile, Op>(&x, &weight, op, plan, ring, place).Run();
    const int warp = static_cast<int>(threadIdx.x) / 32;
    if (warp == 3) HelpEpilogues<Tile, Op>(op, plan, ring, norms, place);
    if constexpr (!Tile::kParts) {
      if (warp >= 1 && warp <= Tile::kWarpgroups && plan.split_tiles > 0 &&
          Segments::FirstUnit(plan, place.worker) % plan.chunks != 0) {
        TellOfPartial(plan, warp - 1);
      }
    }
    if constexpr (Tile::kParts) {  // the barrier in JoinParts is everybody's
      __syncwarp();
      ClusterArrive();
      ClusterWait();
    }
  } else {
    if constexpr (kTrade) GrowRegisters<232>();
    const int group = static_cast<int>(threadIdx.x) / 128 - 1;
    HopperConsumer<Tile, Op>(op, plan, ring, place, group).Run();
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
