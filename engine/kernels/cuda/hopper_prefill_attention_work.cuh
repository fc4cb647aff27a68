// Who computes what in HopperPrefillAttention. Every thread block derives the same list from the
// batch itself, and its own share of it.
//
// A unit of work is 128 rows of queries of one item, of one head or, where there are few queries,
// of all heads that share a KV head, against the positions they see, in tiles. Units are cut where
// that pays or where it is promised:
//
//   kNone    not at all: units with most tiles first, dealt out forth and back
//   kEven    all tiles dealt evenly to the thread blocks; of a unit's thread blocks that with its
//            last tiles, which takes them last, adds what the others have long left in their places
//   kParts   into parts of some tiles, each dealt out like a unit; a second kernel adds them
//   kFolded  into the same parts, but one thread block takes all parts of a unit and adds them
//
// Batch-invariant, parts are of kCutPositions, and they are added from the last position down, one
// after the other, by the same arithmetic: so kParts and kFolded give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "engine/kernels/cuda/prefill_attention.h"
#include "engine/kernels/cuda/ptx.cuh"

namespace tandem::engine::cuda::hopper_attention {

inline constexpr int kUnitRows = 128;
inline constexpr int kMinPiece = 16;   // positions of a copy, at least: no page is smaller
inline constexpr int kMaxRuns = 2048;  // runs of kUnitRows rows of a batch
inline constexpr int kPartHeader = 4;  // floats before a row of a part: base, sum, and two unused
inline constexpr int kCutPositions = 2048;
inline constexpr int kMinPartTiles = 4;
// By how many tiles the thread block with most must exceed the average before tiles are dealt
// evenly.
inline constexpr int kCutCost = 1;

// A thread block's place in `partial`: what each multiplying thread has of O, base and sum, by
// fours.
inline constexpr int kMultiplyingThreads = 256;
template <int kDim>
inline constexpr int kPlaceFloats = kMultiplyingThreads*(kDim / 2 + 4);

struct KernelArgs : PrefillAttentionArgs {
  // Row m of a unit is query m / pack of its item's run and head m % pack of the unit's: with few
  // queries, the heads that share a KV head share a unit.
  int pack = 1;
  int unit_heads = 0;  // heads / pack: units of a run of rows
  // How many of them come before the next run's. Not all, but those of one KV head, where the pages
  // of all do not fit in L2: then thread blocks that are not quite in step find each other's there.
  int round_heads = 0;
  int unit_queries = kUnitRows;     // kUnitRows / pack
  int group_queries = 0;            // before the second warpgroup's first row
  float exponent_scale = 0;         // of scores, to powers of 2
  float score_scale = 0;            // back
  int piece_positions = kMinPiece;  // that one copy takes
  bool may_part = false;            // kParts: the kernel that adds parts follows
  bool may_even = false;            // kEven
  int part_rows = kUnitRows;        // of a part's place in `partial`
  int thread_blocks = 0;            // of the kernel
  int room = 0;                     // for parts in `partial`
};

enum class Cuts { kNone, kEven, kParts, kFolded };

// In shared memory.
struct WorkList {
  uint32_t runs[kMaxRuns];  // item << 16 | number of the run of rows; most positions first
  // Shares of share_tiles tiles of a unit of each run before; where units may be cut.
  int first_share[kMaxRuns + 1];
  int count;
  int share_tiles;
  int most;    // tiles of the thread block that has most if no unit is cut
  bool alike;  // units differ by less than half: what a unit costs besides tiles does not count
};
struct WorkListScratch {
  uint32_t runs[kMaxRuns];
  int positions[kMaxRuns];
};

// Of an item; no rows if it is not this kernel's. The loads depend on nothing, for what they bring
// is far away when a kernel begins.
struct Run {
  int start, rows;
};
__device__ inline Run RunOfItem(const KernelArgs& args, int item) {
  if (item >= args.num_items) return {0, 0};
  const int start = args.starts[item], first_row = args.first_rows[item],
            rows = args.first_rows[item + 1] - first_row;
  PrefetchToL2(args.first_blocks + item);
  return {start, start < 0 || (args.skip_single_rows && rows == 1) ? 0 : rows};
}

// How units are numbered: by rounds of heads, then runs, then heads of the round.
struct Plan {
  Cuts cuts;
  int units;
  int shares;  // of all units
};

struct UnitName {
  int run, head;  // head: of a run's units
};
__device__ inline UnitName NameOfUnit(const KernelArgs& args, const WorkList& list, int unit) {
  const int of_round = list.count * args.round_heads, in_round = unit % of_round;
  return {in_round / args.round_heads,
          unit / of_round * args.round_heads + in_round % args.round_heads};
}

// The units of one thread block are these numbers, forth and back through the list.
__device__ inline int DealtTo(int block, int blocks, int turn) {
  return turn * blocks + (turn % 2 == 0 ? block : blocks - 1 - block);
}

// All but the cuts.
__device__ inline Plan NumberUnits(const KernelArgs& args, const WorkList& list) {
  Plan plan;
  plan.cuts = Cuts::kNone;
  plan.units = list.count * args.unit_heads;
  plan.shares = args.may_part || args.may_even ? list.first_share[list.count] * args.unit_heads : 0;
  return plan;
}

__device__ inline Plan MakePlan(const KernelArgs& args, const WorkList& list) {
  Plan plan = NumberUnits(args, list);
  if (args.batch_invariant) {
    plan.cuts = args.may_part && plan.shares <= args.room ? Cuts::kParts : Cuts::kFolded;
  } else if (args.may_part) {
    plan.cuts = Cuts::kParts;
  } else if (args.may_even && list.alike &&
             list.most > plan.shares / args.thread_blocks + kCutCost) {
    plan.cuts = Cuts::kEven;
  }
  return plan;
}

__device__ inline int SumUpToLane(int value) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int left = __shfl_up_sync(~0u, value, lanes);
    if (lane >= lanes) value += left;
  }
  return value;
}

