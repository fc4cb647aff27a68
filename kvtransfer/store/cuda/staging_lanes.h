// Buffers of a card that frames pass through on their way into a pool or out of it, each with a
// stream of its own, so that one frame is gathered while another travels.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cuda_runtime.h>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

#include "common/base/kv_layout.h"
#include "kvtransfer/plan/copy_plan.h"
#include "kvtransfer/store/cuda/page_kernels.h"
#include "kvtransfer/store/staged_copies.h"

namespace tandem::kvtransfer::cuda {

// kStagedDepth lanes over one pool. Thread-safe, but a lane belongs to one thread at a time.
class StagingLanes {
 public:
  struct Lane {
    cudaStream_t stream = nullptr;
    cudaEvent_t end = nullptr;
    std::byte* buffer = nullptr;  // on the card
    // Pinned, in one allocation.
    std::byte* tables = nullptr;
    PlacedBlock* blocks = nullptr;
    uint64_t* digests = nullptr;
    StagedPiece* pieces = nullptr;
  };
  // A lane while a copy has it; its stream is idle at the end. The card is the calling thread's
  // afterwards.
  class Lease {
   public:
    explicit Lease(StagingLanes* lanes);
    ~Lease();
    Lease(const Lease&) = delete;
    const Lane* operator->() const { return lane_; }

   private:
    StagingLanes* const lanes_;
    const Lane* lane_ = nullptr;
  };
  // The digests that Gather() makes, by block.
  class Digests {
   public:
    explicit Digests(const BlockRun& run)
        : by_block_(run.source_blocks.size(), 0),
          pages_per_block_(2 * static_cast<size_t>(run.heads.count)),
          layers_(static_cast<size_t>(run.layer_count)) {}
    // Once, when the lane's kernel is done.
    void Take(const Lease& lane);
    std::span<const uint64_t> by_block() const { return by_block_; }

   private:
    std::vector<uint64_t> by_block_;
    const size_t pages_per_block_;
    const size_t layers_;
  };

  // For copies of at most `max_copy_bytes` each. `region` lies in the memory of `device` and
  // outlives the lanes. RESOURCE_EXHAUSTED says how much memory they need.
  static absl::StatusOr<std::unique_ptr<StagingLanes>> Open(const KvRegion& region, int device,
                                                            size_t max_copy_bytes);
  ~StagingLanes();

  int device() const { return device_; }
  // Starts to copy the pages of `run` to `to`, which the card reaches, one behind the other, and to
  // digest them on the way. The lists of `run` are read before it returns.
  void Gather(const Lease& lane, const BlockRun& run, std::byte* to) const;
  // Copies from + piece.source_offset -> the pool at target_offset, and waits for it.
  void Scatter(const Lease& lane, const std::byte* from, std::span<const CopyPiece> pieces) const;

 private:
  StagingLanes(const KvRegion& region, int device)
      : region_(region), shape_(ShapeOf(region)), device_(device) {}

  const KvRegion region_;
  const KvPoolShape shape_;
  const int device_;
  std::array<Lane, kStagedDepth> lanes_;  // what they name is a copy's while it has them
  absl::Mutex mutex_;
  std::vector<const Lane*> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::kvtransfer::cuda
