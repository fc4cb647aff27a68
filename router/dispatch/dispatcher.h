// The bounded queue in front of the cluster: decides for each request when and where it goes.
//
// One owner thread holds the queue and the ledger and makes every choice: it calls Step() again and
// again. All other threads leave a note in the inbox and return.
//
// Order: by arrival, where each class of priority counts as having come kClassIsWorth earlier. So a
// higher class goes first, and whoever has waited long enough goes before a higher class that has
// just come: nobody starves. A request that finds every worker full lets smaller ones pass, for
// their room would not be its own; but once it has waited for reserve_after it holds back all who
// stand behind it, until the room that becomes free is enough. What lacks no room but the turn of a
// prefill worker holds back only those that need one too.
//
// Overload: a request that would wait for longer than max_wait, or than its own deadline, is
// refused at once and told when to come back, so that those that are taken are served in time. The
// wait is estimated by how fast the queue moves, and by what waits at the prefill worker of the
// best route. A class of priority counts here too as having come earlier.
#pragma once

#include <atomic>
#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/block_hash.h"
#include "common/base/clock.h"
#include "common/base/inbox.h"
#include "router/dispatch/retries.h"
#include "router/dispatch/routed_ledger.h"
#include "router/dispatch/wait_estimate.h"
#include "router/metrics/router_metrics.h"
#include "router/policy/routing_policy.h"
#include "router/prefix_index/prefix_index.h"
#include "router/registry/registry.h"

namespace tandem::router {

// What routing looks at in a request. Views of what the request owns.
struct RoutablePrompt {
  std::string_view name;  // of the request, for logs
  std::span<const int32_t> tokens;
  std::string_view cache_salt;
  int priority = 0;  // higher goes first
  absl::Time arrived = absl::UnixEpoch();
  absl::Time deadline = absl::InfiniteFuture();
};

// What the dispatcher dispatches. Start and Fail are called on the owner thread and must not block;
// exactly one of them per Submit or Requeue, unless Ended came first.
class Dispatchable {
 public:
  virtual ~Dispatchable() = default;
  // The same whenever it is called.
  virtual RoutablePrompt prompt() const = 0;
  virtual void Start(const Route& route) = 0;
  virtual void Fail(const absl::Status& status) = 0;
};

struct DispatcherOptions {
  int max_queued_requests = 1024;
  int64_t max_queued_tokens = 8 << 20;  // of their prompts
  absl::Duration queue_timeout = absl::Seconds(60);
  absl::Duration max_wait = absl::Seconds(30);
  absl::Duration reserve_after = absl::Seconds(1);
  absl::Duration no_worker_timeout = absl::Seconds(5);
  absl::Duration stalled_after = absl::Seconds(3);  // a worker without progress gets no request
  std::string cluster_secret;
};

class Dispatcher {
 public:
  // Names a request from Submit to Ended, and its place among requests that came at once.
  using Ticket = uint64_t;
  static constexpr absl::Duration kClassIsWorth = absl::Seconds(5);

  // All outlive this.
  Dispatcher(DispatcherOptions options, const Registry* registry, const PrefixIndex* index,
             const RoutingPolicy* policy, RouterMetrics* metrics, Clock* clock);
  // Fails what is still queued. No thread is in Step any more.
  ~Dispatcher();

  // ---- any thread ----
  // Whether the queue may take one more, whatever its prompt: RESOURCE_EXHAUSTED with RetryInfo
  // when it is full or too slow. So a request can be refused before anything is done for it.
  absl::Status MayJoin(int priority, absl::Time deadline) const;
  // As MayJoin, and by the length of the prompt. `*ticket` is set before the first Start or Fail.
  absl::Status Submit(std::shared_ptr<Dispatchable> request, Ticket* ticket);
  // A route failed before the first token: the request is routed again, avoiding what `retries`
  // says. Never refused: it was accepted once. `since` is when its waiting began.
  void Requeue(std::shared_ptr<Dispatchable> request, Ticket ticket, absl::Time since,
               Retries retries);
  // The request left the cluster or the queue, however. Idempotent.
  void Ended(Ticket ticket);
  // Something changed: workers, loads, the clock. Ends a waiting Step.
  void Wake() { inbox_.Wake(); }
  // Submitted and not yet started, failed or ended.
  int queued() const { return queued_; }

  // ---- the owner thread ----
  // One turn: waits up to `wait`, and not beyond the next time limit of a queued request, for a
  // note or Wake(); then routes what can be routed and fails what has waited too long.
  void Step(absl::Duration wait);
  // When a queued request changes by time alone.
  absl::Time NextTimeLimit(absl::Time now) const;

 private:
  struct Queued {
    std::shared_ptr<Dispatchable> request;
    Ticket ticket = 0;
    int64_t size = 0;                                    // of the prompt, tokens
    absl::Time place;                                    // orders the queue
    absl::Time since;                                    // in the queue
    absl::Time without_worker = absl::InfiniteFuture();  // since when nobody could take it
    Retries retries;
    std::optional<bool> local;   // whether decode workers may prefill it; nothing: not asked yet
    std::vector<Hash128> chain;  // of the prompt's blocks...
    std::string chain_model;     // ...for this model digest...
    int chain_block_size = 0;    // ...and block size
  };
  struct EndedNote {
    Ticket ticket;
  };
  using Note = std::variant<Queued, EndedNote>;
  enum class Outcome { kSent, kFailed, kWaits, kFull, kPromised };

  void TakeNotes(std::vector<Note> notes);
  void Insert(Queued queued);
  void RouteAll(absl::Time now);
  Outcome RouteOne(Queued& queued, const ClusterView& view, absl::Time now);
  bool MayBeLocal(Queued& queued, const ClusterView& view) const;
  // OK: behind so many there is a place.
  absl::Status CheckRoom(int queued) const;
  // OK: a request that would wait so long may.
  absl::Status CheckWait(int priority, absl::Time deadline, absl::Duration wait,
                         absl::Time now) const;
  void Send(const Queued& queued, const Route& route, int block_size, absl::Time now);
  std::vector<Exclusion> Excluded(const Queued& queued, const ClusterView& view,
                                  absl::Time now) const;
  std::vector<int> CachedTokens(Queued& queued, const ClusterView& view) const;
  // What a request that has waited too long fails with; OK: it may wait on.
  absl::Status Overdue(const Queued& queued, absl::Time now) const;
  void CountQueued(int requests, int64_t tokens);

  const DispatcherOptions options_;
  const Registry* const registry_;
  const PrefixIndex* const index_;
  const RoutingPolicy* const policy_;
  RouterMetrics* const metrics_;
  Clock* const clock_;

  // Only the owner thread.
  std::list<Queued> queue_;
  RoutedLedger ledger_;

  // Self-synchronised. The estimate is the owner thread's to change. The inbox is bounded by what
  // was accepted: at most two notes per request.
  WaitEstimate wait_;
  Inbox<Note> inbox_;
  std::atomic<int> queued_ = 0;
  std::atomic<int64_t> queued_tokens_ = 0;
  std::atomic<Ticket> last_ticket_ = 0;
};

}  // namespace tandem::router