// As many tiles to a part as give each thread block one. first_share[1...]: tiles of the runs. By
// one warp, as SumShares.
__device__ inline void ChoosePartTiles(const KernelArgs& args, WorkList* list) {
  const int lane = static_cast<int>(threadIdx.x);
  const auto parts = [&](int part_tiles) {
    int sum = 0;
    for (int run = lane; run < list->count; run += 32) {
      sum += (list->first_share[run + 1] + part_tiles - 1) / part_tiles;
    }
    return __reduce_add_sync(~0u, sum) * args.unit_heads;
  };
  int part_tiles = max(kMinPartTiles, (parts(1) + args.thread_blocks - 1) / args.thread_blocks);
  while (parts(part_tiles) > max(args.thread_blocks, list->count * args.unit_heads)) ++part_tiles;
  if (lane == 0) list->share_tiles = part_tiles;
  __syncwarp();
}

// Makes of the tiles of each run the shares of those before it.
__device__ inline void SumShares(WorkList* list) {
  const int lane = static_cast<int>(threadIdx.x), share_tiles = list->share_tiles;
  int before = 0;
  for (int base = 0; base < list->count; base += 32) {
    const int run = base + lane;
    const int sum = SumUpToLane(
        run < list->count ? (list->first_share[run + 1] + share_tiles - 1) / share_tiles : 0);
    if (run < list->count) list->first_share[run + 1] = before + sum;
    before += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) list->first_share[0] = 0;
}

