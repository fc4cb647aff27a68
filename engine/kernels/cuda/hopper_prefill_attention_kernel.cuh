// The kernel of HopperPrefillAttention.
//
// Thread blocks, one to a multiprocessor, work on units of 128 rows of queries
// (hopper_prefill_attention_work.cuh). Warps of their own copy Q, and tiles of K and V, to rings in
// shared memory; two warpgroups take 64 rows each and hold S, P and O in registers:
//
//   S = Q K^T of tile j, O += P V of tile j + 1   on the tensor cores, issued together
//   P = exp2(scale S - base) of tile j            while the other warpgroup has its turn there
//
// The turns are kept by two named barriers. The scheme is FlashAttention-3's (Shah et al., 2024,
// arXiv:2407.08608), the base, a running maximum, Milakov and Gimelshein's (2018,
// arXiv:1805.02867). Tiles are taken from the last one down, so that only the first few need a
// mask. It goes on across units: the next unit's first S is computed beside the last O of the one
// before, for which copies run ahead and Q has two places.
#pragma once

#include <cmath>

#include "engine/kernels/cuda/hopper_prefill_attention_ptx.cuh"
#include "engine/kernels/cuda/hopper_prefill_attention_work.cuh"

namespace tandem::engine::cuda::hopper_attention {

inline constexpr int kGroupRows = 64;  // of a warpgroup
inline constexpr int kGroupThreads = 128;
inline constexpr int kThreads = 3 * kGroupThreads;
// Of a thread. More in all than the block begins with, and it would wait for them for ever.
inline constexpr int kMultiplyingRegisters = 224, kCopyingRegisters = 56;
static_assert(2 * kMultiplyingRegisters + kCopyingRegisters <= 65536 / kThreads / 8 * 8 * 3);
inline constexpr int kStages = 2;
inline constexpr int kQueryStages = 2;
// Units in shared memory. One is needed until its result is written, when the Q of the next has
// long been used and that of the one after it may be there.
inline constexpr int kUnitStages = 4;

// --- Shared memory -------------------------------------------------------------------------------

template <int kDim, int kTile>
struct Layout {
  static constexpr int kHalves = kDim / 64;  // of rows of 128 bytes
  static constexpr int kQueryHalfBytes = kUnitRows * 128;
  static constexpr int kTileHalfBytes = kTile * 128;
  static constexpr int kQueryBytes = kHalves * kQueryHalfBytes;
  static constexpr int kTileBytes = kHalves * kTileHalfBytes;
  static constexpr int kKeys = kQueryStages * kQueryBytes;
  static constexpr int kValues = kKeys + kStages * kTileBytes;
  static constexpr int kBarriers = kValues + kStages * kTileBytes;
  static constexpr int kUnits = kBarriers + 128;
  static constexpr int kWorkList = kUnits + kUnitStages * static_cast<int>(sizeof(Unit));
  static constexpr int kBytes = kWorkList + static_cast<int>(sizeof(WorkList));
  static constexpr int kSharedBytes = kBytes + 1024;  // its beginning is rounded up to 1024
  static_assert(sizeof(WorkListScratch) <= kStages * kTileBytes);
  static_assert(kSharedBytes <= 227 * 1024);
};

// Barriers, in units of 8 bytes.
enum Barrier : int {
  kQueryFull = 0,
  kQueryEmpty = kQueryFull + kQueryStages,
  kKeyFull = kQueryEmpty + kQueryStages,
  kKeyEmpty = kKeyFull + kStages,
  kValueFull = kKeyEmpty + kStages,
  kValueEmpty = kValueFull + kStages,
  kBarrierCount = kValueEmpty + kStages,
};

// A place in a ring of kCount, a power of two.
template <int kCount>
struct Place {
  uint32_t number = 0;
  __device__ int stage() const { return static_cast<int>(number % kCount); }
  __device__ uint32_t parity() const { return number / kCount % 2; }
  __device__ void Advance() { ++number; }
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
  Unit* units;  // [kUnitStages]
  int warp;     // 0, 1: keys; 2, 3: values
  int lane;
  Place<kStages> place;
  Place<kQueryStages> query;
  int announced = 0;

