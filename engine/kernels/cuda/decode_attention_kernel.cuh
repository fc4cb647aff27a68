// The kernel behind decode_attention.h.
#pragma once

#include <cstdint>

#include "engine/kernels/cuda/decode_attention.h"
#include "engine/kernels/cuda/e4m3.cuh"
#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/turns.cuh"

namespace tandem::engine::cuda {

inline constexpr int kAttentionGroup = 8;  // query heads of a KV head, padded
inline constexpr float kLog2E = 1.4426950408889634f;
// Maximum of no scores; finite, so that differences stay numbers.
inline constexpr float kNone = -1e30f;
// How far a score may lie above its head's base, in powers of two, before the base follows.
inline constexpr float kBaseLag = 8;

__device__ inline float Exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// A part of an item's result: [kAttentionGroup][head_dim] unnormalised values, then
// [kAttentionGroup] pairs of base and sum of exp2(score - base).
__host__ __device__ constexpr int AttentionPartSize(int head_dim) {
  return kAttentionGroup * (head_dim + 2);
}

// Two numbers of 8 bytes, each in one piece, around L1.
__device__ inline void LoadPair(uint64_t (&out)[2], const uint64_t* from) {
  asm volatile("ld.relaxed.gpu.global.v2.b64 {%0, %1}, [%2];"
               : "=l"(out[0]), "=l"(out[1])
               : "l"(from)
               : "memory");
}
__device__ inline void StorePair(uint64_t* to, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.gpu.global.v2.b64 [%0], {%1, %2};" ::"l"(to), "l"(first), "l"(second)
               : "memory");
}

// Kv: elements of pages. kStages: tiles in a warp's ring.
template <typename Kv_, int kDim, int kWarps_, int kStages_>
struct AttentionLayout {
  using Kv = Kv_;
  static constexpr int kWarps = kWarps_, kStages = kStages_, kThreads = kWarps * 32;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(Kv));
  static constexpr int kHalfBytes = kAttentionTile * kRowBytes;  // keys, or values, of a tile
  static constexpr int kRingBytes = kStages * 2 * kHalfBytes;    // of a warp
  // Where the newest position of a ring's tile lies.
  static constexpr int kNewestBytes = (kWarps * kStages * 8 + 15) / 16 * 16;
  // A warp's result in shared memory: as a partial result, but heads lie kHeadStride apart, so that
  // accumulators of a warp fall into distinct banks.
  static constexpr int kHeadStride = kDim + 4;
  static constexpr int kMaxima = kAttentionGroup * kHeadStride;
  static constexpr int kSums = kMaxima + kAttentionGroup;
  static constexpr int kResultFloats = kSums + kAttentionGroup;
  static constexpr int kMergeBytes = kWarps * kResultFloats * 4;
  __host__ __device__ static constexpr int SharedBytes(int num_items) {
    return kWarps * kRingBytes + kNewestBytes + kMergeBytes +
           (num_items + 1) * static_cast<int>(sizeof(DecodeItem));
  }
};

// One thread block's part of the attention. Begin fetches pages and may run before the newest
// position's keys and values are written, Finish needs them and the queries.
template <typename Kv, int kDim, int kWarps, int kStages>
class Attention {
 public:
  using L = AttentionLayout<Kv, kDim, kWarps, kStages>;

  __device__ Attention(const DecodeAttentionArgs& args, const DecodeAttentionScratch& scratch,
                       unsigned char* shared)
      : a_(args), scratch_(scratch), lane_(threadIdx.x % 32), warp_(threadIdx.x / 32) {
    ring_ = SharedAddress(shared) + warp_ * L::kRingBytes;
    shared += kWarps * L::kRingBytes;
    newest_ = reinterpret_cast<int64_t*>(shared) + warp_ * kStages;
    merge_ = reinterpret_cast<float*>(shared + L::kNewestBytes);
    items_ = reinterpret_cast<DecodeItem*>(shared + L::kNewestBytes + L::kMergeBytes);
  }

