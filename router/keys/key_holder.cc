#include "router/keys/key_holder.h"

#include <algorithm>

#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::router {

void Allowance::SetRates(const ApiKeyEntry& entry, absl::Time now) {
  absl::MutexLock lock(&mutex_);
  requests_.SetRate(entry.requests_per_minute, now);
  tokens_.SetRate(entry.tokens_per_minute, now);
}

absl::Status Allowance::TakeRequest(const ApiKeyEntry& entry, absl::Time now) {
  absl::Duration for_request;
  absl::Duration for_tokens;
  {
    absl::MutexLock lock(&mutex_);
    for_request = requests_.Wait(now);
    for_tokens = tokens_.Wait(now);
    if (std::max(for_request, for_tokens) <= absl::ZeroDuration()) requests_.Take(1, now);
  }
  const absl::Duration wait = std::max(for_request, for_tokens);
  if (wait <= absl::ZeroDuration()) {
    metrics_.requests.Increment();
    return absl::OkStatus();
  }
  const bool requests = for_request >= for_tokens;
  (requests ? metrics_.refused_requests : metrics_.refused_tokens).Increment();
  return WithRetryAfter(
      ResourceExhausted("the API key '{}' is over its {} {} per minute", entry.name,
                        requests ? entry.requests_per_minute : entry.tokens_per_minute,
                        requests ? "requests" : "tokens"),
      wait);
}

void Allowance::TakeTokens(int64_t count, absl::Time now) {
  if (count <= 0) return;
  metrics_.tokens.Increment(static_cast<double>(count));
  absl::MutexLock lock(&mutex_);
  tokens_.Take(static_cast<double>(count), now);
}

}  // namespace tandem::router
