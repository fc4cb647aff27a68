#include <algorithm>
#include <array>
#include <cstdint>

#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/sample.h"
#include "engine/kernels/draw_weight.h"
#include "engine/kernels/philox.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxTeam = 8;          // blocks of one row
constexpr int kMaxSlots = 1024;      // parts of a row whose maxima are kept
constexpr int kMaxFewest = 128;      // of the most likely tokens, to be found among the slots
constexpr int kMaxCandidates = 512;  // of a list in shared memory: one per thread
constexpr int kBins = 2048;
constexpr float kBinsPerOctave = 128;
constexpr uint32_t kNoLimit = ~0u;
constexpr float kInfinity = __builtin_huge_valf();

// Monotone in the value; -0 is 0. Finite values lie between those of the infinities.
__device__ uint32_t KeyOf(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float ValueOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// What one block found in its part of a row.
struct Partial {
  float original;   // the largest logit
  float adjusted;   // the largest after masks and penalties
  int32_t token;    // of that: the lowest
  int32_t has_nan;  // 1: among the logits
};

struct Task {
  SampleArgs args;
  uint32_t* counts;  // [rows][vocab]: of tokens in the output; zero between launches
  int vocab;
  int quads;         // groups of four tokens of the valid vocabulary
  int team;          // blocks of a row
  int part_quads;    // of a block: a multiple of 8, but for what the last ones have
  int slots;         // of a block
  int slot_threads;  // neighbouring threads that share one
};

struct Candidate {
  uint32_t key;
  int32_t token;
};

struct Shared {
  DrawSpec spec;

  // Of this block's part of the row; the others of the team read it between two barriers.
  Partial part;
  Partial best[2];
  uint32_t original_slots[kThreads], adjusted_slots[kThreads];  // keys of maxima
  Candidate list[kMaxCandidates];
  int list_size;
  uint32_t key_low, key_high;
  uint32_t low[kBins], high[kBins];  // a histogram of integers of 64 bits
  uint64_t part_sum;
  uint32_t part_ties;
  uint64_t warp_sums[kWarps];
  uint32_t warp_ties[kWarps];

  // Of the row, the same in each block of the team.
  Partial row;
  uint32_t slot_keys[kMaxSlots];
  Candidate merged[kMaxCandidates];
  uint64_t weights[kMaxCandidates];
  uint32_t threshold;
  uint64_t above;
  int bin;

  Partial warp_partials[kWarps];
  int32_t token;  // of the team's first block: what is drawn
  DrawResult result;
};

// A barrier of the blocks of a team: what one has written to its shared memory is there for all.
__device__ void TeamBarrier(int team) {
#if __CUDA_ARCH__ >= 900
  if (team > 1) {
    asm volatile("barrier.cluster.arrive;" ::: "memory");
    asm volatile("barrier.cluster.wait;" ::: "memory");
    return;
  }
#endif
  __syncthreads();
}

// The same place in the shared memory of another block of the team.
template <typename T>
__device__ T* PeerOf(T* mine, int rank) {
#if __CUDA_ARCH__ >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(mine), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return mine;
#endif
}

__device__ bool HasPenalties(const DrawSpec& s) {
  return s.repetition_penalty != 1.0f || s.presence_penalty != 0.0f || s.frequency_penalty != 0.0f;
}

// In the order of engine/kernels/cpu/sample.cc, each operation rounded for itself.
__device__ float AdjustedValue(float value, bool masked, const DrawSpec& spec,
                               const uint32_t* count) {
  if (masked) value = -kInfinity;
  if (!HasPenalties(spec)) return value;
  value = value > 0 ? __fdiv_rn(value, spec.repetition_penalty)
                    : __fmul_rn(value, spec.repetition_penalty);
  if (value > 3.402823466e+38f) value = 3.402823466e+38f;
  if (spec.presence_penalty == 0.0f && spec.frequency_penalty == 0.0f) return value;
  if (const uint32_t n = __ldcg(count); n > 0) {
    value = __fsub_rn(value, __fmul_rn(spec.frequency_penalty, static_cast<float>(n)));
    value = __fsub_rn(value, spec.presence_penalty);
  }
  return value;
}

// Of four tokens those whose bit in `marks` is set. Few quads have any: out of the way of loops.
__device__ __noinline__ float4 AdjustedValues(float4 v, uint32_t marks, uint32_t masked,
                                              const DrawSpec& spec, const uint32_t* counts) {
  if (marks & 1) v.x = AdjustedValue(v.x, masked & 1, spec, counts);
  if (marks & 2) v.y = AdjustedValue(v.y, masked & 2, spec, counts + 1);
  if (marks & 4) v.z = AdjustedValue(v.z, masked & 4, spec, counts + 2);
  if (marks & 8) v.w = AdjustedValue(v.w, masked & 8, spec, counts + 3);
  return v;
}

template <typename T>
__device__ T WarpSum(T value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(~0u, value, lanes);
  return value;
}

__device__ Partial Combine(const Partial& a, const Partial& b) {
  Partial out = a;
  out.original = fmaxf(a.original, b.original);
  if (b.adjusted > a.adjusted || (b.adjusted == a.adjusted && b.token < a.token)) {
    out.adjusted = b.adjusted;
    out.token = b.token;
  }
  out.has_nan = a.has_nan | b.has_nan;
  return out;
}

__device__ Partial WarpCombine(Partial partial) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    Partial other;
    other.original = __shfl_xor_sync(~0u, partial.original, lanes);
    other.adjusted = __shfl_xor_sync(~0u, partial.adjusted, lanes);
    other.token = __shfl_xor_sync(~0u, partial.token, lanes);
    other.has_nan = __shfl_xor_sync(~0u, partial.has_nan, lanes);
    partial = Combine(partial, other);
  }
  return partial;
}