  __device__ uint32_t Address(int barrier) const {
    return shared + L::kBarriers + static_cast<uint32_t>(barrier) * 8;
  }

  // Tells the multiplying groups of the next unit, one without queries if there is none, and brings
  // its Q.
  __device__ void Announce(const Unit& unit) {
    WaitBarrier(Address(kQueryEmpty + query.stage()), query.parity() ^ 1);
    const uint32_t full = Address(kQueryFull + query.stage());
    if (lane == 0) {
      units[announced++ % kUnitStages] = unit;
      ExpectBytes(full, unit.queries == 0 ? 0 : L::kHalves * args.pack * args.unit_queries * 128);
    }
    __syncwarp();
    if (unit.queries > 0 && lane < L::kHalves) {
      LoadBox(shared + query.stage() * L::kQueryBytes + lane * L::kQueryHalfBytes, q_map, lane * 64,
              unit.head, unit.first_row, full);
    }
    query.Advance();
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
      WaitBarrier(Address(empty + place.stage()), place.parity() ^ 1);
      const uint32_t barrier = Address(full + place.stage());
      if (warp % 2 == 0 && lane == 0) ExpectBytes(barrier, L::kTileBytes);
      __syncwarp();
      if (has_share) LoadBox(to + place.stage() * L::kTileBytes, kv_map, half * 64, now, barrier);
      place.Advance();
    }
  }

  __device__ void RunAll(Work<kDim, kTile>* work) {
    Unit unit;
    while (work->Next(&unit)) {
      if (warp == 0) Announce(unit);
      Run(unit);
    }
    unit.queries = 0;
    if (warp == 0) Announce(unit);
  }
};

// --- Sums of parts -------------------------------------------------------------------------------
// By whoever adds them: the same instructions, so the same bits.

