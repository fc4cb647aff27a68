#include <algorithm>

#include "engine/kernels/cuda/ptx.cuh"
#include "engine/kernels/cuda/rank_sum.h"

namespace tandem::engine::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kOwn = kSumBlockFloats / kThreads;  // values of a thread in a one-shot sum
static_assert(kOwn % 4 == 0);
// Between ranks that are given the same step at the same time.
constexpr uint64_t kMostWait = 20'000'000'000;  // ns; less than --step-timeout, which names no rank
constexpr int kSpinsPerLook = 1024;

__device__ void StoreRelease(uint32_t* to, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}

__device__ uint32_t LoadAcquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}

__device__ uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// kVector values that another rank may have written, past all caches that do not know of it.
template <int kVector>
__device__ void LoadShared(const float* from, float (&to)[kVector]) {
  if constexpr (kVector == 4) {
    asm volatile("ld.volatile.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
                 : "l"(from)
                 : "memory");
  } else {
    asm volatile("ld.volatile.global.f32 %0, [%1];" : "=f"(to[0]) : "l"(from) : "memory");
  }
}

template <int kVector>
__device__ void Store(float* to, const float (&from)[kVector]) {
  if constexpr (kVector == 4) {
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  } else {
    *to = from[0];
  }
}

template <int kVector>
__device__ void Zero(float* to) {
  constexpr float kZeros[kVector] = {};
  Store<kVector>(to, kZeros);
}

// This thread block and those of its number of the other ranks.
class Meeting {
 public:
  __device__ explicit Meeting(const RankSumArgs& args)
      : args_(args), own_(args.mailboxes[args.rank]), block_(static_cast<int>(blockIdx.x)) {
    epoch_ = *const_cast<volatile uint32_t*>(&own_->epochs[block_]);
  }

  // Of the meeting to come.
  __device__ uint32_t next_epoch() const { return epoch_ + 1; }

  // All threads: what they wrote before is seen by the other ranks' behind it. False: not all came.
  __device__ bool Wait() {
    ++epoch_;
    __threadfence_system();
    __syncthreads();
    const int other = static_cast<int>(threadIdx.x);
    bool came = true;
    if (other < args_.ranks && other != args_.rank) {
      StoreRelease(&args_.mailboxes[other]->arrived[block_][args_.rank], epoch_);
      came = WaitFor(other);
    }
    return __syncthreads_and(came);
  }

  // Once, behind the last one.
  __device__ void End() {
    if (threadIdx.x == 0) own_->epochs[block_] = epoch_;
  }

 private:
  __device__ bool IsHere(int other) const {
    return static_cast<int32_t>(LoadAcquire(&own_->arrived[block_][other]) - epoch_) >= 0;
  }

  // Who does not come in time ends all waiting, or the card would hang for ever. What is computed
  // from then on means nothing, and the host asks before it uses it (CudaRanks::status).
  __device__ bool WaitFor(int other) {
    const uint64_t begin = Nanoseconds();
    for (int spins = 1; !IsHere(other); ++spins) {
      if (spins % kSpinsPerLook != 0) continue;
      if (LoadAcquire(&args_.broken->why) != 0) return false;
      if (Nanoseconds() - begin < kMostWait) continue;
      StoreRelease(&args_.broken->why, SumBreak::kMissing + static_cast<uint32_t>(other));
      return false;
    }
    return true;
  }

  const RankSumArgs& args_;
  RankMailbox* const own_;
  const int block_;
  uint32_t epoch_;
};

// Inboxes are used in turn: who sends for an epoch has met the receiver in the one before, and that
// one had by then read what was sent for the one before that.
template <int kVector>
__global__ __launch_bounds__(kThreads) void OneShotSumKernel(
    const __grid_constant__ RankSumArgs a) {
  WaitForPredecessor();
  LetSuccessorStart();
  Meeting meeting(a);
  const int64_t per_block =
      ((a.count + gridDim.x - 1) / gridDim.x + kVector - 1) / kVector * kVector;
  const int64_t first = blockIdx.x * per_block;
  const int length = static_cast<int>(max(int64_t{0}, min(per_block, a.count - first)));
  const size_t half = meeting.next_epoch() % 2;
  const auto inbox = [&](int of, int from) {
    float* floats = reinterpret_cast<float*>(a.mailboxes[of] + 1);
    const size_t slot =
        (half * static_cast<size_t>(a.ranks) + static_cast<size_t>(from)) * kSumBlocks + blockIdx.x;
    return floats + slot * kSumBlockFloats;
  };
  float own[kOwn / kVector][kVector];
#pragma unroll
  for (int i = 0; i < kOwn / kVector; ++i) {
    const int at = (i * kThreads + static_cast<int>(threadIdx.x)) * kVector;
    if (at >= length) break;
    LoadShared<kVector>(a.place.part + first + at, own[i]);
    for (int other = 0; other < a.ranks; ++other) {
      if (other != a.rank) Store<kVector>(inbox(other, a.rank) + at, own[i]);
    }
    if (a.rank > 0) Zero<kVector>(a.place.part + first + at);
  }
  meeting.Wait();
#pragma unroll
  for (int i = 0; i < kOwn / kVector; ++i) {
    const int at = (i * kThreads + static_cast<int>(threadIdx.x)) * kVector;
    if (at >= length) break;
    float sum[kVector] = {};
    for (int rank = 0; rank < a.ranks; ++rank) {
      float part[kVector] = {};
      if (rank != a.rank) LoadShared<kVector>(inbox(a.rank, rank) + at, part);
#pragma unroll
      for (int e = 0; e < kVector; ++e) {
        const float value = rank == a.rank ? own[i][e] : part[e];
        sum[e] = rank == 0 ? value : sum[e] + value;
      }
    }
    Store<kVector>(a.place.values + first + at, sum);
  }
  meeting.End();
}

