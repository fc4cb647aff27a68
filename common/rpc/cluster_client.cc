#include "common/rpc/cluster_client.h"

#include <algorithm>
#include <optional>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "common/rpc/pending_blocks.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "tandem/internal/v1/cluster.grpc.pb.h"

namespace tandem {
namespace {

using internal::v1::BlockEvents;
using internal::v1::RouterMessage;
using internal::v1::WorkerMessage;

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(100);
constexpr absl::Duration kMaxBackoff = absl::Seconds(1);
constexpr size_t kMaxHashesPerMessage = 16384;
// A snapshot of the whole cache and changes on top of it must fit, or every snapshot would
// overflow.
constexpr size_t kMinPendingHashes = 65536;

// What waits to be sent, and what one stream has told. Shared by the client's thread, the callers
// of Post* and gRPC's threads.
struct Mailbox {
  absl::Mutex mutex;
  bool stopping ABSL_GUARDED_BY(mutex) = false;
  bool joined ABSL_GUARDED_BY(mutex) = false;
  // For the client's thread: callbacks that are due.
  std::optional<internal::v1::Welcome> welcome ABSL_GUARDED_BY(mutex);
  bool call_joined ABSL_GUARDED_BY(mutex) = false;
  bool call_drain ABSL_GUARDED_BY(mutex) = false;
  // For the stream.
  bool draining ABSL_GUARDED_BY(mutex) = false;
  bool draining_sent ABSL_GUARDED_BY(mutex) = false;
  std::optional<absl::Duration> heartbeat ABSL_GUARDED_BY(mutex);
  std::optional<internal::v1::LoadReport> load ABSL_GUARDED_BY(mutex);
  // The newest of all. A stream that ends may have taken it along, so each new one begins with it.
  std::optional<internal::v1::LoadReport> last_load ABSL_GUARDED_BY(mutex);
  PendingBlocks blocks ABSL_GUARDED_BY(mutex);
  bool snapshot_wanted ABSL_GUARDED_BY(mutex) = false;

  void AskForSnapshot() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    call_joined = snapshot_wanted = true;
  }
};

// One Join call. Reactions only note what happened; the client's thread acts. A hold is kept as
// long as reads succeed, because Post* starts writes from outside of reactions.
class JoinCall : public grpc::ClientBidiReactor<WorkerMessage, RouterMessage> {
 public:
  explicit JoinCall(Mailbox* mailbox) : mailbox_(mailbox) {}

  void Start(internal::v1::Cluster::Stub* stub, const internal::v1::Hello& hello)
      ABSL_LOCKS_EXCLUDED(mailbox_->mutex) {
    stub->async()->Join(&context_, this);
    absl::MutexLock lock(&mailbox_->mutex);
    *outgoing_.mutable_hello() = hello;
    writing_ = true;
    StartWrite(&outgoing_);
    StartRead(&incoming_);
    AddHold();
    StartCall();
  }
  void Cancel() { context_.TryCancel(); }

  // The client holds its mailbox's mutex; this tells the thread analysis that it is this stream's
  // mailbox too.
  void AssertMailboxHeld() const ABSL_ASSERT_EXCLUSIVE_LOCK(mailbox_->mutex) {
    mailbox_->mutex.AssertHeld();
  }

  // Sends what is pending, if the stream is idle.
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mailbox_->mutex) {
    if (writing_ || broken_ || !welcomed_) return;
    outgoing_.Clear();
    if (mailbox_->draining && !mailbox_->draining_sent) {
      outgoing_.mutable_draining();
      mailbox_->draining_sent = true;
    } else if (mailbox_->heartbeat) {
      outgoing_.mutable_heartbeat()->set_seconds_without_progress(
          absl::ToDoubleSeconds(*std::exchange(mailbox_->heartbeat, std::nullopt)));
    } else if (mailbox_->load) {
      *outgoing_.mutable_load() = *std::exchange(mailbox_->load, std::nullopt);
    } else if (auto blocks = mailbox_->blocks.Take(kMaxHashesPerMessage)) {
      *outgoing_.mutable_blocks() = std::move(*blocks);
    } else {
      return;
    }
    writing_ = true;
    StartWrite(&outgoing_);
  }

