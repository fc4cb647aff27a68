// The kernel of HopperPrefillAttention.
//
// A unit of work is 128 rows of queries of one item, of one head or, where there are few queries,
// of all heads that share a KV head, against the positions they see. Warps of their own copy Q, and
// tiles of K and V, to rings in shared memory; two warpgroups take 64 rows each and hold S, P and O
// in registers:
//
//   S = Q K^T of tile j, O += P V of tile j + 1   on the tensor cores, issued together
//   P = exp2(scale S - base) of tile j            while the other warpgroup has its turn there
//
// The turns are kept by two named barriers. The scheme is FlashAttention-3's (Shah et al., 2024,
// arXiv:2407.08608), the base, a running maximum, Milakov and Gimelshein's (2018,
// arXiv:1805.02867). Tiles are taken from the last one down, so that only the first few need a
// mask.
//
// Each thread block, one to a multiprocessor, works on a list of units that it derives from the
// batch itself: all units, those with most positions first, dealt out forth and back.
#pragma once

#include <cmath>

#include "engine/kernels/cuda/hopper_prefill_attention_ptx.cuh"
#include "engine/kernels/cuda/prefill_attention.h"

namespace tandem::engine::cuda::hopper_attention {

inline constexpr int kUnitRows = 128;
inline constexpr int kGroupRows = 64;  // of a warpgroup
inline constexpr int kGroupThreads = 128;
inline constexpr int kThreads = 3 * kGroupThreads;
inline constexpr int kStages = 2;
inline constexpr int kMinPiece = 16;      // positions of a copy, at least: no page is smaller
inline constexpr int kMaxUnits = 2048;    // runs of kUnitRows rows of a batch
inline constexpr int kPartialStride = 2;  // floats of a row's maximum and sum

struct KernelArgs : PrefillAttentionArgs {
  // Row m of a unit is query m / pack of its item's run and head m % pack of the unit's: with few
  // queries, the heads that share a KV head share a unit.
  int pack = 1;
  // Units of one KV head before those of the next, where the pages of all do not fit in L2: then
  // thread blocks that are not quite in step find each other's there.
  bool kv_head_first = false;
  int unit_queries = kUnitRows;     // kUnitRows / pack
  int piece_positions = kMinPiece;  // that one copy takes
};

// --- The list of work ----------------------------------------------------------------------------

struct Schedule {
  uint32_t units[kMaxUnits];  // item << 16 | number of the run of rows; most positions first
  int count;
};
struct ScheduleScratch {
  uint32_t units[kMaxUnits];
  int positions[kMaxUnits];
};

__device__ inline int RowsOfItem(const KernelArgs& args, int item) {
  if (item >= args.num_items || args.starts[item] < 0) return 0;
  const int rows = args.first_rows[item + 1] - args.first_rows[item];
  return args.skip_single_rows && rows == 1 ? 0 : rows;
}

// By all threads of the block.
__device__ inline void MakeSchedule(const KernelArgs& args, Schedule* schedule,
                                    ScheduleScratch* scratch) {
  if (threadIdx.x < 32) {
    const int lane = static_cast<int>(threadIdx.x);
    int count = 0;
    for (int base = 0; base < args.num_items; base += 32) {
      const int item_rows = RowsOfItem(args, base + lane);
      for (uint32_t items = __ballot_sync(~0u, item_rows > 0); items != 0; items &= items - 1) {
        const int source = __ffs(static_cast<int>(items)) - 1;
        const int rows = __shfl_sync(~0u, item_rows, source), item = base + source;
        const int runs = (rows + args.unit_queries - 1) / args.unit_queries,
                  start = args.starts[item];
        for (int run = lane; run < runs && count + run < kMaxUnits; run += 32) {
          scratch->units[count + run] =
              static_cast<uint32_t>(item) << 16 | static_cast<uint32_t>(run);
          scratch->positions[count + run] = start + min(rows, (run + 1) * args.unit_queries);
        }
        count += runs;
      }
    }
    if (lane == 0) schedule->count = min(count, kMaxUnits);
  }
  __syncthreads();
  const int count = schedule->count;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) {
    const int positions = scratch->positions[i];
    int rank = 0;
    for (int other = 0; other < count; ++other) {
      const int others = scratch->positions[other];
      rank += others > positions || (others == positions && other < i) ? 1 : 0;
    }
    schedule->units[rank] = scratch->units[i];
  }
  __syncthreads();
}

