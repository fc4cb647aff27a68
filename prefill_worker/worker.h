// The whole prefill worker process but for its flags: engine, KV sender, loop thread, RPC server,
// membership and metrics.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"

#include "common/rpc/server.h"
#include "engine/runtime/engine.h"

namespace tandem {

// Mirrors the flags of the same names.
struct PrefillWorkerOptions {
  EngineOptions engine;
  std::string router;  // empty: stand alone
  std::string listen = "127.0.0.1:0";
  std::string metrics_listen = "127.0.0.1:0";
  std::string advertise_host;  // empty: the host of `listen`
  std::string worker_id;
  std::string served_model_name;  // empty: the model directory's
  std::string cluster_secret;
  int max_waiting = 1024;     // prompts waiting for KV blocks
  double drain_timeout = 30;  // seconds
};

// Used by one thread.
class PrefillWorker {
 public:
  // Serving when it returns. `signals` is woken when the router asks to drain or refuses the
  // worker, and outlives it.
  static absl::StatusOr<std::unique_ptr<PrefillWorker>> Start(const PrefillWorkerOptions& options,
                                                              SignalWaiter* signals);
  virtual ~PrefillWorker() = default;  // gives up what still runs

  virtual const std::string& address() const = 0;
  virtual const std::string& metrics_address() const = 0;
  // Refuses new prompts, finishes those it has (up to drain_timeout), leaves the cluster. An error
  // if the router had refused the worker: one line that says why.
  virtual absl::Status Drain() = 0;
};

}  // namespace tandem
