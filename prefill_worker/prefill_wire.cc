#include "prefill_worker/prefill_wire.h"

#include <utility>
#include <vector>

#include "common/base/kv_layout.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"
#include "engine/wire/wire.h"

namespace tandem::prefill {
namespace {

absl::Status CheckTarget(const internal::v1::KvTarget& target, int prompt_blocks) {
  TransferId id;
  if (!TransferId::FromBytes(target.transfer_id(), &id)) {
    return BadField("target.transfer_id", "must have 16 bytes, got {}",
                    target.transfer_id().size());
  }
  if (target.transport().empty()) {
    return BadField("target.transport", "must be set");
  }
  if (target.address().empty()) {
    return BadField("target.address", "must be HOST:PORT, got nothing");
  }
  const uint64_t covered = uint64_t{target.first_block()} + uint64_t(target.block_ids_size());
  if (covered != static_cast<uint64_t>(prompt_blocks)) {
    return BadField("target.block_ids",
                    "and first_block must make up the prompt's {} blocks, got {} ids from block {}",
                    prompt_blocks, target.block_ids_size(), target.first_block());
  }
  for (int i = 0; i < target.block_ids_size(); ++i) {
    if (target.block_ids(i) < target.num_blocks()) continue;
    return BadField(fmt::format("target.block_ids[{}]", i), "is {}; the pool has {} blocks",
                    target.block_ids(i), target.num_blocks());
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

absl::StatusOr<Work> WorkFromProto(const internal::v1::PrefillRequest& request,
                                   const RequestLimits& limits) {
  if (request.capability_digest() != limits.capability_digest) {
    return FailedPrecondition(
        "capability_digest of the caller and of prefill worker {} differ: model, dtype, block size "
        "or protocol version",
        limits.worker_id);
  }
  if (request.token_ids().empty()) {
    return BadField("token_ids", "must not be empty");
  }
  if (request.token_ids_size() > limits.max_model_len) {
    return BadField("token_ids", "holds {} tokens; max_model_len is {}", request.token_ids_size(),
                    limits.max_model_len);
  }
  Work work;
  TANDEM_ASSIGN_OR_RETURN(
      work.tokens, engine::TokensFromProto(request.token_ids(), limits.vocab_size, "token_ids"));
  TANDEM_ASSIGN_OR_RETURN(
      work.sampling,
      engine::SamplingFromProto(request.sampling(), request.eos_token_ids(), limits.vocab_size));
  TANDEM_RETURN_IF_ERROR(
      CheckTarget(request.target(), BlocksFor(request.token_ids_size(), limits.block_size)));
  if (request.prompt_length() > static_cast<uint32_t>(request.token_ids_size())) {
    return BadField("prompt_length", "must be at most the {} tokens, got {}",
                    request.token_ids_size(), request.prompt_length());
  }
  work.prompt_length = static_cast<int>(request.prompt_length());
  work.target = TargetFromProto(request.target());
  work.first_block = static_cast<int>(request.target().first_block());
  work.request_id = request.request_id();
  work.cache_salt = request.cache_salt();
  work.priority = request.priority();
  return work;
}

internal::v1::PrefillResponse OutcomeToProto(const Outcome& outcome, const std::string& worker_id) {
  internal::v1::PrefillResponse response;
  LogprobToProto(outcome.first_token, response.mutable_first_token());
  for (const TokenLogprob& logprob : outcome.prompt_logprobs) {
    LogprobToProto(logprob, response.add_prompt_logprobs());
  }
  response.set_cached_tokens(static_cast<uint32_t>(outcome.cached_tokens));
  response.set_queue_ms(absl::ToDoubleMilliseconds(outcome.queue));
  response.set_prefill_ms(absl::ToDoubleMilliseconds(outcome.prefill));
  response.set_kv_bytes(outcome.kv_bytes);
  response.set_worker_id(worker_id);
  return response;
}

}  // namespace tandem::prefill