// One unit's rows and positions. Where there are fewer units than thread blocks and partial results
// have a place, the tiles of a unit are split between several.
struct Unit {
  int head, kv_head;  // the first of `pack` heads
  int first_row;      // of the batch
  int queries;        // of the unit, 1..unit_queries
  int start;          // position of the first row
  int end;            // of the positions that the rows see
  int item;
  int splits;                 // that share the unit
  int first_tile, last_tile;  // this split's
};

struct Units {
  int units, splits, total;
};

__device__ inline Units CountUnits(const KernelArgs& args, const Schedule& schedule, int blocks) {
  Units out;
  out.units = schedule.count * (args.heads / args.pack);
  out.splits = args.partial == nullptr || out.units == 0 ? 1 : max(1, blocks / out.units);
  out.total = out.units * out.splits;
  return out;
}

constexpr int kMinSplitTiles = 4;

// Work number `index` in [0, Units::total); false if there is nothing to do for it.
template <int kTile>
__device__ inline bool FindUnit(const KernelArgs& args, const Schedule& schedule,
                                const Units& units, int index, Unit* out) {
  const int unit = index / units.splits, split = index % units.splits;
  const int heads = args.heads / args.pack;
  const int shared_by = heads / args.kv_heads;
  int run = unit / heads, head = unit % heads;
  if (args.kv_head_first) {
    const int of_head = schedule.count * shared_by;
    run = unit % of_head / shared_by;
    head = unit / of_head * shared_by + unit % shared_by;
  }
  const uint32_t entry = schedule.units[run];
  out->item = static_cast<int>(entry >> 16);
  const int offset = static_cast<int>(entry & 0xffff) * args.unit_queries;
  out->head = head * args.pack;
  out->kv_head = out->head / (args.heads / args.kv_heads);
  out->first_row = args.first_rows[out->item] + offset;
  out->queries = min(args.first_rows[out->item + 1] - out->first_row, args.unit_queries);
  out->start = args.starts[out->item] + offset;
  out->end = out->start + out->queries;
  const int tiles = (out->end + kTile - 1) / kTile;
  out->splits = max(1, min(units.splits, tiles / kMinSplitTiles));
  if (split >= out->splits) return false;
  out->first_tile = tiles * split / out->splits;
  out->last_tile = tiles * (split + 1) / out->splits - 1;
  return true;
}

// The work numbers of one thread block, forth and back through the list.
struct Turn {
  int number = 0;
  __device__ int Next(int total) {
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int index = number * blocks + (number % 2 == 0 ? block : blocks - 1 - block);
    ++number;
    return index < total ? index : -1;
  }
};

// --- Shared memory -------------------------------------------------------------------------------

template <int kDim, int kTile>
struct Layout {
  static constexpr int kHalves = kDim / 64;  // of rows of 128 bytes
  static constexpr int kQueryHalfBytes = kUnitRows * 128;
  static constexpr int kTileHalfBytes = kTile * 128;
  static constexpr int kQueryBytes = kHalves * kQueryHalfBytes;
  static constexpr int kTileBytes = kHalves * kTileHalfBytes;
  static constexpr int kKeys = kQueryBytes;
  static constexpr int kValues = kKeys + kStages * kTileBytes;
  static constexpr int kBarriers = kValues + kStages * kTileBytes;
  static constexpr int kSchedule = kBarriers + 128;
  static constexpr int kBytes = kSchedule + static_cast<int>(sizeof(Schedule));
  static constexpr int kSharedBytes = kBytes + 1024;  // its beginning is rounded up to 1024
  static_assert(sizeof(ScheduleScratch) <= kStages * kTileBytes);
  static_assert(kSharedBytes <= 227 * 1024);
};

