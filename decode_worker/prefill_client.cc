#include "decode_worker/prefill_client.h"

#include <utility>

#include "absl/time/clock.h"

#include "common/base/status.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "engine/wire/wire.h"

namespace tandem::decode {
namespace {

// Addresses come and go with restarted workers; over this many, all idle channels are closed.
constexpr size_t kMaxChannels = 256;

absl::StatusOr<PrefillResult> ResultFromProto(const internal::v1::PrefillResponse& response,
                                              int vocab_size) {
  PrefillResult result;
  TANDEM_ASSIGN_OR_RETURN(result.first_token, engine::LogprobFromProto(response.first_token(),
                                                                       vocab_size, "first_token"));
  for (const v1::TokenLogprob& logprob : response.prompt_logprobs()) {
    TANDEM_ASSIGN_OR_RETURN(engine::TokenLogprob value,
                            engine::LogprobFromProto(logprob, vocab_size, "prompt_logprobs"));
    result.prompt_logprobs.push_back(std::move(value));
  }
  result.cached_tokens = static_cast<int>(response.cached_tokens());
  result.queue_ms = response.queue_ms();
  result.prefill_ms = response.prefill_ms();
  result.kv_bytes = response.kv_bytes();
  result.worker_id = response.worker_id();
  return result;
}

}  // namespace

struct PrefillClient::Active {
  uint64_t call_id = 0;
  std::shared_ptr<Stub> stub;  // outlives the call
  grpc::ClientContext context;
  internal::v1::PrefillRequest request;
  internal::v1::PrefillResponse response;
};

PrefillClient::PrefillClient(PrefillClientOptions options, DecodeInbox* inbox, Clock* clock)
    : options_(std::move(options)), inbox_(inbox), clock_(clock) {}

PrefillClient::~PrefillClient() {
  absl::MutexLock lock(&mutex_);
  for (auto& [id, active] : active_) active->context.TryCancel();
  mutex_.Await(absl::Condition(
      +[](decltype(active_)* active) { return active->empty(); }, &active_));
}

std::shared_ptr<PrefillClient::Stub> PrefillClient::StubFor(const std::string& address) {
  absl::MutexLock lock(&mutex_);
  if (stubs_.size() >= kMaxChannels && !stubs_.contains(address)) stubs_.clear();
  std::shared_ptr<Stub>& stub = stubs_[address];
  if (stub == nullptr) stub = internal::v1::Prefill::NewStub(MakeChannel(address));
  return stub;
}

void PrefillClient::Call(PrefillCall call) {
  auto active = std::make_shared<Active>();
  active->call_id = call.call_id;
  active->stub = StubFor(call.address);
  const absl::Duration left = call.deadline - clock_->Now();
  if (left < absl::InfiniteDuration()) {
    active->context.set_deadline(absl::ToChronoTime(absl::Now() + left));
  }
  internal::v1::PrefillRequest& request = active->request;
  request.set_request_id(std::move(call.request_id));
  engine::TokensToProto(call.tokens, request.mutable_token_ids());
  *request.mutable_sampling() = engine::SamplingToProto(call.sampling);
  engine::TokensToProto(call.sampling.eos_token_ids, request.mutable_eos_token_ids());
  request.set_cache_salt(std::move(call.cache_salt));
  request.set_priority(call.priority);
  request.set_capability_digest(options_.capability_digest);
  internal::v1::KvTarget& target = *request.mutable_target();
  target.set_transfer_id(call.transfer.ToBytes());
  target.set_epoch(call.epoch);
  target.set_transport(options_.kv_transport);
  target.set_address(options_.kv_address);
  target.set_token(std::move(call.token));
  target.set_first_block(static_cast<uint32_t>(call.first_block));
  engine::TokensToProto(call.block_ids, target.mutable_block_ids());
  target.set_worker_id(options_.worker_id);
  target.set_num_blocks(static_cast<uint32_t>(options_.num_blocks));
  {
    absl::MutexLock lock(&mutex_);
    active_[active->call_id] = active;
  }
  // The reaction keeps `active`, and with it the stub, alive.
  active->stub->async()->Prefill(&active->context, &active->request, &active->response,
                                 [this, active](grpc::Status status) { OnDone(active, status); });
}

void PrefillClient::OnDone(const std::shared_ptr<Active>& active, const grpc::Status& status) {
  PrefillReply reply{active->call_id, absl::UnknownError("")};
  if (status.ok()) {
    reply.result = ResultFromProto(active->response, options_.vocab_size);
    // A reply that makes no sense is the worker's fault, not the request's.
    if (!reply.result.ok()) {
      reply.result = Internal("malformed reply: {}", std::string(reply.result.status().message()));
    }
  } else {
    reply.result = FromGrpcStatus(status);
  }
  inbox_->Push(std::move(reply));
  absl::MutexLock lock(&mutex_);
  active_.erase(active->call_id);
}

void PrefillClient::Cancel(uint64_t call_id) {
  absl::MutexLock lock(&mutex_);
  auto it = active_.find(call_id);
  if (it != active_.end()) it->second->context.TryCancel();
}

}  // namespace tandem::decode
