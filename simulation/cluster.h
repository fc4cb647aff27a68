// A router, prefill workers and decode workers in one process: no sockets, no gRPC threads, and no
// time but the test's own clock.
//
// Two ways to drive it. Turn() steps every part once, on the caller's thread and always in the same
// order, so that a test is deterministic. Start() gives the router and each worker a thread of its
// own, as processes would have, for the thread sanitizer to look at; the caller goes on calling
// Turn(), which then only serves the clients. After Stop() it steps the workers again.
#pragma once

#include <atomic>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "common/metrics/metrics.h"
#include "router/core/router_core.h"
#include "router/request/request_stream.h"
#include "router/request/stream_sink.h"
#include "simulation/fake_clock.h"
#include "simulation/kv_network.h"
#include "simulation/workers.h"

namespace tandem {

// A client of the router: one request and all that came back. Belongs to the thread of Turn().
class InProcessClient final : public router::StreamSink {
 public:
  // Takes a message once every `turns_per_message` turns of the cluster.
  InProcessClient(router::RouterCore* core, router::Request request, int turns_per_message);

  // Turns the client; false once nothing more will come.
  bool Pump();
  // Goes away, as a closed connection would.
  void Cancel() { stream_->OnClientGone(); }

  bool finished() const;
  absl::Status outcome() const;
  std::vector<int32_t> tokens() const;
  router::GenerateResponse last() const;  // the message that came last, with usage and timing

  // StreamSink.
  void Write(const router::GenerateResponse& response) override;
  void Finish(const absl::Status& status) override;
  void Abort() override {}

 private:
  const int turns_per_message_;
  int turns_ = 0;
  std::shared_ptr<router::RequestStream> stream_;
  mutable absl::Mutex mutex_;
  std::vector<int32_t> tokens_ ABSL_GUARDED_BY(mutex_);
  router::GenerateResponse last_ ABSL_GUARDED_BY(mutex_);
  absl::Status outcome_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
};

struct InProcessClusterOptions {
  int prefill_workers = 2;
  int decode_workers = 2;
  bool unified = false;           // decode workers prefill everything themselves
  InProcessWorkerOptions worker;  // of each; the id is set by the cluster
  // On the thread of a prefill worker, before each of its steps: may fail it.
  std::function<absl::Status(const engine::Batch&)> before_prefill;
  absl::Duration turn = absl::Milliseconds(1);  // what a turn adds to the clock
  // Between the workers; outlives the cluster. Null: one of the cluster's own, where nothing takes
  // time.
  InProcessKvNetwork* kv = nullptr;
  FakeClock* clock = nullptr;  // outlives the cluster; null: one of its own
};

class InProcessCluster {
 public:
  explicit InProcessCluster(const InProcessClusterOptions& options);
  // Ends the threads first.
  ~InProcessCluster();

  void Start();
  void Turn();
  // A turn in which no time passes: a worker whose step is not over is left alone. True if anything
  // was computed or delivered.
  bool StepAll();
  // When the first of the steps in flight is over; InfiniteFuture where there is none.
  absl::Time NextStepEnd();

  // The model that the router serves: its vocabulary and lengths are the fake engine's.
  static router::ServedModel MakeModel(const InProcessWorkerOptions& worker);

  router::RouterCore& core() { return *core_; }
  FakeClock& clock() { return *clock_; }
  std::vector<std::unique_ptr<InProcessPrefillWorker>>& prefills() { return prefills_; }
  std::vector<std::unique_ptr<InProcessDecodeWorker>>& decodes() { return decodes_; }

  // As kill -9 would: its calls end, its stay too, and it is not stepped any more. Not while
  // workers have threads.
  void KillDecode(size_t i);
  // Its loop hangs: it is not stepped any more, while its stay and its calls go on.
  void HangDecode(size_t i) { dead_.insert(decodes_[i].get()); }
  void HangPrefill(size_t i) { dead_.insert(prefills_[i].get()); }
  // Ends the threads of the workers.
  void Stop();
  // What is still held for requests; "" where nothing is. Not while workers have threads.
  std::string Held();

 private:
  class Decoding;

  JoinMessages MessagesTo(const std::unique_ptr<router::Membership>* slot);
  template <typename Worker>
  std::unique_ptr<router::Membership> Join(Worker* worker);
  template <typename Step>
  void Drive(Step step);

  const InProcessClusterOptions options_;
  FakeClock own_clock_;
  FakeClock* const clock_;
  Metrics metrics_;
  InProcessKvNetwork own_kv_;
  InProcessKvNetwork* const kv_;
  std::shared_ptr<Decoding> decoding_;
  // One for each worker, prefill workers first; null once it left. Stays end before the core.
  std::vector<std::unique_ptr<router::Membership>> memberships_;
  std::vector<InProcessPrefillWorker*> prefill_list_;  // what decode workers see
  std::vector<std::unique_ptr<InProcessPrefillWorker>> prefills_;
  std::vector<std::unique_ptr<InProcessDecodeWorker>> decodes_;
  std::unique_ptr<router::RouterCore> core_;
  bool core_has_thread_ = false;
  std::atomic<bool> stopping_ = false;
  std::vector<std::thread> threads_;  // of the workers
  std::set<const void*> dead_;        // workers
};

}  // namespace tandem