// One row as a block of its team sees it. The blocks go through the same calls together, each with
// the part [first_, last_) of the row's quads.
class Row {
 public:
  __device__ Row(const Task& task, int index, int rank, Shared* shared, uint32_t* bits)
      : task_(task),
        spec_(shared->spec),
        shared_(shared),
        logits_(task.args.logits + static_cast<size_t>(index) * static_cast<size_t>(task.vocab)),
        counts_(task.counts + static_cast<size_t>(index) * static_cast<size_t>(task.vocab)),
        masked_(bits),
        seen_(bits + task.part_quads / 8),
        index_(index),
        rank_(rank),
        first_(min(rank * task.part_quads, task.quads)),
        last_(min(first_ + task.part_quads, task.quads)),
        whole_quads_(task.vocab % 4 == 0 ? task.args.valid_vocab / 4 : 0) {
    draws_ = spec_.scored < 0;
    penalties_ = draws_ && HasPenalties(spec_);
    counting_ = penalties_ && (spec_.presence_penalty != 0.0f || spec_.frequency_penalty != 0.0f);
    adjusts_ = penalties_ || (draws_ && spec_.masked_end > spec_.masked_begin);
    greedy_ = spec_.temperature < kGreedyTemperature;
    few_ = draws_ && !greedy_ && spec_.top_k > 0 && spec_.top_k <= kMaxFewest;
    alternatives_ = min(min(spec_.alternatives, kMaxAlternatives), task.args.valid_vocab);
  }

  __device__ void Run();

 private:
  // Marks what is masked or penalised in this block's part, and counts it.
  __device__ void Mark();
  __device__ void ClearCounts();
  __device__ void FindMaxima();
  __device__ float4 Quad(int quad) const;
  // The quad after masks and penalties; what cannot be drawn is -inf.
  __device__ float4 AdjustedQuad(int quad) const {
    float4 v = Quad(quad);
    if (adjusts_) Adjust(quad, &v);
    return v;
  }
  __device__ void Adjust(int quad, float4* values) const;

  __device__ DrawStatus Status(bool has_nan, float maximum) const {
    if (has_nan) return DrawStatus::kNan;
    if (!isinf(maximum)) return DrawStatus::kOk;
    return maximum > 0 ? DrawStatus::kInfinite : DrawStatus::kAllMasked;
  }
  __device__ uint64_t WeightOf(float value) const {
    return DrawWeight(value, shared_->row.adjusted, scale_);
  }
  __device__ void Barrier() const { TeamBarrier(task_.team); }
  template <typename T>
  __device__ T* Peer(T* mine, int rank) const {
    return rank == rank_ ? mine : PeerOf(mine, rank);
  }
  __device__ uint32_t LowestKey() const { return KeyOf(-kInfinity) + 1; }

  // Calls fn(quad, values) for the quads first, first + stride, ... below `last`. `original`: of
  // the logits as they are. Three loads ahead of the work, whose code is long: once, so that it
  // stays in the instruction cache.
  template <class Fn>
  __device__ __forceinline__ void ForQuads(int first, int last, int stride, bool original,
                                           Fn fn) const {
    float4 a = QuadBelow(first, last), b = QuadBelow(first + stride, last),
           c = QuadBelow(first + 2 * stride, last);
#pragma unroll 1
    for (int quad = first; quad < last; quad += stride) {
      float4 v = a;
      a = b;
      b = c;
      c = QuadBelow(quad + 3 * stride, last);
      if (!original && adjusts_) Adjust(quad, &v);
      fn(quad, v);
    }
  }
  __device__ float4 QuadBelow(int quad, int last) const {
    return quad < last ? Quad(quad) : make_float4(0, 0, 0, 0);
  }
  // The same for this block's part, by the whole block and token by token: fn(token, value).
  template <class Fn>
  __device__ void ForTokens(bool original, Fn fn) const {
    ForQuads(first_ + static_cast<int>(threadIdx.x), last_, kThreads, original,
             [&fn](int quad, const float4& v) {
               fn(quad * 4, v.x);
               fn(quad * 4 + 1, v.y);
               fn(quad * 4 + 2, v.z);
               fn(quad * 4 + 3, v.w);
             });
  }

  __device__ void DrawToken();
  // The merged list of the first block becomes every token that equals or exceeds the `wanted`-th
  // largest. Returns their number, or -1 where they do not fit.
  __device__ int ListLargest(int wanted, bool original);
  // What the blocks' lists hold together; -1: more than fits.
  __device__ int ListedByTeam() const;
  __device__ void MergeLists();
  __device__ uint64_t TeamSum(uint64_t* mine) const;
  __device__ void DrawFromList(int size);
  // Where top_k ends (!by_weight) or the nucleus: what is kept is above the threshold, or equal to
  // it and among the first `ties` of those. Only tokens from `lowest` on count.
  struct Cut {
    uint32_t threshold;
    uint32_t ties;
  };
  __device__ Cut Select(bool by_weight, uint32_t lowest);
  // The bin in which the sum, which is `above` before the first one, reaches `wanted`; -1 if none
  // does. Leaves the sum before the bin in shared_->above. After a barrier.
  __device__ int FindBin(uint64_t above, uint64_t wanted);
  __device__ void DrawAbove(const Cut& cut);
  // Of quads [first, last) by this warp: what is above the threshold, and how many equal it.
  __device__ void SumAbove(const Cut& cut, int first, int last, uint64_t* sum,
                           uint32_t* ties) const;
  __device__ void AddAbove(uint32_t threshold, float value, uint64_t* sum, uint32_t* ties) const {
    const uint32_t key = KeyOf(value);
    if (key == threshold) ++*ties;
    if (key <= threshold) return;
    const uint64_t weight = WeightOf(value);
    if (weight >= least_) *sum += weight;
  }
  __device__ void Score();
  __device__ void RankAlternatives(double normaliser);

