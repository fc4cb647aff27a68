#include <algorithm>
#include <cstdint>

#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/sample.h"
#include "engine/kernels/draw_weight.h"
#include "engine/kernels/philox.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxSplits = 32;       // blocks of one row
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

struct Scratch {
  uint32_t* arrived;      // [max_rows]: blocks of the row that are done; zero between launches
  uint32_t* counts;       // [max_rows][vocab]: in the output; zero between launches
  Partial* partials;      // [max_rows][kMaxSplits]
  float* original_slots;  // [max_rows][kMaxSlots]
  float* adjusted_slots;  // [max_rows][kMaxSlots]
};

__host__ __device__ size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

struct Task {
  SampleArgs args;
  Scratch scratch;
  int vocab;
  int quads;       // groups of four tokens of the valid vocabulary
  int part_quads;  // of one split
  int splits;
  int slots;         // of a row: at most kMaxSlots
  int slot_threads;  // neighbouring threads that share one
};

struct Candidate {
  uint32_t key;
  int32_t token;
};

struct Shared {
  DrawSpec spec;
  // Candidates for the token or the alternatives, or of the bin where a selection ends.
  Candidate list[kMaxCandidates];
  uint64_t weights[kMaxCandidates];
  // Histogram; or, of kept tokens, sums by warp.
  uint32_t low[kBins], high[kBins];
  uint32_t slot_keys[kMaxSlots];
  uint64_t warp_sums[kWarps + 1];
  uint32_t warp_ties[kWarps];
  float warp_values[kWarps];
  Partial warp_partials[kWarps];
  Partial row;
  int list_size;
  uint32_t key_low, key_high;
  uint32_t threshold;
  uint64_t above;
  int bin;
  int32_t token;
  DrawResult result;
  bool last;
};

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

// One row as a block sees it.
class Row {
 public:
  __device__ Row(const Task& task, int index, Shared* shared, uint32_t* bits)
      : task_(task),
        spec_(shared->spec),
        shared_(shared),
        logits_(task.args.logits + static_cast<size_t>(index) * static_cast<size_t>(task.vocab)),
        counts_(task.scratch.counts + static_cast<size_t>(index) * static_cast<size_t>(task.vocab)),
        masked_(bits),
        seen_(bits + (task.quads * 4 + 31) / 32),
        index_(index),
        vector_(task.vocab % 4 == 0) {
    draws_ = spec_.scored < 0;
    penalties_ = draws_ && HasPenalties(spec_);
    counting_ = penalties_ && (spec_.presence_penalty != 0.0f || spec_.frequency_penalty != 0.0f);
    adjusts_ = penalties_ || (draws_ && spec_.masked_end > spec_.masked_begin);
    greedy_ = spec_.temperature < kGreedyTemperature;
    few_ = draws_ && !greedy_ && spec_.top_k > 0 && spec_.top_k <= kMaxFewest;
    alternatives_ = min(min(spec_.alternatives, kMaxAlternatives), task.args.valid_vocab);
  }

  // The part [first, last) of the row's quads, by one block of several.
  __device__ void FindMaxima(int split);
  // All that follows, by the last block.
  __device__ void Finish();

 private:
  // Marks what is masked or penalised among the tokens of [first, last) quads. Adds to the counts
  // if `count`.
  __device__ void Mark(int first, int last, bool count);
  __device__ void ClearCounts();
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
  // The same by the whole block and token by token: fn(token, value).
  template <class Fn>
  __device__ void ForTokens(bool original, Fn fn) const {
    ForQuads(static_cast<int>(threadIdx.x), task_.quads, kThreads, original,
             [&fn](int quad, const float4& v) {
               fn(quad * 4, v.x);
               fn(quad * 4 + 1, v.y);
               fn(quad * 4 + 2, v.z);
               fn(quad * 4 + 3, v.w);
             });
  }

