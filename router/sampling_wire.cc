#include "router/sampling_wire.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>

#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

// Accepts low <= value <= high, with `low` itself only if `low_included`. NaN fails every
// comparison.
absl::Status CheckRange(const char* name, float value, float low, bool low_included, float high,
                        const char* accepted) {
  const bool above = low_included ? value >= low : value > low;
  if (above && value <= high) return absl::OkStatus();
  const std::string field = fmt::format("sampling.{}", name);
  return WithField(InvalidArgument("{} must be {}, got {}", field, accepted, value), field);
}

absl::Status CheckNumbers(const v1::SamplingParams& s) {
  constexpr float kMax = 3.4e38f;
  if (s.has_temperature()) {
    TANDEM_RETURN_IF_ERROR(CheckRange("temperature", s.temperature(), 0, true, kMax,
                                      "a finite number >= 0 (0 is greedy)"));
  }
  if (s.has_top_p()) {
    TANDEM_RETURN_IF_ERROR(CheckRange("top_p", s.top_p(), 0, false, 1, "in (0, 1]"));
  }
  if (s.has_min_p()) {
    TANDEM_RETURN_IF_ERROR(CheckRange("min_p", s.min_p(), 0, true, 1, "in [0, 1]"));
  }
  if (s.has_repetition_penalty()) {
    TANDEM_RETURN_IF_ERROR(
        CheckRange("repetition_penalty", s.repetition_penalty(), 0, false, 10, "in (0, 10]"));
  }
  if (s.has_presence_penalty()) {
    TANDEM_RETURN_IF_ERROR(
        CheckRange("presence_penalty", s.presence_penalty(), -2, true, 2, "in [-2, 2]"));
  }
  if (s.has_frequency_penalty()) {
    TANDEM_RETURN_IF_ERROR(
        CheckRange("frequency_penalty", s.frequency_penalty(), -2, true, 2, "in [-2, 2]"));
  }
  if (s.has_top_k() && s.top_k() < -1) {
    return WithField(
        InvalidArgument("sampling.top_k must be >= 1, or 0 or -1 for all tokens, got {}",
                        s.top_k()),
        "sampling.top_k");
  }
  return absl::OkStatus();
}

absl::Status CheckLogprobs(const char* name, bool present, uint32_t value) {
  if (!present || value <= kMaxLogprobAlternatives) return absl::OkStatus();
  const std::string field = fmt::format("sampling.{}", name);
  return WithField(
      InvalidArgument("{} must be at most {}, got {}", field, kMaxLogprobAlternatives, value),
      field);
}

absl::Status CheckLengths(int room, const v1::SamplingParams& s) {
  if (s.has_max_tokens()) {
    if (s.max_tokens() == 0) {
      return WithField(InvalidArgument("sampling.max_tokens must be at least 1, got 0"),
                       "sampling.max_tokens");
    }
    if (s.max_tokens() > static_cast<uint32_t>(room)) {
      return WithField(
          InvalidArgument("sampling.max_tokens {} does not fit: {} tokens are left behind the "
                          "prompt; ask for at most that, or leave it unset",
                          s.max_tokens(), room),
          "sampling.max_tokens");
    }
  }
  const uint32_t max_tokens = s.has_max_tokens() ? s.max_tokens() : static_cast<uint32_t>(room);
  if (s.min_tokens() > max_tokens) {
    return WithField(InvalidArgument("sampling.min_tokens {} is above max_tokens {}",
                                     s.min_tokens(), max_tokens),
                     "sampling.min_tokens");
  }
  return absl::OkStatus();
}

absl::Status CheckStops(const ServedModel& model, const v1::SamplingParams& s) {
  if (s.stop_size() > kMaxStopStrings) {
    return WithField(InvalidArgument("sampling.stop must have at most {} strings, got {}",
                                     kMaxStopStrings, s.stop_size()),
                     "sampling.stop");
  }
  for (int i = 0; i < s.stop_size(); ++i) {
    if (s.stop(i).empty() || s.stop(i).size() > kMaxStopBytes) {
      const std::string field = fmt::format("sampling.stop[{}]", i);
      return WithField(InvalidArgument("{} must have 1 to {} bytes, got {}", field, kMaxStopBytes,
                                       s.stop(i).size()),
                       field);
    }
  }
  if (s.stop_size() > 0 && model.tokenizer == nullptr) {
    return FailedPrecondition(
        "model '{}' has no tokenizer.json, so sampling.stop cannot be matched; use stop_token_ids",
        model.name);
  }
  if (s.stop_token_ids_size() > kMaxStopTokenIds) {
    return WithField(InvalidArgument("sampling.stop_token_ids must have at most {} ids, got {}",
                                     kMaxStopTokenIds, s.stop_token_ids_size()),
                     "sampling.stop_token_ids");
  }
  for (int i = 0; i < s.stop_token_ids_size(); ++i) {
    if (s.stop_token_ids(i) >= static_cast<uint32_t>(model.config.vocab_size)) {
      const std::string field = fmt::format("sampling.stop_token_ids[{}]", i);
      return WithField(InvalidArgument("{} must be below the vocabulary size {}, got {}", field,
                                       model.config.vocab_size, s.stop_token_ids(i)),
                       field);
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckSampling(const ServedModel& model, int room, const v1::SamplingParams& sampling) {
  TANDEM_RETURN_IF_ERROR(CheckNumbers(sampling));
  TANDEM_RETURN_IF_ERROR(CheckLogprobs("logprobs", sampling.has_logprobs(), sampling.logprobs()));
  TANDEM_RETURN_IF_ERROR(
      CheckLogprobs("prompt_logprobs", sampling.has_prompt_logprobs(), sampling.prompt_logprobs()));
  TANDEM_RETURN_IF_ERROR(CheckLengths(room, sampling));
  return CheckStops(model, sampling);
}

void FillSamplingDefaults(const ServedModel& model, int room, v1::SamplingParams* s) {
  const GenerationDefaults& d = model.defaults;
  if (!s->has_temperature()) {
    const bool greedy = d.do_sample.has_value() && !*d.do_sample;
    s->set_temperature(greedy ? 0.0f : static_cast<float>(d.temperature.value_or(1.0)));
  }
  if (!s->has_top_p()) s->set_top_p(static_cast<float>(d.top_p.value_or(1.0)));
  if (!s->has_top_k()) s->set_top_k(d.top_k.value_or(0));
  if (!s->has_min_p()) s->set_min_p(static_cast<float>(d.min_p.value_or(0.0)));
  if (!s->has_repetition_penalty()) {
    s->set_repetition_penalty(static_cast<float>(d.repetition_penalty.value_or(1.0)));
  }
  if (!s->has_presence_penalty()) s->set_presence_penalty(0);
  if (!s->has_frequency_penalty()) s->set_frequency_penalty(0);
  if (!s->has_seed()) s->set_seed(RandomUint64());
  if (!s->has_max_tokens()) {
    const int wanted = std::min(room, static_cast<int>(d.max_new_tokens.value_or(room)));
    s->set_max_tokens(std::max(static_cast<uint32_t>(wanted), s->min_tokens()));
  }
}

}  // namespace tandem::router
