// The API keys in force: those of --api-keys-file, which is read again whenever it has changed.
//
// A file that cannot be used changes nothing: the keys that were in force stay so, the log says why
// every minute (FileWatch), and tandem_api_keys_file_broken is 1. Running requests go on whatever
// becomes of their key.
//
// Thread-safe. Keys are never logged, only the names of their entries.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/base/file_watch.h"
#include "common/metrics/metrics.h"
#include "router/keys/key_holder.h"

namespace tandem::router {

class KeyRing {
 public:
  // Reads the file, and watches it from then on. `metrics` and `clock` outlive this. An error names
  // the file.
  static absl::StatusOr<std::unique_ptr<KeyRing>> Open(const std::string& path, Metrics* metrics,
                                                       Clock* clock);

  // Lets one request in, by the value of the metadata `authorization` ("" where there is none):
  // "Bearer KEY". UNAUTHENTICATED without a key that is in force; RESOURCE_EXHAUSTED with RetryInfo
  // over the limits of its name.
  absl::StatusOr<std::shared_ptr<const KeyHolder>> Admit(std::string_view authorization);

  // Takes over what the file says now. An error names the file; then all stays as it was.
  absl::Status Reload();

 private:
  using Digests = absl::flat_hash_map<std::string, std::shared_ptr<const KeyHolder>>;

  KeyRing(std::string path, Metrics* metrics, Clock* clock);
  absl::Status Take(const absl::StatusOr<std::string>& text);
  void TakeOver(std::vector<ApiKeyEntry> entries) ABSL_EXCLUSIVE_LOCKS_REQUIRED(take_mutex_);
  std::shared_ptr<const KeyHolder> Find(std::string_view key) const;

  const std::string path_;
  Metrics* const metrics_;
  Clock* const clock_;
  prometheus::Gauge& broken_;
  absl::Mutex take_mutex_;  // one Take at a time; before mutex_
  // By name, also of those that are not in force any more: they may come back.
  absl::flat_hash_map<std::string, std::shared_ptr<Allowance>> allowances_
      ABSL_GUARDED_BY(take_mutex_);
  mutable absl::Mutex mutex_;
  std::shared_ptr<const Digests> digests_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<FileWatch> watch_;  // last: its thread uses the rest; constant after Open
};

}  // namespace tandem::router
