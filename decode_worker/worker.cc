#include "decode_worker/worker.h"

#include <cstdint>
#include <limits>
#include <utility>

#include "common/base/status.h"
#include "decode_worker/decode_service.h"
#include "decode_worker/intake.h"
#include "decode_worker/loop.h"
#include "decode_worker/ngram_drafter.h"
#include "decode_worker/prefill_client.h"
#include "worker/kv_ends.h"
#include "worker/worker.h"

namespace tandem::decode {
namespace {

// Events that wait for the loop's next turn, up to which work is accepted.
constexpr size_t kInboxCapacity = 1024;

// A reader of streamed text does not notice gaps of this length.
constexpr double kGpuTargetStepMs = 30;
// Of its products for many rows (engine/kernels/cuda/hopper_linear.h).
constexpr int kGpuRowTile = 256;

class DecodeRole final : public worker::Role {
 public:
  explicit DecodeRole(const WorkerOptions& options) : options_(options), inbox_(kInboxCapacity) {}

  std::string party_role() const override { return kDecodeRole; }
  std::string metrics_role() const override { return options_.role; }
  std::vector<std::string> callers() const override { return {kRouterRole}; }
  absl::Status Start(const worker::Frame& frame) override;
  grpc::Service* service() override { return service_.get(); }
  void FillHello(internal::v1::Hello* hello) const override;
  void Run() override { loop_->Run(); }
  void Post(worker::SnapshotWanted event) override { inbox_.Push(event); }
  void Post(worker::DrainWanted event) override { inbox_.Push(event); }
  void Post(worker::StopWanted event) override { inbox_.Push(event); }

 private:
  bool unified() const { return options_.role == "unified"; }
  absl::Status StartTransfers(const worker::Frame& frame);
  void MakeLoop(const worker::Frame& frame);

  const WorkerOptions options_;

  // Each uses those above it. The waker is last: what it wakes for uses all of them.
  EventInbox inbox_;
  std::unique_ptr<DecodeMetrics> metrics_;
  std::unique_ptr<kvtransfer::KvReceiver> receiver_;
  std::unique_ptr<kvtransfer::KvSender> sender_;
  std::unique_ptr<PrefillClient> prefill_client_;
  std::unique_ptr<Intake> intake_;
  std::unique_ptr<DecodeService> service_;
  std::unique_ptr<StreamWaker> waker_;
  std::unique_ptr<Loop> loop_;
};

absl::Status DecodeRole::Start(const worker::Frame& frame) {
  const engine::EngineOptions& engine = frame.engine->options();
  if (engine.max_num_batched_tokens < engine.max_num_seqs) {
    return InvalidArgument(
        "--max-num-batched-tokens {} is less than --max-num-seqs {}: a batch could not hold one "
        "token of every sequence",
        engine.max_num_batched_tokens, engine.max_num_seqs);
  }
  metrics_ = std::make_unique<DecodeMetrics>(frame.metrics);
  if (!unified()) TANDEM_RETURN_IF_ERROR(StartTransfers(frame));
  intake_ = std::make_unique<Intake>(
      RequestLimits{frame.engine->config().vocab_size, engine.max_model_len}, &inbox_, frame.clock);
  service_ = std::make_unique<DecodeService>(intake_.get());
  waker_ = std::make_unique<StreamWaker>();
  MakeLoop(frame);
  return absl::OkStatus();
}

absl::Status DecodeRole::StartTransfers(const worker::Frame& frame) {
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

  kvtransfer::KvSenderOptions giving = worker::MakeSenderOptions(frame);
  giving.on_done = [this](const TransferId& id, uint64_t epoch, const absl::Status& status,
                          const kvtransfer::TransferStats& stats) {
    inbox_.Push(KvGiven{id, epoch, status, stats});
  };
  TANDEM_ASSIGN_OR_RETURN(sender_, kvtransfer::KvSender::Start(std::move(giving)));

  CallerIdentity identity;
  identity.kv_address = receiver_->address();
  identity.kv_transport = frame.process->kv_transport;
  identity.worker_id = frame.process->worker_id;
  identity.num_blocks = frame.engine->region().num_blocks;
  identity.capability_digest = frame.capability_digest;
  prefill_client_ =
      std::make_unique<PrefillClient>(std::move(identity), frame.credentials,
                                      frame.engine->config().vocab_size, &inbox_, frame.clock);
  return absl::OkStatus();
}

void DecodeRole::MakeLoop(const worker::Frame& frame) {
  const engine::EngineOptions& engine = frame.engine->options();
  LoopOptions loop;
  loop.admission.limits = {engine.block_size, engine.max_num_seqs, engine.max_num_batched_tokens};
  loop.admission.max_model_len = engine.max_model_len;
  loop.admission.unified = unified();
  loop.admission.local_prefill_max_tokens = options_.local_prefill_max_tokens;
  loop.admission.worker_id = frame.process->worker_id;
  loop.admission.cluster_secret = frame.process->cluster_secret;
  loop.admission.model_digest = frame.engine->model_digest();
  const double target_step_ms = options_.target_step_ms >= 0 ? options_.target_step_ms
                                : engine.device == "cpu"     ? 0
                                                             : kGpuTargetStepMs;
  loop.target_step = absl::Milliseconds(target_step_ms);
  if (engine.device != "cpu") loop.row_tile = kGpuRowTile;
  if (options_.speculative == "ngram") {
    loop.speculation.drafter = [] { return std::make_unique<NgramDrafter>(); };
  }
  loop.prefill.worker_id = frame.process->worker_id;
  loop.prefill.block_size = engine.block_size;
  loop.prefill.num_layers = frame.engine->region().layout.num_layers;
  loop.prefill.kv_transport = frame.process->kv_transport;
  loop.prefill.call_timeout = absl::Seconds(options_.prefill_timeout);
  loop.prefill.window.tokens = options_.prefill_window;
  loop.prefill.kv_seal_timeout = absl::Seconds(options_.kv_seal_timeout);
  LoopParts parts;
  parts.runner = &frame.engine->runner();
  parts.pool = &frame.engine->pool();
  parts.cache = &frame.engine->cache();
  parts.receiver = receiver_.get();
  parts.sender = sender_.get();
  parts.caller = prefill_client_.get();
  parts.waker = waker_.get();
  parts.clock = frame.clock;
  parts.metrics = metrics_.get();
  parts.inbox = &inbox_;
  parts.spans = frame.spans;
  loop_ = std::make_unique<Loop>(std::move(loop), parts, frame.reports);
}

void DecodeRole::FillHello(internal::v1::Hello* hello) const {
  hello->set_role(options_.role);
  if (receiver_ != nullptr) hello->set_kv_address(receiver_->address());
  hello->set_local_prefill_max_tokens(
      unified() ? std::numeric_limits<uint32_t>::max()
                : static_cast<uint32_t>(options_.local_prefill_max_tokens));
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerProcess>> StartWorker(const WorkerOptions& options,
                                                           SignalWaiter* signals) {
  return worker::StartWorker(options.engine, options.process, std::make_unique<DecodeRole>(options),
                             signals);
}

}  // namespace tandem::decode
