#include "decode_worker/first_token.h"

#include <algorithm>
#include <utility>

#include "decode_worker/prefill_caller.h"

namespace tandem::decode {
namespace {

bool Contains(const std::vector<int32_t>& values, int32_t value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

}  // namespace

FinishReason EndAfter(const engine::SamplingParams& sampling, int generated, int length,
                      int max_length, int32_t token) {
  if (generated > sampling.min_tokens) {
    if (!sampling.ignore_eos && Contains(sampling.eos_token_ids, token)) return FinishReason::kStop;
    if (Contains(sampling.stop_token_ids, token)) return FinishReason::kStop;
  }
  return length >= max_length ? FinishReason::kLength : FinishReason::kNone;
}

void AddOutcome(const PrefillOutcome& outcome, absl::Duration call, Timing* timing) {
  StageTimes& stages = timing->stages;
  stages[Stage::kPrefillQueue] = absl::ToDoubleMilliseconds(outcome.queue);
  stages[Stage::kKvReturn] = absl::ToDoubleMilliseconds(outcome.kv_return);
  stages[Stage::kPrefill] = absl::ToDoubleMilliseconds(outcome.prefill);
  stages[Stage::kPrefillCall] =
      absl::ToDoubleMilliseconds(call - outcome.queue - outcome.kv_return - outcome.prefill);
  timing->returned_tokens = outcome.returned_tokens;
  timing->kv_bytes = outcome.kv_bytes;
  timing->prefill_worker = outcome.worker_id;
}

FirstToken::FirstToken(std::shared_ptr<TokenStream> stream, engine::SamplingParams sampling,
                       int prompt_length, int arrived_length, int max_length, Timing timing,
                       absl::Time began_at)
    : stream_(std::move(stream)),
      sampling_(std::move(sampling)),
      prompt_length_(prompt_length),
      arrived_length_(arrived_length),
      max_length_(max_length),
      timing_(std::move(timing)),
      began_at_(began_at) {}

TokenEvent FirstToken::MakeEvent(const PrefillOutcome& outcome, absl::Time now) const {
  TokenEvent event;
  event.token_ids.push_back(outcome.first_token.token);
  if (sampling_.logprobs >= 0) event.logprobs.push_back(outcome.first_token);
  event.prompt_logprobs = outcome.prompt_logprobs;
  event.cached_tokens = outcome.cached_tokens;
  event.finish_reason = EndAfter(sampling_, arrived_length_ + 1 - prompt_length_,
                                 arrived_length_ + 1, max_length_, outcome.first_token.token);
  event.timing = timing_;
  AddOutcome(outcome, now - began_at_, &*event.timing);
  return event;
}

void FirstToken::SendProgress(int computed_tokens) {
  TokenEvent event;
  event.computed_tokens = computed_tokens;
  Append(std::move(event), /*token=*/false);
}

bool FirstToken::Send(const PrefillOutcome& outcome, absl::Time now) {
  return Append(MakeEvent(outcome, now), /*token=*/true);
}

bool FirstToken::Append(TokenEvent event, bool token) {
  bool idle = false;
  {
    // Under the lock: once Close() has returned, the loop may end the stream.
    absl::MutexLock lock(&mutex_);
    if (closed_ || sent_) return false;
    sent_ = token;
    idle = stream_->Append(std::move(event));
  }
  if (idle) stream_->Wake();
  return true;
}

bool FirstToken::Close() {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  return sent_;
}

}  // namespace tandem::decode
