// One decode worker process: the role inside the frame of worker/worker.h.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "common/rpc/worker_process.h"
#include "engine/runtime/engine.h"

namespace tandem::decode {

// Mirrors the flags of the same names.
struct WorkerOptions {
  engine::EngineOptions engine;
  WorkerProcessOptions process;
  std::string role = "decode";  // decode, unified
  int local_prefill_max_tokens = 32;
  int prefill_window = 4096;         // tokens
  double target_step_ms = -1;        // 0: off; -1: 30 on a GPU, off on a CPU
  std::string speculative = "none";  // ngram
  double kv_seal_timeout = 10;       // s
  double prefill_timeout = 600;      // s
};

// As worker::StartWorker.
absl::StatusOr<std::unique_ptr<WorkerProcess>> StartWorker(const WorkerOptions& options,
                                                           SignalWaiter* signals);

}  // namespace tandem::decode
