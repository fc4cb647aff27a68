// How copies between a pool and memory of the host are cut for a device: into pieces that one warp
// copies, and into batches that one launch copies through a buffer of bounded size. Pure functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {

// Which offsets of a CopyPiece are the pool's.
enum class CopyDirection { kFromPool, kIntoPool };

// One warp's copy, as a kernel reads it.
struct StagedPiece {
  uint64_t pool_offset = 0;
  uint64_t host_offset = 0;    // from the address that the caller named
  uint64_t buffer_offset = 0;  // from the buffer's beginning
  uint64_t bytes = 0;

  bool operator==(const StagedPiece&) const = default;
};

struct StagingLimits {
  size_t piece_bytes = 0;   // a multiple of kStagingAlignment
  size_t max_pieces = 0;    // of a batch
  size_t buffer_bytes = 0;  // at least piece_bytes + kStagingAlignment
};
// Where both sides of a copy are at such a distance of each other, a kernel copies whole vectors;
// in the buffer they always are.
inline constexpr size_t kStagingAlignment = 16;

class StagingPlan {
 public:
  // `copies` outlives the plan.
  StagingPlan(std::span<const CopyPiece> copies, CopyDirection direction,
              const StagingLimits& limits)
      : copies_(copies), direction_(direction), limits_(limits) {}

  // The next batch, which is empty after the last. The pieces of all batches are the copies, in
  // their order; within a batch they do not overlap in the buffer.
  const std::vector<StagedPiece>& Next();

 private:
  const std::span<const CopyPiece> copies_;
  const CopyDirection direction_;
  const StagingLimits limits_;
  size_t copy_ = 0;    // the copy that the next batch begins with,
  uint64_t done_ = 0;  // and how much of it was planned
  std::vector<StagedPiece> batch_;
};

}  // namespace tandem::kvtransfer
