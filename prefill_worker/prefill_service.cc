#include "prefill_worker/prefill_service.h"

#include <utility>

#include "absl/time/time.h"

#include "common/base/status.h"
#include "common/rpc/status.h"
#include "engine/wire/wire.h"

namespace tandem::prefill {
namespace {

// How long a caller should wait before it asks a full worker again.
constexpr absl::Duration kRetryWhenFull = absl::Milliseconds(200);

// One call. Lives until gRPC is done with it, which is after Finish().
class Reactor final : public grpc::ServerUnaryReactor {
 public:
  Reactor(PrefillInbox* inbox, uint64_t id) : inbox_(inbox), id_(id) {}

  void OnCancel() override { inbox_->Push(PrefillCancelled{id_}); }
  void OnDone() override { delete this; }

 private:
  PrefillInbox* const inbox_;
  const uint64_t id_;
};

absl::Status BadField(absl::Status status, const std::string& field) {
  return WithField(std::move(status), field);
}

absl::Status CheckTarget(const internal::v1::KvTarget& target, int prompt_blocks) {
  TransferId id;
  if (!TransferId::FromBytes(target.transfer_id(), &id)) {
    return BadField(InvalidArgument("target.transfer_id must have 16 bytes, got {}",
                                    target.transfer_id().size()),
                    "target.transfer_id");
  }
  if (target.transport().empty()) {
    return BadField(InvalidArgument("target.transport must be set"), "target.transport");
  }
  if (target.address().empty()) {
    return BadField(InvalidArgument("target.address must be HOST:PORT, got nothing"),
                    "target.address");
  }
  const uint64_t covered = uint64_t{target.first_block()} + uint64_t(target.block_ids_size());
  if (covered != static_cast<uint64_t>(prompt_blocks)) {
    return BadField(
        InvalidArgument("target.block_ids: first_block {} and {} ids must make up the prompt's {} "
                        "blocks",
                        target.first_block(), target.block_ids_size(), prompt_blocks),
        "target.block_ids");
  }
  for (int i = 0; i < target.block_ids_size(); ++i) {
    if (target.block_ids(i) < target.num_blocks()) continue;
    return BadField(InvalidArgument("target.block_ids[{}] is {}; the pool has {} blocks", i,
                                    target.block_ids(i), target.num_blocks()),
                    "target.block_ids");
  }
  return absl::OkStatus();
}

kvtransfer::KvSendTarget TargetFromProto(const internal::v1::KvTarget& target) {
  kvtransfer::KvSendTarget out;
  TransferId::FromBytes(target.transfer_id(), &out.id);
  out.epoch = target.epoch();
  out.transport = target.transport();
  out.address = target.address();
  out.token = target.token();
  out.peer_worker_id = target.worker_id();
  out.target_blocks.assign(target.block_ids().begin(), target.block_ids().end());
  return out;
}

}  // namespace

absl::StatusOr<PrefillWork> WorkFromProto(const internal::v1::PrefillRequest& request,
                                          const PrefillServiceOptions& options) {
  if (request.capability_digest() != options.capability_digest) {
    return FailedPrecondition(
        "capability_digest is {} at the caller and {} at prefill worker {}: model, dtype, block "
        "size, cluster secret or protocol version differ (`tandem status` shows both)",
        request.capability_digest(), options.capability_digest, options.worker_id);
  }
  if (request.token_ids().empty()) {
    return BadField(InvalidArgument("token_ids must not be empty"), "token_ids");
  }
  if (request.token_ids_size() > options.max_model_len) {
    return BadField(InvalidArgument("token_ids holds {} tokens; max_model_len is {}",
                                    request.token_ids_size(), options.max_model_len),
                    "token_ids");
  }
  PrefillWork work;
  absl::StatusOr<std::vector<int32_t>> tokens =
      engine::TokensFromProto(request.token_ids(), options.vocab_size, "token_ids");
  if (!tokens.ok()) return BadField(tokens.status(), "token_ids");
  work.tokens = *std::move(tokens);
  absl::StatusOr<engine::SamplingParams> sampling =
      engine::SamplingFromProto(request.sampling(), request.eos_token_ids(), options.vocab_size);
  if (!sampling.ok()) return BadField(sampling.status(), "sampling");
  work.sampling = *std::move(sampling);
  const int prompt_blocks =
      (request.token_ids_size() + options.block_size - 1) / options.block_size;
  TANDEM_RETURN_IF_ERROR(CheckTarget(request.target(), prompt_blocks));
  work.target = TargetFromProto(request.target());
  work.first_block = static_cast<int>(request.target().first_block());
  work.request_id = request.request_id();
  work.cache_salt = request.cache_salt();
  work.priority = request.priority();
  return work;
}

void OutcomeToProto(const PrefillOutcome& outcome, const std::string& worker_id,
                    internal::v1::PrefillResponse* response) {
  *response->mutable_first_token() = engine::LogprobToProto(outcome.first_token);
  for (const engine::TokenLogprob& logprob : outcome.prompt_logprobs) {
    *response->add_prompt_logprobs() = engine::LogprobToProto(logprob);
  }
  response->set_cached_tokens(static_cast<uint32_t>(outcome.cached_tokens));
  response->set_queue_ms(absl::ToDoubleMilliseconds(outcome.queue));
  response->set_prefill_ms(absl::ToDoubleMilliseconds(outcome.prefill));
  response->set_kv_bytes(outcome.kv_bytes);
  response->set_worker_id(worker_id);
}

PrefillService::PrefillService(PrefillServiceOptions options, PrefillInbox* inbox, Clock* clock)
    : options_(std::move(options)), inbox_(inbox), clock_(clock) {}

grpc::ServerUnaryReactor* PrefillService::Prefill(grpc::CallbackServerContext*,
                                                  const internal::v1::PrefillRequest* request,
                                                  internal::v1::PrefillResponse* response) {
  const uint64_t id = ++last_id_;
  auto* reactor = new Reactor(inbox_, id);
  absl::StatusOr<PrefillWork> work = WorkFromProto(*request, options_);
  if (!work.ok()) {
    reactor->Finish(ToGrpcStatus(work.status()));
    return reactor;
  }
  work->id = id;
  work->arrived = clock_->Now();
  work->reply = [this, reactor, response](absl::StatusOr<PrefillOutcome> outcome) {
    if (outcome.ok()) OutcomeToProto(*outcome, options_.worker_id, response);
    reactor->Finish(ToGrpcStatus(outcome.status()));
  };
  if (!inbox_->TryPush(PrefillArrived{*std::move(work)})) {
    const absl::Status status =
        inbox_->closed() ? Unavailable("prefill worker {} is stopping", options_.worker_id)
                         : WithRetryAfter(ResourceExhausted("prefill worker {} has a full queue",
                                                            options_.worker_id),
                                          kRetryWhenFull);
    reactor->Finish(ToGrpcStatus(status));
  }
  return reactor;
}

}  // namespace tandem::prefill