  __device__ void DrawToken();
  // The list becomes every token that equals or exceeds the `wanted`-th largest. False: they do not
  // fit.
  __device__ bool ListLargest(int wanted, bool original);
  __device__ void DrawFromList();
  // Where top_k ends (!by_weight) or the nucleus: what is kept is above the threshold, or equal to
  // it and among the first `ties` of those. Only tokens from `lowest` on count.
  struct Cut {
    uint32_t threshold;
    uint32_t ties;
  };
  __device__ Cut Select(bool by_weight, uint32_t lowest);
  // The bin in which the sum, which is `above` before the first one, reaches `wanted`; -1 if none
  // does. Leaves the sum before the bin in shared_->above.
  __device__ int FindBin(uint64_t above, uint64_t wanted);
  __device__ void DrawAbove(const Cut& cut);
  __device__ void Score();
  __device__ double SumExp();
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
  const int index_;
  const bool vector_;
  bool draws_, penalties_, counting_, adjusts_, greedy_, few_;
  int alternatives_;
  float scale_ = 0;
  uint64_t least_ = 1;
};

__device__ float4 Row::Quad(int quad) const {
  const int first = quad * 4, valid = task_.args.valid_vocab;
  if (vector_ && first + 4 <= valid) {
    return __ldcg(reinterpret_cast<const float4*>(logits_) + quad);
  }
  float4 v;
  v.x = first < valid ? __ldcg(logits_ + first) : -kInfinity;
  v.y = first + 1 < valid ? __ldcg(logits_ + first + 1) : -kInfinity;
  v.z = first + 2 < valid ? __ldcg(logits_ + first + 2) : -kInfinity;
  v.w = first + 3 < valid ? __ldcg(logits_ + first + 3) : -kInfinity;
  return v;
}

__device__ void Row::Adjust(int quad, float4* v) const {
  const int word = quad >> 3, shift = (quad & 7) * 4;
  const uint32_t marks = (masked_[word] | seen_[word]) >> shift & 15u;
  if (marks != 0) {
    *v = AdjustedValues(*v, marks, masked_[word] >> shift, spec_, counts_ + quad * 4);
  }
}

__device__ void Row::Mark(int first, int last, bool count) {
  const int valid = task_.args.valid_vocab;
  const int from = first * 4, to = min(last * 4, valid);
  for (int i = (first >> 3) + threadIdx.x; i < (last + 7) / 8; i += kThreads) {
    masked_[i] = seen_[i] = 0;
  }
  __syncthreads();
  const int32_t* lists = task_.args.token_lists;
  for (int i = spec_.masked_begin + threadIdx.x; i < spec_.masked_end; i += kThreads) {
    const int32_t token = lists[i];
    if (token >= from && token < to) atomicOr(&masked_[token >> 5], 1u << (token & 31));
  }
  if (penalties_) {
#pragma unroll 4
    for (int i = spec_.history_begin + threadIdx.x; i < spec_.history_end; i += kThreads) {
      const int32_t token = ResolveId(lists[i], task_.args.drawn_before);
      if (token < from || token >= to) continue;
      atomicOr(&seen_[token >> 5], 1u << (token & 31));
      if (count && i >= spec_.output_begin) atomicAdd(&counts_[token], 1u);
    }
  }
  __syncthreads();
}

__device__ void Row::ClearCounts() {
  for (int i = spec_.output_begin + threadIdx.x; i < spec_.history_end; i += kThreads) {
    const int32_t token = ResolveId(task_.args.token_lists[i], task_.args.drawn_before);
    if (token >= 0 && token < task_.args.valid_vocab) counts_[token] = 0;
  }
}

