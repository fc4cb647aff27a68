// The line that says every ten seconds what the cluster does, as long as it does anything.
//
// Not thread-safe: the core's driver.
#pragma once

#include <optional>

#include "absl/time/time.h"

#include "common/base/log.h"

namespace tandem::router {

// Counters since the start, and how things stand.
struct LoadSample {
  double requests = 0;       // ended
  double prompt_tokens = 0;  // of requests that produced a token
  double cached_tokens = 0;  // of those
  double generated_tokens = 0;
  double running = 0;  // requests
  double waiting = 0;
  double kv_usage = 0;  // of decode workers' pools, 0 to 1
};

class LoadSummary {
 public:
  static constexpr absl::Duration kPeriod = absl::Seconds(10);

  bool Due(absl::Time now) const { return now >= next_; }
  // What to log of the time since the last call; nothing where nothing happened and nothing runs.
  std::optional<LogFields> Take(absl::Time now, const LoadSample& sample);

 private:
  absl::Time next_ = absl::InfinitePast();
  absl::Time last_ = absl::InfinitePast();
  LoadSample before_;
};

}  // namespace tandem::router