__device__ inline float Exp2(float x) {
  float out;
  asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// The factors of what is summed up so far, whose exponents have base `before`, and of a part with
// base *base, which becomes that of the sum. A part that has seen nothing changes nothing.
struct Weights {
  float before, part;
};
__device__ inline Weights Join(float before, float* base) {
  const float part = *base;
  *base = fmaxf(before, part);
  const float from = *base == -INFINITY ? 0 : *base;
  return {Exp2(before - from), Exp2(part - from)};
}
__device__ inline float Add(float before, float part, const Weights& weights) {
  return fmaf(before, weights.before, __fmul_rn(part, weights.part));
}
__device__ inline float Inverse(float x) {
  float out;
  asm volatile("rcp.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// A thread block's place is filled and read warp by warp; by all lanes of the warp.
inline constexpr int kWarpsOfPlace = kMultiplyingThreads / 32;
__device__ inline void SetFlag(uint32_t* flag, int lane) {
  __threadfence();
  __syncwarp();
  if (lane == 0) asm volatile("st.release.gpu.global.u32 [%0], 1;" ::"l"(flag) : "memory");
}
__device__ inline void WaitForFlag(const uint32_t* flag, int lane) {
  uint32_t set = 0;
  while (lane == 0 && set == 0) {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(set) : "l"(flag) : "memory");
  }
  __syncwarp();
}
__device__ inline void ClearFlag(uint32_t* flag, int lane) {
  __syncwarp();
  if (lane == 0) *flag = 0;
}

// Adding 0 makes of a negative zero what the sum of several parts makes of it.
__device__ inline float Normalise(float value, float inverse) { return fmaf(value, inverse, 0.f); }

// --- The multiplying warpgroups ------------------------------------------------------------------

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
  const uint32_t shared;
  const Unit* const units;  // [kUnitStages]
  const int group;          // 0, 1
  const int thread;         // of the group
  int query_of[2];          // of the unit, of whose rows the thread has a quarter
  Place<kStages> key, value;
  Place<kQueryStages> query;
  uint32_t fetched = 0;

  float s[kScores], o[kOutputs];
  uint32_t p[kProbabilities];
  float base[2], sum[2], rescale[2];

  __device__ Consumer(const KernelArgs& args, uint32_t shared, const Unit* units)
      : args(args),
        shared(shared),
        units(units),
        group(static_cast<int>(threadIdx.x) / kGroupThreads - 1),
        thread(static_cast<int>(threadIdx.x) % kGroupThreads) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      query_of[r] = Row(r) / args.pack;
    }
  }

  // Of the unit: r is 0 or 1.
  __device__ int Row(int r) const {
    return group * kGroupRows + thread / 32 * 16 + thread % 32 / 4 + 8 * r;
  }

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
    const uint64_t keys = DescribeMatrix(shared + L::kKeys + key.stage() * L::kTileBytes, 16);
    const uint64_t queries =
        DescribeMatrix(shared + query.stage() * L::kQueryBytes + group * kGroupRows * 128, 16);
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
        DescribeMatrix(shared + L::kValues + value.stage() * L::kTileBytes, L::kTileHalfBytes);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      Multiply<true, 1>(o, p + 4 * k, values + k * 2048 / 16);
    }
    CommitProducts();
  }

  // Scores of positions behind a row's own. Select, not add: there may be NaN.
  __device__ void Mask(int start, int tile) {
    const int first = start - tile * kTile - thread % 4 * 2;
    const int last[2] = {first + query_of[0], first + query_of[1]};
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
    const float limit[2] = {(base[0] + kSlack) * args.score_scale,
                            (base[1] + kSlack) * args.score_scale};
    if (!__any_sync(~0u, most[0] > limit[0] || most[1] > limit[1])) return false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = QuadMax(most[r]);
      rescale[r] = 1;
      if (most[r] > limit[r]) {
        const float before = base[r];
        base[r] = most[r] * args.exponent_scale;
        rescale[r] = Exp2(before - base[r]);
        sum[r] *= rescale[r];
      }
    }
    return true;
  }

  // p = exp2(scale s - base), and their sums by row.
  __device__ void Exponentiate() {
    float sums[4] = {0, 0, 0, 0}, from[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      from[r] =
          base[r] == -INFINITY ? 0 : base[r];  // the row has seen nothing yet, nor does it now
    }
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const int r = i / 2 % 2;
      const float left = Exp2(fmaf(s[i], args.exponent_scale, -from[r]));
      const float right = Exp2(fmaf(s[i + 1], args.exponent_scale, -from[r]));
      sums[2 * r] += left;
      sums[2 * r + 1] += right;
      p[i / 2] = PackBFloat16(left, right);
    }
    sum[0] += sums[0] + sums[1];
    sum[1] += sums[2] + sums[3];
  }

  // last: of the unit's tiles.
  __device__ void DoneWithKeys(bool last) {
    Release(kKeyEmpty + key.stage());
    key.Advance();
    if (!last) return;
    Release(kQueryEmpty + query.stage());
    query.Advance();
  }

  // The products S of this tile and O of the tile after it; then P of this one.
  __device__ void Step(int start, int tile, bool last, bool masked) {
    WaitBarrier(Address(kKeyFull + key.stage()), key.parity());
    TakeTurn();
    Pin(s);
    Pin(o);
    Pin(p);
    FenceProducts();
    MultiplyQueriesKeys();
    WaitBarrier(Address(kValueFull + value.stage()), value.parity());
    FenceProducts();
    MultiplyProbabilitiesValues();
    PassTurn();
    WaitForProducts<1>();
    Pin(s);
    DoneWithKeys(last);
    if (masked) Mask(start, tile);
    const bool moved = MoveBase();
    WaitForProducts<0>();
    Pin(o);
    Pin(s);
    Release(kValueEmpty + value.stage());
    value.Advance();
    if (moved) {
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) o[i] *= rescale[i / 2 % 2];
    }
    Exponentiate();
  }

  // What the pages hold behind the last position seen is no number: 0 times it would be none.
  __device__ void ClearValuesBehind(const Unit& unit) {
    const int from = unit.end - unit.last_tile * kTile;
    if (from >= kTile || (from & (args.piece_positions - 1)) == 0) return;
    WaitBarrier(Address(kValueFull + value.stage()), value.parity());
    const int rows = args.piece_positions - (from & (args.piece_positions - 1));
    const uint32_t values = shared + L::kValues + value.stage() * L::kTileBytes + from * 128;
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

  __device__ float4* PlaceOf(int block) const {
    return reinterpret_cast<float4*>(args.partial + int64_t{block} * kPlaceFloats<kDim>) +
           group * kGroupThreads + thread;
  }
  // That this warp's share of a thread block's place is filled, for kEven.
  __device__ uint32_t* FlagOf(int block) const {
    return args.flags + block * kWarpsOfPlace + group * (kGroupThreads / 32) + thread / 32;
  }

  // Adds what the thread block's place holds to o, base and sum, which are as totals of the row.
  __device__ void JoinPlace(int block) {
    const bool others = block != static_cast<int>(blockIdx.x);
    if (others) WaitForFlag(FlagOf(block), thread % 32);
    const float4* place = PlaceOf(block);
    const float4 header = __ldcg(place);
    const Weights weights[2] = {Join(header.x, &base[0]), Join(header.y, &base[1])};
    sum[0] = Add(header.z, sum[0], weights[0]);
    sum[1] = Add(header.w, sum[1], weights[1]);
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      // The registers have no room for more at once.
      if (i % 8 == 0) asm volatile("" ::: "memory");
      const float4 before = __ldcg(place + (i + 1) * kMultiplyingThreads);
      o[4 * i] = Add(before.x, o[4 * i], weights[0]);
      o[4 * i + 1] = Add(before.y, o[4 * i + 1], weights[0]);
      o[4 * i + 2] = Add(before.z, o[4 * i + 2], weights[1]);
      o[4 * i + 3] = Add(before.w, o[4 * i + 3], weights[1]);
    }
    if (others) ClearFlag(FlagOf(block), thread % 32);
  }

  __device__ void FillPlace() const {
    float4* place = PlaceOf(static_cast<int>(blockIdx.x));
    __stcg(place, make_float4(base[0], base[1], sum[0], sum[1]));
#pragma unroll
    for (int i = 0; i < kOutputs / 4; ++i) {
      __stcg(place + (i + 1) * kMultiplyingThreads,
             make_float4(o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]));
    }
    if (args.may_even) SetFlag(FlagOf(static_cast<int>(blockIdx.x)), thread % 32);
  }

  __device__ void WritePart(float* to, int queries) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (query_of[r] >= queries) continue;
      float* part = to + Row(r) * (kDim + kPartHeader);
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        *reinterpret_cast<float2*>(part + kPartHeader + i * 8 + thread % 4 * 2) =
            make_float2(o[4 * i + 2 * r], o[4 * i + 2 * r + 1]);
      }
      if (thread % 4 == 0) *reinterpret_cast<float2*>(part) = make_float2(base[r], sum[r]);
    }
  }

  __device__ void WriteOut(const Unit& unit) const {
    const int quad_lane = thread % 4;
    const int queries = unit.queries, first_row = unit.first_row, head = unit.head;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float inverse = Inverse(sum[r]);
      __nv_bfloat16* out = args.out + (static_cast<int64_t>(first_row + query_of[r]) * args.heads +
                                       head + Row(r) - query_of[r] * args.pack) *
                                          kDim;
#pragma unroll
      for (int c = 0; c < kDim / 32; ++c) {
        uint32_t v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = PackBFloat16(Normalise(o[4 * (4 * c + i) + 2 * r], inverse),
                              Normalise(o[4 * (4 * c + i) + 2 * r + 1], inverse));
        }
        TransposeInQuad(v, quad_lane);
        if (query_of[r] < queries) {
          *reinterpret_cast<uint4*>(out + c * 32 + quad_lane * 8) =
              make_uint4(v[0], v[1], v[2], v[3]);
        }
      }
    }
  }

  __device__ void Finish(const Unit& unit) {
    sum[0] = QuadSum(sum[0]);
    sum[1] = QuadSum(sum[1]);
    for (int i = 0; i < unit.joined; ++i) JoinPlace(unit.first_joined + i);
    if (unit.stays) {
      FillPlace();
    } else if (unit.part != nullptr) {
      WritePart(unit.part, unit.queries);
    } else {
      WriteOut(unit);
    }
  }

  __device__ void Clear() {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) o[i] = 0;
    base[0] = base[1] = -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // Waits for the next unit; false: there is none.
  __device__ bool Fetch() {
    WaitBarrier(Address(kQueryFull + query.stage()), query.parity());
    ++fetched;
    return Fetched(1).queries > 0;
  }
  // The last unit, or that before it.
  __device__ const Unit& Fetched(int ago) const { return units[(fetched - ago) % kUnitStages]; }

  // A step across units: the last O of one, if there is one, and the first P of the next, if there
  // is one. The products that nobody needs are computed too, of whatever lies there: one copy of
  // this code, which every thread block has to fetch, is worth more.
  __device__ void Cross(bool ends, bool begins) {
    if (begins) WaitBarrier(Address(kKeyFull + key.stage()), key.parity());
    if (ends) WaitBarrier(Address(kValueFull + value.stage()), value.parity());
    TakeTurn();
    Pin(s);
    Pin(o);
    Pin(p);
    FenceProducts();
    MultiplyQueriesKeys();
    MultiplyProbabilitiesValues();
    PassTurn();
    WaitForProducts<1>();
    Pin(s);
    if (begins) {
      const int tile = Fetched(1).last_tile;
      DoneWithKeys(tile == Fetched(1).first_tile);
      Mask(Fetched(1).start, tile);
    }
    WaitForProducts<0>();
    Pin(o);
    Pin(s);
    if (ends) {
      Release(kValueEmpty + value.stage());
      value.Advance();
      Finish(Fetched(2));
    }
    Clear();
    if (!begins) return;
    MoveBase();
    Exponentiate();
    ClearValuesBehind(Fetched(1));
  }

  // The tiles after a unit's first.
  __device__ void Continue(const Unit& unit) {
    // Tiles below this one are seen whole by all rows of the group.
    const int start = unit.start, first_tile = unit.first_tile;
    const int first_masked = (start + group * args.group_queries + 1) / kTile;
    for (int tile = unit.last_tile - 1; tile >= first_tile; --tile) {
      Step(start, tile, tile == first_tile, tile >= first_masked);
    }
  }

  __device__ void Run() {
#pragma unroll
    for (int i = 0; i < kProbabilities; ++i) p[i] = 0;
    Clear();
    while (true) {
      const bool more = Fetch();
      Cross(fetched > 1, more);
      if (!more) return;
      Continue(Fetched(1));
    }
  }
};