// By all threads of the block.
template <int kTile>
__device__ inline void MakeWorkList(const KernelArgs& args, WorkList* list,
                                    WorkListScratch* scratch) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (threadIdx.x < 32) {
    int count = 0;
    for (int base = 0; base < args.num_items; base += 32) {
      const int item = base + lane;
      const Run of_lane = RunOfItem(args, item);
      const int runs = (of_lane.rows + args.unit_queries - 1) / args.unit_queries;
      const int behind = count + SumUpToLane(runs), first = behind - runs;
      for (int run = 0; run < runs && first + run < kMaxRuns; ++run) {
        scratch->runs[first + run] = static_cast<uint32_t>(item) << 16 | static_cast<uint32_t>(run);
        scratch->positions[first + run] =
            of_lane.start + min(of_lane.rows, (run + 1) * args.unit_queries);
      }
      count = __shfl_sync(~0u, behind, 31);
    }
    if (lane == 0) {
      list->count = min(count, kMaxRuns);
      list->share_tiles = args.batch_invariant ? kCutPositions / kTile : 1;
      list->most = 0;
    }
  }
  __syncthreads();
  const int count = list->count;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int positions = scratch->positions[i];
    int rank = 0;
    for (int other = 0; other < count; ++other) {
      const int others = scratch->positions[other];
      rank += others > positions || (others == positions && other < i) ? 1 : 0;
    }
    list->runs[rank] = scratch->runs[i];
    list->first_share[rank + 1] = (positions + kTile - 1) / kTile;
  }
  __syncthreads();
  if (!args.may_part && !args.may_even) return;
  if (threadIdx.x < 32) {
    if (args.may_part && !args.batch_invariant) ChoosePartTiles(args, list);
    if (lane == 0) list->alike = 2 * list->first_share[count] >= list->first_share[1];
    __syncwarp();
    SumShares(list);
  }
  __syncthreads();
  if (!args.may_even) return;
  const Plan plan = NumberUnits(args, *list);
  for (int block = static_cast<int>(threadIdx.x); block < args.thread_blocks;
       block += static_cast<int>(blockDim.x)) {
    int tiles = 0;
    for (int turn = 0, unit; (unit = DealtTo(block, args.thread_blocks, turn)) < plan.units;
         ++turn) {
      const int run = NameOfUnit(args, *list, unit).run;
      tiles += list->first_share[run + 1] - list->first_share[run];
    }
    atomicMax(&list->most, tiles);
  }
  __syncthreads();
}

// A unit, or a part of one.
struct alignas(16) Unit {
  int head = 0, kv_head = 0;  // the first of `pack` heads
  int first_row = 0;          // of the batch
  int queries = 0;            // of the unit, 1..unit_queries
  int start = 0;              // position of the first row
  int end = 0;                // of the positions that the rows see
  int item = 0;
  int first_tile = 0, last_tile = 0;
  // Whose places hold the rest of what is done of the unit: kFolded: this thread block's, of the
  // positions behind; kEven: those of the positions before.
  int first_joined = 0, joined = 0;
  bool stays = false;     // the result goes to this thread block's place,
  float* part = nullptr;  // or to a place of `partial`; else it is the unit's, and goes to `out`
};

template <int kTile>
__device__ inline Unit WholeUnit(const KernelArgs& args, const WorkList& list,
                                 const UnitName& name) {
  const uint32_t entry = list.runs[name.run];
  Unit unit;
  unit.item = static_cast<int>(entry >> 16);
  const int offset = static_cast<int>(entry & 0xffff) * args.unit_queries;
  unit.head = name.head * args.pack;
  unit.kv_head = unit.head / (args.heads / args.kv_heads);
  unit.first_row = args.first_rows[unit.item] + offset;
  unit.queries = min(args.first_rows[unit.item + 1] - unit.first_row, args.unit_queries);
  unit.start = args.starts[unit.item] + offset;
  unit.end = unit.start + unit.queries;
  unit.last_tile = (unit.end - 1) / kTile;
  return unit;
}

// Where a share lies: shares are numbered by units, from a unit's last position down.
struct Share {
  UnitName unit;
  int offset, count;  // in the unit's shares
};
__device__ inline Share FindShare(const KernelArgs& args, const WorkList& list, int share) {
  const int of_round = list.first_share[list.count] * args.round_heads;
  int rest = share % of_round;
  int low = 0, high = list.count;  // the run is in [low, high)
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.first_share[middle] * args.round_heads <= rest) {
      low = middle;
    } else {
      high = middle;
    }
  }
  rest -= list.first_share[low] * args.round_heads;
  const int count = list.first_share[low + 1] - list.first_share[low];
  return {{low, share / of_round * args.round_heads + rest / count}, rest % count, count};
}
__device__ inline int FirstShareOf(const KernelArgs& args, const WorkList& list,
                                   const UnitName& unit) {
  const int round = unit.head / args.round_heads, head = unit.head % args.round_heads;
  const int first = list.first_share[unit.run], count = list.first_share[unit.run + 1] - first;
  return (round * list.first_share[list.count] + first) * args.round_heads + head * count;
}

