// Memory of the host between two pools, as one store reaches it (KvStore::OpenWindow): pages go out
// of its pool into the window, or out of the window into its pool.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "kvtransfer/store/staged_copies.h"

namespace tandem::kvtransfer {

// Gather() and Fetch() belong to one thread at a time; what they return may be used by another, at
// most kStagedDepth at a time. Outlives it; must not outlive its store.
class HostWindow {
 public:
  virtual ~HostWindow() = default;

  // Starts to copy the pages of `run` into the window from `at` on, one behind the other in the
  // order of BuildCopyPlan(), and to digest them on the way; does not wait. The lists of `run` are
  // read before it returns.
  virtual std::unique_ptr<Gathering> Gather(const BlockRun& run, size_t at) = 0;
  // Starts to bring a part of the window. Its bytes are needed until the last Scatter() has
  // returned.
  virtual std::unique_ptr<Fetched> Fetch(size_t at, size_t bytes) = 0;

  // For the self-test of a link, before the first Gather() or Fetch(). The first moves `pattern`
  // from where the pool's memory is into the window, or, if it is empty, `bytes` of anything; the
  // second fetches so many bytes, and returns them as they came if `wanted`. At most
  // `max_copy_bytes` of OpenWindow().
  virtual void ProbeOut(size_t at, size_t bytes, std::span<const std::byte> pattern) = 0;
  virtual std::vector<std::byte> ProbeIn(size_t at, size_t bytes, bool wanted) = 0;
};

}  // namespace tandem::kvtransfer
