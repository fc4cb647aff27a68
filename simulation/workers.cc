#include "simulation/workers.h"

#include <limits>
#include <utility>
#include <variant>

#include "common/base/check.h"
#include "common/base/status.h"
#include "common/rpc/cluster_client.h"
#include "common/rpc/load_wire.h"
#include "common/rpc/token_wire.h"
#include "engine/wire/cluster_wire.h"

namespace tandem {
namespace {

constexpr size_t kInboxCapacity = 4096;

internal::v1::Capability MakeCapability(const InProcessWorkerOptions& options) {
  internal::v1::Capability capability;
  capability.set_model("fake");
  capability.set_model_digest(options.model_digest);
  capability.set_block_size(static_cast<uint32_t>(options.engine.block_size));
  capability.set_protocol_version(kProtocolVersion);
  capability.set_vocab_size(static_cast<uint32_t>(options.engine.model.vocab_size));
  return capability;
}

worker::Reports MakeReports(JoinMessages messages) {
  worker::Reports reports;
  reports.load = [load = std::move(messages.load)](const LoadReport& report) {
    if (load) load(LoadReportToProto(report));
  };
  reports.blocks = [blocks = std::move(messages.blocks)](const engine::BlockEvents& events,
                                                         bool cleared) {
    if (blocks) blocks(engine::BlockEventsToProto(events, cleared));
  };
  return reports;
}

prefill::RequestLimits PrefillLimits(const InProcessWorkerOptions& options) {
  return {.worker_id = options.worker_id,
          .capability_digest = CapabilityDigest(MakeCapability(options)),
          .vocab_size = options.engine.model.vocab_size,
          .max_model_len = options.max_model_len,
          .block_size = options.engine.block_size,
          .num_blocks = options.engine.num_blocks};
}

// Either kind of worker, by the events of its inbox.
template <typename Sealed, typename Failed, typename Quiet, typename Inbox>
std::unique_ptr<kvtransfer::KvReceiver> MakeReceiver(const InProcessWorkerOptions& options,
                                                     const KvRegion& region, InProcessKvNetwork* kv,
                                                     Inbox* inbox) {
  kvtransfer::KvReceiverOptions receiver;
  receiver.region = region;
  receiver.worker_id = options.worker_id;
  receiver.capability_digest = CapabilityDigest(MakeCapability(options));
  receiver.on_sealed = [inbox](const TransferId& id, uint64_t epoch,
                               const kvtransfer::TransferStats& stats) {
    inbox->Push(Sealed{id, epoch, stats});
  };
  receiver.on_failed = [inbox](const TransferId& id, uint64_t epoch, const absl::Status& status) {
    inbox->Push(Failed{id, epoch, status});
  };
  receiver.on_quiet = [inbox](const TransferId& id, uint64_t epoch) {
    inbox->Push(Quiet{id, epoch});
  };
  return kv->MakeReceiver(std::move(receiver));
}

template <typename Done, typename Inbox>
std::unique_ptr<kvtransfer::KvSender> MakeSender(const InProcessWorkerOptions& options,
                                                 const KvRegion& region, InProcessKvNetwork* kv,
                                                 Inbox* inbox) {
  kvtransfer::KvSenderOptions sender;
  sender.region = region;
  sender.worker_id = options.worker_id;
  sender.capability_digest = CapabilityDigest(MakeCapability(options));
  sender.on_done = [inbox](const TransferId& id, uint64_t epoch, const absl::Status& status,
                           const kvtransfer::TransferStats& stats) {
    inbox->Push(Done{id, epoch, status, stats});
  };
  return kv->MakeSender(std::move(sender));
}

}  // namespace

internal::v1::Hello MakeHello(const InProcessWorkerOptions& options, const std::string& role,
                              const std::string& address) {
  internal::v1::Hello hello;
  hello.set_worker_id(options.worker_id);
  hello.set_incarnation(options.incarnation);
  hello.set_role(role);
  hello.set_address(address);
  *hello.mutable_capability() = MakeCapability(options);
  hello.set_max_model_len(static_cast<uint32_t>(options.max_model_len));
  hello.set_max_num_seqs(static_cast<uint32_t>(options.max_num_seqs));
  hello.set_max_num_batched_tokens(static_cast<uint32_t>(options.max_num_batched_tokens));
  hello.set_num_blocks(static_cast<uint32_t>(options.engine.num_blocks));
  return hello;
}

std::string AddressOf(const std::string& role, const InProcessWorkerOptions& options) {
  const std::string address = role + ":" + options.worker_id;
  return options.incarnation == 1 ? address : address + "#" + std::to_string(options.incarnation);
}

InProcessPrefillWorker::InProcessPrefillWorker(const InProcessWorkerOptions& options,
                                               InProcessKvNetwork* kv, Clock* clock,
                                               JoinMessages messages)
    : options_(options),
      engine_(options.engine),
      metrics_(&engine_.metrics),
      inbox_(kInboxCapacity),
      intake_(PrefillLimits(options), &inbox_, clock) {
  const KvRegion region = engine_.memory.region();
  if (options.returns) {
    receiver_ = MakeReceiver<prefill::KvSealed, prefill::KvFailed, prefill::KvQuiet>(
        options, region, kv, &inbox_);
  }
  sender_ = MakeSender<prefill::KvShipped>(options, region, kv, &inbox_);
  prefill::LoopOptions loop;
  loop.limits = {options.max_num_batched_tokens, options.max_num_seqs};
  loop.layout = region.layout;
  loop.returns.worker_id = options.worker_id;
  loop.returns.kv_transport = kv->transport();
  loop.returns.block_size = options.engine.block_size;
  loop.worker_id = options.worker_id;
  loop.cluster_secret = options.cluster_secret;
  loop.model_digest = options.model_digest;
  prefill::LoopParts parts;
  parts.runner = &engine_.runner();
  parts.pool = &engine_.pool;
  parts.cache = &engine_.cache;
  parts.sender = sender_.get();
  parts.receiver = receiver_.get();
  parts.clock = clock;
  parts.metrics = &metrics_;
  parts.inbox = &inbox_;
  loop_ = std::make_unique<prefill::Loop>(std::move(loop), parts, MakeReports(std::move(messages)));
}

InProcessPrefillWorker::~InProcessPrefillWorker() {
  // While there is a sender to abort what it ships.
  inbox_.Push(worker::StopWanted{});
  Step();
}

internal::v1::Hello InProcessPrefillWorker::hello() const {
  internal::v1::Hello hello = MakeHello(options_, "prefill", address());
  if (receiver_ != nullptr) hello.set_kv_address(receiver_->address());
  return hello;
}

InProcessPrefillCaller::InProcessPrefillCaller(decode::CallerIdentity identity, int vocab_size,
                                               const std::vector<InProcessPrefillWorker*>* workers,
                                               decode::EventInbox* inbox, Clock* clock)
    : identity_(std::move(identity)),
      vocab_size_(vocab_size),
      workers_(workers),
      inbox_(inbox),
      clock_(clock) {}

void InProcessPrefillCaller::Call(decode::PrefillCall call) {
  const uint64_t call_id = call.call_id;
  for (InProcessPrefillWorker* prefill : *workers_) {
    if (prefill->address() != call.peer.address) continue;
    const Active active = {&prefill->intake(), prefill->intake().NewId()};
    {
      absl::MutexLock lock(&mutex_);
      active_[call_id] = active;
    }
    active.intake->Submit(
        active.id, decode::CallToProto(call, identity_),
        [this, call, intake = active.intake](const prefill::Wanted& wanted) {
          auto blocks = decode::WantedFromProto(intake->ToProto(wanted), call);
          TANDEM_CHECK(blocks.ok(), "{}", blocks.status().ToString());
          inbox_->Push(*std::move(blocks));
        },
        [first_token = call.first_token](int computed) { first_token->SendProgress(computed); },
        [this, call_id, first_token = call.first_token,
         intake = active.intake](const absl::StatusOr<prefill::Outcome>& outcome) {
          {
            absl::MutexLock lock(&mutex_);
            active_.erase(call_id);
          }
          decode::PrefillReply reply{.call_id = call_id, .at = clock_->Now()};
          if (outcome.ok()) {
            reply.outcome = decode::OutcomeFromProto(intake->ToProto(*outcome), vocab_size_);
            reply.sent = reply.outcome.ok() && first_token->Send(*reply.outcome, reply.at);
          } else {
            reply.outcome = outcome.status();
          }
          inbox_->Push(std::move(reply));
        });
    return;
  }
  inbox_->Push(decode::PrefillReply{
      call_id, Unavailable("no prefill worker at {} in this process", call.peer.address)});
}

void InProcessPrefillCaller::Cancel(uint64_t call_id) {
  Active active;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = active_.find(call_id);
    if (it == active_.end()) return;
    active = it->second;
  }
  active.intake->Cancel(active.id);
}