// kEven: thread block `block` takes the shares from FirstOfBlock(block) on.
__device__ inline int FirstOfBlock(const KernelArgs& args, const Plan& plan, int block) {
  return static_cast<int>(static_cast<int64_t>(block) * plan.shares / args.thread_blocks);
}
__device__ inline int BlockOf(const KernelArgs& args, const Plan& plan, int share) {
  return static_cast<int>(((static_cast<int64_t>(share) + 1) * args.thread_blocks - 1) /
                          plan.shares);
}

// A place in `partial` of part_rows rows, behind those of the thread blocks.
template <int kDim>
__device__ inline float* PartAt(const KernelArgs& args, int slot) {
  return args.partial + int64_t{args.thread_blocks} * kPlaceFloats<kDim> +
         static_cast<int64_t>(slot) * args.part_rows * (kDim + kPartHeader);
}

// One thread block's units and parts of units, in order.
template <int kDim, int kTile>
class Work {
 public:
  __device__ Work(const KernelArgs& args, const WorkList& list)
      : args_(args), list_(list), plan_(MakePlan(args, list)) {
    const int block = static_cast<int>(blockIdx.x);
    if (plan_.cuts != Cuts::kEven) return;
    next_ = FirstOfBlock(args, plan_, block);
    end_ = FirstOfBlock(args, plan_, block + 1);
  }

  // Makes `unit`, the one before or at first an empty one, the next; false: there is none.
  __device__ bool Next(Unit* unit) {
    if (plan_.cuts == Cuts::kEven) return NextEven(unit);
    const int cut = list_.share_tiles;
    if (plan_.cuts == Cuts::kFolded && unit->first_tile > 0) {
      unit->last_tile = unit->first_tile - 1;
      unit->first_tile -= cut;
      unit->first_joined = static_cast<int>(blockIdx.x);
      unit->joined = 1;
      unit->stays = unit->first_tile > 0;
      return true;
    }
    const int index = DealtTo(static_cast<int>(blockIdx.x), args_.thread_blocks, next_++);
    if (index >= (plan_.cuts == Cuts::kParts ? plan_.shares : plan_.units)) return false;
    if (plan_.cuts == Cuts::kParts) {
      const Share share = FindShare(args_, list_, index);
      *unit = WholeUnit<kTile>(args_, list_, share.unit);
      unit->first_tile = (share.count - 1 - share.offset) * cut;
      unit->last_tile = min(unit->last_tile, unit->first_tile + cut - 1);
      if (share.count > 1) unit->part = PartAt<kDim>(args_, index);
      return true;
    }
    *unit = WholeUnit<kTile>(args_, list_, NameOfUnit(args_, list_, index));
    if (plan_.cuts == Cuts::kFolded) {
      unit->first_tile = unit->last_tile / cut * cut;
      unit->stays = unit->first_tile > 0;
    }
    return true;
  }

 private:
  __device__ bool NextEven(Unit* unit) {
    if (next_ >= end_) return false;
    const Share share = FindShare(args_, list_, next_);
    const int count = min(share.count - share.offset, end_ - next_);
    *unit = WholeUnit<kTile>(args_, list_, share.unit);
    unit->last_tile -= share.offset;
    unit->first_tile = unit->last_tile - count + 1;
    if (share.offset > 0) {
      unit->stays = true;
    } else if (count < share.count) {
      unit->first_joined = static_cast<int>(blockIdx.x) + 1;
      unit->joined = BlockOf(args_, plan_, next_ + share.count - 1) - unit->first_joined + 1;
    }
    next_ += count;
    return true;
  }

  const KernelArgs& args_;
  const WorkList& list_;
  const Plan plan_;
  int next_ = 0;  // kEven: share; else turn
  int end_ = 0;
};

}  // namespace tandem::engine::cuda::hopper_attention
