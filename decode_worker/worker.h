// One decode worker process: engine, loop, KV listener, RPC server and membership, put together.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/rpc/server.h"
#include "engine/runtime/engine.h"

namespace tandem {

// Mirrors the flags of the same names.
struct DecodeWorkerOptions {
  EngineOptions engine;
  std::string worker_id;
  std::string router;  // HOST:PORT; empty: no cluster, for tests
  std::string listen = "127.0.0.1:0";
  std::string metrics_listen = "127.0.0.1:0";
  std::string kv_listen = "127.0.0.1:0";
  std::string advertise_host;     // empty: the host of `listen`
  std::string role = "decode";    // decode, unified
  std::string served_model_name;  // empty: the model directory's name
  std::string cluster_secret;
  int local_prefill_max_tokens = 32;
  double drain_timeout = 30;     // s
  double kv_seal_timeout = 10;   // s
  double prefill_timeout = 600;  // s
};

class DecodeWorker {
 public:
  // Everything is bound and announced when it returns. `signals` is woken when the router asks for
  // a drain or refuses the worker.
  static absl::StatusOr<std::unique_ptr<DecodeWorker>> Start(const DecodeWorkerOptions& options,
                                                             SignalWaiter* signals);
  virtual ~DecodeWorker() = default;

  virtual const std::string& address() const = 0;  // as bound
  virtual const std::string& metrics_address() const = 0;
  // Refuses new work, finishes what runs (up to drain_timeout), leaves the cluster. Not OK if the
  // router had refused the worker.
  virtual absl::Status Drain() = 0;
};

}  // namespace tandem