InProcessDecodeWorker::InProcessDecodeWorker(
    const InProcessWorkerOptions& options, InProcessKvNetwork* kv,
    const std::vector<InProcessPrefillWorker*>* prefill_workers, Clock* clock,
    JoinMessages messages)
    : InProcessDecodeWorker(
          options, kv,
          [&options, prefill_workers, clock](decode::CallerIdentity identity,
                                             decode::EventInbox* inbox) {
            return std::make_unique<InProcessPrefillCaller>(std::move(identity),
                                                            options.engine.model.vocab_size,
                                                            prefill_workers, inbox, clock);
          },
          clock, std::move(messages)) {}

InProcessDecodeWorker::InProcessDecodeWorker(const InProcessWorkerOptions& options,
                                             InProcessKvNetwork* kv, const MakeCaller& make_caller,
                                             Clock* clock, JoinMessages messages)
    : options_(options),
      engine_(options.engine),
      metrics_(&engine_.metrics),
      inbox_(kInboxCapacity),
      intake_({options.engine.model.vocab_size, options.max_model_len}, &inbox_, clock) {
  const KvRegion region = engine_.memory.region();
  receiver_ = MakeReceiver<decode::KvSealed, decode::KvFailed, decode::KvQuiet>(options, region, kv,
                                                                                &inbox_);
  sender_ = MakeSender<decode::KvGiven>(options, region, kv, &inbox_);
  decode::CallerIdentity identity;
  identity.kv_transport = kv->transport();
  identity.kv_address = receiver_->address();
  identity.worker_id = options.worker_id;
  identity.num_blocks = options.engine.num_blocks;
  identity.capability_digest = CapabilityDigest(MakeCapability(options));
  caller_ = make_caller(std::move(identity), &inbox_);

  decode::LoopOptions loop;
  loop.admission.limits = {options.engine.block_size, options.max_num_seqs,
                           options.max_num_batched_tokens};
  loop.admission.max_model_len = options.max_model_len;
  loop.admission.unified = options.unified;
  loop.admission.local_prefill_max_tokens = options.local_prefill_max_tokens;
  loop.admission.worker_id = options.worker_id;
  loop.admission.cluster_secret = options.cluster_secret;
  loop.admission.model_digest = options.model_digest;
  loop.target_step = options.target_step;
  loop.row_tile = options.row_tile;
  loop.prefill.worker_id = options.worker_id;
  loop.prefill.kv_transport = kv->transport();
  loop.prefill.block_size = options.engine.block_size;
  loop.prefill.num_layers = region.layout.num_layers;
  decode::LoopParts parts;
  parts.runner = &engine_.runner();
  parts.pool = &engine_.pool;
  parts.cache = &engine_.cache;
  parts.receiver = receiver_.get();
  parts.sender = sender_.get();
  parts.caller = caller_.get();
  parts.clock = clock;
  parts.metrics = &metrics_;
  parts.inbox = &inbox_;
  loop_ = std::make_unique<decode::Loop>(std::move(loop), parts, MakeReports(std::move(messages)));
}

