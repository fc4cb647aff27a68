// The frame of every worker process: engine, metrics, RPC server, membership, the loop's thread and
// the drain. A Role adds what one kind of worker does inside it.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "grpcpp/grpcpp.h"

#include "common/base/clock.h"
#include "common/base/trace.h"
#include "common/metrics/metrics.h"
#include "common/rpc/cluster_clients.h"
#include "common/rpc/cluster_credentials.h"
#include "common/rpc/worker_process.h"
#include "engine/runtime/engine.h"
#include "worker/reports.h"

namespace tandem::worker {

// What a role builds upon. All of it outlives the role.
struct Frame {
  engine::Engine* engine = nullptr;
  Metrics* metrics = nullptr;
  Clock* clock = nullptr;
  SpanSink* spans = nullptr;  // null: nothing is traced
  const WorkerProcessOptions* process = nullptr;
  std::shared_ptr<const ClusterCredentials> credentials;
  std::function<TlsTexts()> tls;  // of KV connections; empty: none
  std::string capability_digest;  // what peers must present
  Reports reports;                // for the role's loop
};

// One kind of worker. Start, FillHello and Run are called in this order; Post, from any thread, at
// any time after Start.
class Role {
 public:
  virtual ~Role() = default;

  // What it is to others of the cluster, and what those are who may call its service (common/auth).
  virtual std::string party_role() const = 0;
  virtual std::vector<std::string> callers() const = 0;
  // The label `role` of its metrics.
  virtual std::string metrics_role() const { return party_role(); }
  // Makes the loop and its KV endpoint.
  virtual absl::Status Start(const Frame& frame) = 0;
  // The RPC edge. Its calls end when Run() has returned.
  virtual grpc::Service* service() = 0;
  // The role's own fields: its name, and what only it has.
  virtual void FillHello(internal::v1::Hello* hello) const = 0;
  // What its routers vouch with is told to; null: nobody asks. Lives as long as the role.
  virtual VoucherCheck* vouchers() { return nullptr; }
  // The loop, on a thread of its own: until StopWanted, or until nothing is left after DrainWanted.
  // Nobody waits for an answer when it returns.
  virtual void Run() = 0;
  virtual void Post(SnapshotWanted event) = 0;
  virtual void Post(DrainWanted event) = 0;
  virtual void Post(StopWanted event) = 0;
};

// Loads the engine, starts the role and joins the cluster. Everything is bound and announced when
// it returns. `signals` is woken when the router asks for a drain or refuses the worker, and
// outlives it. Errors name the flag and what would be accepted.
absl::StatusOr<std::unique_ptr<WorkerProcess>> StartWorker(const engine::EngineOptions& engine,
                                                           const WorkerProcessOptions& process,
                                                           std::unique_ptr<Role> role,
                                                           SignalWaiter* signals);

}  // namespace tandem::worker
