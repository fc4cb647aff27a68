#include "cli/bench/recorder.h"

namespace tandem::cli {

int RequestRecord::output_tokens() const {
  int sum = 0;
  for (const TokenArrival& arrival : arrivals) sum += arrival.tokens;
  return sum;
}

void Recorder::OnTokens(std::span<const uint32_t> ids) {
  record_.arrivals.push_back({clock_->Now(), static_cast<int>(ids.size())});
  answer_.insert(answer_.end(), ids.begin(), ids.end());
  token_count_->fetch_add(static_cast<int64_t>(ids.size()), std::memory_order_relaxed);
}

void Recorder::OnEnd(const absl::Status& status, const AnswerUsage& usage) {
  record_.ended = clock_->Now();
  record_.status = status;
  record_.usage = usage;
  if (usage.prompt_tokens > 0) record_.prompt_tokens = usage.prompt_tokens;
  // A message may have held more than one.
  const int missing = usage.output_tokens - record_.output_tokens();
  if (missing > 0 && !record_.arrivals.empty()) record_.arrivals.back().tokens += missing;
  on_ended_(std::move(record_), std::move(answer_));
}

}  // namespace tandem::cli
