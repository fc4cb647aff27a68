// One decode worker process: engine, loop, KV listener, RPC server and membership, put together.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "common/rpc/worker_process.h"
#include "engine/runtime/engine.h"

namespace tandem::decode {

// Mirrors the flags of the same names.
struct DecodeWorkerOptions {
  engine::EngineOptions engine;
  WorkerProcessOptions process;
  std::string kv_listen = "127.0.0.1:0";
  std::string role = "decode";  // decode, unified
  int local_prefill_max_tokens = 32;
  double kv_seal_timeout = 10;   // s
  double prefill_timeout = 600;  // s
};

// Everything is bound and announced when it returns. `signals` is woken when the router asks for a
// drain or refuses the worker, and outlives it.
absl::StatusOr<std::unique_ptr<WorkerProcess>> StartDecodeWorker(const DecodeWorkerOptions& options,
                                                                 SignalWaiter* signals);

}  // namespace tandem::decode