// --- The kernel ----------------------------------------------------------------------------------

template <int kDim, int kTile>
__device__ void Attention(const KernelArgs& args, const CUtensorMap* q_map,
                          const CUtensorMap* kv_map, unsigned char* dynamic_shared) {
  using L = Layout<kDim, kTile>;
  unsigned char* shared = dynamic_shared + (1024 - SharedAddress(dynamic_shared) % 1024) % 1024;
  const uint32_t address = SharedAddress(shared);
  Unit* units = reinterpret_cast<Unit*>(shared + L::kUnits);
  WorkList* list = reinterpret_cast<WorkList*>(shared + L::kWorkList);
  if (threadIdx.x == 0) {
    PrefetchTensorMap(q_map);
    PrefetchTensorMap(kv_map);
    for (int i = 0; i < kBarrierCount; ++i) {
      const bool full = i < kQueryEmpty || (i >= kKeyFull && i < kKeyEmpty) ||
                        (i >= kValueFull && i < kValueEmpty);
      InitBarrier(address + L::kBarriers + static_cast<uint32_t>(i) * 8, full ? 1 : 8);
    }
    FenceBarrierInit();
  }
  MakeWorkList<kTile>(args, list, reinterpret_cast<WorkListScratch*>(shared + L::kKeys));
  FenceAsyncProxy();  // copies follow where the scratch was
  __syncthreads();
  WaitForPredecessor();
  LetSuccessorStart();

  const int group = static_cast<int>(threadIdx.x) / kGroupThreads;
  if (group == 0) {
    ShrinkRegisters<kCopyingRegisters>();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    Producer<kDim, kTile> producer{args, q_map, kv_map, address, units, warp, lane};
    Work<kDim, kTile> work(args, *list);
    producer.RunAll(&work);
  } else {
    GrowRegisters<kMultiplyingRegisters>();
    Consumer<kDim, kTile> consumer(args, address, units);
    if (consumer.group == 1) consumer.PassTurn();
    consumer.Run();
    if (consumer.group == 0) consumer.TakeTurn();
  }
}

