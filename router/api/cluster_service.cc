#include "router/api/cluster_service.h"

#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/escaping.h"
#include "absl/synchronization/mutex.h"
#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "common/rpc/cluster_credentials.h"
#include "common/rpc/status.h"

namespace tandem::router {
namespace {

using internal::v1::RouterMessage;
using internal::v1::WorkerMessage;

}  // namespace

// One worker's stream. Reads follow one another in gRPC's reactions; writes are queued, because a
// drain may be asked for from any thread.
class JoinReactor : public grpc::ServerBidiReactor<WorkerMessage, RouterMessage>,
                    public std::enable_shared_from_this<JoinReactor> {
 public:
  // Keeps itself alive until OnDone.
  void Start(RouterCore* core, std::optional<Party> caller) {
    caller_ = std::move(caller);
    self_ = shared_from_this();
    membership_ = core->Join([weak = weak_from_this()](RouterMessage message) {
      if (const auto reactor = weak.lock()) reactor->Send(std::move(message));
    });
    StartRead(&incoming_);
  }

  void OnReadDone(bool ok) override {
    if (!ok) return End(absl::OkStatus());
    absl::Status status = CheckCaller();
    if (status.ok()) status = membership_->Handle(incoming_);
    if (!status.ok()) {
      spdlog::warn("worker refused: {}", absl::CEscape(MessageOf(status)));
      return End(status);
    }
    incoming_.Clear();
    StartRead(&incoming_);
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    outgoing_.pop_front();
    if (!ok) outgoing_.clear();
    WriteNext();
  }

  void OnCancel() override { End(absl::CancelledError("the stream was cancelled")); }

  // From any thread, after Start. Not by End: the membership may be gone when another has ended it.
  void Stop() {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    ended_ = true;
    Finish(grpc::Status::OK);
  }

  void OnDone() override {
    // Here and not when the last reference goes: a drain that is being asked for may hold one, and
    // the core may be gone before it lets go.
    membership_.reset();
    self_.reset();
  }

 private:
  // A worker can only join as what it has proved to be.
  absl::Status CheckCaller() const {
    if (!incoming_.has_hello() || !caller_.has_value()) return absl::OkStatus();
    const internal::v1::Hello& hello = incoming_.hello();
    const std::string role = hello.role() == kPrefillRole ? kPrefillRole : kDecodeRole;
    if (*caller_ == Party{role, hello.worker_id()}) return absl::OkStatus();
    return PermissionDenied("hello is not of the worker that the caller has proved to be");
  }

  void Send(RouterMessage message) {
    absl::MutexLock lock(&mutex_);
    outgoing_.push_back(std::move(message));
    WriteNext();
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || ended_ || outgoing_.empty()) return;
    writing_ = true;
    StartWrite(&outgoing_.front());
  }

  void End(const absl::Status& status) {
    // Losing the stream is leaving: at once, not when gRPC is done with it.
    membership_->Leave();
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    ended_ = true;
    Finish(ToGrpcStatus(status));
  }

  std::shared_ptr<JoinReactor> self_;       // set before the first reaction, reset in the last
  std::unique_ptr<Membership> membership_;  // the same
  std::optional<Party> caller_;             // constant after Start
  WorkerMessage incoming_;                  // only gRPC's read reactions
  absl::Mutex mutex_;
  std::deque<RouterMessage> outgoing_ ABSL_GUARDED_BY(mutex_);  // the front one is being written
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
};

grpc::ServerBidiReactor<WorkerMessage, RouterMessage>* ClusterService::Join(
    grpc::CallbackServerContext* context) {
  auto reactor = std::make_shared<JoinReactor>();
  reactor->Start(core_, CallerOf(*context->auth_context()));
  absl::MutexLock lock(&mutex_);
  std::erase_if(reactors_, [](const auto& weak) { return weak.expired(); });
  reactors_.push_back(reactor);
  if (ended_) reactor->Stop();
  return reactor.get();
}

void ClusterService::EndAll() {
  std::vector<std::weak_ptr<JoinReactor>> reactors;
  {
    absl::MutexLock lock(&mutex_);
    ended_ = true;
    reactors.swap(reactors_);
  }
  for (const auto& weak : reactors) {
    if (const auto reactor = weak.lock()) reactor->Stop();
  }
}

}  // namespace tandem::router
