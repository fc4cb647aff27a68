// What prefill and decode worker processes have in common: the flags of a cluster's member, the
// address that it announces, and the frame of main().
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "common/auth/certificate_files.h"
#include "common/base/host_port.h"
#include "common/base/log.h"
#include "common/config/flags.h"
#include "common/config/metrics_flags.h"
#include "common/config/trace_flags.h"
#include "common/rpc/server.h"

namespace tandem {

// Mirrors the flags of the same names.
struct WorkerProcessOptions {
  std::vector<std::string> routers;  // HOST:PORT, or several with commas; empty: stand alone
  std::string listen = "127.0.0.1:0";
  MetricsOptions metrics;
  std::string health_listen;      // empty: none
  std::string advertise_host;     // empty: the host of `listen`
  std::string worker_id;          // empty: drawn at random
  std::string served_model_name;  // empty: the model directory's name
  std::string cluster_secret;     // default: TANDEM_CLUSTER_SECRET
  TlsFiles cluster_tls;           // all empty: the secret is enough
  std::string kv_listen;          // HOST:PORT; empty: the host of `listen`, any port
  std::string kv_transport = "auto";
  bool kv_tls = true;
  int64_t kv_ring_bytes = int64_t{64} << 20;
  double min_kv_link_gbps = 0.05;  // GB/s: less than half of what gigabit Ethernet carries
  std::string slow_kv_link = "refuse";
  double drain_timeout = 30;  // s
  double step_timeout = 60;   // s; 0: none
  TraceOptions trace;
  LogOptions log;
};

// Used by one thread.
class WorkerProcess {
 public:
  virtual ~WorkerProcess() = default;  // gives up what still runs

  virtual const std::string& address() const = 0;  // as bound
  virtual const std::string& metrics_address() const = 0;
  virtual std::string health_address() const = 0;  // "" without --health-listen
  // Refuses new work, finishes what runs (up to drain_timeout), leaves the cluster. An error if the
  // router had refused the worker: one line that says why.
  virtual absl::Status Drain() = 0;
};

void AddWorkerProcessFlags(FlagSet* flags, WorkerProcessOptions* options);

// The routers to join, each once. INVALID_ARGUMENT names the flag.
absl::StatusOr<std::vector<HostPort>> RoutersOf(const WorkerProcessOptions& options);

// What to announce for a host, or an address, that was bound: --advertise-host if given; the
// machine's name where all interfaces were bound.
std::string AdvertisedHost(const WorkerProcessOptions& options, const std::string& bound_host);
absl::StatusOr<std::string> AdvertisedAddress(const WorkerProcessOptions& options,
                                              const std::string& bound);
// The same for /metrics, which may be for this machine alone where the worker is not: then as it
// was bound, for under no other name it is reached.
absl::StatusOr<std::string> AdvertisedMetricsAddress(const WorkerProcessOptions& options,
                                                     const std::string& bound);

// The whole of main(): parses `flags`, starts the worker, prints "listening HOST:PORT metrics
// HOST:PORT", and "health HOST:PORT" where there is one, waits for a signal or for the worker to
// wake `signals`, drains. Call before any thread is started. `kind` ("prefill") begins a drawn
// worker id. Exit codes: 0 stopped cleanly, 1 an error whose one line stands on stderr, 2 bad flags
// (as told by the parser or `validate`).
struct WorkerMain {
  FlagSet* flags = nullptr;
  WorkerProcessOptions* options = nullptr;
  std::string kind;
  std::function<absl::Status()> validate;
  std::function<absl::StatusOr<std::unique_ptr<WorkerProcess>>(SignalWaiter* signals)> start;
};
int RunWorkerProcess(const WorkerMain& parts, int argc, const char* const* argv);

}  // namespace tandem