  __device__ void AddToBin(int bin, uint64_t measure) const {
    const uint32_t low = static_cast<uint32_t>(measure);
    uint32_t high = static_cast<uint32_t>(measure >> 32);
    const uint32_t before = atomicAdd(&shared_->low[bin], low);
    if (before + low < before) ++high;
    if (high != 0) atomicAdd(&shared_->high[bin], high);
  }
  __device__ void ClearBins() const {
    for (int i = threadIdx.x; i < kBins; i += kThreads) shared_->low[i] = shared_->high[i] = 0;
  }
  __device__ uint64_t BlockSum(uint64_t value) const;

  const Task& task_;
  const DrawSpec& spec_;
  Shared* const shared_;
  const float* const logits_;
  uint32_t* const counts_;
  uint32_t* const masked_;  // bits by token, in shared memory
  uint32_t* const seen_;
  const int index_, rank_;
  const int first_, last_;
  const int whole_quads_;  // that one load reads
  bool draws_, penalties_, counting_, adjusts_, greedy_, few_;
  int alternatives_;
  float scale_ = 0;
  uint64_t least_ = 1;
};

// Four tokens of which some are missing, or that are not aligned.
__device__ __forceinline__ float4 OddQuad(const float* logits, int first, int valid) {
  float4 v;
  v.x = first < valid ? __ldcg(logits + first) : -kInfinity;
  v.y = first + 1 < valid ? __ldcg(logits + first + 1) : -kInfinity;
  v.z = first + 2 < valid ? __ldcg(logits + first + 2) : -kInfinity;
  v.w = first + 3 < valid ? __ldcg(logits + first + 3) : -kInfinity;
  return v;
}

__device__ float4 Row::Quad(int quad) const {
  if (quad < whole_quads_) return __ldcg(reinterpret_cast<const float4*>(logits_) + quad);
  return OddQuad(logits_, quad * 4, task_.args.valid_vocab);
}

__device__ void Row::Adjust(int quad, float4* v) const {
  const int word = (quad - first_) >> 3, shift = (quad & 7) * 4;
  const uint32_t marks = (masked_[word] | seen_[word]) >> shift & 15u;
  if (marks != 0) {
    *v = AdjustedValues(*v, marks, masked_[word] >> shift, spec_, counts_ + quad * 4);
  }
}

__device__ void Row::Mark() {
  const int from = first_ * 4, to = min(last_ * 4, task_.args.valid_vocab);
  for (int i = static_cast<int>(threadIdx.x); i < task_.part_quads / 8; i += kThreads) {
    masked_[i] = seen_[i] = 0;
  }
  __syncthreads();
  const int32_t* lists = task_.args.token_lists;
  for (int i = spec_.masked_begin + threadIdx.x; i < spec_.masked_end; i += kThreads) {
    const int32_t token = lists[i];
    if (token >= from && token < to) {
      atomicOr(&masked_[(token - from) >> 5], 1u << (token & 31));
    }
  }
  if (penalties_) {
#pragma unroll 4
    for (int i = spec_.history_begin + threadIdx.x; i < spec_.history_end; i += kThreads) {
      const int32_t token = ResolveId(lists[i], task_.args.drawn_before);
      if (token < from || token >= to) continue;
      atomicOr(&seen_[(token - from) >> 5], 1u << (token & 31));
      if (counting_ && i >= spec_.output_begin) atomicAdd(&counts_[token], 1u);
    }
  }
  __syncthreads();
}

__device__ void Row::ClearCounts() {
  const int from = first_ * 4, to = min(last_ * 4, task_.args.valid_vocab);
  for (int i = spec_.output_begin + threadIdx.x; i < spec_.history_end; i += kThreads) {
    const int32_t token = ResolveId(task_.args.token_lists[i], task_.args.drawn_before);
    if (token >= from && token < to) counts_[token] = 0;
  }
}

