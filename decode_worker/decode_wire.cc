#include "decode_worker/decode_wire.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "common/base/refusal.h"
#include "common/base/status.h"
#include "common/rpc/status.h"
#include "engine/wire/wire.h"
#include "worker/kv_target_wire.h"

namespace tandem::decode {
namespace {

absl::StatusOr<PrefillOutcome> ReadOutcome(const internal::v1::PrefillResponse& response,
                                           int vocab_size) {
  if (!response.has_first_token()) return BadField("first_token", "must be set");
  PrefillOutcome outcome;
  TANDEM_ASSIGN_OR_RETURN(outcome.first_token, engine::LogprobFromProto(response.first_token(),
                                                                        vocab_size, "first_token"));
  for (const v1::TokenLogprob& logprob : response.prompt_logprobs()) {
    TANDEM_ASSIGN_OR_RETURN(TokenLogprob value,
                            engine::LogprobFromProto(logprob, vocab_size, "prompt_logprobs"));
    outcome.prompt_logprobs.push_back(std::move(value));
  }
  outcome.cached_tokens = static_cast<int>(response.cached_tokens());
  outcome.returned_tokens = static_cast<int>(response.returned_tokens());
  outcome.queue = absl::Milliseconds(response.queue_ms());
  outcome.kv_return = absl::Milliseconds(response.kv_return_ms());
  outcome.prefill = absl::Milliseconds(response.prefill_ms());
  outcome.kv_bytes = response.kv_bytes();
  outcome.worker_id = response.worker_id();
  return outcome;
}

// What was generated elsewhere leaves something to draw.
absl::Status CheckPromptLength(const internal::v1::DecodeRequest& request, int max_tokens) {
  const int64_t prompt = request.prompt_length();
  if (prompt > request.token_ids_size()) {
    return BadField("prompt_length", "must be at most the {} tokens, got {}",
                    request.token_ids_size(), prompt);
  }
  if (prompt > 0 && request.token_ids_size() - prompt >= max_tokens) {
    return BadField("prompt_length", "{} of {} tokens leaves nothing of max_tokens {} to draw",
                    prompt, request.token_ids_size(), max_tokens);
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Work> WorkFromProto(const internal::v1::DecodeRequest& request,
                                   const RequestLimits& limits) {
  if (request.token_ids().empty()) {
    return BadField("token_ids", "must not be empty");
  }
  if (request.token_ids_size() >= limits.max_model_len) {
    return BadField("token_ids",
                    "has {} tokens; max_model_len {} leaves room for a prompt of at most {}",
                    request.token_ids_size(), limits.max_model_len, limits.max_model_len - 1);
  }
  Work work;
  TANDEM_ASSIGN_OR_RETURN(
      work.tokens, engine::TokensFromProto(request.token_ids(), limits.vocab_size, "token_ids"));
  TANDEM_ASSIGN_OR_RETURN(
      work.sampling,
      engine::SamplingFromProto(request.sampling(), request.eos_token_ids(), limits.vocab_size));
  TANDEM_RETURN_IF_ERROR(CheckPromptLength(request, work.sampling.max_tokens));
  work.prompt_length = static_cast<int>(request.prompt_length());
  if (request.route().may_lose() > 0) {
    work.may_lose = static_cast<int>(std::min(request.route().may_lose(), 100u));
  }
  work.request_id = request.request_id();
  work.cache_salt = request.cache_salt();
  work.priority = request.priority();
  work.progress = request.progress();
  for (const auto& candidate : request.route().prefill()) {
    // More than any router names.
    if (static_cast<int>(work.prefill.size()) == kMaxPrefillWorkers) break;
    work.prefill.push_back({candidate.worker_id(), candidate.address(), candidate.voucher(),
                            candidate.return_address()});
  }
  return work;
}

internal::v1::PrefillRequest CallToProto(const PrefillCall& call, const CallerIdentity& identity) {
  internal::v1::PrefillRequest request;
  request.set_request_id(call.request_id);
  engine::TokensToProto(call.tokens, request.mutable_token_ids());
  *request.mutable_sampling() = engine::SamplingToProto(call.sampling);
  engine::TokensToProto(call.sampling.eos_token_ids, request.mutable_eos_token_ids());
  request.set_prompt_length(static_cast<uint32_t>(call.prompt_length));
  request.set_cache_salt(call.cache_salt);
  request.set_priority(call.priority);
  request.set_progress(call.progress);
  request.set_capability_digest(identity.capability_digest);
  request.set_gives_back(call.gives_back);
  internal::v1::KvTarget& target = *request.mutable_target();
  target.set_transfer_id(call.transfer.ToBytes());
  target.set_epoch(call.epoch);
  target.set_transport(identity.kv_transport);
  target.set_address(identity.kv_address);
  target.set_token(call.token);
  target.set_first_block(static_cast<uint32_t>(call.first_block));
  engine::TokensToProto(call.block_ids, target.mutable_block_ids());
  target.set_worker_id(identity.worker_id);
  target.set_voucher(call.peer.voucher);
  target.set_num_blocks(static_cast<uint32_t>(identity.num_blocks));
  return request;
}

absl::StatusOr<BlocksWanted> WantedFromProto(const internal::v1::KvTarget& wanted,
                                             const PrefillCall& call) {
  BlocksWanted out;
  out.call_id = call.call_id;
  TANDEM_ASSIGN_OR_RETURN(out.target, worker::KvTargetFromProto(wanted, "wanted"));
  const uint64_t end = uint64_t{wanted.first_block()} + uint64_t(wanted.block_ids_size());
  if (!call.gives_back || end > static_cast<uint64_t>(call.first_block)) {
    return BadField("wanted.block_ids", "must end before block {}, got {} from block {}",
                    call.gives_back ? call.first_block : 0, wanted.block_ids_size(),
                    wanted.first_block());
  }
  out.first_block = static_cast<int>(wanted.first_block());
  out.target.address = call.peer.return_address;
  out.target.peer_worker_id = call.peer.worker_id;
  return out;
}

absl::StatusOr<PrefillOutcome> OutcomeFromProto(const internal::v1::PrefillResponse& response,
                                                int vocab_size) {
  absl::StatusOr<PrefillOutcome> outcome = ReadOutcome(response, vocab_size);
  if (outcome.ok()) return outcome;
  return Internal("malformed reply: {}", MessageOf(outcome.status()));
}

}  // namespace tandem::decode
