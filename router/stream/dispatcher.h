// The bounded queue in front of the cluster: decides for each request when and where it goes.
//
// Thread-safe. One owner thread ("dispatch") holds the queue and the ledger and makes every choice;
// the other methods leave a note for it and return. It sleeps until a note or a time limit comes.
// Order: higher priority first, then arrival; a request that finds every worker full holds back the
// ones behind it, so that small requests do not starve large ones.
#pragma once

#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "common/base/block_hash.h"
#include "common/base/clock.h"
#include "router/policy/routed_ledger.h"
#include "router/policy/routing_policy.h"
#include "router/prefix_index/prefix_index.h"
#include "router/registry/registry.h"
#include "router/router_metrics.h"
#include "router/stream/request.h"

namespace tandem::router {

// What the dispatcher dispatches. Start and Fail are called on the dispatch thread and must not
// block; exactly one of them per Submit or Requeue, unless Ended came first.
class Dispatchable {
 public:
  virtual ~Dispatchable() = default;
  virtual const Request& request() const = 0;
  virtual void Start(const Assignment& assignment) = 0;
  virtual void Fail(const absl::Status& status) = 0;
};

struct DispatcherOptions {
  int max_queued_requests = 1024;
  absl::Duration queue_timeout = absl::Seconds(60);
  absl::Duration no_worker_timeout = absl::Seconds(5);
  std::string cluster_secret;
};

class Dispatcher {
 public:
  // Names a request from Submit to Ended.
  using Ticket = uint64_t;

  // All outlive this.
  Dispatcher(DispatcherOptions options, Registry* registry, const PrefixIndex* index,
             const RoutingPolicy* policy, RouterMetrics* metrics, Clock* clock);
  ~Dispatcher();  // fails what is still queued

  // RESOURCE_EXHAUSTED with RetryInfo when the queue is full. `*ticket` is set before the first
  // Start or Fail.
  absl::Status Submit(std::shared_ptr<Dispatchable> request, Ticket* ticket);
  // An assignment failed before the first token: routed again, avoiding the workers of `refusals`
  // (lost ones for a moment, full ones until they report). Never refused: it was accepted once.
  // `since` is when its waiting began.
  void Requeue(std::shared_ptr<Dispatchable> request, Ticket ticket, absl::Time since,
               std::vector<Refusal> refusals);
  // The request left the cluster or the queue, however. Idempotent.
  void Ended(Ticket ticket);
  // Something changed: workers, loads.
  void Kick();

  int queued() const;

 private:
  struct Queued {
    std::shared_ptr<Dispatchable> request;
    Ticket ticket;
    absl::Time since;                                    // in the queue
    absl::Time without_worker = absl::InfiniteFuture();  // since when nobody could take it
    std::vector<Refusal> refusals;
    std::vector<Hash128> chain;  // of the prompt's blocks...
    std::string chain_model;     // ...for this model digest...
    int chain_block_size = 0;    // ...and block size
  };
  enum class Outcome { kLeft, kWaits, kFull };

  struct Note {
    Queued queued;  // only the ticket counts if `ended`
    bool ended = false;
  };

  void Run();
  bool HasNotes() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !notes_.empty() || kicked_ || stopping_;
  }
  void TakeNotes(std::vector<Note> notes);
  void Insert(Queued queued);
  void RouteAll(absl::Time now);
  Outcome Route(Queued& queued, const ClusterView& view, absl::Time now);
  void Assign(const Queued& queued, const ClusterView& view, const RouteChoice& choice,
              absl::Time now);
  std::vector<int> CachedTokens(Queued& queued, const ClusterView& view) const;
  Exclusion ExclusionOf(const Queued& queued, const WorkerView& worker, absl::Time now) const;
  // What a request that has waited too long fails with; OK: it may wait on.
  absl::Status Overdue(const Queued& queued, absl::Time now) const;
  absl::Time NextTimeLimit() const;
  void CountQueued(int delta) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const DispatcherOptions options_;
  Registry* const registry_;
  const PrefixIndex* const index_;
  const RoutingPolicy* const policy_;
  RouterMetrics* const metrics_;
  Clock* const clock_;

  // Only the dispatch thread.
  std::list<Queued> queue_;
  RoutedLedger ledger_;

  mutable absl::Mutex mutex_;
  std::vector<Note> notes_ ABSL_GUARDED_BY(mutex_);
  bool kicked_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  int queued_ ABSL_GUARDED_BY(mutex_) = 0;  // submitted and not yet started, failed or ended
  Ticket next_ticket_ ABSL_GUARDED_BY(mutex_) = 1;
  std::thread thread_;
};

}  // namespace tandem::router
