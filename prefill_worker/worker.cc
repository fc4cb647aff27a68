#include "prefill_worker/worker.h"

#include <cstdint>
#include <thread>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "spdlog/spdlog.h"

#include "common/base/clock.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/metrics/metrics.h"
#include "common/metrics/worker_metrics.h"
#include "common/rpc/cluster_client.h"
#include "engine/wire/cluster_wire.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "prefill_worker/loop.h"
#include "prefill_worker/prefill_service.h"

namespace tandem::prefill {
namespace {

// Events that wait for the loop's next turn, up to which prompts are accepted.
constexpr size_t kInboxCapacity = 1024;

internal::v1::LoadReport LoadToProto(const PrefillLoad& load, const kvtransfer::KvSender& sender) {
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

class Worker final : public WorkerProcess {
 public:
  Worker(const PrefillWorkerOptions& options, SignalWaiter* signals)
      : options_(options), signals_(signals), inbox_(kInboxCapacity), worker_metrics_(&metrics_) {}
  ~Worker() override { Stop(absl::ZeroDuration()); }

  absl::Status Init();
  const std::string& address() const override { return server_->address(); }
  const std::string& metrics_address() const override { return metrics_.address(); }
  absl::Status Drain() override {
    Stop(absl::Seconds(options_.process.drain_timeout));
    absl::MutexLock lock(&mutex_);
    return refused_;
  }

 private:
  absl::Status StartSender();
  absl::Status StartServer();
  void StartLoop();
  absl::Status Join();
  internal::v1::Hello MakeHello(const std::string& address, const std::string& metrics) const;
  void Stop(absl::Duration drain);

  const PrefillWorkerOptions options_;
  SignalWaiter* const signals_;
  internal::v1::Capability capability_;

  // In the order of their construction; each uses those above it.
  Metrics metrics_;
  PrefillInbox inbox_;
  WorkerMetrics worker_metrics_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<kvtransfer::KvSender> sender_;
  std::unique_ptr<PrefillLoop> loop_;
  std::unique_ptr<PrefillService> service_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<ClusterClient> cluster_;
  std::thread thread_;
  absl::Notification loop_done_;

  absl::Mutex mutex_;
  absl::Status refused_ ABSL_GUARDED_BY(mutex_);  // by the router
};

absl::Status Worker::Init() {
  TANDEM_RETURN_IF_ERROR(metrics_.Serve(options_.process.metrics_listen));
  TANDEM_ASSIGN_OR_RETURN(engine_, engine::Engine::Load(options_.engine));
  const std::string name = options_.process.served_model_name.empty()
                               ? engine::DefaultModelName(engine_->options().model_dir)
                               : options_.process.served_model_name;
  capability_ = engine::CapabilityOf(*engine_, name, options_.process.cluster_secret);
  spdlog::info("{}", engine_->Banner());
  TANDEM_RETURN_IF_ERROR(StartSender());
  StartLoop();
  TANDEM_RETURN_IF_ERROR(StartServer());
  TANDEM_RETURN_IF_ERROR(Join());
  thread_ = std::thread([this] {
    loop_->Run();
    loop_done_.Notify();
  });
  server_->SetServing(true);
  return absl::OkStatus();
}

absl::Status Worker::StartSender() {
  kvtransfer::KvSenderOptions sender;
  sender.region = engine_->region();
  sender.worker_id = options_.process.worker_id;
  sender.capability_digest = CapabilityDigest(capability_);
  sender.on_done = [this](const TransferId& id, uint64_t epoch, const absl::Status& status,
                          const kvtransfer::TransferStats& stats) {
    inbox_.Push(PrefillShipped{id, epoch, status, stats});
  };
  TANDEM_ASSIGN_OR_RETURN(sender_, kvtransfer::KvSender::Start(std::move(sender)));
  return absl::OkStatus();
}

void Worker::StartLoop() {
  PrefillLoopOptions loop;
  loop.limits = {engine_->options().max_num_batched_tokens, engine_->options().max_num_seqs};
  loop.layout = engine_->region().layout;
  loop.max_waiting = options_.max_waiting;
  loop.worker_id = options_.process.worker_id;
  loop.cluster_secret = options_.process.cluster_secret;
  loop.model_digest = engine_->model_digest();
  PrefillLoopParts parts;
  parts.runner = &engine_->runner();
  parts.pool = &engine_->pool();
  parts.cache = &engine_->cache();
  parts.sender = sender_.get();
  parts.clock = Clock::Real();
  parts.metrics = &worker_metrics_;
  parts.inbox = &inbox_;
  PrefillLoopHooks hooks;  // cluster_ is set before the loop's thread starts and outlives it
  hooks.report = [this](const PrefillLoad& load) {
    if (cluster_ != nullptr) cluster_->PostLoad(LoadToProto(load, *sender_));
  };
  hooks.blocks = [this](const engine::BlockEvents& events, bool cleared) {
    if (cluster_ != nullptr) cluster_->PostBlocks(engine::BlockEventsToProto(events, cleared));
  };
  loop_ = std::make_unique<PrefillLoop>(std::move(loop), parts, std::move(hooks));
}

absl::Status Worker::StartServer() {
  PrefillServiceOptions service;
  service.worker_id = options_.process.worker_id;
  service.capability_digest = CapabilityDigest(capability_);
  service.vocab_size = engine_->config().vocab_size;
  service.max_model_len = engine_->options().max_model_len;
  service.block_size = engine_->region().layout.block_size;
  service_ = std::make_unique<PrefillService>(std::move(service), &inbox_, Clock::Real());
  RpcServerOptions server;
  server.listen_address = options_.process.listen;
  TANDEM_ASSIGN_OR_RETURN(server_, RpcServer::Start(server, {service_.get()}));
  return absl::OkStatus();
}

internal::v1::Hello Worker::MakeHello(const std::string& address,
                                      const std::string& metrics) const {
  const engine::EngineOptions& engine = engine_->options();
  internal::v1::Hello hello;
  hello.set_worker_id(options_.process.worker_id);
  hello.set_incarnation(RandomUint64());
  hello.set_role("prefill");
  hello.set_address(address);
  *hello.mutable_capability() = capability_;
  hello.set_max_model_len(static_cast<uint32_t>(engine.max_model_len));
  hello.set_max_num_seqs(static_cast<uint32_t>(engine.max_num_seqs));
  hello.set_max_num_batched_tokens(static_cast<uint32_t>(engine.max_num_batched_tokens));
  hello.set_num_blocks(static_cast<uint32_t>(engine_->region().num_blocks));
  hello.set_metrics_address(metrics);
  return hello;
}

absl::Status Worker::Join() {
  if (options_.process.router.empty()) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(const std::string address,
                          AdvertisedAddress(options_.process, server_->address()));
  TANDEM_ASSIGN_OR_RETURN(const std::string metrics,
                          AdvertisedAddress(options_.process, metrics_.address()));
  ClusterClientOptions cluster;
  cluster.router_address = options_.process.router;
  cluster.hello = MakeHello(address, metrics);
  cluster.on_joined = [this] { inbox_.Push(PrefillSnapshotWanted{}); };
  cluster.on_drain = [this] { signals_->Wake(); };
  cluster.on_refused = [this](const absl::Status& status) {
    {
      absl::MutexLock lock(&mutex_);
      refused_ = status;
    }
    signals_->Wake();
  };
  cluster_ = ClusterClient::Start(std::move(cluster));
  return absl::OkStatus();
}

void Worker::Stop(absl::Duration drain) {
  if (thread_.joinable()) {
    server_->SetServing(false);
    if (cluster_ != nullptr) cluster_->PostDraining();
    inbox_.Push(PrefillDrainWanted{});
    if (!loop_done_.WaitForNotificationWithTimeout(drain)) {
      spdlog::warn("giving up what still runs after {}", absl::FormatDuration(drain));
      inbox_.Push(PrefillStopWanted{});
    }
    thread_.join();
  }
  if (server_ != nullptr) server_->Shutdown(absl::Seconds(1));
  cluster_.reset();
  sender_.reset();  // before the loop, whose blocks it may read
  loop_.reset();
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerProcess>> StartPrefillWorker(
    const PrefillWorkerOptions& options, SignalWaiter* signals) {
  auto worker = std::make_unique<Worker>(options, signals);
  TANDEM_RETURN_IF_ERROR(worker->Init());
  return worker;
}

}  // namespace tandem::prefill
