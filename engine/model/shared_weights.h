// One copy of a host's packed weights, in memory that its workers share.
//
// The memory is a memfd that who starts the workers made (`tandem up`), empty, and that they open
// by its path, /proc/PID/fd/N. Who gets its lock first fills it and seals it against every change;
// the others wait for the lock. So what is sealed is finished and can be changed by nobody, and
// what is not sealed is the rest of somebody who died filling it: the lock is free then, and the
// next one begins anew. Nothing outlives the last process. docs/adr/007-shared-weights.md says why
// it is no file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#include "engine/device/buffer.h"

namespace tandem::engine {

// Gives out the shared memory part by part, to be written or, once it is filled, as it is: who
// reads asks for the same parts in the same order as who wrote.
class WeightArena {
 public:
  virtual ~WeightArena() = default;

  // Whether the parts hold their weights; they are read-only then. Otherwise they are zeroed.
  virtual bool filled() const = 0;
  // Parts begin at multiples of the page size, and live independently of the arena.
  virtual absl::StatusOr<Buffer> Take(const std::string& name, size_t bytes) = 0;
};

// Has `use` called with a filled arena of the weights that `key` names. Before, if nobody has
// filled the memory at `path`, `fill` is called with an empty one; what it took must be gone when
// it returns. The errors of both are returned as they are; all others are UNAVAILABLE: the memory
// cannot be had, or holds something else. Then weights have to be loaded without it.
absl::Status UseSharedWeights(const std::string& path, const std::string& key,
                              const std::function<absl::Status(WeightArena*)>& fill,
                              const std::function<absl::Status(WeightArena*)>& use);

// Bytes that the memory at `path` takes already; 0 where it cannot be opened.
size_t SharedWeightsSize(const std::string& path);

}  // namespace tandem::engine