__device__ void Row::FindMaxima() {
  if (adjusts_) Mark();
  Partial best = {-kInfinity, -kInfinity, INT32_MAX, 0};
  const auto add = [&best](int32_t token, float value) {
    if (value > best.adjusted) {
      best.adjusted = value;
      best.token = token;
    }
  };
  const auto add_quad = [&](int quad, const float4& v) {
    const float most = fmaxf(fmaxf(v.x, v.y), fmaxf(v.z, v.w));
    if (!(v.x == v.x && v.y == v.y && v.z == v.z && v.w == v.w)) best.has_nan = 1;
    best.original = fmaxf(best.original, most);
    if (!adjusts_) {
      if (!(most > best.adjusted)) return;
      add(quad * 4, v.x);
      add(quad * 4 + 1, v.y);
      add(quad * 4 + 2, v.z);
      add(quad * 4 + 3, v.w);
      return;
    }
    float4 adjusted = v;
    Adjust(quad, &adjusted);
    add(quad * 4, adjusted.x);
    add(quad * 4 + 1, adjusted.y);
    add(quad * 4 + 2, adjusted.z);
    add(quad * 4 + 3, adjusted.w);
  };
  // Bound by memory: four loads at once.
  constexpr int kUnroll = 4;
  for (int base = first_ + static_cast<int>(threadIdx.x); base < last_;
       base += kUnroll * kThreads) {
    float4 v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) v[i] = QuadBelow(base + i * kThreads, last_);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * kThreads < last_) add_quad(base + i * kThreads, v[i]);
    }
  }

  const int thread = static_cast<int>(threadIdx.x);
  if (few_ || alternatives_ > 0) {
    float original = best.original, adjusted = best.adjusted;
    for (int lanes = task_.slot_threads / 2; lanes > 0; lanes /= 2) {
      original = fmaxf(original, __shfl_xor_sync(~0u, original, lanes));
      adjusted = fmaxf(adjusted, __shfl_xor_sync(~0u, adjusted, lanes));
    }
    if (thread % task_.slot_threads == 0) {
      shared_->original_slots[thread / task_.slot_threads] = KeyOf(original);
      shared_->adjusted_slots[thread / task_.slot_threads] = KeyOf(adjusted);
    }
  }
  best = WarpCombine(best);
  if (thread % 32 == 0) shared_->warp_partials[thread / 32] = best;
  __syncthreads();
  if (thread < 32) {
    best = WarpCombine(shared_->warp_partials[thread % kWarps]);
    if (thread == 0) shared_->part = best;
  }
  Barrier();
  if (thread < 32) {
    best = WarpCombine(*Peer(&shared_->part, thread % task_.team));
    if (thread == 0) shared_->row = best;
  }
  __syncthreads();
}

__device__ void Row::Run() {
  const int thread = static_cast<int>(threadIdx.x);
  FindMaxima();
  const Partial row = shared_->row;
  DrawStatus status = Status(row.has_nan != 0, row.original);
  if (status == DrawStatus::kOk && adjusts_) status = Status(false, row.adjusted);
  if (!draws_ && spec_.scored >= task_.args.valid_vocab) status = DrawStatus::kOutOfVocabulary;
  for (int i = thread; i < static_cast<int>(sizeof(DrawResult) / 4); i += kThreads) {
    reinterpret_cast<uint32_t*>(&shared_->result)[i] = 0;
  }
  if (thread == 0) shared_->token = draws_ ? row.token : spec_.scored;
  const bool searches = status == DrawStatus::kOk && draws_ && !greedy_;
  const bool scores = status == DrawStatus::kOk && (!draws_ || spec_.alternatives >= 0);
  // Nobody leaves, or draws, before all have what they need of the others.
  Barrier();
  if (searches) {
    DrawToken();
    Barrier();
  }
  if (scores) {
    Score();
    Barrier();
  }
  if (counting_) ClearCounts();
  if (rank_ != 0) return;
  if (thread == 0) {
    const bool named = status == DrawStatus::kOk || status == DrawStatus::kOutOfVocabulary;
    shared_->result.status = status;
    shared_->result.token = named ? shared_->token : 0;
    if (draws_ && spec_.item >= 0) task_.args.drawn[spec_.item] = shared_->result.token;
  }
  __syncthreads();
  uint32_t* out = reinterpret_cast<uint32_t*>(task_.args.results + index_);
  for (int i = thread; i < static_cast<int>(sizeof(DrawResult) / 4); i += kThreads) {
    out[i] = reinterpret_cast<const uint32_t*>(&shared_->result)[i];
  }
}

__device__ void Row::DrawToken() {
  scale_ = DrawScale(spec_.temperature);
  least_ = LeastWeight(spec_.min_p);
  least_ = least_ < 1 ? 1 : least_ > kFullWeight ? kFullWeight : least_;
  if (few_) {
    const int size = ListLargest(spec_.top_k, false);
    if (size >= 0) {
      if (rank_ == 0) DrawFromList(size);
      return;
    }
  }
  Cut cut = {LowestKey(), kNoLimit};
  if (spec_.top_k > 0 && spec_.top_k < task_.args.valid_vocab) cut = Select(false, cut.threshold);
  if (spec_.top_p < 1.0f) cut = Select(true, cut.threshold);
  DrawAbove(cut);
}

__device__ int Row::ListedByTeam() const {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int size = WarpSum(lane < task_.team ? *Peer(&shared_->list_size, lane) : 0);
  return size <= kMaxCandidates ? size : -1;
}

// A warp per block.
__device__ void Row::MergeLists() {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int size = lane < task_.team ? *Peer(&shared_->list_size, lane) : 0;
  const int at = WarpSum(lane < warp ? size : 0);
  size = __shfl_sync(~0u, size, warp);
  if (warp < task_.team) {
    const Candidate* list = Peer(&shared_->list[0], warp);
    for (int i = lane; i < size; i += 32) shared_->merged[at + i] = list[i];
  }
  __syncthreads();
}

__device__ uint64_t Row::TeamSum(uint64_t* mine) const {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return WarpSum(lane < task_.team ? *Peer(mine, lane) : 0);
}

