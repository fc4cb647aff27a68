// Which streams run at which worker, so that they can be moved when it is found to hang.
//
// Thread-safe. Lock order: a stream's lock, then this one.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

namespace tandem::router {

class RequestStream;

class RunningStreams {
 public:
  void Add(const std::string& worker, const RequestStream* key, std::weak_ptr<RequestStream> stream)
      ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    by_worker_[worker][key] = std::move(stream);
  }
  // Idempotent.
  void Remove(const std::string& worker, const RequestStream* key) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    const auto it = by_worker_.find(worker);
    if (it == by_worker_.end()) return;
    it->second.erase(key);
    if (it->second.empty()) by_worker_.erase(it);
  }
  std::vector<std::shared_ptr<RequestStream>> At(const std::string& worker) const
      ABSL_LOCKS_EXCLUDED(mutex_) {
    std::vector<std::shared_ptr<RequestStream>> out;
    absl::MutexLock lock(&mutex_);
    const auto it = by_worker_.find(worker);
    if (it == by_worker_.end()) return out;
    for (const auto& [key, weak] : it->second) {
      if (std::shared_ptr<RequestStream> stream = weak.lock()) out.push_back(std::move(stream));
    }
    return out;
  }

 private:
  using Streams = absl::flat_hash_map<const RequestStream*, std::weak_ptr<RequestStream>>;

  mutable absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Streams> by_worker_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::router
