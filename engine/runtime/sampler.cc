#include "engine/runtime/sampler.h"

#include "common/base/status.h"

namespace tandem::engine {
namespace {

bool HasPenalties(const SamplingParams& p) {
  return p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
}

int32_t SizeOf(const std::vector<int32_t>& list) { return static_cast<int32_t>(list.size()); }

}  // namespace

DrawSpec MakeDrawSpec(const SamplingParams& params, const BatchItem& item,
                      std::vector<int32_t>* token_lists) {
  DrawSpec spec;
  spec.alternatives = params.logprobs;
  spec.position = item.length();
  spec.seed = params.seed;
  spec.temperature = params.temperature;
  spec.top_p = params.top_p;
  spec.min_p = params.min_p;
  spec.top_k = params.top_k;
  spec.repetition_penalty = params.repetition_penalty;
  spec.presence_penalty = params.presence_penalty;
  spec.frequency_penalty = params.frequency_penalty;
  spec.masked_begin = SizeOf(*token_lists);
  if (item.length() - item.prompt_length < params.min_tokens) {
    const auto mask = [token_lists](const std::vector<int32_t>& ids) {
      token_lists->insert(token_lists->end(), ids.begin(), ids.end());
    };
    if (!params.ignore_eos) mask(params.eos_token_ids);
    mask(params.stop_token_ids);
  }
  spec.masked_end = spec.history_begin = SizeOf(*token_lists);
  if (HasPenalties(params)) {
    token_lists->insert(token_lists->end(), item.tokens.begin(), item.tokens.end());
    if (item.pending.step != 0) token_lists->push_back(PendingId(item.pending.item));
  }
  spec.output_begin = spec.history_begin + item.prompt_length;
  spec.history_end = SizeOf(*token_lists);
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
