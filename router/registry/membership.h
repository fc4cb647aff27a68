// One worker's stay in the cluster, message by message: Cluster/Join without its network. Feeds the
// registry and the prefix index with what the worker says.
//
// Thread-safe, except that Handle is called by one thread at a time. Never blocks.
#pragma once

#include <functional>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "router/prefix_index/prefix_index.h"
#include "router/registry/registry.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem::router {

class Membership {
 public:
  // Takes a message to the worker: from any thread, also after this is gone; must not block.
  using Send = std::function<void(internal::v1::RouterMessage)>;

  // Both pointers outlive this.
  Membership(std::string router_id, Registry* registry, PrefixIndex* index, Send send);
  // Leaves the cluster.
  ~Membership();
  Membership(const Membership&) = delete;
  Membership& operator=(const Membership&) = delete;

  // The worker's next message; the first must be Hello, which is answered with Welcome. An error
  // ends the stay: it goes to the worker as the stream's status.
  absl::Status Handle(const internal::v1::WorkerMessage& message);
  // Idempotent; also while Handle runs.
  void Leave();

 private:
  absl::Status HandleHello(const internal::v1::Hello& hello);
  std::optional<Registry::Member> member() const;

  const std::string router_id_;
  Registry* const registry_;
  PrefixIndex* const index_;
  const Send send_;
  mutable absl::Mutex mutex_;
  std::optional<Registry::Member> member_ ABSL_GUARDED_BY(mutex_);
  bool left_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem::router