// Calls `visit(first of kVector values)` for those of a rank's slice that are this thread's.
template <int kVector, typename Visit>
__device__ void ForSlice(int64_t count, int rank, int ranks, const Visit& visit) {
  const int64_t units = (count + kVector - 1) / kVector;
  const int64_t begin = units * rank / ranks, end = units * (rank + 1) / ranks;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t unit = begin + static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; unit < end;
       unit += step) {
    visit(unit * kVector);
  }
}

template <int kVector>
__device__ void AddSlice(const SumPlace* places, int64_t count, int rank, int ranks) {
  ForSlice<kVector>(count, rank, ranks, [&](int64_t at) {
    float sum[kVector];
    LoadShared<kVector>(places[0].part + at, sum);
    for (int other = 1; other < ranks; ++other) {
      float part[kVector];
      LoadShared<kVector>(places[other].part + at, part);
#pragma unroll
      for (int e = 0; e < kVector; ++e) sum[e] += part[e];
    }
    for (int other = 0; other < ranks; ++other) Store<kVector>(places[other].values + at, sum);
  });
}

template <int kVector>
__global__ __launch_bounds__(kThreads) void SumInPlaceKernel(
    const __grid_constant__ RankSumArgs a) {
  __shared__ SumPlace places[kMaxCudaRanks];
  WaitForPredecessor();
  LetSuccessorStart();
  Meeting meeting(a);
  const int other = static_cast<int>(threadIdx.x);
  if (other < a.ranks) a.mailboxes[other]->places[blockIdx.x][a.rank] = a.place;
  if (!meeting.Wait()) return meeting.End();
  if (other < a.ranks) {
    const volatile SumPlace* place = &a.mailboxes[a.rank]->places[blockIdx.x][other];
    places[other].part = place->part;
    places[other].values = place->values;
  }
  __syncthreads();
  AddSlice<kVector>(places, a.count, a.rank, a.ranks);
  meeting.Wait();
  meeting.End();
  if (a.rank == 0) return;
  // Of every slice what this block's companions have read.
  for (int rank = 0; rank < a.ranks; ++rank) {
    ForSlice<kVector>(a.count, rank, a.ranks,
                      [&](int64_t at) { Zero<kVector>(a.place.part + at); });
  }
}

template <int kVector>
__global__ __launch_bounds__(kThreads) void AddSlicesKernel(
    const __grid_constant__ AddSlicesArgs a) {
  WaitForPredecessor();
  AddSlice<kVector>(a.places, a.count, a.rank, a.ranks);
}

dim3 BlocksFor(int64_t count, int vector, int most) {
  const int64_t per_block = int64_t{kThreads} * vector;
  return dim3(static_cast<unsigned>(std::min<int64_t>(most, (count + per_block - 1) / per_block)));
}

bool IsAligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Of all ranks alike: their sums have the same counts, and memory of devices is aligned.
bool InVectors(const SumPlace& place, int64_t count) {
  return count % 4 == 0 && IsAligned(place.part) && IsAligned(place.values);
}

bool Good(int64_t count, int rank, int ranks) {
  return count > 0 && ranks > 1 && ranks <= kMaxCudaRanks && rank >= 0 && rank < ranks;
}

}  // namespace

cudaError_t OneShotSum(const RankSumArgs& args, const LaunchOptions& options) {
  if (!Good(args.count, args.rank, args.ranks) ||
      args.count > static_cast<int64_t>(kOneShotFloats)) {
    return cudaErrorInvalidValue;
  }
  if (InVectors(args.place, args.count)) {
    return Launch(OneShotSumKernel<4>, BlocksFor(args.count, 4, kSumBlocks), kThreads, 0, options,
                  args);
  }
  return Launch(OneShotSumKernel<1>, BlocksFor(args.count, 1, kSumBlocks), kThreads, 0, options,
                args);
}

cudaError_t SumInPlace(const RankSumArgs& args, const LaunchOptions& options) {
  if (!Good(args.count, args.rank, args.ranks)) return cudaErrorInvalidValue;
  const bool vectors = InVectors(args.place, args.count);
  return Launch(vectors ? SumInPlaceKernel<4> : SumInPlaceKernel<1>,
                BlocksFor(args.count, vectors ? 4 : 1, kSumBlocks), kThreads, 0, options, args);
}

cudaError_t AddSlices(const AddSlicesArgs& args, const LaunchOptions& options) {
  if (!Good(args.count, args.rank, args.ranks)) return cudaErrorInvalidValue;
  const bool vectors = InVectors(args.places[args.rank], args.count);
  return Launch(vectors ? AddSlicesKernel<4> : AddSlicesKernel<1>,
                BlocksFor(args.count, vectors ? 4 : 1, 4 * options.multiprocessors), kThreads, 0,
                options, args);
}

}  // namespace tandem::engine::cuda