internal::v1::Hello InProcessDecodeWorker::hello() const {
  internal::v1::Hello hello =
      MakeHello(options_, options_.unified ? "unified" : "decode", address());
  hello.set_local_prefill_max_tokens(
      options_.unified ? std::numeric_limits<uint32_t>::max()
                       : static_cast<uint32_t>(options_.local_prefill_max_tokens));
  return hello;
}

uint64_t InProcessDecodeWorker::Generate(const internal::v1::DecodeRequest& request,
                                         absl::Duration left,
                                         std::function<void(internal::v1::TokenEvent)> on_event,
                                         std::function<void(absl::Status)> on_end) {
  absl::StatusOr<decode::Work> work = intake_.Read(request, left);
  if (!work.ok()) {
    on_end(work.status());
    return 0;
  }
  const uint64_t id = work->id;
  // The stream's taker needs the stream itself, which the loop keeps alive until it has ended.
  auto holder = std::make_shared<std::weak_ptr<decode::TokenStream>>();
  auto stream = intake_.MakeStream([holder, on_event, on_end] {
    const std::shared_ptr<decode::TokenStream> self = holder->lock();
    while (self != nullptr) {
      decode::TokenStream::Item item = self->Take();
      if (auto* event = std::get_if<TokenEvent>(&item)) {
        internal::v1::TokenEvent message;
        TokenEventToProto(*event, &message);
        on_event(std::move(message));
      } else {
        if (auto* status = std::get_if<absl::Status>(&item)) on_end(*status);
        return;
      }
    }
  });
  *holder = stream;
  if (absl::Status status = intake_.Push(*std::move(work), stream); !status.ok()) {
    on_end(status);
    return 0;
  }
  return id;
}

}  // namespace tandem
