// The router without its network: queue, routing, streams, membership, timers. No gRPC, no sockets,
// and no time but its Clock's, so that a test runs a whole cluster in one process under a clock of
// its own. RouterServer puts gRPC around it.
//
// Thread-safe, except that one thread at a time drives it: either Start() gives it a thread, or the
// owner calls Step() again and again.
#pragma once

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "common/base/timer_queue.h"
#include "common/base/trace.h"
#include "common/metrics/metrics.h"
#include "router/core/load_summary.h"
#include "router/dispatch/dispatcher.h"
#include "router/metrics/router_metrics.h"
#include "router/policy/cost_policy.h"
#include "router/prefix_index/prefix_index.h"
#include "router/registry/membership.h"
#include "router/registry/registry.h"
#include "router/request/access_log.h"
#include "router/request/decode_client.h"
#include "router/request/open_streams.h"
#include "router/request/request_stream.h"
#include "router/request/served_model.h"

namespace tandem::router {

struct RouterCoreOptions {
  // What workers must be, beyond what the model directory says: RegistryOptions.
  std::string model_digest;
  std::string dtype;
  std::string kv_dtype;
  std::string quantization;
  int block_size = 0;  // tokens
  DispatcherOptions dispatcher;
  CostPolicyOptions policy;
  int max_model_len = 0;  // tokens; 0: the model's
  // Whether a stream that loses its decode worker after the first token goes on elsewhere.
  bool migrate = true;
  // A worker without progress for so long counts as lost: what runs there goes on elsewhere. What
  // has no token yet does so after DispatcherOptions::stalled_after.
  absl::Duration lost_after = absl::Seconds(10);
  // Where the spans of traced requests go; null: none are made. Outlives the core.
  SpanSink* spans = nullptr;
  // Of requests whose clients trace nothing, those that are traced: 0 to 1. The others do as their
  // clients.
  double trace_sample_ratio = 1;
};

class RouterCore {
 public:
  // `metrics` and `clock` outlive this.
  RouterCore(const RouterCoreOptions& options, ServedModel model,
             std::unique_ptr<DecodeClient> decode_client, Metrics* metrics, Clock* clock);
  // Every stream has ended, every Membership is gone. Fails what is still queued.
  ~RouterCore();

  // ---- the driver ----
  // Gives the core a thread of its own, until it is destroyed.
  void Start();
  // Instead of Start, by one thread: fires the timers that are due and routes what is queued, after
  // waiting up to `wait` of real time for something to do.
  void Step(absl::Duration wait);
  // Any thread: ends a waiting Step. Whoever moves a manual clock calls this.
  void Wake() { dispatcher_.Wake(); }
  // The driver, between two Steps: when the next one is due though nobody calls in meanwhile.
  absl::Time NextDue() const;

  // ---- fronts ----
  // The stream of a request; the front keeps it and then calls its Begin(), from where on `sink` is
  // called until its Finish (see request/stream_sink.h). INVALID_ARGUMENT names the field.
  absl::StatusOr<std::shared_ptr<RequestStream>> NewStream(Request request, StreamSink* sink);
  // See Dispatcher::MayJoin.
  absl::Status MayJoin(int priority, absl::Time deadline) const {
    return dispatcher_.MayJoin(priority, deadline);
  }
  OpenStreams& open_streams() { return open_streams_; }
  RouterMetrics& metrics() { return metrics_; }
  // A request that was refused before there was a stream for it has ended so; id, key_name, trace
  // and status are known of it.
  void NoteRefused(const AccessRecord& record);

  // ---- workers ----
  // A worker's stay; its messages go to Membership::Handle, the router's to `send`.
  std::unique_ptr<Membership> Join(Membership::Send send);

  // ---- operators ----
  // See Registry::Drain.
  absl::Status DrainWorker(const std::string& worker_id) { return registry_.Drain(worker_id); }
  // Called after a worker has joined, left or begun to drain, from any thread. At most once, before
  // the first Join.
  void SetListener(std::function<void()> listener) { listener_ = std::move(listener); }
  std::shared_ptr<const ClusterView> view() const { return registry_.view(); }
  const ServedModel& model() const { return model_; }
  // Longest prompt and answer together: the router's own limit, or less where no worker holds so
  // much. A prompt goes only to workers that hold it.
  int max_model_len() const;
  int queued_requests() const { return dispatcher_.queued(); }
  const PrefixIndex& prefix_index() const { return index_; }
  // A worker that has made no progress for so long gets no request.
  absl::Duration stalled_after() const { return stalled_after_; }
  Clock* clock() const { return clock_; }

 private:
  void OnClusterChanged();
  // Moves the streams of workers that hang, first those that lose nothing by it, then all, and
  // counts the workers by state. At most every kLookForStuck. The driver's thread.
  void LookForStuck();
  void SummariseLoad();

  const ServedModel model_;
  const bool migrate_;
  const absl::Duration stalled_after_;
  const absl::Duration lost_after_;
  SpanSink* const spans_;
  const double trace_sample_ratio_;
  const std::string id_;
  Clock* const clock_;
  std::function<void()> listener_;
  RouterMetrics metrics_;
  PrefixIndex index_;
  const int max_model_len_;
  Registry registry_;
  const CostPolicy policy_;
  const std::unique_ptr<DecodeClient> decode_client_;
  AccessLog access_log_;
  SuspectPrompts suspects_;
  RunningStreams running_;
  TimerQueue timers_;  // outlives the dispatcher, whose end ends streams
  Dispatcher dispatcher_;
  OpenStreams open_streams_;
  std::atomic<uint64_t> roster_ = 0;  // Registry::roster() as last told
  // Only the driver.
  absl::Time next_look_ = absl::InfinitePast();
  LoadSummary load_summary_;
  std::set<PrefixIndex::Slot> stuck_;  // stays of workers whose streams were moved
  std::atomic<bool> stopping_ = false;
  std::thread thread_;  // not joinable without Start
};

}  // namespace tandem::router
