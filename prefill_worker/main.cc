// tandem_prefill_worker: computes prompts and ships their KV blocks to decode workers.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <unistd.h>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "fmt/format.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/config/flags.h"
#include "common/metrics/metrics.h"
#include "common/metrics/worker_metrics.h"
#include "common/rpc/cluster_client.h"
#include "common/rpc/server.h"
#include "engine/runtime/engine.h"
#include "engine/runtime/engine_flags.h"
#include "engine/wire/cluster_wire.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "prefill_worker/loop.h"
#include "prefill_worker/prefill_service.h"

namespace tandem {
namespace {

// Requests between the RPC edge and the loop's next turn.
constexpr size_t kInboxCapacity = 1024;

struct WorkerOptions {
  EngineOptions engine;
  std::string router = "127.0.0.1:7700";
  std::string listen = "127.0.0.1:0";
  std::string metrics_listen = "127.0.0.1:0";
  std::string advertise_host;
  std::string worker_id;
  std::string served_model_name;
  std::string cluster_secret;
  int max_waiting = 1024;
  double drain_timeout = 30;  // seconds
};

void AddFlags(FlagSet* flags, WorkerOptions* options) {
  AddEngineFlags(flags, &options->engine);
  flags->Add("--router", &options->router, "router to join", "HOST:PORT");
  flags->Add("--listen", &options->listen, "address of the RPC service; port 0: any", "HOST:PORT");
  flags->Add("--metrics-listen", &options->metrics_listen, "address of /metrics; port 0: any",
             "HOST:PORT");
  flags->Add("--advertise-host", &options->advertise_host,
             "host that others reach this worker at (default: that of --listen)");
  flags->Add("--worker-id", &options->worker_id,
             "name in the cluster, unique (default: prefill-PID)");
  flags->Add("--served-model-name", &options->served_model_name,
             "model name in the cluster (default: the model directory's)");
  flags->Add("--cluster-secret", &options->cluster_secret,
             "shared by all processes of the cluster (default: env TANDEM_CLUSTER_SECRET)");
  flags->Add("--max-waiting", &options->max_waiting, "prompts that may wait for KV blocks");
  flags->Add("--drain-timeout", &options->drain_timeout,
             "time that running prompts get to finish at SIGTERM", "s");
}

void FillDefaults(WorkerOptions* options) {
  if (options->worker_id.empty()) options->worker_id = fmt::format("prefill-{}", getpid());
  if (options->served_model_name.empty()) {
    options->served_model_name = DefaultModelName(options->engine.model_dir);
  }
  if (const char* secret = std::getenv("TANDEM_CLUSTER_SECRET");
      options->cluster_secret.empty() && secret != nullptr) {
    options->cluster_secret = secret;
  }
}

// The address that goes into Hello, for the one that was bound.
absl::StatusOr<std::string> Advertised(const WorkerOptions& options, const std::string& bound) {
  TANDEM_ASSIGN_OR_RETURN(HostPort address, ParseHostPort(bound));
  if (!options.advertise_host.empty()) {
    address.host = options.advertise_host;
  } else if (address.host == "0.0.0.0" || address.host == "::") {
    char name[256] = {};
    gethostname(name, sizeof(name) - 1);
    address.host = name;
  }
  return address.ToString();
}

internal::v1::LoadReport LoadToProto(const PrefillLoad& load, const KvSender& sender) {
  internal::v1::LoadReport report;
  report.set_running(static_cast<uint32_t>(load.running));
  report.set_waiting(static_cast<uint32_t>(load.waiting));
  report.set_waiting_tokens(static_cast<uint64_t>(load.waiting_tokens));
  report.set_blocks_free(static_cast<uint32_t>(load.blocks.free));
  report.set_blocks_cached(static_cast<uint32_t>(load.blocks.cached));
  report.set_blocks_used(static_cast<uint32_t>(load.blocks.used));
  report.set_blocks_quarantined(static_cast<uint32_t>(load.blocks.quarantined));
  report.set_prefill_tokens_per_second(load.tokens_per_second);
  for (const auto& [peer, rate] : sender.LinkRates()) {
    internal::v1::LinkRate* link = report.add_links();
    link->set_peer_worker_id(peer);
    link->set_bytes_per_second(rate);
  }
  return report;
}

internal::v1::Hello MakeHello(const WorkerOptions& options, const Engine& engine,
                              const std::string& address, const std::string& metrics_address) {
  internal::v1::Hello hello;
  hello.set_worker_id(options.worker_id);
  hello.set_incarnation(RandomUint64());
  hello.set_role("prefill");
  hello.set_address(address);
  *hello.mutable_capability() =
      CapabilityOf(engine, options.served_model_name, options.cluster_secret);
  const EngineOptions& resolved = engine.options();
  hello.set_max_model_len(static_cast<uint32_t>(resolved.max_model_len));
  hello.set_max_num_seqs(static_cast<uint32_t>(resolved.max_num_seqs));
  hello.set_max_num_batched_tokens(static_cast<uint32_t>(resolved.max_num_batched_tokens));
  hello.set_num_blocks(static_cast<uint32_t>(engine.region().num_blocks));
  hello.set_metrics_address(metrics_address);
  return hello;
}

PrefillLoopOptions LoopOptionsOf(const WorkerOptions& options, const Engine& engine) {
  PrefillLoopOptions loop;
  loop.limits = {engine.options().max_num_batched_tokens, engine.options().max_num_seqs};
  loop.layout = engine.region().layout;
  loop.max_waiting = options.max_waiting;
  loop.worker_id = options.worker_id;
  loop.cluster_secret = options.cluster_secret;
  loop.model_digest = engine.model_digest();
  return loop;
}

// Everything of a running worker; members end in reverse order, users before what they use.
class Worker {
 public:
  explicit Worker(WorkerOptions options) : options_(std::move(options)), inbox_(kInboxCapacity) {}

