// The seam between the worker loops and the model: one forward pass over a ragged batch, in two
// halves, so that the host can prepare step n + 1 while the device computes step n.
//
//   depth 1:  Launch(n)  Collect(n)  Launch(n + 1)  Collect(n + 1) ...
//   depth 2:  Launch(n)  Launch(n + 1)  Collect(n)  Launch(n + 2)  Collect(n + 1) ...
//
// At depth 2 step n + 1 takes tokens that step n draws without the host knowing them
// (BatchItem::pending). That a sequence ended is seen one step late: its token of step n + 1 is
// dropped, and its blocks may be given to others only once step n + 1 was collected.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"

#include "common/base/ready_event.h"
#include "engine/runtime/batch.h"

namespace tandem::engine {

struct LaunchedStep {
  StepId id = 0;
  // [num_layers] where the batch wanted them, else empty. Event i is true when the KV of the whole
  // batch lies in the pool in layers 0..i, or when the step failed or was abandoned.
  std::vector<std::shared_ptr<const ReadyEvent>> layer_ready;
};

// Not thread-safe: one worker loop owns it. The events may be waited for by other threads; the
// loop's own thread must not wait for them, for a runner on the CPU may compute inside Collect.
//
// A sequence's output does not depend on what else is in the batch, on how its prompt was cut into
// chunks, on the block size, or on the depth (float32: bit-identical).
class ModelRunner {
 public:
  // Abandons what was not collected.
  virtual ~ModelRunner() = default;

  // Steps that may be launched and not yet collected; at least 1.
  virtual int max_in_flight() const { return 1; }

  // Begins to write KV of all tokens of the batch into the pool and to sample where asked; steps
  // run in the order of launching. Copies what it needs of the batch: nothing in it is read after
  // the return. The blocks must stay leased until the step is collected.
  // INVALID_ARGUMENT, with nothing launched, for a batch that contradicts itself or the pool, or
  // exceeds max_num_batched_tokens.
  virtual absl::StatusOr<LaunchedStep> Launch(const Batch& batch) = 0;

  // Waits for the oldest launched step, which is `step`, and gives its output. An error means that
  // nothing of the batch may be used (its KV is undefined); the steps after it can still be
  // collected, and items whose pending token was to come from the failed one fail.
  virtual absl::StatusOr<StepOutput> Collect(StepId step) = 0;

  // Grows while a step is computed, as far as the host sees it: by layers, where steps run on the
  // host. Null: only whole steps are seen. May be read by any thread.
  virtual const std::atomic<uint64_t>* progress() const { return nullptr; }

  // Launch and Collect at once, with nothing else in flight.
  absl::StatusOr<StepOutput> Run(const Batch& batch) {
    absl::StatusOr<LaunchedStep> step = Launch(batch);
    if (!step.ok()) return step.status();
    return Collect(step->id);
  }
};

}  // namespace tandem::engine