__device__ int Row::ListLargest(int wanted, bool original) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int slots = task_.slots;
  Barrier();
  uint32_t* mine = original ? shared_->original_slots : shared_->adjusted_slots;
  for (int i = thread; i < kMaxSlots; i += kThreads) {
    // Both powers of two.
    const int block = i >> (__ffs(slots) - 1);
    shared_->slot_keys[i] = block < task_.team ? Peer(mine, block)[i & (slots - 1)] : 0;
  }
  if (thread == 0) shared_->list_size = 0;
  __syncthreads();
  // The wanted-th largest of the maxima, four bits at a time: each warp tries one continuation. So
  // many tokens at least are not below it.
  uint32_t threshold = 0;
  for (int shift = 28; shift >= 0; shift -= 4) {
    const uint32_t next = threshold | static_cast<uint32_t>(warp) << shift;
    int count = 0;
#pragma unroll 8
    for (int i = lane; i < kMaxSlots; i += 32) count += shared_->slot_keys[i] >= next;
    const bool reached = __reduce_add_sync(~0u, count) >= wanted;
    // All those up to the largest that is reached.
    const int reaching = __syncthreads_count(lane == 0 && warp > 0 && reached);
    threshold |= static_cast<uint32_t>(reaching) << shift;
  }
  threshold = max(threshold, LowestKey());
  const int group = task_.slot_threads;
  const auto keep = [&](int32_t token, float value) {
    const uint32_t key = KeyOf(value);
    if (key < threshold) return;
    const int at = atomicAdd(&shared_->list_size, 1);
    if (at < kMaxCandidates) shared_->list[at] = {key, token};
  };
  // Only parts whose maximum is not below it hold such tokens.
  const int rounds = (last_ - first_ + kThreads - 1) / kThreads;
  for (int base = warp; base < slots; base += kThreads) {
    const int at = base + lane * kWarps;
    const uint32_t hits = __ballot_sync(~0u, at < slots && mine[at] >= threshold);
    for (uint32_t left = hits; left != 0; left &= left - 1) {
      const int slot = base + (__ffs(static_cast<int>(left)) - 1) * kWarps;
#pragma unroll 1
      for (int i = lane; i < rounds * group; i += 32) {
        const int quad = first_ + i / group * kThreads + slot * group + i % group;
        if (quad >= last_) continue;
        const float4 v = original ? Quad(quad) : AdjustedQuad(quad);
        keep(quad * 4, v.x);
        keep(quad * 4 + 1, v.y);
        keep(quad * 4 + 2, v.z);
        keep(quad * 4 + 3, v.w);
      }
    }
  }
  Barrier();
  const int size = ListedByTeam();
  if (size >= 0 && rank_ == 0) MergeLists();
  return size;
}

__device__ uint64_t Row::BlockSum(uint64_t value) const {
  value = WarpSum(value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared_->warp_sums[threadIdx.x / 32] = value;
  __syncthreads();
  uint64_t sum = 0;
  for (int i = 0; i < kWarps; ++i) sum += shared_->warp_sums[i];
  return sum;
}

// One candidate per thread, each compared with all others.
__device__ void Row::DrawFromList(int size) {
  const int me = static_cast<int>(threadIdx.x);
  const Candidate mine = me < size ? shared_->merged[me] : Candidate{0, 0};
  uint64_t weight = 0;
  if (me < size) {
    int larger = 0;
    for (int i = 0; i < size; ++i) larger += shared_->merged[i].key > mine.key;
    weight = WeightOf(ValueOf(mine.key));
    if (larger >= spec_.top_k || weight < least_) weight = 0;
    shared_->weights[me] = weight;
  }
  uint64_t total = BlockSum(weight);
  if (spec_.top_p < 1.0f) {
    uint64_t before = 0;
    if (me < size) {
      for (int i = 0; i < size; ++i) {
        const Candidate other = shared_->merged[i];
        const bool better =
            other.key > mine.key || (other.key == mine.key && other.token < mine.token);
        if (better) before += shared_->weights[i];
      }
    }
    __syncthreads();
    if (before >= NucleusWeight(total, spec_.top_p)) weight = 0;
    if (me < size) shared_->weights[me] = weight;
    total = BlockSum(weight);
  }
  const uint64_t target =
      DrawTarget(total, UniformAt(spec_.seed, static_cast<uint64_t>(spec_.position)));
  if (weight != 0) {
    uint64_t before = 0;
    for (int i = 0; i < size; ++i) {
      if (shared_->merged[i].token < mine.token) before += shared_->weights[i];
    }
    if (before <= target && target - before < weight) shared_->token = mine.token;
  }
  __syncthreads();
}

__device__ int Row::FindBin(uint64_t above, uint64_t wanted) {
  constexpr int kMine = kBins / kThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  uint64_t bins[kMine], sum = 0;
  __syncthreads();
  for (int i = 0; i < kMine; ++i) bins[i] = 0;
  for (int block = 0; block < task_.team; ++block) {
    const uint32_t* low = Peer(&shared_->low[0], block);
    const uint32_t* high = Peer(&shared_->high[0], block);
    for (int i = 0; i < kMine; ++i) {
      const int bin = thread * kMine + i;
      bins[i] += static_cast<uint64_t>(high[bin]) << 32 | low[bin];
    }
  }
  for (int i = 0; i < kMine; ++i) sum += bins[i];
  uint64_t before = sum;  // of this thread's bins and those before, of the warp
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, before, lanes);
    if (lane >= lanes) before += other;
  }
  if (lane == 31) shared_->warp_sums[warp] = before;
  if (thread == 0) shared_->bin = -1;
  __syncthreads();
  before += above - sum;
  for (int i = 0; i < warp; ++i) before += shared_->warp_sums[i];
  for (int i = 0; i < kMine; ++i) {
    if (before < wanted && wanted - before <= bins[i]) {
      shared_->bin = thread * kMine + i;
      shared_->above = before;
    }
    before += bins[i];
  }
  __syncthreads();
  return shared_->bin;
}

