// Pages on their way between a pool and what a frame goes through: memory of the host (HostWindow),
// or a FIFO to another pool (PeerFifo).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"

#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {

// So many gatherings, or fetches, of one window or FIFO may be there at a time: one is read, one
// travels, one is written.
inline constexpr size_t kStagedDepth = 3;

// Pages that leave the pool. Destroying it waits for them.
class Gathering {
 public:
  virtual ~Gathering() = default;
  // Until the pool's pages are no longer read and digests() is known; of a window also until they
  // are there for other processes. UNAVAILABLE: the way is gone.
  virtual absl::Status Wait() = 0;
  // One per block of the run, over the run's heads.
  virtual std::span<const uint64_t> digests() const = 0;
};

// A frame that comes to where the pool's memory is. Destroying it waits for that.
class Fetched {
 public:
  virtual ~Fetched() = default;
  // UNAVAILABLE: the way is gone, and nothing may be scattered.
  virtual absl::Status Wait() = 0;
  // After Wait(): copies into the pool, piece.source_offset of the frame -> target_offset.
  virtual void Scatter(std::span<const CopyPiece> pieces) = 0;
};

}  // namespace tandem::kvtransfer
