// Whole workers without processes, RPC or threads of their own: loop, edge, fake engine and KV
// endpoint, which a test steps by hand. What they would say over the wire is messages here as well.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "decode_worker/intake.h"
#include "decode_worker/loop.h"
#include "prefill_worker/intake.h"
#include "prefill_worker/loop.h"
#include "simulation/fake_engine.h"
#include "simulation/kv_network.h"
#include "tandem/internal/v1/cluster.pb.h"

namespace tandem {

// What a worker tells the router on its Join stream.
struct JoinMessages {
  std::function<void(internal::v1::LoadReport)> load;
  std::function<void(internal::v1::BlockEvents)> blocks;
};

struct InProcessWorkerOptions {
  std::string worker_id;
  uint64_t incarnation = 1;
  engine::FakeEngineOptions engine;
  int max_model_len = 512;  // tokens
  int max_num_seqs = 16;
  int max_num_batched_tokens = 128;
  int local_prefill_max_tokens = 16;  // of a decode worker
  bool unified = false;               // a decode worker that prefills everything itself
  bool returns = true;                // a prefill worker has blocks given back
  // Of a decode worker, as decode::LoopOptions has them.
  absl::Duration target_step;
  int row_tile = 1;
  std::string cluster_secret;
  std::string model_digest = "fake";
};

internal::v1::Hello MakeHello(const InProcessWorkerOptions& options, const std::string& role,
                              const std::string& address);
// Another one for each process that has had this name.
std::string AddressOf(const std::string& role, const InProcessWorkerOptions& options);

// Step() belongs to one thread; intake() is thread-safe.
class InProcessPrefillWorker {
 public:
  InProcessPrefillWorker(const InProcessWorkerOptions& options, InProcessKvNetwork* kv,
                         Clock* clock, JoinMessages messages);
  // As a process that is killed: what is open ends unheard.
  ~InProcessPrefillWorker();

  prefill::Intake& intake() { return intake_; }
  internal::v1::Hello hello() const;
  // As Cluster/Join's "joined" would.
  void PostSnapshotWanted() { inbox_.Push(worker::SnapshotWanted{}); }
  // As a prefill candidate is named in a route.
  std::string address() const { return AddressOf("prefill", options_); }
  // False if there was nothing to compute.
  bool Step() { return loop_->Step(absl::ZeroDuration()); }
  absl::Duration IdleWait() const { return loop_->IdleWait(); }
  size_t num_returns() const { return loop_->num_returns(); }
  engine::FakeEngine& engine() { return engine_; }
  prefill::PrefillMetrics& metrics() { return metrics_; }

 private:
  const InProcessWorkerOptions options_;
  engine::FakeEngine engine_;
  prefill::PrefillMetrics metrics_;
  prefill::EventInbox inbox_;
  std::unique_ptr<kvtransfer::KvReceiver> receiver_;
  std::unique_ptr<prefill::Loop> loop_;
  std::unique_ptr<kvtransfer::KvSender> sender_;  // goes before the loop, whose blocks it reads
  prefill::Intake intake_;
};

// Brings calls to prefill workers of this process. Thread-safe; replies come on the thread that
// steps the prefill worker.
class InProcessPrefillCaller final : public decode::PrefillCaller {
 public:
  // All outlive this. `workers` is read with each call.
  InProcessPrefillCaller(decode::CallerIdentity identity, int vocab_size,
                         const std::vector<InProcessPrefillWorker*>* workers,
                         decode::EventInbox* inbox, Clock* clock);

  void Call(decode::PrefillCall call) override;
  void Cancel(uint64_t call_id) override;

 private:
  struct Active {
    prefill::Intake* intake = nullptr;
    uint64_t id = 0;
  };

  const decode::CallerIdentity identity_;
  const int vocab_size_;
  const std::vector<InProcessPrefillWorker*>* const workers_;
  decode::EventInbox* const inbox_;
  Clock* const clock_;
  absl::Mutex mutex_;
  absl::flat_hash_map<uint64_t, Active> active_ ABSL_GUARDED_BY(mutex_);  // by call id
};

// Step() belongs to one thread; Generate() and intake() are thread-safe.
class InProcessDecodeWorker {
 public:
  InProcessDecodeWorker(const InProcessWorkerOptions& options, InProcessKvNetwork* kv,
                        const std::vector<InProcessPrefillWorker*>* prefill_workers, Clock* clock,
                        JoinMessages messages);
  // How it reaches prefill workers is the caller's affair.
  using MakeCaller = std::function<std::unique_ptr<decode::PrefillCaller>(
      decode::CallerIdentity identity, decode::EventInbox* inbox)>;
  InProcessDecodeWorker(const InProcessWorkerOptions& options, InProcessKvNetwork* kv,
                        const MakeCaller& make_caller, Clock* clock, JoinMessages messages);

  // Calls back on the thread of Step(), or before the return where it is refused at once. Returns
  // the id for Cancel(); 0: it was refused.
  uint64_t Generate(const internal::v1::DecodeRequest& request, absl::Duration left,
                    std::function<void(internal::v1::TokenEvent)> on_event,
                    std::function<void(absl::Status)> on_end);
  void Cancel(uint64_t id) { intake_.Cancel(id); }
  internal::v1::Hello hello() const;
  void PostSnapshotWanted() { inbox_.Push(worker::SnapshotWanted{}); }
  std::string address() const { return AddressOf("decode", options_); }
  bool Step() { return loop_->Step(absl::ZeroDuration()); }
  absl::Duration IdleWait() const { return loop_->IdleWait(); }
  decode::Intake& intake() { return intake_; }
  size_t num_sequences() const { return loop_->num_sequences(); }
  size_t num_transfers() const { return loop_->num_transfers(); }
  engine::FakeEngine& engine() { return engine_; }

 private:
  const InProcessWorkerOptions options_;
  engine::FakeEngine engine_;
  decode::DecodeMetrics metrics_;
  decode::EventInbox inbox_;
  std::unique_ptr<kvtransfer::KvReceiver> receiver_;
  std::unique_ptr<kvtransfer::KvSender> sender_;
  std::unique_ptr<decode::PrefillCaller> caller_;
  decode::Intake intake_;
  std::unique_ptr<decode::Loop> loop_;
};

}  // namespace tandem
