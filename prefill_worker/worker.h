// One prefill worker process: the role inside the frame of worker/worker.h.
#pragma once

#include <memory>

#include "absl/status/statusor.h"

#include "common/rpc/worker_process.h"
#include "engine/runtime/engine.h"

namespace tandem::prefill {

// Mirrors the flags of the same names.
struct WorkerOptions {
  engine::EngineOptions engine;
  WorkerProcessOptions process;
  int max_waiting = 1024;        // prompts waiting for KV blocks
  double kv_return_timeout = 2;  // s; 0: no blocks are asked back from decode workers
};

// As worker::StartWorker.
absl::StatusOr<std::unique_ptr<WorkerProcess>> StartWorker(const WorkerOptions& options,
                                                           SignalWaiter* signals);

}  // namespace tandem::prefill
