#include "decode_worker/worker.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <thread>
#include <utility>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "spdlog/spdlog.h"

#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/rpc/cluster_client.h"
#include "decode_worker/decode_service.h"
#include "decode_worker/decode_wire.h"
#include "decode_worker/loop.h"
#include "decode_worker/prefill_client.h"
#include "engine/wire/cluster_wire.h"

namespace tandem::decode {
namespace {

// Events that wait for the loop's next turn, up to which work is accepted.
constexpr size_t kInboxCapacity = 1024;

class Worker final : public WorkerProcess {
 public:
  Worker(const DecodeWorkerOptions& options, SignalWaiter* signals)
      : options_(options), signals_(signals), inbox_(kInboxCapacity), metrics_of_loop_(&metrics_) {}
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
  bool unified() const { return options_.role == "unified"; }
  absl::Status StartTransfers();
  absl::Status StartServer();
  void StartLoop();
  absl::Status Join();
  internal::v1::Hello MakeHello(const std::string& address, const std::string& metrics) const;
  void Stop(absl::Duration drain);

  const DecodeWorkerOptions options_;
  SignalWaiter* const signals_;
  internal::v1::Capability capability_;

  // In the order of their construction; each uses those above it.
  Metrics metrics_;
  DecodeInbox inbox_;
  DecodeMetrics metrics_of_loop_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<kvtransfer::KvReceiver> receiver_;
  std::unique_ptr<PrefillClient> prefill_client_;
  std::unique_ptr<DecodeLoop> loop_;
  std::unique_ptr<DecodeService> service_;
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
  const engine::EngineOptions& engine = engine_->options();
  if (engine.max_num_batched_tokens < engine.max_num_seqs) {
    return InvalidArgument(
        "--max-num-batched-tokens {} is less than --max-num-seqs {}: a batch could not hold one "
        "token of every sequence",
        engine.max_num_batched_tokens, engine.max_num_seqs);
  }
  const std::string name = options_.process.served_model_name.empty()
                               ? engine::DefaultModelName(engine.model_dir)
                               : options_.process.served_model_name;
  capability_ = engine::CapabilityOf(*engine_, name, options_.process.cluster_secret);
  spdlog::info("{}", engine_->Banner());
  TANDEM_RETURN_IF_ERROR(StartTransfers());
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

absl::Status Worker::StartTransfers() {
  if (unified()) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(HostPort listen, ParseHostPort(options_.kv_listen));
  kvtransfer::KvReceiverOptions kv;
  kv.listen_host = listen.host;
  kv.port = listen.port;
  kv.advertise_host = AdvertisedHost(options_.process, listen.host);
  kv.region = engine_->region();
  kv.worker_id = options_.process.worker_id;
  kv.capability_digest = CapabilityDigest(capability_);
  kv.on_sealed = [this](const TransferId& id, uint64_t epoch,
                        const kvtransfer::TransferStats& stats) {
    inbox_.Push(KvSealed{id, epoch, stats});
  };
  kv.on_failed = [this](const TransferId& id, uint64_t epoch, const absl::Status& status) {
    inbox_.Push(KvFailed{id, epoch, status});
  };
  kv.on_quiet = [this](const TransferId& id, uint64_t epoch) { inbox_.Push(KvQuiet{id, epoch}); };
  TANDEM_ASSIGN_OR_RETURN(receiver_, kvtransfer::KvReceiver::Start(std::move(kv)));

  PrefillClientOptions prefill;
  prefill.kv_address = receiver_->address();
  prefill.worker_id = options_.process.worker_id;
  prefill.num_blocks = engine_->region().num_blocks;
  prefill.capability_digest = CapabilityDigest(capability_);
  prefill.vocab_size = engine_->config().vocab_size;
  prefill_client_ = std::make_unique<PrefillClient>(std::move(prefill), &inbox_, Clock::Real());
  return absl::OkStatus();
}

void Worker::StartLoop() {
  const engine::EngineOptions& engine = engine_->options();
  LoopOptions loop;
  loop.limits = {engine.block_size, engine.max_num_seqs, engine.max_num_batched_tokens};
  loop.max_model_len = engine.max_model_len;
  loop.unified = unified();
  loop.local_prefill_max_tokens = options_.local_prefill_max_tokens;
  loop.kv_seal_timeout = absl::Seconds(options_.kv_seal_timeout);
  loop.prefill_timeout = absl::Seconds(options_.prefill_timeout);
  loop.worker_id = options_.process.worker_id;
  loop.cluster_secret = options_.process.cluster_secret;
  loop.model_digest = engine_->model_digest();
  LoopParts parts;
  parts.runner = &engine_->runner();
  parts.pool = &engine_->pool();
  parts.cache = &engine_->cache();
  parts.receiver = receiver_.get();
  parts.caller = prefill_client_.get();
  parts.clock = Clock::Real();
  parts.metrics = &metrics_of_loop_;
  parts.inbox = &inbox_;
  LoopHooks hooks;  // cluster_ is set before the loop's thread starts and outlives it
  hooks.report = [this](const LoadSnapshot& load) {
    if (cluster_ != nullptr) cluster_->PostLoad(LoadToProto(load));
  };
  hooks.blocks = [this](const engine::BlockEvents& events, bool cleared) {
    if (cluster_ != nullptr) cluster_->PostBlocks(engine::BlockEventsToProto(events, cleared));
  };
  loop_ = std::make_unique<DecodeLoop>(std::move(loop), parts, std::move(hooks));
}

absl::Status Worker::StartServer() {
  service_ = std::make_unique<DecodeService>(&inbox_, Clock::Real(), engine_->config().vocab_size);
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
  hello.set_role(options_.role);
  hello.set_address(address);
  *hello.mutable_capability() = capability_;
  hello.set_max_model_len(static_cast<uint32_t>(engine.max_model_len));
  hello.set_max_num_seqs(static_cast<uint32_t>(engine.max_num_seqs));
  hello.set_max_num_batched_tokens(static_cast<uint32_t>(engine.max_num_batched_tokens));
  hello.set_num_blocks(static_cast<uint32_t>(engine_->region().num_blocks));
  hello.set_local_prefill_max_tokens(
      unified() ? std::numeric_limits<uint32_t>::max()
                : static_cast<uint32_t>(options_.local_prefill_max_tokens));
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
  cluster.on_joined = [this] { inbox_.Push(SnapshotWanted{}); };
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
  const absl::Time deadline = Clock::Real()->Now() + drain;
  if (thread_.joinable()) {
    if (cluster_ != nullptr) cluster_->PostDraining();
    server_->SetServing(false);
    inbox_.Push(DrainWanted{});
    if (!loop_done_.WaitForNotificationWithTimeout(drain)) inbox_.Push(StopWanted{});
    thread_.join();
  }
  loop_.reset();  // ends the streams that are left, so that the server need not cancel them
  // Slow readers may still be taking the last tokens of sequences that have ended.
  const absl::Duration left = deadline - Clock::Real()->Now();
  if (server_ != nullptr) server_->Shutdown(std::max(left, absl::Seconds(1)));
  cluster_.reset();
  prefill_client_.reset();
  receiver_.reset();
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerProcess>> StartDecodeWorker(const DecodeWorkerOptions& options,
                                                                 SignalWaiter* signals) {
  auto worker = std::make_unique<Worker>(options, signals);
  TANDEM_RETURN_IF_ERROR(worker->Init());
  return worker;
}

}  // namespace tandem::decode