// --- Parts put together --------------------------------------------------------------------------

// A warp to each row of each unit that was cut.
template <int kDim, int kTile>
__device__ void AddParts(const KernelArgs& args, unsigned char* shared) {
  WorkList* list = reinterpret_cast<WorkList*>(shared);
  MakeWorkList<kTile>(args, list, reinterpret_cast<WorkListScratch*>(shared + sizeof(WorkList)));
  WaitForPredecessor();
  LetSuccessorStart();
  const Plan plan = MakePlan(args, *list);
  if (plan.cuts != Cuts::kParts) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warps = static_cast<int>(gridDim.x * blockDim.x) / 32;
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) / 32;
       i < plan.units * args.part_rows; i += warps) {
    const int row = i % args.part_rows, query = row / args.pack;
    const UnitName name = NameOfUnit(args, *list, i / args.part_rows);
    const int parts = list->first_share[name.run + 1] - list->first_share[name.run];
    if (parts == 1) continue;
    const int first_slot = FirstShareOf(args, *list, name);
    const Unit unit = WholeUnit<kTile>(args, *list, name);
    if (query >= unit.queries) continue;

    constexpr int kColumns = kDim / 32, kAtOnce = 8;  // columns of a lane; parts on their way
    const float* first_row = PartAt<kDim>(args, first_slot) + row * (kDim + kPartHeader);
    const int stride = args.part_rows * (kDim + kPartHeader);
    const auto row_of = [&](int part) { return first_row + int64_t{part} * stride; };
    float values[kAtOnce][kColumns];
    const auto load = [&](int first) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const float* from = row_of(min(first + k, parts - 1)) + kPartHeader + lane * kColumns;
        if constexpr (kColumns == 4) {
          const float4 v = *reinterpret_cast<const float4*>(from);
          values[k][0] = v.x, values[k][1] = v.y, values[k][2] = v.z, values[k][3] = v.w;
        } else {
          const float2 v = *reinterpret_cast<const float2*>(from);
          values[k][0] = v.x, values[k][1] = v.y;
        }
      }
    };
    load(0);
    float base = -INFINITY, total = 0, out[kColumns] = {};
    for (int first = 0; first < parts; first += 32) {
      // A lane to each part: its base, and that of all before it.
      float2 header = {-INFINITY, 0};
      if (first + lane < parts) {
        header = *reinterpret_cast<const float2*>(row_of(first + lane));
      }
      float most = fmaxf(header.x, base);
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const float left = __shfl_up_sync(~0u, most, lanes);
        if (lane >= lanes) most = fmaxf(most, left);
      }
      float before = __shfl_up_sync(~0u, most, 1);
      if (lane == 0) before = base;
      base = __shfl_sync(~0u, most, 31);
      float joined = header.x;
      const Weights weights = Join(before, &joined);
      const int count = min(32, parts - first);
      for (int group = 0; group < count; group += kAtOnce) {
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (group + k >= count) continue;
          const Weights now = {__shfl_sync(~0u, weights.before, group + k),
                               __shfl_sync(~0u, weights.part, group + k)};
          total = Add(total, __shfl_sync(~0u, header.y, group + k), now);
#pragma unroll
          for (int c = 0; c < kColumns; ++c) out[c] = Add(out[c], values[k][c], now);
        }
        load(first + group + kAtOnce);
      }
    }
    const float inverse = Inverse(total);
    __nv_bfloat16* to =
        args.out +
        (static_cast<int64_t>(unit.first_row + query) * args.heads + unit.head + row % args.pack) *
            kDim +
        lane * kColumns;
#pragma unroll
    for (int c = 0; c < kColumns; c += 2) {
      *reinterpret_cast<uint32_t*>(to + c) =
          PackBFloat16(Normalise(out[c], inverse), Normalise(out[c + 1], inverse));
    }
  }
}

}  // namespace tandem::engine::cuda::hopper_attention