  // False if this thread block has no work; then Finish is not called.
  __device__ bool Begin() {
    for (int i = threadIdx.x; i <= a_.num_items; i += L::kThreads) {
      reinterpret_cast<int4*>(items_)[i] = __ldcg(reinterpret_cast<const int4*>(a_.items) + i);
    }
    __syncthreads();
    units_ = items_[a_.num_items].first_tile * a_.kv_heads;
    // As many tiles per thread block at least as its rings fetch ahead.
    constexpr int kMinTiles = kWarps * (kStages - 1);
    grid_ = min(static_cast<int>(gridDim.x), (units_ + kMinTiles - 1) / kMinTiles);
    const int most = WholeShare(max(kMinTiles, (units_ + grid_ - 1) / max(grid_, 1)));
    if (most > 0) {
      if (!FindWholeShare(most)) return false;
    } else {
      if (static_cast<int>(blockIdx.x) >= grid_) return false;
      begin_ = UnitOf(blockIdx.x);
      end_ = UnitOf(blockIdx.x + 1);
    }
    next_load_ = begin_ + warp_;

    locate_ = next_load_ + lane_ * kWarps;
    FindBlock();
    const uint32_t turn = LookAtTurn(scratch_.turns);  // on its way beside the block's number
    LocateTiles();
    TakeTurn(scratch_.turns, turn);
    for (int i = 0; i < kStages - 1; ++i) LoadTile(i);
    FindBlock();
    return true;
  }

  // Launches are numbered since the scratch memory was zeros. Every thread block counts for itself,
  // so that none waits for another; all come to the same number. This one counts and is done.
  __device__ void CountLaunch() {
    if (threadIdx.x == 0) {
      scratch_.launches[blockIdx.x] = __ldcg(scratch_.launches + blockIdx.x) + 1;
    }
  }

  __device__ void Finish() {
    launch_ = __ldcg(scratch_.launches + blockIdx.x) + 1;  // on its way beside the queries
    int unit = begin_;
    while (unit < end_) unit = RunItem(unit);
    WaitForCopies<0>();
    // All threads have read it: there were barriers since.
    if (threadIdx.x == 0) scratch_.launches[blockIdx.x] = launch_;
    if (continued_.tiles > 0) MergeShared(continued_);
    if (unfinished_.tiles > 0) MergeShared(unfinished_);
  }

 private:
  // One KV head of one sequence.
  struct Item {
    int index, kv_head, first_unit, tiles;
  };

  static constexpr bool kFp8 = sizeof(Kv) == 1;
  static constexpr int kFewItems = 32;  // a lane for each

  // Tiles of the lane's item, where items are few.
  __device__ int TilesOfLane() const {
    return lane_ < a_.num_items ? items_[lane_ + 1].first_tile - items_[lane_].first_tile : 0;
  }

  // A thread block with parts of two items has the latency of both. Where items are few, each can
  // have thread blocks of its own: returns how many tiles these have at most, or 0 where that is
  // clearly more than `dealt`, as many as they have when tiles are dealt evenly.
  __device__ int WholeShare(int dealt) const {
    if (a_.num_items > kFewItems) return 0;
    const int tiles = TilesOfLane(), longest = __reduce_max_sync(~0u, tiles);
    const int count = __popc(__ballot_sync(~0u, tiles > 0)) * a_.kv_heads;
    const int blocks = static_cast<int>(gridDim.x);
    if (count == 0 || count > blocks) return 0;
    // Each of these needs no more thread blocks than there are.
    const int each = blocks / count;
    int share = (longest + each - 1) / each;
    if (count < blocks) share = min(share, (units_ + blocks - count - 1) / (blocks - count));
    share = max(share, dealt);
    return share <= dealt + dealt / 8 + 2 ? share : 0;
  }

