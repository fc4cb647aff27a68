#include "prefill_worker/prefill_wire.h"

#include <utility>
#include <vector>

#include "common/base/kv_layout.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"
#include "engine/wire/wire.h"
#include "worker/kv_target_wire.h"

namespace tandem::prefill {
namespace {

absl::Status CheckTarget(const internal::v1::KvTarget& target, int prompt_blocks) {
  if (target.address().empty()) {
    return BadField("target.address", "must be HOST:PORT, got nothing");
  }
  const uint64_t covered = uint64_t{target.first_block()} + uint64_t(target.block_ids_size());
  if (covered != static_cast<uint64_t>(prompt_blocks)) {
    return BadField("target.block_ids",
                    "and first_block must make up the prompt's {} blocks, got {} ids from block {}",
                    prompt_blocks, target.block_ids_size(), target.first_block());
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Work> WorkFromProto(const internal::v1::PrefillRequest& request,
                                   const RequestLimits& limits) {
  if (request.capability_digest() != limits.capability_digest) {
    return FailedPrecondition(
        "capability_digest of the caller and of prefill worker {} differ: model, dtype, "
        "quantization, "
        "block size or protocol version",
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
  TANDEM_ASSIGN_OR_RETURN(work.target, worker::KvTargetFromProto(request.target(), "target"));
  TANDEM_RETURN_IF_ERROR(
      CheckTarget(request.target(), BlocksFor(request.token_ids_size(), limits.block_size)));
  if (request.prompt_length() > static_cast<uint32_t>(request.token_ids_size())) {
    return BadField("prompt_length", "must be at most the {} tokens, got {}",
                    request.token_ids_size(), request.prompt_length());
  }
  work.prompt_length = static_cast<int>(request.prompt_length());
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
  response.set_kv_return_ms(absl::ToDoubleMilliseconds(outcome.kv_return));
  response.set_returned_tokens(static_cast<uint32_t>(outcome.returned_tokens));
  return response;
}

internal::v1::KvTarget WantedToProto(const Wanted& wanted, int num_blocks) {
  const kvtransfer::KvSendTarget& from = wanted.target;
  internal::v1::KvTarget target;
  target.set_transfer_id(from.id.ToBytes());
  target.set_epoch(from.epoch);
  target.set_transport(from.transport);
  target.set_token(from.token);
  target.set_first_block(static_cast<uint32_t>(wanted.first_block));
  engine::TokensToProto(from.target_blocks, target.mutable_block_ids());
  target.set_num_blocks(static_cast<uint32_t>(num_blocks));
  return target;
}

}  // namespace tandem::prefill
