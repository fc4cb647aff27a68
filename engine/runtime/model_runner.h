// The seam between the worker loops and the model: one forward pass over a ragged batch.
#pragma once

#include "absl/status/statusor.h"

#include "engine/runtime/batch.h"

namespace tandem {

// Not thread-safe: one worker loop owns it.
//
// A sequence's output does not depend on what else is in the batch, on how its prompt was cut into
// chunks, or on the block size (float32: bit-identical).
class ModelRunner {
 public:
  virtual ~ModelRunner() = default;

  // Writes KV of all computed tokens into the pool and samples where asked. The batch must fit
  // max_num_batched_tokens. An error means that nothing of the batch may be used (its KV is
  // undefined).
  virtual absl::StatusOr<StepOutput> Run(const Batch& batch) = 0;
};

}  // namespace tandem
