#include "worker/kv_ends.h"

#include <vector>

#include "common/base/status.h"

namespace tandem::worker {

absl::StatusOr<HostPort> KvListenAddress(const WorkerProcessOptions& process) {
  TANDEM_ASSIGN_OR_RETURN(const HostPort rpc, ParseHostPort(process.listen));
  HostPort kv = {rpc.host, 0};
  if (!process.kv_listen.empty()) {
    TANDEM_ASSIGN_OR_RETURN(kv, ParseHostPort(process.kv_listen));
  }
  const std::string announced = AdvertisedHost(process, rpc.host);
  if (IsLoopback(kv.host) && !IsLoopback(announced)) {
    return InvalidArgument(
        "KV blocks would be awaited at {} (--kv-listen; else the host of --listen), which no other "
        "host reaches, but this worker is announced as {}: listen there, or on 0.0.0.0",
        kv.ToString(), announced);
  }
  return kv;
}

namespace {

// The pool, or its pieces.
template <typename Options>
void SetPool(const engine::Engine& engine, Options* options) {
  options->region = engine.region();
  const std::vector<KvRegion> regions = engine.regions();
  if (regions.size() > 1) options->shards = regions;
}

}  // namespace

absl::StatusOr<kvtransfer::KvReceiverOptions> MakeReceiverOptions(const Frame& frame) {
  const WorkerProcessOptions& process = *frame.process;
  TANDEM_ASSIGN_OR_RETURN(const HostPort listen, KvListenAddress(process));
  TANDEM_RETURN_IF_ERROR(
      RequireSecretBeyondLoopback(process.cluster_secret, "--kv-listen", listen.ToString()));
  kvtransfer::KvReceiverOptions options;
  options.listen_host = listen.host;
  options.port = listen.port;
  options.advertise_host = AdvertisedHost(process, listen.host);
  SetPool(*frame.engine, &options);
  options.worker_id = process.worker_id;
  options.cluster_secret = process.cluster_secret;
  if (process.kv_tls) options.tls = frame.tls;
  options.capability_digest = frame.capability_digest;
  options.transports = process.kv_transport;
  options.ring_bytes = static_cast<size_t>(process.kv_ring_bytes);
  options.metrics = frame.metrics;
  return options;
}

kvtransfer::KvSenderOptions MakeSenderOptions(const Frame& frame) {
  kvtransfer::KvSenderOptions options;
  SetPool(*frame.engine, &options);
  options.worker_id = frame.process->worker_id;
  options.cluster_secret = frame.process->cluster_secret;
  if (frame.process->kv_tls) options.tls = frame.tls;
  options.capability_digest = frame.capability_digest;
  options.transports = frame.process->kv_transport;
  options.min_link_bytes_per_second = frame.process->min_kv_link_gbps * 1e9;
  options.refuse_slow_links = frame.process->slow_kv_link == "refuse";
  options.metrics = frame.metrics;
  return options;
}

}  // namespace tandem::worker
