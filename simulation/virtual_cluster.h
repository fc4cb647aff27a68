// A whole cluster under a virtual clock: the router, workers that can die, hang and come back, the
// calls between them and KV transfers, all as events of one queue.
//
// The parts are the cluster's own: RouterCore, both loops with their pools, caches and intakes,
// Membership, and what decides in KV transfers (virtual_kv_network.h). What gRPC does between them
// is modelled: streams in order with a window, deadlines, cancellation that reaches the other end,
// UNAVAILABLE where a process or a connection ends. Steps take the time that a cost function says.
//
//   VirtualCluster cluster(options);
//   auto client = cluster.Submit(request, {});
//   cluster.events().RunUntil(cluster.events().Now() + absl::Seconds(10));
//
// Not thread-safe: everything happens on one thread, and with the same inputs in the same way.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/metrics/metrics.h"
#include "router/core/router_core.h"
#include "router/request/request_stream.h"
#include "router/request/stream_sink.h"
#include "simulation/event_queue.h"
#include "simulation/faults.h"
#include "simulation/step_time.h"
#include "simulation/virtual_kv_network.h"
#include "simulation/virtual_model_runner.h"
#include "simulation/workers.h"

namespace tandem {

struct VirtualWorker {
  router::WorkerRole role = router::WorkerRole::kPrefill;
  InProcessWorkerOptions options;  // worker_id must be set; `unified` follows the role
  StepTime step_time = [](const engine::Batch&) { return absl::Milliseconds(5); };
};

struct VirtualClusterOptions {
  std::vector<VirtualWorker> workers;
  router::RouterCoreOptions router;
  absl::Duration latency = absl::Microseconds(100);       // of a message, one way
  absl::Duration turn_time = absl::Microseconds(20);      // of the host, for a turn of a loop
  absl::Duration rejoin_after = absl::Milliseconds(200);  // a worker whose stay has broken
  // Until the router sees that a stay has ended: meanwhile a worker may have joined again.
  absl::Duration half_open;
  size_t window = 4;    // messages of a token stream on their way to the router
  VirtualKvOptions kv;  // its faults, times and callbacks are the cluster's
  Faults faults;
};

// One request and all that came of it.
class VirtualClient final : public router::StreamSink {
 public:
  struct Options {
    absl::Duration read_time;  // for each message
  };
  struct Arrival {
    absl::Time at;
    int tokens;
  };

  bool finished() const { return num_finishes_ > 0; }
  int num_finishes() const { return num_finishes_; }  // 1, or something is wrong
  const absl::Status& outcome() const { return outcome_; }
  const std::vector<int32_t>& tokens() const { return tokens_; }
  const std::vector<Arrival>& arrivals() const { return arrivals_; }
  // The message that came last, with usage and timing.
  const router::GenerateResponse& last() const { return last_; }
  // That every message's count of tokens was what had come by then.
  bool counted_right() const { return counted_right_; }
  absl::Time submitted_at() const { return submitted_at_; }
  absl::Time finished_at() const { return finished_at_; }
  // Goes away, as a closed connection would.
  void Cancel();

  // StreamSink.
  void Write(const router::GenerateResponse& response) override;
  void Finish(const absl::Status& status) override;
  void Abort() override;

 private:
  friend class VirtualCluster;
  VirtualClient(class VirtualCluster* cluster, Options options)
      : cluster_(cluster), options_(options) {}
  void TakeMessage(bool ok);

  class VirtualCluster* const cluster_;
  const Options options_;
  std::shared_ptr<router::RequestStream> stream_;
  absl::Time submitted_at_, finished_at_;
  int message_ = 0;  // being written
  bool writing_ = false;
  std::vector<int32_t> tokens_;
  std::vector<Arrival> arrivals_;
  router::GenerateResponse last_;
  bool counted_right_ = true;
  int num_finishes_ = 0;
  absl::Status outcome_;
};

class VirtualCluster {
 public:
  explicit VirtualCluster(VirtualClusterOptions options);
  ~VirtualCluster();

  // The model that the router serves: vocabulary and lengths are the first worker's.
  const router::ServedModel& model() const { return core_->model(); }
  // The client lives as long as the cluster. INVALID_ARGUMENT as RouterCore::NewStream.
  absl::StatusOr<VirtualClient*> Submit(router::Request request, VirtualClient::Options options);

  EventQueue& events() { return events_; }
  router::RouterCore& core() { return *core_; }

  // ---- what happens to workers, by their place in the options ----
  size_t num_workers() const { return workers_.size(); }
  // As kill -9: its calls, its stay and its links end, its memory is gone.
  void Kill(size_t worker);
  // Another process under the same name; after Kill.
  void Restart(size_t worker);
  // Its loop stands still; calls, stay and links go on.
  void Hang(size_t worker, bool hangs);
  // As SIGSTOP, and SIGCONT then: the whole process stands still.
  void Stop(size_t worker, absl::Time until);
  // Its stay in the cluster ends, and begins again after rejoin_after.
  void BreakStay(size_t worker);
  // Its KV connections end.
  void BreakLinks(size_t worker);

  // ---- what is there ----
  bool alive(size_t worker) const { return workers_[worker].process != nullptr; }
  bool hangs(size_t worker) const { return workers_[worker].hangs; }
  // Whether it is in the middle of a write into another worker's pool.
  bool Writing(size_t worker) const;
  engine::FakeEngine& engine(size_t worker);
  size_t num_sequences(size_t worker) const;  // of a decode worker
  // Of a prefill worker that lives: returns of blocks that may still be written.
  size_t num_returns(size_t worker) const;
  // Of all that have lived: prompt tokens that came back from decode to prefill workers.
  int returned_tokens() const;
  // What living workers and the router hold for requests; "" where nothing is.
  std::string Held();
  // Where the router's prefix index and what a living worker has cached differ; "" where nowhere.
  // Only where no report is under way.
  std::string IndexErrors();

 private:
  friend class VirtualClient;
  struct Process;
  struct Worker {
    VirtualWorker setup;
    uint64_t incarnation = 0;
    bool hangs = false;
    std::shared_ptr<Process> process;  // null: dead
  };
  class Decoding;
  class DecodeCall;
  class PrefillCaller;

  void StartProcess(Worker* worker);
  void Join(const std::shared_ptr<Process>& process);
  void LeaveCluster(const std::shared_ptr<Process>& process);
  void Report(const std::shared_ptr<Process>& process, internal::v1::WorkerMessage message);
  // A turn of the loop as soon as it has time.
  void Wake(const std::shared_ptr<Process>& process);
  void WakeAt(const std::shared_ptr<Process>& process, absl::Time when);
  void Turn(const std::shared_ptr<Process>& process);
  void WakeRouter();
  void TurnRouter();
  std::shared_ptr<Process> FindByAddress(const std::string& address) const;
  Fate FateOf(Message::Kind kind, std::string_view from, std::string_view to);

  const VirtualClusterOptions options_;
  EventQueue events_;
  Metrics metrics_;
  VirtualKvNetwork kv_;
  std::vector<Worker> workers_;
  std::vector<std::shared_ptr<Process>> processes_;  // the dead ones too: events may name them
  std::unique_ptr<router::RouterCore> core_;
  bool router_woken_ = false;
  absl::Time router_due_ = absl::InfiniteFuture();
  std::vector<std::unique_ptr<VirtualClient>> clients_;
};

}  // namespace tandem
