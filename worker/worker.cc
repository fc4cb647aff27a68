#include "worker/worker.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <pthread.h>
#include <thread>
#include <unistd.h>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "spdlog/spdlog.h"

#include "common/base/dtype.h"
#include "common/base/kv_layout.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/metrics/process_metrics.h"
#include "common/metrics/tls_metrics.h"
#include "common/rpc/cluster_flags.h"
#include "common/rpc/end_on_signal.h"
#include "common/rpc/load_wire.h"
#include "common/rpc/server.h"
#include "common/trace/otlp_client.h"
#include "engine/runtime/tensor_parallel.h"
#include "engine/wire/cluster_wire.h"
#include "worker/cluster_metrics.h"
#include "worker/engine_metrics.h"
#include "worker/gpu_metrics.h"
#include "worker/watchdog.h"

namespace tandem::worker {
namespace {

// What `top -H` and debuggers show of the thread that computes.
constexpr char kLoopThread[] = "tandem-loop";

// The one connection of a router carries all of its streams (--max-streams of the router).
constexpr int kMaxStreamsPerPeer = 1 << 16;

EngineFacts FactsOf(engine::Engine& engine, absl::Duration load_time) {
  const KvRegion region = engine.region();
  EngineFacts facts;
  facts.block_size = region.layout.block_size;
  facts.num_blocks = region.num_blocks;
  facts.kv_bytes_per_token = static_cast<int64_t>(region.layout.BytesPerToken());
  facts.dtype = DTypeName(region.layout.dtype);
  facts.max_model_len = engine.options().max_model_len;
  facts.prefix_caching = engine.options().enable_prefix_caching;
  facts.load_time = load_time;
  return facts;
}

class Worker final : public WorkerProcess {
 public:
  Worker(WorkerProcessOptions process, std::unique_ptr<Role> role, SignalWaiter* signals)
      : process_(std::move(process)), signals_(signals), role_(std::move(role)) {}
  ~Worker() override { Stop(absl::ZeroDuration()); }

  absl::Status Init(const engine::EngineOptions& options);
  const std::string& address() const override { return server_->address(); }
  const std::string& metrics_address() const override { return metrics_.address(); }
  std::string health_address() const override {
    return health_ == nullptr ? "" : health_->address();
  }
  absl::Status Drain() override {
    Stop(absl::Seconds(process_.drain_timeout));
    absl::MutexLock lock(&mutex_);
    return refused_;
  }

 private:
  std::unique_ptr<Watchdog> MakeWatchdog();
  Frame MakeFrame();
  absl::Status MakeCredentials();
  // What it shows and believes where no gRPC is spoken; null: nothing.
  std::function<TlsTexts()> Texts() const;
  absl::Status Join();
  void SetServing(bool serving);
  internal::v1::Hello MakeHello(const std::string& address, const std::string& metrics) const;
  void Refuse(const absl::Status& status);
  void Stop(absl::Duration drain);

  const WorkerProcessOptions process_;
  SignalWaiter* const signals_;
  internal::v1::Capability capability_;

  // Each uses those above it; the role is started between engine and server.
  Metrics metrics_;
  std::shared_ptr<CertificateFiles> certificate_;  // null: the secret is enough
  std::shared_ptr<const ClusterCredentials> credentials_;
  std::unique_ptr<ClusterMetrics> cluster_metrics_;
  std::unique_ptr<SpanSink> spans_;  // null: nothing is traced
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<Role> role_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<RpcServer> health_;  // null without --health-listen
  std::unique_ptr<ClusterClients>
      cluster_;  // null: stands alone; set before the loop's thread starts
  bool role_started_ = false;
  std::unique_ptr<Watchdog> watchdog_;
  std::thread thread_;
  absl::Notification loop_done_;