  absl::Status Start();
  // Returns after a signal, a drain command or a refused registration, when all work has ended.
  absl::Status Serve();

 private:
  absl::Status Join();
  void StartLoop();

  const WorkerOptions options_;
  SignalWaiter signals_;
  PrefillInbox inbox_;
  Metrics metrics_;
  WorkerMetrics worker_metrics_{&metrics_};
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<PrefillLoop> loop_;
  std::unique_ptr<KvSender> sender_;
  std::unique_ptr<PrefillService> service_;
  std::unique_ptr<RpcServer> server_;
  absl::Mutex refused_mutex_;
  absl::Status refused_ ABSL_GUARDED_BY(refused_mutex_);
  std::unique_ptr<ClusterClient> cluster_;
};

absl::Status Worker::Start() {
  TANDEM_ASSIGN_OR_RETURN(engine_, Engine::Load(options_.engine));
  spdlog::info("{}", engine_->Banner());
  const internal::v1::Capability capability =
      CapabilityOf(*engine_, options_.served_model_name, options_.cluster_secret);

  KvSenderOptions sender;
  sender.region = engine_->region();
  sender.worker_id = options_.worker_id;
  sender.capability_digest = CapabilityDigest(capability);
  sender.on_done = [this](const TransferId& id, uint64_t epoch, const absl::Status& status,
                          const TransferStats& stats) {
    inbox_.Push(PrefillShipped{id, epoch, status, stats});
  };
  TANDEM_ASSIGN_OR_RETURN(sender_, KvSender::Start(std::move(sender)));

  TANDEM_RETURN_IF_ERROR(metrics_.Serve(options_.metrics_listen));
  PrefillServiceOptions service;
  service.worker_id = options_.worker_id;
  service.capability_digest = CapabilityDigest(capability);
  service.vocab_size = engine_->config().vocab_size;
  service.max_model_len = engine_->options().max_model_len;
  service.block_size = engine_->region().layout.block_size;
  service_ = std::make_unique<PrefillService>(std::move(service), &inbox_, Clock::Real());
  TANDEM_ASSIGN_OR_RETURN(server_,
                          RpcServer::Start({.listen_address = options_.listen}, {service_.get()}));
  TANDEM_RETURN_IF_ERROR(Join());
  StartLoop();
  server_->SetServing(true);
  fmt::print("listening {} metrics {}\n", server_->address(), metrics_.address());
  std::fflush(stdout);
  return absl::OkStatus();
}

absl::Status Worker::Join() {
  TANDEM_ASSIGN_OR_RETURN(const std::string address, Advertised(options_, server_->address()));
  TANDEM_ASSIGN_OR_RETURN(const std::string metrics, Advertised(options_, metrics_.address()));
  ClusterClientOptions cluster;
  cluster.router_address = options_.router;
  cluster.hello = MakeHello(options_, *engine_, address, metrics);
  cluster.on_joined = [this] { inbox_.Push(PrefillSnapshotWanted{}); };
  cluster.on_drain = [this] { signals_.Wake(); };
  cluster.on_refused = [this](const absl::Status& status) {
    absl::MutexLock lock(&refused_mutex_);
    refused_ = status;
    signals_.Wake();
  };
  cluster_ = ClusterClient::Start(std::move(cluster));
  return absl::OkStatus();
}

void Worker::StartLoop() {
  PrefillLoopParts parts;
  parts.runner = &engine_->runner();
  parts.pool = &engine_->pool();
  parts.cache = &engine_->cache();
  parts.sender = sender_.get();
  parts.clock = Clock::Real();
  parts.metrics = &worker_metrics_;
  parts.inbox = &inbox_;
  PrefillLoopHooks hooks;
  hooks.report = [this](const PrefillLoad& load) {
    cluster_->PostLoad(LoadToProto(load, *sender_));
  };
  hooks.blocks = [this](const BlockEvents& events, bool cleared) {
    cluster_->PostBlocks(BlockEventsToProto(events, cleared));
  };
  loop_ = std::make_unique<PrefillLoop>(LoopOptionsOf(options_, *engine_), parts, hooks);
}

absl::Status Worker::Serve() {
  absl::Notification ended;
  std::thread loop([this, &ended] {
    loop_->Run();
    ended.Notify();
  });
  const int signal = signals_.Wait();
  spdlog::info("draining ({})", signal == 0 ? "asked by the router" : "signal");
  server_->SetServing(false);
  cluster_->PostDraining();
  inbox_.Push(PrefillDrainWanted{});
  if (!ended.WaitForNotificationWithTimeout(absl::Seconds(options_.drain_timeout))) {
    spdlog::warn("giving up what still runs after {} s", options_.drain_timeout);
    inbox_.Push(PrefillStopWanted{});
  }
  loop.join();
  server_->Shutdown(absl::Seconds(1));
  cluster_.reset();
  server_.reset();
  sender_.reset();
  loop_.reset();
  absl::MutexLock lock(&refused_mutex_);
  return refused_;
}

int Main(int argc, char** argv) {
  spdlog::set_default_logger(spdlog::stderr_logger_mt("tandem"));
  WorkerOptions options;
  FlagSet flags("tandem_prefill_worker", "Computes prompts and ships their KV blocks.");
  AddFlags(&flags, &options);
  if (const absl::Status status = flags.Parse(argc, argv); !status.ok()) {
    fmt::print(stderr, "tandem_prefill_worker: {}\n", std::string(status.message()));
    return 2;
  }
  if (flags.HelpRequested()) {
    fmt::print("{}", flags.Help());
    return 0;
  }
  FillDefaults(&options);
  spdlog::set_pattern(fmt::format("%Y-%m-%d %H:%M:%S.%e %L {} %v", options.worker_id));
  Worker worker(std::move(options));
  absl::Status status = worker.Start();
  if (status.ok()) status = worker.Serve();
  if (status.ok()) return 0;
  fmt::print(stderr, "tandem_prefill_worker: {}\n", std::string(status.message()));
  return 1;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) { return tandem::Main(argc, argv); }