__device__ void Row::FindMaxima(int split) {
  const int first = split * task_.part_quads;
  const int last = min(first + task_.part_quads, task_.quads);
  if (adjusts_ && first < last) Mark(first, last, counting_);
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
  for (int base = first + static_cast<int>(threadIdx.x); base < last; base += kUnroll * kThreads) {
    float4 v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) v[i] = QuadBelow(base + i * kThreads, last);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      if (base + i * kThreads < last) add_quad(base + i * kThreads, v[i]);
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
      const int slot = (split * kThreads + thread) / task_.slot_threads;
      if (alternatives_ > 0) task_.scratch.original_slots[index_ * kMaxSlots + slot] = original;
      if (few_) task_.scratch.adjusted_slots[index_ * kMaxSlots + slot] = adjusted;
    }
  }
  best = WarpCombine(best);
  if (thread % 32 == 0) shared_->warp_partials[thread / 32] = best;
  __syncthreads();
  if (thread < 32) {
    best = thread < kWarps ? shared_->warp_partials[thread] : shared_->warp_partials[0];
    best = WarpCombine(best);
    if (thread == 0) task_.scratch.partials[index_ * kMaxSplits + split] = best;
  }
}

__device__ void Row::Finish() {
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < static_cast<int>(sizeof(DrawResult) / 4); i += kThreads) {
    reinterpret_cast<uint32_t*>(&shared_->result)[i] = 0;
  }
  if (thread < 32) {
    Partial best = {-kInfinity, -kInfinity, INT32_MAX, 0};
    if (thread < task_.splits) {
      const Partial* from = task_.scratch.partials + index_ * kMaxSplits + thread;
      best.original = __ldcg(&from->original);
      best.adjusted = __ldcg(&from->adjusted);
      best.token = __ldcg(&from->token);
      best.has_nan = __ldcg(&from->has_nan);
    }
    best = WarpCombine(best);
    if (thread == 0) shared_->row = best;
  }
  __syncthreads();
  const Partial row = shared_->row;
  DrawStatus status = Status(row.has_nan != 0, row.original);
  if (status == DrawStatus::kOk && adjusts_) status = Status(false, row.adjusted);
  if (!draws_ && spec_.scored >= task_.args.valid_vocab) status = DrawStatus::kOutOfVocabulary;
  if (thread == 0) {
    shared_->token = draws_ ? row.token : spec_.scored;
    shared_->result.status = status;
  }
  if (status == DrawStatus::kOk && draws_ && !greedy_) {
    if (adjusts_ && task_.splits > 1) Mark(0, task_.quads, false);
    DrawToken();
  }
  __syncthreads();
  if (thread == 0) {
    const bool named = status == DrawStatus::kOk || status == DrawStatus::kOutOfVocabulary;
    shared_->result.token = named ? shared_->token : 0;
    if (draws_) task_.args.drawn[spec_.item] = shared_->result.token;
  }
  if (status == DrawStatus::kOk && (!draws_ || spec_.alternatives >= 0)) Score();
  if (counting_) ClearCounts();
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
  if (few_ && ListLargest(spec_.top_k, false)) {
    DrawFromList();
    return;
  }
  Cut cut = {LowestKey(), kNoLimit};
  if (spec_.top_k > 0 && spec_.top_k < task_.args.valid_vocab) cut = Select(false, cut.threshold);
  if (spec_.top_p < 1.0f) cut = Select(true, cut.threshold);
  DrawAbove(cut);
}

