// The whole prefill worker process but for its flags: engine, KV sender, loop thread, RPC server,
// membership and metrics.
#pragma once

#include <memory>

#include "absl/status/statusor.h"

#include "common/rpc/worker_process.h"
#include "engine/runtime/engine.h"

namespace tandem::prefill {

// Mirrors the flags of the same names.
struct PrefillWorkerOptions {
  engine::EngineOptions engine;
  WorkerProcessOptions process;
  int max_waiting = 1024;  // prompts waiting for KV blocks
};

// Serving when it returns. `signals` is woken when the router asks to drain or refuses the worker,
// and outlives it.
absl::StatusOr<std::unique_ptr<WorkerProcess>> StartPrefillWorker(
    const PrefillWorkerOptions& options, SignalWaiter* signals);

}  // namespace tandem::prefill
