#include "engine/wire/wire.h"

#include <string>

#include "fmt/format.h"

#include "common/base/sampling_ranges.h"
#include "common/base/status.h"
#include "common/rpc/sampling_check.h"
#include "common/rpc/status.h"
#include "common/rpc/token_wire.h"

namespace tandem::engine {
namespace {

absl::Status CheckToken(uint32_t id, int vocab_size, std::string_view field) {
  if (id < static_cast<uint32_t>(vocab_size)) return absl::OkStatus();
  return BadField(std::string(field), "is {}; the vocabulary has {} tokens (ids 0 to {})", id,
                  vocab_size, vocab_size - 1);
}

absl::StatusOr<int> CountFromProto(std::string_view field, uint32_t value, uint32_t least,
                                   uint32_t most) {
  if (value < least || value > most) {
    return BadField(std::string(field), "must be in [{}, {}], got {}", least, most, value);
  }
  return static_cast<int>(value);
}

absl::StatusOr<std::vector<int32_t>> StopIdsFromProto(const ProtoTokens& ids, int vocab_size,
                                                      std::string_view field) {
  if (ids.size() > kMaxEndTokenIds) {
    return BadField(std::string(field), "may hold {} ids, got {}", kMaxEndTokenIds, ids.size());
  }
  return TokensFromProto(ids, vocab_size, field);
}

}  // namespace

absl::StatusOr<std::vector<int32_t>> TokensFromProto(const ProtoTokens& ids, int vocab_size,
                                                     std::string_view field) {
  std::vector<int32_t> tokens;
  tokens.reserve(static_cast<size_t>(ids.size()));
  for (const uint32_t id : ids) {
    if (id >= static_cast<uint32_t>(vocab_size)) {
      return CheckToken(id, vocab_size, fmt::format("{}[{}]", field, tokens.size()));
    }
    tokens.push_back(static_cast<int32_t>(id));
  }
  return tokens;
}

void TokensToProto(std::span<const int32_t> tokens, ProtoTokens* ids) {
  ids->Clear();
  ids->Reserve(static_cast<int>(tokens.size()));
  for (const int32_t token : tokens) ids->Add(static_cast<uint32_t>(token));
}

absl::StatusOr<SamplingParams> SamplingFromProto(const v1::SamplingParams& proto,
                                                 const ProtoTokens& eos_token_ids, int vocab_size) {
  constexpr uint32_t kMostTokens = 1u << 30;
  TANDEM_RETURN_IF_ERROR(CheckSamplingRanges(proto));
  SamplingParams s;
  if (proto.has_temperature()) s.temperature = proto.temperature();
  if (proto.has_top_p()) s.top_p = proto.top_p();
  if (proto.has_top_k()) s.top_k = proto.top_k();
  if (proto.has_min_p()) s.min_p = proto.min_p();
  if (proto.has_repetition_penalty()) s.repetition_penalty = proto.repetition_penalty();
  if (proto.has_presence_penalty()) s.presence_penalty = proto.presence_penalty();
  if (proto.has_frequency_penalty()) s.frequency_penalty = proto.frequency_penalty();
  if (proto.has_seed()) s.seed = proto.seed();
  s.ignore_eos = proto.ignore_eos();
  TANDEM_ASSIGN_OR_RETURN(
      s.max_tokens, CountFromProto("sampling.max_tokens", proto.max_tokens(), 1, kMostTokens));
  TANDEM_ASSIGN_OR_RETURN(
      s.min_tokens, CountFromProto("sampling.min_tokens", proto.min_tokens(), 0, kMostTokens));
  if (proto.has_logprobs()) s.logprobs = static_cast<int>(proto.logprobs());
  if (proto.has_prompt_logprobs()) s.prompt_logprobs = static_cast<int>(proto.prompt_logprobs());
  TANDEM_ASSIGN_OR_RETURN(s.stop_token_ids, StopIdsFromProto(proto.stop_token_ids(), vocab_size,
                                                             "sampling.stop_token_ids"));
  TANDEM_ASSIGN_OR_RETURN(s.eos_token_ids,
                          StopIdsFromProto(eos_token_ids, vocab_size, "eos_token_ids"));
  return s;
}

v1::SamplingParams SamplingToProto(const SamplingParams& sampling) {
  v1::SamplingParams proto;
  proto.set_temperature(sampling.temperature);
  proto.set_top_p(sampling.top_p);
  proto.set_top_k(sampling.top_k);
  proto.set_min_p(sampling.min_p);
  proto.set_repetition_penalty(sampling.repetition_penalty);
  proto.set_presence_penalty(sampling.presence_penalty);
  proto.set_frequency_penalty(sampling.frequency_penalty);
  proto.set_max_tokens(static_cast<uint32_t>(sampling.max_tokens));
  proto.set_seed(sampling.seed);
  proto.set_min_tokens(static_cast<uint32_t>(sampling.min_tokens));
  TokensToProto(sampling.stop_token_ids, proto.mutable_stop_token_ids());
  proto.set_ignore_eos(sampling.ignore_eos);
  if (sampling.logprobs >= 0) proto.set_logprobs(static_cast<uint32_t>(sampling.logprobs));
  if (sampling.prompt_logprobs >= 0) {
    proto.set_prompt_logprobs(static_cast<uint32_t>(sampling.prompt_logprobs));
  }
  return proto;
}

absl::StatusOr<TokenLogprob> LogprobFromProto(const v1::TokenLogprob& proto, int vocab_size,
                                              std::string_view field) {
  TANDEM_RETURN_IF_ERROR(
      CheckToken(proto.token_id(), vocab_size, fmt::format("{}.token_id", field)));
  if (proto.top_size() > kMaxLogprobs) {
    return BadField(fmt::format("{}.top", field), "may hold {} alternatives, got {}", kMaxLogprobs,
                    proto.top_size());
  }
  for (int i = 0; i < proto.top_size(); ++i) {
    TANDEM_RETURN_IF_ERROR(CheckToken(proto.top(i).token_id(), vocab_size,
                                      fmt::format("{}.top[{}].token_id", field, i)));
  }
  return tandem::LogprobFromProto(proto);
}

}  // namespace tandem::engine