  absl::Mutex mutex_;
  absl::Status refused_ ABSL_GUARDED_BY(mutex_);  // by the router
};

absl::Status Worker::Init(const engine::EngineOptions& options) {
  TANDEM_RETURN_IF_ERROR(
      RequireSecretBeyondLoopback(process_.cluster_secret, "--listen", process_.listen));
  const std::string name = process_.served_model_name.empty() ? DefaultModelName(options.model_dir)
                                                              : process_.served_model_name;
  const MetricLabels labels = {
      {"role", role_->metrics_role()}, {"worker", process_.worker_id}, {"model_name", name}};
  metrics_.SetLabels(labels);
  AddProcessMetrics(&metrics_, labels);
  TANDEM_RETURN_IF_ERROR(MakeCredentials());
  AddBuildInfo(&metrics_);
  TANDEM_RETURN_IF_ERROR(
      metrics_.Serve(process_.metrics.listen, process_.metrics.tls ? Texts() : nullptr));
  const std::string service = fmt::format("tandem_{}_worker", role_->party_role());
  spans_ = StartTracing(process_.trace, service, process_.worker_id, &metrics_);
  if (!process_.health_listen.empty()) {
    // Before the model is loaded: a probe is to hear "not yet" then, and not that nobody is there.
    // Open to anyone, who learns no more; the RPC service below answers only who has the secret.
    TANDEM_ASSIGN_OR_RETURN(health_,
                            RpcServer::Start({.listen_address = process_.health_listen}, {}));
  }
  const absl::Time load_start = Clock::Real()->Now();
  {
    const EndOnSignal end_on_signal("loading the model");
    TANDEM_ASSIGN_OR_RETURN(engine_, engine::Engine::Load(options));
  }
  cluster_metrics_ = std::make_unique<ClusterMetrics>(&metrics_);
  AddEngineMetrics(&metrics_, FactsOf(*engine_, Clock::Real()->Now() - load_start));
  if (engine_->options().device == "cuda") {
    // Of several, the first rank's.
    TANDEM_ASSIGN_OR_RETURN(const std::vector<int> devices, engine::DevicesOf(engine_->options()));
    auto gauge = OpenGpuGauge(devices.front());
    if (gauge.has_value()) AddGpuMetrics(&metrics_, labels, *std::move(gauge));
  }
  watchdog_ = MakeWatchdog();
  capability_ = engine::CapabilityOf(*engine_, name);
  spdlog::info("{}", engine_->Banner());
  TANDEM_RETURN_IF_ERROR(role_->Start(MakeFrame()));
  role_started_ = true;
  RpcServerOptions server;
  server.listen_address = process_.listen;
  server.credentials = credentials_;
  server.callers = role_->callers();
  server.max_streams_per_connection = kMaxStreamsPerPeer;
  TANDEM_ASSIGN_OR_RETURN(server_, RpcServer::Start(server, {role_->service()}));
  TANDEM_RETURN_IF_ERROR(Join());
  watchdog_->Start();
  thread_ = std::thread([this] {
    pthread_setname_np(pthread_self(), kLoopThread);
    role_->Run();
    // What follows is not a turn.
    watchdog_->Stop();
    loop_done_.Notify();
  });
  SetServing(true);
  return absl::OkStatus();
}

absl::Status Worker::MakeCredentials() {
  TANDEM_ASSIGN_OR_RETURN(certificate_,
                          OpenClusterCertificate(process_.cluster_tls,
                                                 ShowExpiry(&metrics_, TlsCertificate::kCluster)));
  TANDEM_ASSIGN_OR_RETURN(
      credentials_,
      ClusterCredentials::Make(process_.cluster_secret, {role_->party_role(), process_.worker_id},
                               certificate_));
  return absl::OkStatus();
}

std::function<TlsTexts()> Worker::Texts() const {
  if (certificate_ == nullptr) return nullptr;
  return [files = certificate_] { return files->texts(); };
}

void Worker::SetServing(bool serving) {
  server_->SetServing(serving);
  if (health_ != nullptr) health_->SetServing(serving);
}

std::unique_ptr<Watchdog> Worker::MakeWatchdog() {
  Watchdog::Options options;
  if (process_.step_timeout > 0) options.limit = absl::Seconds(process_.step_timeout);
  options.within_turn = engine_->runner().progress();
  options.report = [this](absl::Duration without_progress) {
    if (cluster_ != nullptr) cluster_->PostHeartbeat(without_progress);
  };
  options.on_stuck = [](absl::Duration without_progress) {
    // Neither stdio nor the heap: the loop may have hung with their locks.
    std::array<char, 160> text;
    const auto end = fmt::format_to_n(text.data(), text.size(),
                                      "FATAL the loop has got nowhere for {} s: a step hangs "
                                      "(--step-timeout); ending the process\n",
                                      absl::ToInt64Seconds(without_progress));
    (void)!write(STDERR_FILENO, text.data(), std::min(end.size, text.size()));
    std::abort();
  };
  return std::make_unique<Watchdog>(std::move(options), Clock::Real());
}

Frame Worker::MakeFrame() {
  Frame frame;
  frame.engine = engine_.get();
  frame.metrics = &metrics_;
  frame.clock = Clock::Real();
  frame.spans = spans_.get();
  frame.process = &process_;
  frame.credentials = credentials_;
  frame.tls = Texts();
  frame.capability_digest = CapabilityDigest(capability_);
  // Called on the loop's thread, which lives shorter than cluster_.
  frame.reports.load = [this](const LoadReport& load) {
    if (cluster_ != nullptr) cluster_->PostLoad(LoadReportToProto(load));
  };
  frame.reports.blocks = [this](const engine::BlockEvents& events, bool cleared) {
    if (cluster_ != nullptr) cluster_->PostBlocks(engine::BlockEventsToProto(events, cleared));
  };
  frame.reports.turn = [this] { watchdog_->NoteTurn(); };
  return frame;
}

internal::v1::Hello Worker::MakeHello(const std::string& address,
                                      const std::string& metrics) const {
  const engine::EngineOptions& options = engine_->options();
  internal::v1::Hello hello;
  hello.set_worker_id(process_.worker_id);
  hello.set_incarnation(RandomUint64());
  hello.set_address(address);
  *hello.mutable_capability() = capability_;
  hello.set_max_model_len(static_cast<uint32_t>(options.max_model_len));
  hello.set_max_num_seqs(static_cast<uint32_t>(options.max_num_seqs));
  hello.set_max_num_batched_tokens(static_cast<uint32_t>(options.max_num_batched_tokens));
  hello.set_num_blocks(static_cast<uint32_t>(engine_->region().num_blocks));
  hello.set_metrics_address(metrics);
  role_->FillHello(&hello);
  return hello;
}

absl::Status Worker::Join() {
  TANDEM_ASSIGN_OR_RETURN(std::vector<HostPort> routers, RoutersOf(process_));
  if (routers.empty()) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(const std::string address,
                          AdvertisedAddress(process_, server_->address()));
  TANDEM_ASSIGN_OR_RETURN(const std::string metrics,
                          AdvertisedMetricsAddress(process_, metrics_.address()));
  ClusterClientsOptions cluster;
  cluster.routers = std::move(routers);
  cluster.credentials = credentials_;
  cluster.hello = MakeHello(address, metrics);
  cluster.vouchers = role_->vouchers();
  cluster.on_joined = [this] { role_->Post(SnapshotWanted{}); };
  cluster.on_drain = [this] { signals_->Wake(); };
  cluster.on_refused = [this](const absl::Status& status) { Refuse(status); };
  cluster.on_look = [this](size_t known, size_t joined) {
    cluster_metrics_->SetRouters(known, joined);
  };
  cluster_ = std::make_unique<ClusterClients>(std::move(cluster));
  return absl::OkStatus();
}

void Worker::Refuse(const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    refused_ = status;
  }
  // After the status is there: whom this wakes reads it.
  signals_->Wake();
}

void Worker::Stop(absl::Duration drain) {
  const absl::Time deadline = Clock::Real()->Now() + drain;
  if (thread_.joinable()) {
    // The router first, so that it sends no more before health and loop refuse it.
    if (cluster_ != nullptr) cluster_->PostDraining();
    SetServing(false);
    role_->Post(DrainWanted{});
    if (!loop_done_.WaitForNotificationWithTimeout(drain)) {
      spdlog::warn("giving up what still runs after {}", absl::FormatDuration(drain));
      role_->Post(StopWanted{});
    }
    thread_.join();
  } else if (role_started_ && !loop_done_.HasBeenNotified()) {
    // The start failed behind the server's: whoever called meanwhile still waits for an answer.
    role_->Post(StopWanted{});
    role_->Run();
    loop_done_.Notify();
  }
  // The loop has answered everybody, but slow readers may still be taking the last tokens.
  const absl::Duration left = deadline - Clock::Real()->Now();
  if (server_ != nullptr) server_->Shutdown(std::max(left, absl::Seconds(1)));
  cluster_.reset();
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerProcess>> StartWorker(const engine::EngineOptions& engine,
                                                           const WorkerProcessOptions& process,
                                                           std::unique_ptr<Role> role,
                                                           SignalWaiter* signals) {
  auto worker = std::make_unique<Worker>(process, std::move(role), signals);
  TANDEM_RETURN_IF_ERROR(worker->Init(engine));
  return worker;
}

}  // namespace tandem::worker
