// Sums over the ranks of a model (engine/device/collective.h) on devices that reach each other's
// memory by plain pointers: the same device, or peer access. All ranks have the same bits: parts
// are added in the order of ranks.
//
// Two ways for ranks to wait for each other:
//
// - On the device: OneShotSum and SumInPlace. Each rank's kernel spins until the others' are there
//   too, block by block. Nothing of it is the host's, so it can be recorded and played again: the
//   number of a meeting (its epoch) is counted in memory of the device, and all ranks give their
//   streams the same sums. Every rank needs a device of its own. On one that is shared it could
//   hang: a kernel that spins holds a place, the other rank's product that it waits for may be one
//   whose thread blocks take a whole multiprocessor each and wait for each other, and of those the
//   last would never be placed. Streams that share a hardware queue, and kernels that are loaded
//   when they are first called, are further ways to the same end.
//   On a device of its own only a rank's own stream has kernels that wait, and what is behind
//   a sum may start beside it: it waits for nobody but its predecessor.
// - In the streams: AddSlices computes one rank's share of a sum between two meetings, which the
//   host arranges by events (cuda_ranks.h). Nothing spins.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>

#include "engine/kernels/cuda/launch.h"

namespace tandem::engine::cuda {

inline constexpr int kMaxCudaRanks = 8;
inline constexpr int kSumBlocks = 64;  // at most, of a sum
// Of the values of a one-shot sum, in a thread block.
inline constexpr int kSumBlockFloats = 8192;
inline constexpr size_t kOneShotFloats = size_t{kSumBlocks} * kSumBlockFloats;

// Where a rank's values are: what it adds, and what is to be the sum.
struct SumPlace {
  float* part = nullptr;  // zeroed behind the sum, but for rank 0, whose part is `values` itself
  float* values = nullptr;
};

// What the others write to of a rank's memory, zeroed at first.
struct RankMailbox {
  uint32_t arrived[kSumBlocks][kMaxCudaRanks];  // the last epoch, by its block and by rank
  uint32_t epochs[kSumBlocks];                  // the rank's own
  SumPlace places[kSumBlocks][kMaxCudaRanks];
  // Followed by float [2][ranks][kSumBlocks][kSumBlockFloats]: parts of one-shot sums, those of odd
  // epochs and of even ones.
  static size_t Bytes(int ranks) {
    return sizeof(RankMailbox) + 2 * static_cast<size_t>(ranks) * kOneShotFloats * sizeof(float);
  }
};
static_assert(sizeof(RankMailbox) % 16 == 0);

// Why ranks no longer wait, in memory of the host that all devices read and write.
struct SumBreak {
  static constexpr uint32_t kAborted = 1;  // by the host
  static constexpr uint32_t kMissing = 2;  // + the rank that did not come in time
  uint32_t why = 0;                        // 0: they do
};

struct RankSumArgs {
  RankMailbox* mailboxes[kMaxCudaRanks] = {};  // of all ranks
  SumBreak* broken = nullptr;
  SumPlace place;  // the rank's own
  int64_t count = 0;
  int rank = 0, ranks = 0;
};

// For count <= kOneShotFloats: everybody sends the whole part to everybody. One meeting.
cudaError_t OneShotSum(const RankSumArgs& args, const LaunchOptions& options);
// For any count: each rank adds up a slice in the memory of all. Two meetings.
cudaError_t SumInPlace(const RankSumArgs& args, const LaunchOptions& options);

// A rank's slice, to all ranks: places[0, ranks), whose parts stay as they are.
struct AddSlicesArgs {
  SumPlace places[kMaxCudaRanks];
  int64_t count = 0;
  int rank = 0, ranks = 0;
};
cudaError_t AddSlices(const AddSlicesArgs& args, const LaunchOptions& options);

}  // namespace tandem::engine::cuda