// Barriers, in units of 8 bytes.
enum Barrier : int {
  kQueryFull = 0,
  kQueryEmpty = 1,
  kKeyFull = 2,
  kKeyEmpty = kKeyFull + kStages,
  kValueFull = kKeyEmpty + kStages,
  kValueEmpty = kValueFull + kStages,
  kBarrierCount = kValueEmpty + kStages,
};

// A place in a ring.
struct Place {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// --- The copying warps ---------------------------------------------------------------------------
// Two for keys and two for values, for a warp issues copies of different addresses one after the
// other, and a page of 16 positions is small.

template <int kDim, int kTile>
struct Producer {
  using L = Layout<kDim, kTile>;
  static_assert(kTile / kMinPiece * L::kHalves <= 64);

  const KernelArgs& args;
  const CUtensorMap* q_map;
  const CUtensorMap* kv_map;
  uint32_t shared;
  int warp;  // 0, 1: keys; 2, 3: values
  int lane;
  Place place;
  uint32_t query_parity = 0;

  __device__ uint32_t Address(int barrier) const {
    return shared + L::kBarriers + static_cast<uint32_t>(barrier) * 8;
  }

  __device__ void CopyQueries(const Unit& unit) {
    WaitBarrier(Address(kQueryEmpty), query_parity ^ 1);
    if (lane == 0) {
      ExpectBytes(Address(kQueryFull), L::kHalves * args.pack * args.unit_queries * 128);
    }
    __syncwarp();
    if (lane < L::kHalves) {
      LoadBox(shared + lane * L::kQueryHalfBytes, q_map, lane * 64, unit.head, unit.first_row,
              Address(kQueryFull));
    }
    query_parity ^= 1;
  }

  __device__ void Run(const Unit& unit) {
    const bool values = warp >= 2;
    // A lane's share of every tile: some positions, one half of their rows.
    const int share = 2 * lane + warp % 2;
    const int half = share % L::kHalves, offset = share / L::kHalves * args.piece_positions;
    const bool has_share = offset < kTile;
    const uint32_t to = shared + (values ? L::kValues : L::kKeys) +
                        static_cast<uint32_t>(half * L::kTileHalfBytes + offset * 128);
    const int full = values ? kValueFull : kKeyFull, empty = values ? kValueEmpty : kKeyEmpty;
    const int32_t* blocks = args.blocks + args.first_blocks[unit.item];
    const int page = (values ? args.kv_heads : 0) + unit.kv_head;  // of the block

    // Blocks are read a tile before their use.
    const auto read = [&](int tile) {
      const int position = tile * kTile + offset;
      return has_share && tile >= unit.first_tile && position < unit.end
                 ? blocks[position / args.block_size]
                 : -1;
    };
    // The row of the pool. Positions that no row sees come from behind it: zeros.
    const auto row = [&](int tile, int block) {
      return block < 0 ? args.num_pool_blocks * 2 * args.kv_heads * args.block_size
                       : (block * 2 * args.kv_heads + page) * args.block_size +
                             (tile * kTile + offset) % args.block_size;
    };
    int block = read(unit.last_tile);
    for (int tile = unit.last_tile; tile >= unit.first_tile; --tile) {
      const int now = row(tile, block);
      block = read(tile - 1);
      WaitBarrier(Address(empty + place.stage), place.parity ^ 1);
      const uint32_t barrier = Address(full + place.stage);
      if (warp % 2 == 0 && lane == 0) ExpectBytes(barrier, L::kTileBytes);
      __syncwarp();
      if (has_share) LoadBox(to + place.stage * L::kTileBytes, kv_map, half * 64, now, barrier);
      place.Advance();
      if (tile == unit.last_tile && warp == 0) CopyQueries(unit);
    }
  }
};

// --- The multiplying warpgroups ------------------------------------------------------------------

__device__ inline float Exp2(float x) {
  float out;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

__device__ inline float QuadMax(float value) {
  value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
  return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}
__device__ inline float QuadSum(float value) {
  value += __shfl_xor_sync(~0u, value, 1);
  return value + __shfl_xor_sync(~0u, value, 2);
}

// Thread q of each quad has v[i] of column i of a row and gets v[q] of its companions.
__device__ inline void TransposeInQuad(uint32_t (&v)[4], int quad_lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = (quad_lane & bit) != 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((i & bit) != 0) continue;
      const uint32_t sent = upper ? v[i] : v[i | bit];
      const uint32_t got = __shfl_xor_sync(~0u, sent, bit);
      if (upper) {
        v[i] = got;
      } else {
        v[i | bit] = got;
      }
    }
  }
}