  // This thread block's part of one item, whose parts have at most `most` tiles; false: none.
  __device__ bool FindWholeShare(int most) {
    const int lane_tiles = TilesOfLane(), lane_owners = (lane_tiles + most - 1) / most;
    int last = lane_owners * a_.kv_heads;  // thread blocks up to the lane's item
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) {
      const int before = __shfl_up_sync(~0u, last, lanes);
      if (lane_ >= lanes) last += before;
    }
    const int block = static_cast<int>(blockIdx.x);
    const unsigned reach = __ballot_sync(~0u, block < last);
    if (reach == 0) return false;
    const int index = __ffs(static_cast<int>(reach)) - 1;
    const int tiles = __shfl_sync(~0u, lane_tiles, index);
    const int owners = __shfl_sync(~0u, lane_owners, index);
    const int own = block - (__shfl_sync(~0u, last, index) - owners * a_.kv_heads);
    const int head = own / owners, part = own % owners;
    const int unit = items_[index].first_tile * a_.kv_heads + head * tiles;
    begin_ = unit + part * tiles / owners;
    end_ = unit + (part + 1) * tiles / owners;
    whole_first_owner_ = block - part;
    whole_owners_ = owners;
    return true;
  }

  // Tiles dealt evenly: the first thread blocks have one more.
  __device__ int UnitOf(int thread_block) const {
    return thread_block * (units_ / grid_) + min(thread_block, units_ % grid_);
  }
  __device__ int OwnerOf(int unit) const {
    const int each = units_ / grid_, more = units_ % grid_, first = more * (each + 1);
    return unit < first ? unit / (each + 1) : more + (unit - first) / each;
  }

  // Items without tiles are never found: the last of those that begin at a tile has it.
  __device__ Item ItemOf(int unit) const {
    int low = 0, high = a_.num_items;  // the item is in [low, high)
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (items_[middle].first_tile * a_.kv_heads <= unit) {
        low = middle;
      } else {
        high = middle;
      }
    }
    const int first = items_[low].first_tile, tiles = items_[low + 1].first_tile - first;
    const int head = (unit - first * a_.kv_heads) / tiles;
    return {low, head, first * a_.kv_heads + head * tiles, tiles};
  }

  // Begins to look up the block of the lane's tile after the located ones.
  __device__ void FindBlock() {
    found_valid_ = 0;
    if (locate_ >= end_) return;
    const Item item = ItemOf(locate_);
    const DecodeItem& of = items_[item.index];
    const int position = (locate_ - item.first_unit) * kAttentionTile;
    found_block_ = a_.blocks[of.first_block + position / a_.block_size];
    found_valid_ = of.length - position;
    found_offset_ = (item.kv_head * a_.block_size + position % a_.block_size) * kDim;
  }

  // Each lane finds where one of the warp's next 32 tiles lies.
  __device__ void LocateTiles() {
    located_ = 0;
    tile_valid_ = found_valid_;
    tile_offset_ = found_valid_ == 0 ? -1
                                     : static_cast<int64_t>(found_block_) * 2 * a_.kv_heads *
                                               a_.block_size * kDim +
                                           found_offset_;
    locate_ += 32 * kWarps;
  }

  static constexpr int kChunks = L::kRowBytes / 16;  // of a position's keys, or values

  // Swizzled, so that the same chunk of eight rows in turn lies in all banks.
  __device__ static uint32_t Offset(int row, int chunk) {
    constexpr int kRowsOfBanks = L::kRowBytes < 128 ? 128 / L::kRowBytes : 1;
    const int swizzle = row / kRowsOfBanks % 8 % kChunks;
    return static_cast<uint32_t>(row * L::kRowBytes + ((chunk ^ swizzle) << 4));
  }

  // Fetches the warp's next tile; an empty group of copies if there is none. Of an item's last
  // tile, the newest position follows in StoreNewest, and what is beyond it becomes zeros, for what
  // lies there may be no number.
  __device__ void LoadTile(int stage) {
    if (located_ == 32) {
      LocateTiles();
      FindBlock();
    }
    const int64_t offset = __shfl_sync(~0u, tile_offset_, located_);
    const int valid = __shfl_sync(~0u, tile_valid_, located_);
    ++located_;
    next_load_ += kWarps;
    // That was the first warp's last tile; the other warps are about as far.
    const bool last = next_load_ >= end_ && next_load_ < end_ + kWarps;
    if (last && threadIdx.x == 0) EndTurn(scratch_.turns);
    if (offset >= 0) {
      const unsigned char* keys = BytesOf(offset);
      const unsigned char* values =
          BytesOf(offset + static_cast<int64_t>(a_.kv_heads) * a_.block_size * kDim);
      const uint32_t to = ring_ + stage * 2 * L::kHalfBytes;
      if (valid <= kAttentionTile && lane_ == 0) newest_[stage] = offset + (valid - 1) * kDim;
      const bool whole = valid > kAttentionTile;
#pragma unroll
      for (int i = 0; i < kAttentionTile * kChunks / 32; ++i) {
        const int index = i * 32 + lane_, row = index / kChunks, chunk = index % kChunks;
        const uint32_t at = to + Offset(row, chunk);
        if (whole) {
          CopyAsync(at, keys + index * 16);
          CopyAsync(at + L::kHalfBytes, values + index * 16);
        } else {
          CopyAsync(at, keys + index * 16, row + 1 < valid);
          CopyAsync(at + L::kHalfBytes, values + index * 16, row + 1 < valid);
        }
      }
    }
    CommitCopies();
  }

  __device__ const unsigned char* BytesOf(int64_t element) const {
    return static_cast<const unsigned char*>(a_.kv) + element * static_cast<int64_t>(sizeof(Kv));
  }

  // Queries as the tensor core's B operand: lane holds head lane / 4, elements of its column pair.
  __device__ void LoadQueries(const Item& item) {
    const int group = a_.heads / a_.kv_heads, head = lane_ / 4;
    const __nv_bfloat16* q = a_.q + (static_cast<int64_t>(items_[item.index].row) * a_.heads +
                                     item.kv_head * group + head) *
                                        kDim;
    score_scale_[0] = score_scale_[1] = a_.scale * kLog2E;
    if constexpr (kFp8) {
      // AddTile brings dimensions in another order to the products.
#pragma unroll
      for (int i = 0; i < kDim / 8; i += 2) {
        const auto* from = reinterpret_cast<const uint2*>(q + i * 8 + lane_ % 4 * 4);
        const uint2 four = head < group ? __ldcg(from) : uint2{};
        q_[i] = four.x;
        q_[i + 1] = four.y;
      }
      BringToHalves();
    } else {
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        const auto* from = reinterpret_cast<const unsigned*>(q + i * 8 + lane_ % 4 * 2);
        q_[i] = head < group ? __ldcg(from) : 0u;
      }
    }
  }

  // Scales each head's queries by a power of two that leaves the largest between 2^14 and 2^15, and
  // its scores back.
  __device__ void BringToHalves() {
    // As bits, of which those of larger numbers are larger.
    uint32_t largest = 0;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      largest = max(largest, max(q_[i] & 0x7fff0000u, (q_[i] & 0x7fffu) << 16));
    }
    largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
    constexpr int kBias = 127;
    const int power = min(14 - (static_cast<int>(largest >> 23) - kBias), kBias - 1);
    const float scale = __uint_as_float(static_cast<uint32_t>(kBias + power) << 23);
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      q_[i] = PackHalves(__uint_as_float(q_[i] << 16) * scale,
                         __uint_as_float(q_[i] & 0xffff0000u) * scale);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int of_head = __shfl_sync(~0u, power, lane_ % 4 * 8 + i * 4);
      score_scale_[i] *= __uint_as_float(static_cast<uint32_t>(kBias - of_head) << 23);
    }
  }

  // Computes this thread block's tiles of the item that `unit` begins or continues; returns the
  // first unit after them.
  __device__ int RunItem(int unit) {
    const Item item = ItemOf(unit);
    const int stop = min(end_, item.first_unit + item.tiles);
    const int length = items_[item.index].length;
    LoadQueries(item);
    // Where the item's last tile is on its way already, so is its newest position from here on.
    int tile = begin_ + warp_ + next_tile_ * kWarps;
    const int last = item.first_unit + item.tiles - 1, ahead = last - tile;
    const bool near =
        last < stop && ahead >= 0 && ahead % kWarps == 0 && ahead / kWarps < kStages - 1;
    uint4 newest = {};
    __syncwarp();
    if (near) newest = LoadNewest((next_tile_ + ahead / kWarps) % kStages);
    base_[0] = base_[1] = kNone;
    sum_[0] = sum_[1] = 0;
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[m][i] = 0;
    }
    for (; tile < stop; tile += kWarps) {
      WaitForCopies<kStages - 2>();
      __syncwarp();
      LoadTile((next_tile_ + kStages - 1) % kStages);
      const int valid = length - (tile - item.first_unit) * kAttentionTile;
      const int stage = next_tile_ % kStages;
      const uint32_t keys = ring_ + stage * 2 * L::kHalfBytes;
      if (valid <= kAttentionTile) {
        StoreNewest(near ? newest : LoadNewest(stage), valid - 1, keys);
      }
      AddTile(keys, valid);
      ++next_tile_;
    }
    FinishItem(item, unit > item.first_unit, stop < item.first_unit + item.tiles);
    return stop;
  }

  // The lane's share of key and value of an item's last position, whose tile lies in `stage`.
  __device__ uint4 LoadNewest(int stage) const {
    if (lane_ >= 2 * kChunks) return {};
    const unsigned char* from = BytesOf(newest_[stage] + static_cast<int64_t>(lane_ / kChunks) *
                                                             a_.kv_heads * a_.block_size * kDim) +
                                lane_ % kChunks * 16;
    return __ldcg(reinterpret_cast<const uint4*>(from));
  }
  // Brings it into row `row` of the tile.
  __device__ void StoreNewest(const uint4& value, int row, uint32_t keys) const {
    if (lane_ < 2 * kChunks) {
      const uint32_t to = keys + lane_ / kChunks * L::kHalfBytes + Offset(row, lane_ % kChunks);
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(value.x), "r"(value.y),
                   "r"(value.z), "r"(value.w)
                   : "memory");
    }
    __syncwarp();
  }

  // Scores of 16 positions x 8 heads, softmax over the running base, and values. `valid`: how many
  // of the tile's positions exist.
  __device__ void AddTile(uint32_t keys, int valid) {
    float s[4] = {0, 0, 0, 0}, s_odd[4] = {0, 0, 0, 0};
#pragma unroll
    for (int step = 0; step < kDim / 16; step += 2) {
      uint32_t k[4];
      if constexpr (kFp8) {
        // Two chunks of 16 dimensions, of positions 0-7 and 8-15. Lanes have four neighbouring
        // dimensions of each, which the products take for two pairs that lie 8 apart.
        LoadMatrices(k, keys + Offset(lane_ % 16, step + lane_ / 16));
        MultiplyAddHalves(s, {Low(k[0]), Low(k[1]), High(k[0]), High(k[1])}, q_[step * 2],
                          q_[step * 2 + 1]);
        MultiplyAddHalves(s_odd, {Low(k[2]), Low(k[3]), High(k[2]), High(k[3])}, q_[step * 2 + 2],
                          q_[step * 2 + 3]);
      } else {
        LoadMatrices(k, keys + Offset(lane_ % 16, step * 2 + lane_ / 16));
        MultiplyAdd(s, k, q_[step * 2], q_[step * 2 + 1]);
        LoadMatrices(k, keys + Offset(lane_ % 16, step * 2 + 2 + lane_ / 16));
        MultiplyAdd(s_odd, k, q_[step * 2 + 2], q_[step * 2 + 3]);
      }
    }
    // s[0], s[1]: position lane / 4, heads lane % 4 * 2 and + 1; s[2], s[3]: position + 8.
    float p[4];
    bool above = false;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool exists = lane_ / 4 + i / 2 * 8 < valid;
      p[i] = exists ? (s[i] + s_odd[i]) * score_scale_[i % 2] : kNone;
      above = above || p[i] > base_[i % 2] + kBaseLag;
    }
    if (__any_sync(~0u, above)) RaiseBases(p);