  void OnReadDone(bool ok) override {
    absl::MutexLock lock(&mailbox_->mutex);
    if (!ok) {
      Break();
      RemoveHold();
      return;
    }
    if (incoming_.has_welcome() && !welcomed_) {
      welcomed_ = true;
      mailbox_->joined = true;
      mailbox_->AskForSnapshot();
      mailbox_->welcome = incoming_.welcome();
      spdlog::info("joined the cluster of router {}", incoming_.welcome().router_id());
    } else if (incoming_.has_drain()) {
      mailbox_->call_drain = true;
    }
    Pump();
    StartRead(&incoming_);
  }
  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mailbox_->mutex);
    writing_ = false;
    if (ok) {
      Pump();
    } else {
      Break();
    }
  }
  void OnDone(const grpc::Status& status) override {
    absl::MutexLock lock(&mailbox_->mutex);
    status_ = status;
    done_ = true;
  }

  bool done() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mailbox_->mutex) { return done_; }
  bool welcomed() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mailbox_->mutex) { return welcomed_; }
  const grpc::Status& status() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mailbox_->mutex) {
    return status_;
  }

 private:
  void Break() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mailbox_->mutex) {
    broken_ = true;
    mailbox_->joined = false;
  }

  Mailbox* const mailbox_;
  grpc::ClientContext context_;
  RouterMessage incoming_;
  WorkerMessage outgoing_ ABSL_GUARDED_BY(mailbox_->mutex);
  bool writing_ ABSL_GUARDED_BY(mailbox_->mutex) = false;
  bool broken_ ABSL_GUARDED_BY(mailbox_->mutex) = false;
  bool welcomed_ ABSL_GUARDED_BY(mailbox_->mutex) = false;
  bool done_ ABSL_GUARDED_BY(mailbox_->mutex) = false;
  grpc::Status status_ ABSL_GUARDED_BY(mailbox_->mutex);
};

class GrpcClusterClient : public ClusterClient {
 public:
  explicit GrpcClusterClient(ClusterClientOptions options)
      : options_(std::move(options)),
        max_pending_hashes_(std::max(kMinPendingHashes, size_t{4} * options_.hello.num_blocks())),
        stub_(internal::v1::Cluster::NewStub(
            MakeChannel(options_.router_address, *options_.credentials, {kRouterRole, ""}))),
        thread_([this] { Run(); }) {}

  ~GrpcClusterClient() override {
    {
      absl::MutexLock lock(&mailbox_.mutex);
      mailbox_.stopping = true;
      if (stream_ != nullptr) stream_->Cancel();
    }
    thread_.join();
  }

  bool joined() const override {
    absl::MutexLock lock(&mailbox_.mutex);
    return mailbox_.joined;
  }

  void PostLoad(internal::v1::LoadReport load) override {
    absl::MutexLock lock(&mailbox_.mutex);
    mailbox_.load = mailbox_.last_load = std::move(load);
    PumpStream();
  }

  void PostHeartbeat(absl::Duration without_progress) override {
    absl::MutexLock lock(&mailbox_.mutex);
    mailbox_.heartbeat = without_progress;
    PumpStream();
  }

  void PostBlocks(BlockEvents events) override {
    absl::MutexLock lock(&mailbox_.mutex);
    if (!mailbox_.joined) return;  // a snapshot is asked for on joining
    if (events.cleared() && !std::exchange(mailbox_.snapshot_wanted, false)) return;
    mailbox_.blocks.Merge(events);
    PumpStream();
    if (mailbox_.blocks.size() > max_pending_hashes_) {
      mailbox_.blocks.Clear();
      mailbox_.AskForSnapshot();
    }
  }

  void PostDraining() override {
    absl::MutexLock lock(&mailbox_.mutex);
    mailbox_.draining = true;
    PumpStream();
  }

