#include "prefill_worker/worker.h"

#include <cstdint>
#include <limits>
#include <utility>

#include "common/base/status.h"
#include "common/base/work_pool.h"
#include "kvtransfer/channel/kv_endpoints.h"
#include "prefill_worker/intake.h"
#include "prefill_worker/loop.h"
#include "prefill_worker/prefill_service.h"
#include "worker/kv_ends.h"
#include "worker/worker.h"

namespace tandem::prefill {
namespace {

// Events that wait for the loop's next turn, up to which prompts are accepted.
constexpr size_t kInboxCapacity = 1024;

class PrefillRole final : public worker::Role {
 public:
  explicit PrefillRole(const WorkerOptions& options) : options_(options), inbox_(kInboxCapacity) {}
  // The sender first: it may still read blocks, which the loop gives back when it goes.
  ~PrefillRole() override { sender_.reset(); }

  std::string party_role() const override { return kPrefillRole; }
  std::vector<std::string> callers() const override { return {kDecodeRole}; }
  absl::Status Start(const worker::Frame& frame) override;
  grpc::Service* service() override { return service_.get(); }
  void FillHello(internal::v1::Hello* hello) const override {
    hello->set_role("prefill");
    if (receiver_ != nullptr) hello->set_kv_address(receiver_->address());
  }
  VoucherCheck* vouchers() override { return &vouchers_; }
  void Run() override { loop_->Run(); }
  void Post(worker::SnapshotWanted event) override { inbox_.Push(event); }
  void Post(worker::DrainWanted event) override { inbox_.Push(event); }
  void Post(worker::StopWanted event) override { inbox_.Push(event); }

 private:
  absl::Status StartSender(const worker::Frame& frame);
  absl::Status StartReceiver(const worker::Frame& frame);
  void MakeLoop(const worker::Frame& frame);

  const WorkerOptions options_;

  // Each uses those above it.
  EventInbox inbox_;
  std::unique_ptr<PrefillMetrics> metrics_;
  std::unique_ptr<kvtransfer::KvReceiver> receiver_;  // null: no blocks are asked back
  std::unique_ptr<kvtransfer::KvSender> sender_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<Intake> intake_;
  VoucherCheck vouchers_;
  WorkPool writers_{1, std::numeric_limits<size_t>::max()};  // bounded by the loop's prompts
  std::unique_ptr<PrefillService> service_;
};

absl::Status PrefillRole::Start(const worker::Frame& frame) {
  metrics_ = std::make_unique<PrefillMetrics>(frame.metrics);
  if (options_.kv_return_timeout > 0) TANDEM_RETURN_IF_ERROR(StartReceiver(frame));
  TANDEM_RETURN_IF_ERROR(StartSender(frame));
  MakeLoop(frame);
  RequestLimits limits;
  limits.worker_id = frame.process->worker_id;
  limits.capability_digest = frame.capability_digest;
  limits.vocab_size = frame.engine->config().vocab_size;
  limits.max_model_len = frame.engine->options().max_model_len;
  limits.block_size = frame.engine->region().layout.block_size;
  limits.num_blocks = frame.engine->region().num_blocks;
  intake_ = std::make_unique<Intake>(std::move(limits), &inbox_, frame.clock);
  service_ = std::make_unique<PrefillService>(
      intake_.get(), frame.process->routers.empty() ? nullptr : &vouchers_, &writers_);
  return absl::OkStatus();
}

absl::Status PrefillRole::StartSender(const worker::Frame& frame) {
  kvtransfer::KvSenderOptions sender = worker::MakeSenderOptions(frame);
  sender.on_done = [this](const TransferId& id, uint64_t epoch, const absl::Status& status,
                          const kvtransfer::TransferStats& stats) {
    inbox_.Push(KvShipped{id, epoch, status, stats});
  };
  TANDEM_ASSIGN_OR_RETURN(sender_, kvtransfer::KvSender::Start(std::move(sender)));
  return absl::OkStatus();
}

absl::Status PrefillRole::StartReceiver(const worker::Frame& frame) {
  TANDEM_ASSIGN_OR_RETURN(kvtransfer::KvReceiverOptions kv, worker::MakeReceiverOptions(frame));
  kv.on_sealed = [this](const TransferId& id, uint64_t epoch,
                        const kvtransfer::TransferStats& stats) {
    inbox_.Push(KvSealed{id, epoch, stats});
  };
  kv.on_failed = [this](const TransferId& id, uint64_t epoch, const absl::Status& status) {
    inbox_.Push(KvFailed{id, epoch, status});
  };
  kv.on_quiet = [this](const TransferId& id, uint64_t epoch) { inbox_.Push(KvQuiet{id, epoch}); };
  TANDEM_ASSIGN_OR_RETURN(receiver_, kvtransfer::KvReceiver::Start(std::move(kv)));
  return absl::OkStatus();
}

void PrefillRole::MakeLoop(const worker::Frame& frame) {
  const engine::EngineOptions& engine = frame.engine->options();
  LoopOptions loop;
  loop.limits = {engine.max_num_batched_tokens, engine.max_num_seqs};
  loop.layout = frame.engine->region().layout;
  loop.max_waiting = options_.max_waiting;
  loop.returns.worker_id = frame.process->worker_id;
  loop.returns.kv_transport = frame.process->kv_transport;
  loop.returns.block_size = engine.block_size;
  loop.returns.timeout = absl::Seconds(options_.kv_return_timeout);
  loop.worker_id = frame.process->worker_id;
  loop.cluster_secret = frame.process->cluster_secret;
  loop.model_digest = frame.engine->model_digest();
  LoopParts parts;
  parts.runner = &frame.engine->runner();
  parts.pool = &frame.engine->pool();
  parts.cache = &frame.engine->cache();
  parts.sender = sender_.get();
  parts.receiver = receiver_.get();
  parts.clock = frame.clock;
  parts.metrics = metrics_.get();
  parts.inbox = &inbox_;
  parts.spans = frame.spans;
  loop_ = std::make_unique<Loop>(std::move(loop), parts, frame.reports);
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerProcess>> StartWorker(const WorkerOptions& options,
                                                           SignalWaiter* signals) {
  return worker::StartWorker(options.engine, options.process,
                             std::make_unique<PrefillRole>(options), signals);
}

}  // namespace tandem::prefill