__device__ Row::Cut Row::Select(bool by_weight, uint32_t lowest) {
  const int thread = static_cast<int>(threadIdx.x);
  const float maximum = shared_->row.adjusted;
  const float bin_scale = kBinsPerOctave * scale_;
  const auto measure_of = [&](float value) -> uint64_t {
    if (!by_weight) return 1;
    const uint64_t weight = WeightOf(value);
    return weight >= least_ ? weight : 0;
  };
  // Bins by distance from the maximum; the last takes what is further.
  const auto bin_of = [&](float value) {
    return static_cast<int>(fminf((maximum - value) * bin_scale, static_cast<float>(kBins - 1)));
  };
  Barrier();
  ClearBins();
  __syncthreads();
  uint64_t tail = 0, sum = 0;
  ForTokens(false, [&](int32_t, float value) {
    if (KeyOf(value) < lowest) return;
    const uint64_t measure = measure_of(value);
    if (measure == 0) return;
    sum += measure;
    const int bin = bin_of(value);
    if (bin == kBins - 1) {
      tail += measure;
    } else {
      AddToBin(bin, measure);
    }
  });
  tail = WarpSum(tail);
  if (thread % 32 == 0 && tail != 0) AddToBin(kBins - 1, tail);
  sum = BlockSum(sum);
  if (thread == 0) shared_->part_sum = sum;
  Barrier();
  const uint64_t total = TeamSum(&shared_->part_sum);
  const uint64_t wanted =
      by_weight ? NucleusWeight(total, spec_.top_p) : static_cast<uint64_t>(spec_.top_k);
  int bin = FindBin(0, wanted);
  if (bin < 0) return {lowest, kNoLimit};  // fewer than top_k

  uint32_t low = lowest, high = ~0u;  // where the threshold lies, once bins are of keys
  bool linear = true;
  while (bin >= 0) {
    Barrier();
    const uint64_t above = shared_->above;
    if (thread == 0) {
      shared_->list_size = 0;
      shared_->key_low = ~0u;
      shared_->key_high = 0;
    }
    __syncthreads();
    uint32_t key_low = ~0u, key_high = 0;
    ForTokens(false, [&](int32_t token, float value) {
      const uint32_t key = KeyOf(value);
      if (key < low || key > high || (linear && bin_of(value) != bin)) return;
      if (measure_of(value) == 0) return;
      key_low = min(key_low, key);
      key_high = max(key_high, key);
      const int at = atomicAdd(&shared_->list_size, 1);
      if (at < kMaxCandidates) shared_->list[at] = {key, token};
    });
    key_low = __reduce_min_sync(~0u, key_low);
    key_high = __reduce_max_sync(~0u, key_high);
    if (thread % 32 == 0) {
      atomicMin(&shared_->key_low, key_low);
      atomicMax(&shared_->key_high, key_high);
    }
    Barrier();
    const int block = thread % 32 % task_.team;
    low = __reduce_min_sync(~0u, *Peer(&shared_->key_low, block));
    high = __reduce_max_sync(~0u, *Peer(&shared_->key_high, block));
    if (low == high) {
      if (thread == 0) shared_->threshold = low;
      break;
    }
    const int size = ListedByTeam();
    if (size >= 0) {
      MergeLists();
      if (thread < size) {
        shared_->weights[thread] = measure_of(ValueOf(shared_->merged[thread].key));
      }
      __syncthreads();
      if (thread < size) {
        const uint32_t mine = shared_->merged[thread].key;
        uint64_t before = above, equal = 0;
        for (int i = 0; i < size; ++i) {
          const uint32_t key = shared_->merged[i].key;
          if (key > mine) before += shared_->weights[i];
          if (key == mine) equal += shared_->weights[i];
        }
        if (before < wanted && wanted - before <= equal) {
          shared_->threshold = mine;
          shared_->above = before;
        }
      }
      break;
    }
    linear = false;
    const int shift = max(0, 21 - __clz(static_cast<int>(high - low)));  // 2^11 bins
    ClearBins();
    __syncthreads();
    ForTokens(false, [&](int32_t, float value) {
      const uint32_t key = KeyOf(value);
      if (key < low || key > high) return;
      const uint64_t measure = measure_of(value);
      if (measure != 0) AddToBin(static_cast<int>((high - key) >> shift), measure);
    });
    Barrier();
    bin = FindBin(above, wanted);  // there is one: the last held it
    high -= static_cast<uint32_t>(bin) << shift;
    const uint32_t width = (1u << shift) - 1;
    low = high - low > width ? high - width : low;
  }
  __syncthreads();
  Cut cut = {shared_->threshold, kNoLimit};
  if (by_weight) {
    const uint64_t each = WeightOf(ValueOf(cut.threshold));
    cut.ties = static_cast<uint32_t>((wanted - shared_->above + each - 1) / each);
  }
  return cut;
}

__device__ void Row::SumAbove(const Cut& cut, int first, int last, uint64_t* sum,
                              uint32_t* ties) const {
  uint64_t s = 0;
  uint32_t t = 0;
  ForQuads(first + static_cast<int>(threadIdx.x) % 32, last, 32, false, [&](int, const float4& v) {
    AddAbove(cut.threshold, v.x, &s, &t);
    AddAbove(cut.threshold, v.y, &s, &t);
    AddAbove(cut.threshold, v.z, &s, &t);
    AddAbove(cut.threshold, v.w, &s, &t);
  });
  *sum = WarpSum(s);
  *ties = WarpSum(t);
}

