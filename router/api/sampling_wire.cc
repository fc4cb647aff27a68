#include "router/api/sampling_wire.h"

#include <algorithm>
#include <cstdint>

#include "common/base/sampling_ranges.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/rpc/sampling_check.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

absl::Status CheckLengths(int room, const v1::SamplingParams& s) {
  if (s.has_max_tokens()) {
    if (s.max_tokens() == 0) {
      return BadField("sampling.max_tokens", "must be at least 1, got 0");
    }
    if (s.max_tokens() > static_cast<uint32_t>(room)) {
      return BadField(
          "sampling.max_tokens",
          "{} does not fit: {} tokens are left behind the prompt; ask for at most that, "
          "or leave it unset",
          s.max_tokens(), room);
    }
  }
  const uint32_t max_tokens = s.has_max_tokens() ? s.max_tokens() : static_cast<uint32_t>(room);
  if (s.min_tokens() > max_tokens) {
    return BadField("sampling.min_tokens", "{} is above max_tokens {}", s.min_tokens(), max_tokens);
  }
  return absl::OkStatus();
}

absl::Status CheckStops(const ServedModel& model, const v1::SamplingParams& s) {
  if (s.stop_size() > kMaxStopStrings) {
    return BadField("sampling.stop", "must have at most {} strings, got {}", kMaxStopStrings,
                    s.stop_size());
  }
  for (int i = 0; i < s.stop_size(); ++i) {
    if (s.stop(i).empty() || s.stop(i).size() > kMaxStopBytes) {
      return BadField(fmt::format("sampling.stop[{}]", i), "must have 1 to {} bytes, got {}",
                      kMaxStopBytes, s.stop(i).size());
    }
  }
  if (s.stop_size() > 0 && model.tokenizer == nullptr) {
    return FailedPrecondition(
        "model '{}' has no tokenizer.json, so sampling.stop cannot be matched; use stop_token_ids",
        model.name);
  }
  if (s.stop_token_ids_size() > kMaxStopTokenIds) {
    return BadField("sampling.stop_token_ids", "must have at most {} ids, got {}", kMaxStopTokenIds,
                    s.stop_token_ids_size());
  }
  for (int i = 0; i < s.stop_token_ids_size(); ++i) {
    if (s.stop_token_ids(i) >= static_cast<uint32_t>(model.config.vocab_size)) {
      return BadField(fmt::format("sampling.stop_token_ids[{}]", i),
                      "must be below the vocabulary size {}, got {}", model.config.vocab_size,
                      s.stop_token_ids(i));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckSampling(const ServedModel& model, int room, const v1::SamplingParams& sampling) {
  TANDEM_RETURN_IF_ERROR(CheckSamplingRanges(sampling));
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