#pragma unroll
    for (int i = 0; i < 4; ++i) p[i] = Exp2(p[i] - base_[i % 2]);
#pragma unroll
    for (int head = 0; head < 2; ++head) sum_[head] += p[head] + p[head + 2];  // this lane's share
    const uint32_t b0 = TransposeMatrix(kFp8 ? PackHalves(p[0], p[1]) : PackBFloat16(p[0], p[1]));
    const uint32_t b1 = TransposeMatrix(kFp8 ? PackHalves(p[2], p[3]) : PackBFloat16(p[2], p[3]));
    // Transposed: dimensions become rows. Matrices: positions 0-7 of one chunk of dimensions and of
    // the next, then positions 8-15.
    const int row = lane_ / 16 * 8 + lane_ % 8, next = lane_ / 8 % 2;
    constexpr int kMatrixRows = kFp8 ? 2 : 1;  // rows of o_ that two chunks make
#pragma unroll
    for (int m = 0; m < kDim / 16; m += kMatrixRows) {
      uint32_t v[4];
      const int chunk = (kFp8 ? m : m * 2) + next;
      LoadMatricesTransposed(v, keys + L::kHalfBytes + Offset(row, chunk));
      if constexpr (kFp8) {
        // Of two positions a lane has two neighbouring dimensions, the first one's bytes lowest.
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = __byte_perm(v[i], 0, 0x3120);
        MultiplyAddHalves(o_[m], {Low(v[0]), High(v[0]), Low(v[2]), High(v[2])}, b0, b1);
        MultiplyAddHalves(o_[m + 1], {Low(v[1]), High(v[1]), Low(v[3]), High(v[3])}, b0, b1);
      } else {
        MultiplyAdd(o_[m], v, b0, b1);
      }
    }
  }

  // Two of four e4m3 as halves.
  __device__ static uint32_t Low(uint32_t four) { return HalvesOf(static_cast<uint16_t>(four)); }
  __device__ static uint32_t High(uint32_t four) {
    return HalvesOf(static_cast<uint16_t>(four >> 16));
  }

  // Whose value o_[m][i] is.
  __device__ int DimensionOf(int m, int i) const {
    return m * 16 + (kFp8 ? lane_ / 4 * 2 + i / 2 : lane_ / 4 + i / 2 * 8);
  }

  // Raises the bases to the highest of the scores so far.
  __device__ void RaiseBases(const float (&p)[4]) {
    float rescale[2];
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float maximum = fmaxf(p[head], p[head + 2]);
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, lanes));
      }
      maximum = fmaxf(maximum, base_[head]);
      rescale[head] = Exp2(base_[head] - maximum);
      base_[head] = maximum;
      sum_[head] *= rescale[head];
    }
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[m][i] *= rescale[i % 2];
    }
  }

  __device__ void StoreResult(float* to) const {
#pragma unroll
    for (int m = 0; m < kDim / 16; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        to[(lane_ % 4 * 2 + i % 2) * L::kHeadStride + DimensionOf(m, i)] = o_[m][i];
      }
    }
    if (lane_ < 4) {
#pragma unroll
      for (int head = 0; head < 2; ++head) {
        to[L::kMaxima + lane_ * 2 + head] = base_[head];
        to[L::kSums + lane_ * 2 + head] = sum_[head];
      }
    }
  }

  __device__ __nv_bfloat16* OutputOf(const Item& item) const {
    return a_.out + (static_cast<int64_t>(items_[item.index].row) * a_.heads +
                     item.kv_head * (a_.heads / a_.kv_heads)) *
                        kDim;
  }

  // Adds the warps' results, in their order, and writes the output, or this thread block's part of
  // it. A thread block shares at most two items with others: the one it continues and the one it
  // leaves unfinished.
  __device__ void FinishItem(const Item& item, bool continued, bool unfinished) {
#pragma unroll
    for (int head = 0; head < 2; ++head) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        sum_[head] += __shfl_xor_sync(~0u, sum_[head], lanes);
      }
    }
    __syncthreads();  // nobody reads the last item's
    StoreResult(merge_ + warp_ * L::kResultFloats);
    __syncthreads();
    const bool shared = continued || unfinished;
    uint64_t* part = Part(blockIdx.x, continued);
    const int heads = a_.heads / a_.kv_heads;
    for (int i = threadIdx.x; i < heads * (kDim / 4); i += L::kThreads) {
      const int head = i / (kDim / 4);
      float maximum = kNone, sum = 0, weights[kWarps];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        weights[w] = merge_[w * L::kResultFloats + L::kMaxima + head];
        maximum = fmaxf(maximum, weights[w]);
      }
      float4 total = {};
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* result = merge_ + w * L::kResultFloats;
        const float weight = Exp2(weights[w] - maximum);
        sum += result[L::kSums + head] * weight;
        const float4 value =
            reinterpret_cast<const float4*>(result + head * L::kHeadStride)[i % (kDim / 4)];
        total.x += value.x * weight;
        total.y += value.y * weight;
        total.z += value.z * weight;
        total.w += value.w * weight;
      }
      if (shared) {
        StorePair(part + i * 4, Signed(total.x), Signed(total.y));
        StorePair(part + i * 4 + 2, Signed(total.z), Signed(total.w));
        if (i % (kDim / 4) == 0) {
          StorePair(part + kAttentionGroup * kDim + head * 2, Signed(maximum), Signed(sum));
        }
      } else {
        const float inverse = 1.0f / sum;
        reinterpret_cast<uint2*>(OutputOf(item))[i] = {
            PackBFloat16(total.x * inverse, total.y * inverse),
            PackBFloat16(total.z * inverse, total.w * inverse)};
      }
    }
    if (continued) {
      continued_ = item;
    } else if (unfinished) {
      unfinished_ = item;
    }
  }

  // What thread blocks give each other is a number signed with that of the launch, in one piece of
  // 8 bytes: who reads it sees by itself whether it is there, without fences and counters.
  __device__ uint64_t Signed(float value) const {
    return static_cast<uint64_t>(launch_) << 32 | __float_as_uint(value);
  }
  __device__ bool IsSigned(uint64_t value) const {
    return static_cast<uint32_t>(value >> 32) == launch_;
  }
  __device__ static float Number(uint64_t value) {
    return __uint_as_float(static_cast<uint32_t>(value));
  }

  __device__ int FirstOwner(const Item& item) const {
    return whole_owners_ > 0 ? whole_first_owner_ : OwnerOf(item.first_unit);
  }
  __device__ int Owners(const Item& item) const {
    if (whole_owners_ > 0) return whole_owners_;
    return OwnerOf(item.first_unit + item.tiles - 1) - OwnerOf(item.first_unit) + 1;
  }

  __device__ uint64_t* Part(int owner, bool continued) const {
    return scratch_.parts + (static_cast<int64_t>(owner) * 2 + continued) * AttentionPartSize(kDim);
  }

  // A running softmax over four neighbouring columns of a head.
  struct Columns {
    float maximum = kNone, sum = 0, values[4] = {0, 0, 0, 0};
    __device__ void Add(const Columns& other) {
      const float highest = fmaxf(maximum, other.maximum);
      const float mine = Exp2(maximum - highest), others = Exp2(other.maximum - highest);
      maximum = highest;
      sum = sum * mine + other.sum * others;
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = values[i] * mine + other.values[i] * others;
    }
  };

  // Adds parts [begin, end) of an item's columns 4 * quad to 4 * quad + 3, in order, as soon as
  // their owners have stored them.
  __device__ Columns AddParts(int first_owner, int begin, int end, int quad) const {
    constexpr int kAtOnce = 4;
    const int scales = kAttentionGroup * kDim + quad / (kDim / 4) * 2;
    Columns columns;
    for (; begin < end; begin += kAtOnce) {
      uint64_t numbers[kAtOnce][3][2];
      bool complete;
      do {
        complete = true;
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (begin + k >= end) continue;
          const uint64_t* part = Part(first_owner + begin + k, begin + k > 0);
          LoadPair(numbers[k][0], part + scales);
          LoadPair(numbers[k][1], part + quad * 4);
          LoadPair(numbers[k][2], part + quad * 4 + 2);
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; ++k) {
          if (begin + k >= end) continue;
#pragma unroll
          for (int i = 0; i < 3; ++i) {
            complete = complete && IsSigned(numbers[k][i][0]) && IsSigned(numbers[k][i][1]);
          }
        }
      } while (!complete);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        if (begin + k >= end) continue;
        columns.Add({Number(numbers[k][0][0]),
                     Number(numbers[k][0][1]),
                     {Number(numbers[k][1][0]), Number(numbers[k][1][1]), Number(numbers[k][2][0]),
                      Number(numbers[k][2][1])}});
      }
    }
    return columns;
  }

  // This thread block's share of the columns of an item that several own. Where that is few columns
  // the warps share the parts, and add what they have in order.
  __device__ void MergeShared(const Item& item) {
    const int first_owner = FirstOwner(item), owners = Owners(item);
    const int own = static_cast<int>(blockIdx.x) - first_owner;
    const int quads = a_.heads / a_.kv_heads * kDim / 4;
    const int begin = own * quads / owners, end = (own + 1) * quads / owners;
    const int ways = max(1, kWarps / max(1, (end - begin + 31) / 32));
    if (ways == 1) {
      for (int quad = begin + static_cast<int>(threadIdx.x); quad < end; quad += L::kThreads) {
        StoreColumns(item, quad, AddParts(first_owner, 0, owners, quad));
      }
      return;
    }
    const int way = warp_ % ways, quad = begin + warp_ / ways * 32 + lane_;
    Columns columns;
    if (quad < end) {
      columns = AddParts(first_owner, way * owners / ways, (way + 1) * owners / ways, quad);
    }
    Columns* others = reinterpret_cast<Columns*>(merge_);
    __syncthreads();  // nobody reads what lay there
    others[threadIdx.x] = columns;
    __syncthreads();
    if (way != 0 || quad >= end) return;
    for (int i = 1; i < ways; ++i) columns.Add(others[threadIdx.x + i * 32]);
    StoreColumns(item, quad, columns);
  }

  __device__ void StoreColumns(const Item& item, int quad, const Columns& columns) const {
    const float inverse = 1.0f / columns.sum;
    reinterpret_cast<uint2*>(OutputOf(item))[quad] = {
        PackBFloat16(columns.values[0] * inverse, columns.values[1] * inverse),
        PackBFloat16(columns.values[2] * inverse, columns.values[3] * inverse)};
  }

  const DecodeAttentionArgs& a_;
  const DecodeAttentionScratch& scratch_;
  const int lane_, warp_;
  uint32_t ring_;
  float* merge_;
  int64_t* newest_;    // [kStages]: element offset of the newest position of a tile
  DecodeItem* items_;  // [num_items + 1]
  int units_ = 0, grid_ = 0, begin_ = 0, end_ = 0;
  int whole_first_owner_ = 0, whole_owners_ = 0;  // of the one item here; 0: tiles are dealt evenly
  uint32_t launch_ = 0;
  int next_load_ = 0;         // unit of the warp's next LoadTile
  int next_tile_ = 0;         // how many tiles the warp has computed
  int located_ = 0;           // how many of the 32 located tiles are used up
  int64_t tile_offset_ = -1;  // of this lane's located tile: its keys in the pool; -1: none
  int tile_valid_ = 0;        // positions of the sequence from its first on
  // The lane's tile of the 32 after these, as FindBlock left it.
  int locate_ = 0, found_block_ = 0, found_valid_ = 0, found_offset_ = 0;
  Item continued_ = {}, unfinished_ = {};  // shared with other thread blocks; no tiles: none
  uint32_t q_[kDim / 8];
  float base_[2], sum_[2], score_scale_[2];  // of heads lane % 4 * 2 and + 1
  float o_[kDim / 16][4];                    // [dimension][head], as the tensor core leaves them
};

}  // namespace tandem::engine::cuda
