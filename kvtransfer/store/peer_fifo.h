// A FIFO between the memory of two pools, in two processes of one host or of two
// (KvStore::JoinFifo): what the writer's end gathers comes to the reader's end in the same order.
// Nothing is matched by name: the n-th Fetch() takes the n-th Gather(), and both say how many bytes
// that is.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "kvtransfer/store/staged_copies.h"

namespace tandem::kvtransfer {

enum class FifoEnd { kWriter, kReader };

// Gather() and Fetch() belong to one thread at a time; what they return may be used by another, at
// most kStagedDepth at a time. Outlives it; must not outlive its store. Every wait ends after the
// patience that JoinFifo() was given, and soon after Abort(); the FIFO is of no use then.
class PeerFifo {
 public:
  virtual ~PeerFifo() = default;

  // Waits until the other end has joined. UNAVAILABLE says why it has not.
  virtual absl::Status AwaitPeer() = 0;

  // The writer's end. Starts to send the pages of `run`, one behind the other in the order of
  // BuildCopyPlan(), and to digest them on the way; does not wait. The lists of `run` are read
  // before it returns.
  virtual std::unique_ptr<Gathering> Gather(const BlockRun& run) = 0;
  // The reader's end. Starts to take what comes next.
  virtual std::unique_ptr<Fetched> Fetch(size_t bytes) = 0;

  // For the self-test of a link, before the first Gather() or Fetch(): the same with `pattern`, or
  // with `bytes` of anything if that is empty; the second returns what came if `wanted`. At most
  // `max_copy_bytes` of JoinFifo().
  virtual absl::Status ProbeOut(size_t bytes, std::span<const std::byte> pattern) = 0;
  virtual absl::StatusOr<std::vector<std::byte>> ProbeIn(size_t bytes, bool wanted) = 0;

  // Thread-safe. Whoever waits is told UNAVAILABLE.
  virtual void Abort() = 0;
};

}  // namespace tandem::kvtransfer