template <int kDim, int kTile>
struct Consumer {
  using L = Layout<kDim, kTile>;
  static constexpr int kScores = kTile / 2, kOutputs = kDim / 2;  // registers of a thread
  static constexpr int kProbabilities = kTile / 4;
  static constexpr float kSlack = 8;

  const KernelArgs& args;
  uint32_t shared;
  int group;    // 0, 1
  int thread;   // of the group
  float scale;  // of scores, to powers of 2
  Place key, value;
  uint32_t query_parity = 0;

  float s[kScores], o[kOutputs];
  uint32_t p[kProbabilities];
  float base[2], limit[2], sum[2], rescale[2];

  __device__ uint32_t Address(int barrier) const {
    return shared + L::kBarriers + static_cast<uint32_t>(barrier) * 8;
  }
  // By each warp when it has done with what the barrier guards.
  __device__ void Release(int barrier) const {
    if (thread % 32 == 0) Arrive(Address(barrier));
  }

  // The two warpgroups issue their products in turns.
  __device__ void TakeTurn() const { SyncThreads(1 + group, 2 * kGroupThreads); }
  __device__ void PassTurn() const { ArriveThreads(1 + (group ^ 1), 2 * kGroupThreads); }

  __device__ void MultiplyQueriesKeys() {
    const uint64_t keys = DescribeMatrix(shared + L::kKeys + key.stage * L::kTileBytes, 16);
    const uint64_t queries = DescribeMatrix(shared + group * kGroupRows * 128, 16);
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) {
      const uint64_t b = keys + (k / 4 * L::kTileHalfBytes + k % 4 * 32) / 16;
      const uint64_t a = queries + (k / 4 * L::kQueryHalfBytes + k % 4 * 32) / 16;
      if (k == 0) {
        Multiply<false>(s, a, b);
      } else {
        Multiply<true>(s, a, b);
      }
    }
    CommitProducts();
  }

  __device__ void MultiplyProbabilitiesValues() {
    const uint64_t values =
        DescribeMatrix(shared + L::kValues + value.stage * L::kTileBytes, L::kTileHalfBytes);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Multiply<true, 1>(o, p + 4 * k, values + k * 2048 / 16);
    }
    CommitProducts();
  }

  // Scores of positions behind a row's own. Select, not add: there may be NaN.
  __device__ void Mask(const Unit& unit, int tile) {
    const int row = group * kGroupRows + thread / 32 * 16 + thread % 32 / 4;
    const int first = unit.start - tile * kTile - thread % 4 * 2;
    const int last[2] = {first + row / args.pack, first + (row + 8) / args.pack};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      if (i / 4 * 8 + i % 2 > last[i / 2 % 2]) s[i] = -INFINITY;
    }
  }

  // The base of a row's exponents: its running maximum, but one that lags behind by up to kSlack
  // (as in FlashAttention-4), so that what was summed up so far need rarely be scaled. What a row
  // does depends on its own scores alone. Returns whether `rescale` is to be applied to o.
  __device__ bool MoveBase() {
    float most[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float left = s[2 * r], right = s[2 * r + 1];
#pragma unroll
      for (int i = 4; i < kScores; i += 4) {
        left = fmaxf(left, s[i + 2 * r]);
        right = fmaxf(right, s[i + 2 * r + 1]);
      }
      most[r] = fmaxf(left, right);
    }
    if (!__any_sync(~0u, most[0] > limit[0] || most[1] > limit[1])) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = QuadMax(most[r]);
      rescale[r] = 1;
      if (most[r] > limit[r]) {
        const float before = base[r];
        base[r] = most[r] * scale;
        limit[r] = fmaf(kSlack, 1 / scale, most[r]);
        rescale[r] = Exp2(before - base[r]);
        sum[r] *= rescale[r];
      }
    }
    return true;
  }

  // p = exp2(scale s - base), and their sums by row.
  template <bool kMasked>
  __device__ void Exponentiate() {
    float sums[4] = {0, 0, 0, 0}, from[2] = {base[0], base[1]};
#pragma unroll
    for (int r = 0; kMasked && r < 2; ++r) {
      if (base[r] == -INFINITY) from[r] = 0;  // the row has seen nothing yet, nor does it now
    }
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const int r = i / 2 % 2;
      const float left = Exp2(fmaf(s[i], scale, -from[r]));
      const float right = Exp2(fmaf(s[i + 1], scale, -from[r]));
      sums[2 * r] += left;
      sums[2 * r + 1] += right;
      p[i / 2] = PackBFloat16(left, right);
    }
    sum[0] += sums[0] + sums[1];
    sum[1] += sums[2] + sums[3];
  }

  // The products S of this tile and O of the tile after it; then P of this one.
  template <bool kMasked>
  __device__ void Step(const Unit& unit, int tile) {
    WaitBarrier(Address(kKeyFull + key.stage), key.parity);
    TakeTurn();
    Pin(s);
    Pin(o);
    Pin(p);
    FenceProducts();
    MultiplyQueriesKeys();
    WaitBarrier(Address(kValueFull + value.stage), value.parity);
    FenceProducts();
    MultiplyProbabilitiesValues();
    PassTurn();
    WaitForProducts<1>();
    Pin(s);
    Release(kKeyEmpty + key.stage);
    key.Advance();
    if constexpr (kMasked) Mask(unit, tile);
    const bool moved = MoveBase();
    WaitForProducts<0>();
    Pin(o);
    Pin(s);
    Release(kValueEmpty + value.stage);
    value.Advance();
    if (moved) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[i / 2 % 2];
    }
    Exponentiate<kMasked>();
  }

  // What the pages hold behind the last position seen is no number: 0 times it would be none.
  __device__ void ClearValuesBehind(const Unit& unit) {
    const int from = unit.end - unit.last_tile * kTile;
    if (from >= kTile || from % args.piece_positions == 0) return;
    const int rows = args.piece_positions - from % args.piece_positions;
    const uint32_t values = shared + L::kValues + value.stage * L::kTileBytes + from * 128;
    for (int i = thread; i < rows * 8 * L::kHalves; i += kGroupThreads) {
      const int half = i / (rows * 8);
      asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                       values + half * L::kTileHalfBytes + i % (rows * 8) * 16),
                   "r"(0)
                   : "memory");
    }
    FenceAsyncProxy();
    SyncThreads(3 + group, kGroupThreads);
  }

  __device__ void Write(const Unit& unit, int slot) {
    const int quad_lane = thread % 4;
    const int row = group * kGroupRows + thread / 32 * 16 + thread % 32 / 4;  // and row + 8
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float total = QuadSum(sum[r]);
      if (unit.splits > 1) {
        float* partial = args.partial + (static_cast<int64_t>(slot) * kUnitRows + row + 8 * r) *
                                            (kDim + kPartialStride);
#pragma unroll
        for (int i = 0; i < kDim / 8; ++i) {
          *reinterpret_cast<float2*>(partial + kPartialStride + i * 8 + quad_lane * 2) =
              make_float2(o[4 * i + 2 * r], o[4 * i + 2 * r + 1]);
        }
        if (quad_lane == 0) {
          *reinterpret_cast<float2*>(partial) = make_float2(base[r], total);
        }
        continue;
      }
      const float inverse = 1 / total;
      const int query = (row + 8 * r) / args.pack;
      __nv_bfloat16* out = args.out + (static_cast<int64_t>(unit.first_row + query) * args.heads +
                                       unit.head + (row + 8 * r) % args.pack) *
                                          kDim;
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = PackBFloat16(o[4 * (4 * c + i) + 2 * r] * inverse,
                              o[4 * (4 * c + i) + 2 * r + 1] * inverse);
        }
        TransposeInQuad(v, quad_lane);
        if (query < unit.queries) {
          *reinterpret_cast<uint4*>(out + c * 32 + quad_lane * 8) =
              make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    }
  }

  __device__ void Run(const Unit& unit, int slot) {
    // Tiles below this one are seen whole by all rows of the group.
    const int first_masked =
        max(unit.first_tile, (unit.start + group * kGroupRows / args.pack + 1) / kTile);
    int tile = unit.last_tile;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0;
    base[0] = base[1] = limit[0] = limit[1] = -INFINITY;
    sum[0] = sum[1] = 0;

    WaitBarrier(Address(kQueryFull), query_parity);
    query_parity ^= 1;
    WaitBarrier(Address(kKeyFull + key.stage), key.parity);
    Pin(s);
    FenceProducts();
    MultiplyQueriesKeys();
    WaitForProducts<0>();
    Pin(s);
    Release(kKeyEmpty + key.stage);
    key.Advance();
    Mask(unit, tile);
    MoveBase();
    Exponentiate<true>();
    WaitBarrier(Address(kValueFull + value.stage), value.parity);
    ClearValuesBehind(unit);

    for (--tile; tile >= first_masked; --tile) Step<true>(unit, tile);
    for (; tile >= unit.first_tile; --tile) Step<false>(unit, tile);
    Release(kQueryEmpty);

    WaitBarrier(Address(kValueFull + value.stage), value.parity);
    Pin(o);
    FenceProducts();
    MultiplyProbabilitiesValues();
    WaitForProducts<0>();
    Pin(o);
    Release(kValueEmpty + value.stage);
    value.Advance();
    Write(unit, slot);
  }
};

