// What the ranks of one model do together. A model that is split over several devices (tensor
// parallelism) has a rank for each: a device, a stream, and an end of the collective.
#pragma once

#include <cstddef>

#include "absl/status/status.h"

#include "engine/device/device.h"
#include "engine/device/stream.h"

namespace tandem::engine {

// One rank's end. Belongs to the thread that gives work to the rank's stream. All ranks call the
// same functions with the same counts in the same order, each on a thread of its own: a call may
// wait for the others.
class Collective {
 public:
  virtual ~Collective() = default;

  virtual int rank() const = 0;
  virtual int size() const = 0;  // ranks

  // Before the first sum, once: allocates what sums of up to `most` values need on the rank's
  // device, which outlives this end's use. ABORTED where another rank failed.
  virtual absl::Status Prepare(Device* /*device*/, size_t /*most*/) { return absl::OkStatus(); }

  // A sum over ranks in memory of each rank's device: values[0, count) are equal on all ranks
  // before BeginSum(). Between the two calls every rank adds its part to what BeginSum() returns,
  // and behind EndSum() all have the values from before and all parts added to them in `values`,
  // the same bits everywhere. (BeginSum() returns `values` on rank 0 and zeros on the others.)
  virtual float* BeginSum(float* values, size_t count, Stream* stream) = 0;
  virtual void EndSum(float* values, size_t count, Stream* stream) = 0;
  // Returns when the threads of all ranks have called it: between what a rank allocates or frees,
  // for which the driver may wait for a device, and sums in which that device waits for the rank.
  virtual void Meet() {}
  // The least value that any rank gives. What ranks size by the memory that each finds must be
  // equal on all, so that it later grows on all in the same step (Meet()). On the host nothing
  // depends on that, and each keeps its own.
  virtual int Least(int value) { return value; }
  // Whether sums can be recorded (Stream::Capture).
  virtual bool recordable() const { return true; }
};

// All ends, for who makes the ranks.
class Ranks {
 public:
  virtual ~Ranks() = default;

  virtual Collective* at(int rank) const = 0;
  // A rank is given up: the others no longer wait for it, and sums mean nothing from now on.
  virtual void Abort() {}
  // INTERNAL once a rank waited in vain for another: what was computed since then means nothing.
  virtual absl::Status status() const { return absl::OkStatus(); }
};

}  // namespace tandem::engine