// Sums over the blocks' parts, and sixteenths of them, one per warp, tell where the drawn token
// lies; its block then looks at sixteenths of that.
__device__ void Row::DrawAbove(const Cut& cut) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint64_t each = WeightOf(ValueOf(cut.threshold));  // of those at the threshold
  if (each < least_) each = 0;
  uint32_t ties_left = cut.ties;
  uint64_t target = 0;
  const auto kept = [&](uint64_t sum, uint32_t ties) { return sum + min(ties, ties_left) * each; };
  const auto pass = [&](uint64_t sum, uint32_t ties) {  // whether the token lies further on
    if (target < kept(sum, ties)) return false;
    target -= kept(sum, ties);
    ties_left -= min(ties, ties_left);
    return true;
  };
  int first = first_, last = last_;
  for (bool whole = true; whole || last - first > 32; whole = false) {
    const int part = (last - first + kWarps - 1) / kWarps;
    const int begin = min(first + warp * part, last), end = min(begin + part, last);
    uint64_t sum;
    uint32_t ties;
    SumAbove(cut, begin, end, &sum, &ties);
    __syncthreads();
    if (lane == 0) {
      shared_->warp_sums[warp] = sum;
      shared_->warp_ties[warp] = ties;
    }
    __syncthreads();
    if (whole) {
      if (threadIdx.x == 0) {
        shared_->part_sum = 0;
        shared_->part_ties = 0;
        for (int i = 0; i < kWarps; ++i) {
          shared_->part_sum += shared_->warp_sums[i];
          shared_->part_ties += shared_->warp_ties[i];
        }
      }
      Barrier();
      uint64_t sums[kMaxTeam], total = 0;
      uint32_t counts[kMaxTeam], left = ties_left;
#pragma unroll
      for (int i = 0; i < kMaxTeam; ++i) {
        sums[i] = i < task_.team ? *Peer(&shared_->part_sum, i) : 0;
        counts[i] = i < task_.team ? *Peer(&shared_->part_ties, i) : 0;
        total += sums[i] + min(counts[i], left) * each;
        left -= min(counts[i], left);
      }
      target = DrawTarget(total, UniformAt(spec_.seed, static_cast<uint64_t>(spec_.position)));
      bool here = false, found = false;
#pragma unroll
      for (int i = 0; i < kMaxTeam; ++i) {
        if (found || i >= task_.team || pass(sums[i], counts[i])) continue;
        found = true;
        here = i == rank_;
      }
      if (!here) return;
    }
    int chosen = 0;
    while (chosen < kWarps - 1 && pass(shared_->warp_sums[chosen], shared_->warp_ties[chosen])) {
      ++chosen;
    }
    first = min(first + chosen * part, last);
    last = min(first + part, last);
  }
  if (warp != 0) return;
  const float4 v = first + lane < last
                       ? AdjustedQuad(first + lane)
                       : make_float4(-kInfinity, -kInfinity, -kInfinity, -kInfinity);
  const float values[4] = {v.x, v.y, v.z, v.w};
  uint64_t sum = 0;
  uint32_t ties = 0;
  for (int i = 0; i < 4; ++i) AddAbove(cut.threshold, values[i], &sum, &ties);
  uint32_t ties_before = ties;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, ties_before, lanes);
    if (lane >= lanes) ties_before += other;
  }
  ties_before -= ties;
  ties_left -= min(ties_before, ties_left);
  sum = kept(sum, ties);
  uint64_t before = sum;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint64_t other = __shfl_up_sync(~0u, before, lanes);
    if (lane >= lanes) before += other;
  }
  before -= sum;
  if (before > target || target - before >= sum) return;
  // One lane is left.
  for (int i = 0; i < 4; ++i) {
    uint64_t weight = 0;
    uint32_t tie = 0;
    AddAbove(cut.threshold, values[i], &weight, &tie);
    if (tie != 0 && ties_left > 0) {
      weight = each;
      --ties_left;
    }
    before += weight;
    if (before > target) {
      *Peer(&shared_->token, 0) = (first + lane) * 4 + i;
      return;
    }
  }
}

// The sum of probabilities is one of integers too, so that the last bits of a log probability do
// not depend on the size of the team, which the number of rows decides.
__device__ void Row::Score() {
  const float maximum = shared_->row.original, scale = DrawScale(1);
  uint64_t sum = 0;
  ForTokens(true, [&](int32_t, float value) { sum += DrawWeight(value, maximum, scale); });
  sum = BlockSum(sum);
  if (threadIdx.x == 0) shared_->part_sum = sum;
  Barrier();
  const uint64_t total = TeamSum(&shared_->part_sum);
  const double normaliser = static_cast<double>(maximum) +
                            log(static_cast<double>(total) / static_cast<double>(kFullWeight));
  if (threadIdx.x == 0 && rank_ == 0) {
    const double logit = static_cast<double>(__ldcg(logits_ + shared_->token));
    shared_->result.logprob = static_cast<float>(logit - normaliser);
  }
  if (alternatives_ > 0) RankAlternatives(normaliser);
}

