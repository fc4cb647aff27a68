// The pool of another process, mapped where a store's card can write it (KvStore::MapPeer).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/status.h"

#include "kvtransfer/plan/copy_plan.h"

namespace tandem::kvtransfer {

// Start() belongs to one thread. Outlives its copies; must not outlive its store.
class PeerPool {
 public:
  virtual ~PeerPool() = default;

  class Copy {
   public:
    virtual ~Copy() = default;
    // Until nothing of it is written any more, and what was can be seen by others. False: the grant
    // was gone before all was written. Once, from any thread, before the copy is destroyed.
    virtual bool Wait() = 0;
    // After Wait(), of a whole copy: one per block of the run, over the run's heads.
    virtual std::span<const uint64_t> digests() const = 0;
  };
  // Starts to copy `run` of the store into this pool, and to digest it on the way; does not wait.
  // Copies are done in the order of their start. The card looks at `grant`, which lies in the
  // control pages, all the time, and stops within microseconds when it is not `generation`.
  virtual std::unique_ptr<Copy> Start(const BlockRun& run, const std::atomic<uint64_t>* grant,
                                      uint64_t generation) = 0;
  // For the self-test of a link: has the card read so many bytes of this pool, which harms no block
  // that is in use and takes as long as writing. Before the first Start().
  virtual absl::Status Probe(size_t bytes) = 0;
};

}  // namespace tandem::kvtransfer
