#include "router/core/load_summary.h"

#include <cmath>
#include <utility>

namespace tandem::router {
namespace {

double Tenths(double value) { return std::round(value * 10) / 10; }

}  // namespace

std::optional<LogFields> LoadSummary::Take(absl::Time now, const LoadSample& sample) {
  const LoadSample before = std::exchange(before_, sample);
  const absl::Time last = std::exchange(last_, now);
  next_ = now + kPeriod;
  if (last == absl::InfinitePast()) return std::nullopt;
  const bool idle = sample.requests == before.requests &&
                    sample.generated_tokens == before.generated_tokens && sample.running == 0 &&
                    sample.waiting == 0;
  if (idle) return std::nullopt;
  const double seconds = absl::ToDoubleSeconds(now - last);
  const double prompt_tokens = sample.prompt_tokens - before.prompt_tokens;
  const double cached_tokens = sample.cached_tokens - before.cached_tokens;
  LogFields out = {
      {"seconds", Tenths(seconds)},
      {"requests_per_s", Tenths((sample.requests - before.requests) / seconds)},
      {"generated_tokens_per_s",
       Tenths((sample.generated_tokens - before.generated_tokens) / seconds)},
      {"prompt_tokens_per_s", Tenths(prompt_tokens / seconds)},
      {"running", static_cast<int64_t>(sample.running)},
      {"waiting", static_cast<int64_t>(sample.waiting)},
      {"kv_percent", Tenths(100 * sample.kv_usage)},
  };
  if (prompt_tokens > 0)
    out.emplace_back("hit_percent", Tenths(100 * cached_tokens / prompt_tokens));
  return out;
}

}  // namespace tandem::router