__device__ void Row::RankAlternatives(double normaliser) {
  const int thread = static_cast<int>(threadIdx.x);
  const auto put = [&](int rank, int32_t token, float logit) {
    shared_->result.alternatives[rank] = token;
    shared_->result.alternative_logprobs[rank] =
        static_cast<float>(static_cast<double>(logit) - normaliser);
  };
  if (thread == 0) shared_->result.num_alternatives = alternatives_;
  const int size = ListLargest(alternatives_, true);
  if (size >= alternatives_) {
    if (rank_ != 0 || thread >= size) return;
    const Candidate mine = shared_->merged[thread];
    int rank = 0;
    for (int i = 0; i < size; ++i) {
      const Candidate other = shared_->merged[i];
      rank += other.key > mine.key || (other.key == mine.key && other.token < mine.token);
    }
    if (rank < alternatives_) put(rank, mine.token, ValueOf(mine.key));
    return;
  }
  // Many equal ones, or tokens without probability: one after the other.
  float last_value = kInfinity;
  int32_t last_token = -1;
  for (int rank = 0; rank < alternatives_; ++rank) {
    Partial best = {-kInfinity, -kInfinity, INT32_MAX, 0};
    ForTokens(true, [&](int32_t token, float value) {
      if (token >= task_.args.valid_vocab) return;
      if (value > last_value || (value == last_value && token <= last_token)) return;
      if (value > best.adjusted || (value == best.adjusted && token < best.token)) {
        best.adjusted = value;
        best.token = token;
      }
    });
    best = WarpCombine(best);
    __syncthreads();
    if (thread % 32 == 0) shared_->warp_partials[thread / 32] = best;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) best = Combine(best, shared_->warp_partials[i]);
    if (thread == 0) shared_->best[rank % 2] = best;
    Barrier();
    for (int i = 0; i < task_.team; ++i) best = Combine(best, *Peer(&shared_->best[rank % 2], i));
    last_value = best.adjusted;
    last_token = best.token;
    if (thread == 0) put(rank, last_token, last_value);
  }
}

__global__ void __launch_bounds__(kThreads, 2) SampleKernel(const __grid_constant__ Task task) {
  extern __shared__ uint32_t bits[];
  __shared__ Shared shared;
  WaitForPredecessor();
  LetSuccessorStart();
  const int thread = static_cast<int>(threadIdx.x);
  const int rank = static_cast<int>(blockIdx.x), index = static_cast<int>(blockIdx.y);
  if (thread < static_cast<int>(sizeof(DrawSpec) / 4)) {
    reinterpret_cast<uint32_t*>(&shared.spec)[thread] =
        __ldcg(reinterpret_cast<const uint32_t*>(task.args.specs + index) + thread);
  }
  __syncthreads();
  Row row(task, index, rank, &shared, bits);
  row.Run();
}

// Of masked_ and seen_.
size_t BitBytes(const Task& task) {
  return static_cast<size_t>(task.part_quads / 8) * 2 * sizeof(uint32_t);
}

cudaLaunchConfig_t ConfigOf(const Task& task, cudaLaunchAttribute* cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(task.team), static_cast<unsigned>(task.args.count));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = BitBytes(task);
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = static_cast<unsigned>(task.team);
  cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
  config.attrs = cluster;
  config.numAttrs = task.team > 1 ? 1 : 0;
  return config;
}

void SetTeam(int team, Task* task) {
  task->team = team;
  // Whole words of the bits by token.
  task->part_quads = ((task->quads + team - 1) / team + 7) / 8 * 8;
  task->slots = std::min(kThreads, kMaxSlots / team);
  task->slot_threads = kThreads / task->slots;
}

// Teams of this size that run at once, of a device with clusters (compute capability 9.0); they
// must lie in one of its parts, so that there are fewer than blocks would tell.
int TeamsAtOnce(int team, Task task) {
  static std::array<PerDevice<int>, kMaxTeam + 1> known;
  return known[static_cast<size_t>(team)].Get([&] {
    int device = 0, major = 0, teams = 0;
    SetTeam(team, &task);
    cudaLaunchAttribute cluster = {};
    const cudaLaunchConfig_t config = ConfigOf(task, &cluster);
    const bool has =
        cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        major >= 9 && cudaOccupancyMaxActiveClusters(&teams, SampleKernel, &config) == cudaSuccess;
    return has ? teams : 0;
  });
}

}  // namespace

size_t SampleScratchBytes(int max_rows, int vocab) {
  return static_cast<size_t>(max_rows) * static_cast<size_t>(vocab) * sizeof(uint32_t);
}

cudaError_t SampleRows(const SampleArgs& args, int vocab, int max_rows, void* scratch,
                       const LaunchOptions& options) {
  if (args.count < 0 || args.count > max_rows || args.valid_vocab < 1 || args.valid_vocab > vocab ||
      vocab >= 1 << (63 - kWeightBits)) {
    return cudaErrorInvalidValue;
  }
  if (args.count == 0) return cudaSuccess;
  Task task = {};
  task.args = args;
  task.counts = static_cast<uint32_t*>(scratch);
  task.vocab = vocab;
  task.quads = (args.valid_vocab + 3) / 4;
  SetTeam(1, &task);
  const cudaError_t prepared = cudaFuncSetAttribute(
      SampleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(BitBytes(task)));
  if (prepared != cudaSuccess) return prepared;
  for (int team = 2; team <= kMaxTeam && args.count <= TeamsAtOnce(team, task); team *= 2) {
    SetTeam(team, &task);
  }
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = ConfigOf(task, attributes);
  config.stream = options.stream;
  if (options.overlap) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, SampleKernel, task);
}

}  // namespace tandem::engine::cuda
