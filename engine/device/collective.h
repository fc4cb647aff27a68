// What the ranks of one model do together. A model that is split over several devices (tensor
// parallelism) has a rank for each: a device, a stream, and an end of the collective.
#pragma once

#include <cstddef>

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

  // A sum over ranks in memory of each rank's device: values[0, count) are equal on all ranks
  // before BeginSum(). Between the two calls every rank adds its part to its own, and behind
  // EndSum() all have the values from before and all parts added to them, the same bits
  // everywhere. (BeginSum() sets them to zero on all ranks but the first.)
  virtual void BeginSum(float* values, size_t count, Stream* stream) = 0;
  virtual void EndSum(float* values, size_t count, Stream* stream) = 0;
};

}  // namespace tandem::engine