// --- The kernel ----------------------------------------------------------------------------------

template <int kDim, int kTile>
__device__ void Attention(const KernelArgs& args, const CUtensorMap* q_map,
                          const CUtensorMap* kv_map, unsigned char* dynamic_shared) {
  using L = Layout<kDim, kTile>;
  unsigned char* shared = dynamic_shared + (1024 - SharedAddress(dynamic_shared) % 1024) % 1024;
  const uint32_t address = SharedAddress(shared);
  Schedule* schedule = reinterpret_cast<Schedule*>(shared + L::kSchedule);
  if (threadIdx.x == 0) {
    PrefetchTensorMap(q_map);
    PrefetchTensorMap(kv_map);
    for (int i = 0; i < kBarrierCount; ++i) {
      const bool full = i == kQueryFull || (i >= kKeyFull && i < kKeyEmpty) ||
                        (i >= kValueFull && i < kValueEmpty);
      InitBarrier(address + L::kBarriers + static_cast<uint32_t>(i) * 8, full ? 1 : 8);
    }
    FenceBarrierInit();
  }
  MakeSchedule(args, schedule, reinterpret_cast<ScheduleScratch*>(shared + L::kKeys));
  FenceAsyncProxy();  // copies follow where the scratch was
  __syncthreads();
  WaitForPredecessor();
  LetSuccessorStart();

  const Units units = CountUnits(args, *schedule, static_cast<int>(gridDim.x));
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  Turn turn;
  Unit unit;
  if (group == 0) {
    ShrinkRegisters<56>();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    Producer<kDim, kTile> producer{args, q_map, kv_map, address, warp, lane};
    for (int index; (index = turn.Next(units.total)) >= 0;) {
      if (FindUnit<kTile>(args, *schedule, units, index, &unit)) producer.Run(unit);
    }
  } else {
    GrowRegisters<224>();
    Consumer<kDim, kTile> consumer{args, address, group - 1,
                                   static_cast<int>(threadIdx.x) % kGroupThreads,
                                   args.scale * 1.44269504088896341f};
    if (consumer.group == 1) consumer.PassTurn();
    for (int index; (index = turn.Next(units.total)) >= 0;) {
      if (FindUnit<kTile>(args, *schedule, units, index, &unit)) consumer.Run(unit, index);
    }
    if (consumer.group == 0) consumer.TakeTurn();
  }
}

