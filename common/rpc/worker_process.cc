#include "common/rpc/worker_process.h"

#include <algorithm>
#include <cstdio>
#include <unistd.h>

#include "absl/strings/str_split.h"
#include "fmt/format.h"
#include "spdlog/spdlog.h"

#include "common/base/heap.h"
#include "common/base/locks.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/config/log_flags.h"
#include "common/rpc/cluster_flags.h"

namespace tandem {

void AddWorkerProcessFlags(FlagSet* flags, WorkerProcessOptions* o) {
  flags->Group("Network");
  flags->AddRepeated(
      "--router", &o->routers,
      "internal HOST:PORT of the routers to join, with commas between them; of a name all hosts "
      "that it stands for, now and later; empty: stand alone");
  flags->Add("--listen", &o->listen, "address of the RPC service; port 0: any", "HOST:PORT");
  AddMetricsFlags(flags, &o->metrics);
  flags->Add("--health-listen", &o->health_listen,
             "address that answers grpc.health.v1 to anyone, for probes; empty: none", "HOST:PORT");
  flags->Add("--advertise-host", &o->advertise_host,
             "host that others reach this worker by; default: the host of --listen");
  flags->Add("--worker-id", &o->worker_id, "name in the cluster; default: drawn at random");
  flags->Add(
      "--served-model-name", &o->served_model_name,
      "name that clients ask for; default: the name of the model directory, or ORG/NAME of the "
      "Hugging Face cache");
  flags->Add("--kv-listen", &o->kv_listen,
             "address where other workers deliver KV blocks; port 0: any; default: the host of "
             "--listen, any port",
             "HOST:PORT");
  flags->Add(
      "--kv-transport", &o->kv_transport,
      "how KV blocks travel between workers: auto (the best that both have, but nccl), or some "
      "of cuda_ipc,nccl,shm,shm_ring,tcp in order of preference; shm is shm_ring too",
      "NAMES");
  flags->Add("--kv-tls", &o->kv_tls,
             "KV connections between workers are TLS where there is --cluster-cert; without it "
             "their bytes go as fast as the network, and in the clear");
  flags->AddBytes("--kv-ring-bytes", &o->kv_ring_bytes,
                  "memory of the host that each link over shm_ring has between two workers, pinned "
                  "where they have GPUs");
  flags->Add("--min-kv-link-gbps", &o->min_kv_link_gbps,
             "a link to another worker whose self-test finds less is not used; 0: any is", "GB/s");
  flags->AddChoice("--slow-kv-link", &o->slow_kv_link, {"refuse", "warn"},
                   "what becomes of a link below --min-kv-link-gbps");
  AddClusterFlags(flags, &o->cluster_secret, &o->cluster_tls);
  flags->Group("Timeouts");
  flags->Add("--drain-timeout", &o->drain_timeout,
             "how long running requests may take to finish after SIGTERM", "s");
  flags->Add("--step-timeout", &o->step_timeout,
             "a step that gets nowhere for so long (on a CPU: no layer is finished) ends the "
             "process; 0: never",
             "s");
  AddTraceFlags(flags, &o->trace);
  AddLogFlags(flags, &o->log);
}

absl::StatusOr<std::vector<HostPort>> RoutersOf(const WorkerProcessOptions& options) {
  std::vector<HostPort> routers;
  for (const std::string& list : options.routers) {
    for (const std::string& text :
         std::vector<std::string>(absl::StrSplit(list, ',', absl::SkipEmpty()))) {
      const absl::StatusOr<HostPort> router = ParseHostPort(text);
      if (!router.ok()) return InvalidArgument("--router: {}", MessageOf(router.status()));
      if (std::find(routers.begin(), routers.end(), *router) == routers.end()) {
        routers.push_back(*router);
      }
    }
  }
  return routers;
}

std::string AdvertisedHost(const WorkerProcessOptions& options, const std::string& bound_host) {
  if (!options.advertise_host.empty()) return options.advertise_host;
  if (bound_host != "0.0.0.0" && bound_host != "::") return bound_host;
  char name[256] = "localhost";
  gethostname(name, sizeof(name) - 1);
  return name;
}

absl::StatusOr<std::string> AdvertisedAddress(const WorkerProcessOptions& options,
                                              const std::string& bound) {
  TANDEM_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(bound));
  address.host = AdvertisedHost(options, address.host);
  return address.ToString();
}

absl::StatusOr<std::string> AdvertisedMetricsAddress(const WorkerProcessOptions& options,
                                                     const std::string& bound) {
  TANDEM_ASSIGN_OR_RETURN(const HostPort address, ParseHostPort(bound));
  return IsLoopback(address.host) ? bound : AdvertisedAddress(options, bound);
}

int RunWorkerProcess(const WorkerMain& parts, int argc, const char* const* argv) {
  KeepFewHeaps();
  WatchNoLockOrders();
  SignalWaiter signals;
  WorkerProcessOptions& options = *parts.options;
  const auto fail = [&](int code, const absl::Status& status) {
    ReportFailure(parts.flags->program(), MessageOf(status));
    return code;
  };
  absl::Status status = parts.flags->Parse(argc, argv);
  if (status.ok() && parts.flags->HelpRequested()) {
    fmt::print("{}", parts.flags->Help());
    return 0;
  }
  if (status.ok() && !(options.drain_timeout > 0)) {
    status =
        InvalidArgument("--drain-timeout must be more than 0 s, got {}", options.drain_timeout);
  }
  if (status.ok() && !(options.step_timeout >= 0)) {
    status = InvalidArgument("--step-timeout must be >= 0 s, got {}", options.step_timeout);
  }
  if (status.ok()) status = RoutersOf(options).status();
  if (status.ok()) status = CheckTraceFlags(options.trace);
  if (status.ok()) status = CheckClusterFlags(options.cluster_tls);
  if (status.ok()) {
    status = CheckMetricsFlags(options.metrics, !options.cluster_tls.certificate.empty());
  }
  if (status.ok()) status = parts.validate();
  if (!status.ok()) return fail(2, status);
  if (options.worker_id.empty()) {
    options.worker_id = fmt::format("{}-{:08x}", parts.kind, RandomUint64() & 0xffffffff);
  }

  StartLog(options.worker_id, options.log);
  absl::StatusOr<std::unique_ptr<WorkerProcess>> worker = parts.start(&signals);
  if (!worker.ok()) return fail(1, worker.status());
  const std::string health = (*worker)->health_address();
  fmt::print("listening {} metrics {}{}\n", (*worker)->address(), (*worker)->metrics_address(),
             health.empty() ? "" : " health " + health);
  std::fflush(stdout);
  signals.Wait();
  spdlog::info("draining");
  status = (*worker)->Drain();
  worker->reset();
  if (!status.ok()) return fail(1, status);
  spdlog::info("stopped");
  FlushLog();
  return 0;
}

}  // namespace tandem
