#include "engine/runtime/sampler.h"

#include "common/base/status.h"

namespace tandem::engine {
namespace {

bool HasPenalties(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

}  // namespace

size_t MaxListTokens(const SamplingParams& params, const BatchItem& item) {
  const size_t masked = params.eos_token_ids.size() + params.stop_token_ids.size();
  const size_t history = HasPenalties(params) ? static_cast<size_t>(item.length()) : 0;
  return (item.draft.size() + 1) * (masked + history);
}

DrawSpec MakeDrawSpec(const SamplingParams& params, const BatchItem& item, size_t drafted,
                      TokenLists* lists) {
  const int length = item.length() - static_cast<int>(item.draft.size() - drafted);
  DrawSpec spec;
  spec.alternatives = params.logprobs;
  spec.position = length;
  spec.seed = params.seed;
  spec.temperature = params.temperature;
  spec.top_p = params.top_p;
  spec.min_p = params.min_p;
  spec.top_k = params.top_k;
  spec.repetition_penalty = params.repetition_penalty;
  spec.presence_penalty = params.presence_penalty;
  spec.frequency_penalty = params.frequency_penalty;
  spec.masked_begin = lists->size;
  if (length - item.prompt_length < params.min_tokens) {
    if (!params.ignore_eos) lists->Append(params.eos_token_ids);
    lists->Append(params.stop_token_ids);
  }
  spec.masked_end = spec.history_begin = lists->size;
  if (HasPenalties(params)) {
    lists->Append(item.tokens);
    if (item.pending.step != 0) {
      const int32_t pending[] = {PendingId(item.pending.item)};
      lists->Append(pending);
    }
    lists->Append(item.draft.first(drafted));
  }
  spec.output_begin = spec.history_begin + item.prompt_length;
  spec.history_end = lists->size;
  return spec;
}

absl::StatusOr<TokenLogprob> ReadDraw(const DrawResult& result, int valid_vocab) {
  switch (result.status) {
    case DrawStatus::kOk:
      break;
    case DrawStatus::kNan:
      return Internal(
          "the model's logits hold NaN: broken weights, or numbers beyond the range of its dtype");
    case DrawStatus::kInfinite:
      return Internal("the model's logits hold +inf");
    case DrawStatus::kAllMasked:
      return Internal("every token of the vocabulary is masked");
    case DrawStatus::kOutOfVocabulary:
      return InvalidArgument("token id {} is outside of the vocabulary of {}", result.token,
                             valid_vocab);
  }
  TokenLogprob out;
  out.token = result.token;
  out.logprob = result.logprob;
  for (int i = 0; i < result.num_alternatives; ++i) {
    out.top.push_back({result.alternatives[i], result.alternative_logprobs[i]});
  }
  return out;
}

}  // namespace tandem::engine