// --- Split units put together --------------------------------------------------------------------

__device__ inline float WarpMax(float value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    value = fmaxf(value, __shfl_xor_sync(~0u, value, lanes));
  return value;
}

// A warp to each row of each unit that was split over the `blocks` thread blocks of Attention.
template <int kDim, int kTile>
__device__ void Merge(const KernelArgs& args, int blocks, unsigned char* shared) {
  Schedule* schedule = reinterpret_cast<Schedule*>(shared);
  MakeSchedule(args, schedule, reinterpret_cast<ScheduleScratch*>(shared + sizeof(Schedule)));
  WaitForPredecessor();
  LetSuccessorStart();
  const Units units = CountUnits(args, *schedule, blocks);
  if (units.splits == 1) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / 32;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
       i < units.units * kUnitRows; i += warps) {
    const int index = i / kUnitRows * units.splits, row = i % kUnitRows;
    Unit unit;
    const int query = row / args.pack;
    if (!FindUnit<kTile>(args, *schedule, units, index, &unit) || unit.splits == 1 ||
        query >= unit.queries) {
      continue;
    }
    const float* partial =
        args.partial + (static_cast<int64_t>(index) * kUnitRows + row) * (kDim + kPartialStride);
    constexpr int64_t kSplitStride = static_cast<int64_t>(kUnitRows) * (kDim + kPartialStride);
    // A lane to each split.
    float most = -INFINITY;
    for (int split = lane; split < unit.splits; split += 32) {
      most = fmaxf(most, partial[split * kSplitStride]);
    }
    most = WarpMax(most);
    float total = 0;
    for (int split = lane; split < unit.splits; split += 32) {
      const float* from = partial + split * kSplitStride;
      total = fmaf(from[1], Exp2(from[0] - most), total);
    }
    const float inverse = 1 / WarpSum(total);
    float2 out[kDim / 64] = {};
#pragma unroll 4
    for (int split = 0; split < unit.splits; ++split) {
      const float* from = partial + split * kSplitStride;
      const float weight = Exp2(from[0] - most);
#pragma unroll
      for (int c = 0; c < kDim / 64; ++c) {
        const float2 part =
            *reinterpret_cast<const float2*>(from + kPartialStride + c * 64 + lane * 2);
        out[c].x = fmaf(part.x, weight, out[c].x);
        out[c].y = fmaf(part.y, weight, out[c].y);
      }
    }
    __nv_bfloat16* to = args.out + (static_cast<int64_t>(unit.first_row + query) * args.heads +
                                    unit.head + row % args.pack) *
                                       kDim;
#pragma unroll
    for (int c = 0; c < kDim / 64; ++c) {
      *reinterpret_cast<uint32_t*>(to + c * 64 + lane * 2) =
          PackBFloat16(out[c].x * inverse, out[c].y * inverse);
    }
  }
}

}  // namespace tandem::engine::cuda::hopper_attention
