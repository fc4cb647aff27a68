// Whoever has one of the keys of an entry of --api-keys-file: what they may do, and what they have
// had of it.
#pragma once

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/metrics/metrics.h"
#include "router/keys/api_keys_file.h"
#include "router/keys/key_metrics.h"
#include "router/keys/rate_limit.h"

namespace tandem::router {

// What a name has had. Stays when the file is read again, so that a new file is no new minute.
// Thread-safe.
class Allowance {
 public:
  Allowance(Metrics* metrics, const std::string& name) : metrics_(metrics, name) {}

  void SetRates(const ApiKeyEntry& entry, absl::Time now);
  // One more request; RESOURCE_EXHAUSTED says which limit it is over, and when to come again.
  absl::Status TakeRequest(const ApiKeyEntry& entry, absl::Time now);
  void TakeTokens(int64_t count, absl::Time now);
  void NotePriorityRefused() { metrics_.refused_priority.Increment(); }

 private:
  const KeyMetrics metrics_;
  absl::Mutex mutex_;
  RateLimit requests_ ABSL_GUARDED_BY(mutex_);
  RateLimit tokens_ ABSL_GUARDED_BY(mutex_);
};

// One entry as it was read, and the allowance of its name. Requests keep theirs after another file
// was read. Thread-safe, immutable but for the allowance.
struct KeyHolder {
  ApiKeyEntry entry;
  std::shared_ptr<Allowance> allowance;
};

}  // namespace tandem::router