__device__ bool Row::ListLargest(int wanted, bool original) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const float* slots =
      (original ? task_.scratch.original_slots : task_.scratch.adjusted_slots) + index_ * kMaxSlots;
  __syncthreads();
  for (int i = thread; i < kMaxSlots; i += kThreads) {
    shared_->slot_keys[i] = i < task_.slots ? KeyOf(__ldcg(slots + i)) : 0;
  }
  if (thread == 0) shared_->list_size = 0;
  __syncthreads();
  if (warp == 0) {
    // The wanted-th largest of the maxima, bit by bit: so many tokens at least are not below it.
    uint32_t keys[kMaxSlots / 32];
#pragma unroll
    for (int i = 0; i < kMaxSlots / 32; ++i) keys[i] = shared_->slot_keys[i * 32 + lane];
    uint32_t threshold = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t next = threshold | 1u << bit;
      int count = 0;
#pragma unroll
      for (int i = 0; i < kMaxSlots / 32; ++i) count += keys[i] >= next;
      if (__reduce_add_sync(~0u, count) >= wanted) threshold = next;
    }
    if (lane == 0) shared_->threshold = max(threshold, LowestKey());
  }
  __syncthreads();
  const uint32_t threshold = shared_->threshold;
  const int group = task_.slot_threads, groups = kThreads / group;
  const auto keep = [&](int32_t token, float value) {
    const uint32_t key = KeyOf(value);
    if (key < threshold) return;
    const int at = atomicAdd(&shared_->list_size, 1);
    if (at < kMaxCandidates) shared_->list[at] = {key, token};
  };
  // Only parts whose maximum is not below it hold such tokens.
  for (int base = warp; base < kMaxSlots; base += kThreads) {
    const uint32_t hits = __ballot_sync(~0u, shared_->slot_keys[base + lane * kWarps] >= threshold);
    for (uint32_t left = hits; left != 0; left &= left - 1) {
      const int slot = base + (__ffs(static_cast<int>(left)) - 1) * kWarps;
      const int first = slot / groups * task_.part_quads;
      const int last = min(first + task_.part_quads, task_.quads);
      const int rounds = (last - first + kThreads - 1) / kThreads;
      for (int i = lane; i < rounds * group; i += 32) {
        const int quad = first + i / group * kThreads + slot % groups * group + i % group;
        if (quad >= last) continue;
        const float4 v = original ? Quad(quad) : AdjustedQuad(quad);
        keep(quad * 4, v.x);
        keep(quad * 4 + 1, v.y);
        keep(quad * 4 + 2, v.z);
        keep(quad * 4 + 3, v.w);
      }
    }
  }
  __syncthreads();
  return shared_->list_size <= kMaxCandidates;
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
__device__ void Row::DrawFromList() {
  const int size = shared_->list_size, me = static_cast<int>(threadIdx.x);
  const Candidate mine = me < size ? shared_->list[me] : Candidate{0, 0};
  uint64_t weight = 0;
  if (me < size) {
    int larger = 0;
    for (int i = 0; i < size; ++i) larger += shared_->list[i].key > mine.key;
    weight = WeightOf(ValueOf(mine.key));
    if (larger >= spec_.top_k || weight < least_) weight = 0;
    shared_->weights[me] = weight;
  }
  uint64_t total = BlockSum(weight);
  if (spec_.top_p < 1.0f) {
    uint64_t before = 0;
    if (me < size) {
      for (int i = 0; i < size; ++i) {
        const Candidate other = shared_->list[i];
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
      if (shared_->list[i].token < mine.token) before += shared_->weights[i];
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
  for (int i = 0; i < kMine; ++i) {
    const int bin = thread * kMine + i;
    bins[i] = static_cast<uint64_t>(shared_->high[bin]) << 32 | shared_->low[bin];
    sum += bins[i];
  }
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
  __syncthreads();
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
  const uint64_t total = BlockSum(sum);
  const uint64_t wanted =
      by_weight ? NucleusWeight(total, spec_.top_p) : static_cast<uint64_t>(spec_.top_k);
  int bin = FindBin(0, wanted);
  if (bin < 0) return {lowest, kNoLimit};  // fewer than top_k

  uint32_t low = lowest, high = ~0u;  // where the threshold lies, once bins are of keys
  bool linear = true;
  while (bin >= 0) {
    __syncthreads();
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
    __syncthreads();
    low = shared_->key_low;
    high = shared_->key_high;
    if (low == high) {
      if (thread == 0) shared_->threshold = low;
      break;
    }
    const int size = shared_->list_size;
    if (size <= kMaxCandidates) {
      if (thread < size) shared_->weights[thread] = measure_of(ValueOf(shared_->list[thread].key));
      __syncthreads();
      if (thread < size) {
        const uint32_t mine = shared_->list[thread].key;
        uint64_t before = above, equal = 0;
        for (int i = 0; i < size; ++i) {
          const uint32_t key = shared_->list[i].key;
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
    __syncthreads();
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

// Sums over sixteenths of the row, one per warp, tell in which of them the drawn token lies; then
// over sixteenths of that.
__device__ void Row::DrawAbove(const Cut& cut) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  uint64_t each = WeightOf(ValueOf(cut.threshold));  // of those at the threshold
  if (each < least_) each = 0;
  uint32_t ties_left = cut.ties;
  uint64_t target = 0;
  const auto add = [&](float value, uint64_t* sum, uint32_t* ties) {
    const uint32_t key = KeyOf(value);
    if (key == cut.threshold) ++*ties;
    if (key <= cut.threshold) return;
    const uint64_t weight = WeightOf(value);
    if (weight >= least_) *sum += weight;
  };
  int first = 0, last = task_.quads;
  for (bool whole = true; whole || last - first > 32; whole = false) {
    const int part = (last - first + kWarps - 1) / kWarps;
    const int begin = min(first + warp * part, last), end = min(begin + part, last);
    uint64_t sum = 0;
    uint32_t ties = 0;
    ForQuads(begin + lane, end, 32, false, [&](int, const float4& v) {
      add(v.x, &sum, &ties);
      add(v.y, &sum, &ties);
      add(v.z, &sum, &ties);
      add(v.w, &sum, &ties);
    });
    sum = WarpSum(sum);
    ties = WarpSum(ties);
    __syncthreads();
    if (lane == 0) {
      shared_->warp_sums[warp] = sum;
      shared_->warp_ties[warp] = ties;
    }
    __syncthreads();
    if (whole) {
      uint64_t total = 0;
      uint32_t left = ties_left;
      for (int i = 0; i < kWarps; ++i) {
        const uint32_t kept = min(shared_->warp_ties[i], left);
        total += shared_->warp_sums[i] + kept * each;
        left -= kept;
      }
      target = DrawTarget(total, UniformAt(spec_.seed, static_cast<uint64_t>(spec_.position)));
    }
    int chosen = 0;
    for (; chosen < kWarps - 1; ++chosen) {
      const uint32_t kept = min(shared_->warp_ties[chosen], ties_left);
      const uint64_t mine = shared_->warp_sums[chosen] + kept * each;
      if (target < mine) break;
      target -= mine;
      ties_left -= kept;
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
  for (int i = 0; i < 4; ++i) add(values[i], &sum, &ties);
  uint32_t ties_before = ties;
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const uint32_t other = __shfl_up_sync(~0u, ties_before, lanes);
    if (lane >= lanes) ties_before += other;
  }
  ties_before -= ties;
  ties_left -= min(ties_before, ties_left);
  sum += min(ties, ties_left) * each;
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
    add(values[i], &weight, &tie);
    if (tie != 0 && ties_left > 0) {
      weight = each;
      --ties_left;
    }
    before += weight;
    if (before > target) {
      shared_->token = (first + lane) * 4 + i;
      return;
    }
  }
}

__device__ double Row::SumExp() {
  const float maximum = shared_->row.original;
  float sum = 0;
  ForQuads(static_cast<int>(threadIdx.x), task_.quads, kThreads, true, [&](int, const float4& v) {
    sum += (exp2f((v.x - maximum) * 1.44269504f) + exp2f((v.y - maximum) * 1.44269504f)) +
           (exp2f((v.z - maximum) * 1.44269504f) + exp2f((v.w - maximum) * 1.44269504f));
  });
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared_->warp_values[threadIdx.x / 32] = sum;
  __syncthreads();
  double total = 0;
  for (int i = 0; i < kWarps; ++i) total += static_cast<double>(shared_->warp_values[i]);
  return total;
}

__device__ void Row::Score() {
  const double normaliser = static_cast<double>(shared_->row.original) + log(SumExp());
  if (threadIdx.x == 0) {
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
  if (ListLargest(alternatives_, true) && shared_->list_size >= alternatives_) {
    if (thread >= shared_->list_size) return;
    const Candidate mine = shared_->list[thread];
    int rank = 0;
    for (int i = 0; i < shared_->list_size; ++i) {
      const Candidate other = shared_->list[i];
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
  const int split = static_cast<int>(blockIdx.x), index = static_cast<int>(blockIdx.y);
  if (thread < static_cast<int>(sizeof(DrawSpec) / 4)) {
    reinterpret_cast<uint32_t*>(&shared.spec)[thread] =
        __ldcg(reinterpret_cast<const uint32_t*>(task.args.specs + index) + thread);
  }
  __syncthreads();
  Row row(task, index, &shared, bits);
  row.FindMaxima(split);
  if (task.splits > 1) {
    __threadfence();
    __syncthreads();
    if (thread == 0) {
      const uint32_t before = atomicAdd(&task.scratch.arrived[index], 1u);
      shared.last = before + 1 == static_cast<uint32_t>(task.splits);
      if (shared.last) task.scratch.arrived[index] = 0;
      __threadfence();
    }
    __syncthreads();
    if (!shared.last) return;
    __threadfence();
  } else {
    __syncthreads();
  }
  row.Finish();
}

Scratch ScratchAt(void* base, int max_rows, int vocab, size_t* bytes) {
  const size_t rows = static_cast<size_t>(max_rows);
  size_t used = 0;
  const auto take = [&](size_t size) {
    char* at = base == nullptr ? nullptr : static_cast<char*>(base) + used;
    used += Aligned(size);
    return at;
  };
  Scratch scratch;
  scratch.arrived = reinterpret_cast<uint32_t*>(take(rows * sizeof(uint32_t)));
  scratch.counts =
      reinterpret_cast<uint32_t*>(take(rows * static_cast<size_t>(vocab) * sizeof(uint32_t)));
  scratch.partials = reinterpret_cast<Partial*>(take(rows * kMaxSplits * sizeof(Partial)));
  scratch.original_slots = reinterpret_cast<float*>(take(rows * kMaxSlots * sizeof(float)));
  scratch.adjusted_slots = reinterpret_cast<float*>(take(rows * kMaxSlots * sizeof(float)));
  *bytes = used;
  return scratch;
}

}  // namespace

size_t SampleScratchBytes(int max_rows, int vocab) {
  size_t bytes = 0;
  ScratchAt(nullptr, max_rows, vocab, &bytes);
  return bytes;
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
  size_t bytes = 0;
  task.scratch = ScratchAt(scratch, max_rows, vocab, &bytes);
  task.vocab = vocab;
  task.quads = (args.valid_vocab + 3) / 4;
  // Two blocks fit on a multiprocessor.
  task.splits = 1;
  while (task.splits < kMaxSplits && task.splits * args.count < options.multiprocessors) {
    task.splits *= 2;
  }
  // Whole words of the bits by token.
  task.part_quads = ((task.quads + task.splits - 1) / task.splits + 7) / 8 * 8;
  task.slots = std::min(kMaxSlots, task.splits * kThreads);
  task.slot_threads = task.splits * kThreads / task.slots;
  const size_t shared = static_cast<size_t>((task.quads * 4 + 31) / 32) * 2 * sizeof(uint32_t);
  const cudaError_t prepared = cudaFuncSetAttribute(
      SampleKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
  if (prepared != cudaSuccess) return prepared;
  return Launch(SampleKernel,
                dim3(static_cast<unsigned>(task.splits), static_cast<unsigned>(args.count)),
                kThreads, shared, options, task);
}

}  // namespace tandem::engine::cuda