 private:
  void PumpStream() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mailbox_.mutex) {
    if (stream_ == nullptr) return;
    stream_->AssertMailboxHeld();
    stream_->Pump();
  }

  void Run() {
    absl::Duration backoff = kFirstBackoff;
    absl::Time last_warning = absl::InfinitePast();
    bool member = false;  // at any time
    while (true) {
      bool was_joined = false;
      const absl::Status status = RunStream(&was_joined);
      {
        absl::MutexLock lock(&mailbox_.mutex);
        if (mailbox_.stopping) return;
      }
      member = member || was_joined;
      if (status.code() == absl::StatusCode::kFailedPrecondition && !member) {
        if (options_.on_refused) options_.on_refused(status);
        return;
      }
      if (was_joined) backoff = kFirstBackoff;
      if (status.ok()) {
        last_warning = absl::Now();  // nobody answers there for a while, and rightly
        spdlog::info("router {} has stopped; dialling until one answers", options_.router_address);
      } else if (was_joined || absl::Now() - last_warning > absl::Seconds(10)) {
        last_warning = absl::Now();
        spdlog::warn("{} router {}: {}; dialling again", was_joined ? "lost" : "cannot join",
                     options_.router_address, MessageOf(status));
      }
      absl::MutexLock lock(&mailbox_.mutex);
      if (mailbox_.mutex.AwaitWithTimeout(absl::Condition(&mailbox_.stopping), backoff)) return;
      backoff = std::min(2 * backoff, kMaxBackoff);
    }
  }

  // One stream from Hello to its end; calls back meanwhile. OK: the router said that it stops.
  absl::Status RunStream(bool* was_joined) {
    JoinCall stream(&mailbox_);
    {
      absl::MutexLock lock(&mailbox_.mutex);
      if (mailbox_.stopping) return absl::CancelledError("stopping");
      mailbox_.call_joined = mailbox_.call_drain = mailbox_.draining_sent = false;
      mailbox_.blocks.Clear();
      mailbox_.load = mailbox_.last_load;
    }
    if (options_.on_dial) options_.on_dial();
    stream.Start(stub_.get(), options_.hello);
    {
      absl::MutexLock lock(&mailbox_.mutex);
      stream_ = &stream;
      if (mailbox_.stopping) stream.Cancel();
    }
    while (true) {
      std::optional<internal::v1::Welcome> welcome;
      bool call_joined = false;
      bool call_drain = false;
      {
        absl::MutexLock lock(&mailbox_.mutex);
        const auto due = [this, &stream]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
          return stream.done() || mailbox_.call_joined || mailbox_.call_drain;
        };
        mailbox_.mutex.Await(absl::Condition(&due));
        stream.AssertMailboxHeld();
        if (stream.done()) {
          stream_ = nullptr;
          mailbox_.joined = false;
          *was_joined = stream.welcomed();
          return FromGrpcStatus(stream.status());
        }
        welcome = std::exchange(mailbox_.welcome, std::nullopt);
        call_joined = std::exchange(mailbox_.call_joined, false);
        call_drain = std::exchange(mailbox_.call_drain, false);
      }
      if (welcome && options_.on_welcome) options_.on_welcome(*welcome);
      if (call_joined && options_.on_joined) options_.on_joined();
      if (call_drain && options_.on_drain) options_.on_drain();
    }
  }

  const ClusterClientOptions options_;
  const size_t max_pending_hashes_;
  const std::unique_ptr<internal::v1::Cluster::Stub> stub_;
  mutable Mailbox mailbox_;
  JoinCall* stream_ ABSL_GUARDED_BY(mailbox_.mutex) = nullptr;
  std::thread thread_;  // last: runs over all of the above
};

}  // namespace

std::unique_ptr<ClusterClient> ClusterClient::Start(ClusterClientOptions options) {
  return std::make_unique<GrpcClusterClient>(std::move(options));
}

}  // namespace tandem
