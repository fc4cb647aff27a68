#include "prefill_worker/prefill_service.h"

#include <atomic>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

#include "common/base/check.h"
#include "common/base/status.h"
#include "common/rpc/cluster_credentials.h"
#include "common/rpc/status.h"
#include "common/rpc/trace_metadata.h"

namespace tandem::prefill {
namespace {

// How long a caller should wait before it asks a full worker again.
constexpr absl::Duration kRetryWhenFull = absl::Milliseconds(200);

// One call. Lives until gRPC is done with it, which is after Finish().
class PrefillReactor final : public grpc::ServerWriteReactor<internal::v1::PrefillEvent> {
 public:
  PrefillReactor(Intake* intake, WorkPool* writers)
      : intake_(intake), writers_(writers), id_(intake->NewId()) {}

  void Start(const internal::v1::PrefillRequest& request, absl::Duration left,
             const TraceContext& trace) {
    intake_->Submit(
        id_, request, [this](const Wanted& wanted) { Ask(wanted); },
        [this](int computed_tokens) { Progress(computed_tokens); },
        [this](absl::StatusOr<Outcome> outcome) { Answer(std::move(outcome)); }, left, trace);
  }

  void OnCancel() override {
    if (const uint64_t id = id_; id != 0) intake_->Cancel(id);
  }
  void OnWriteDone(bool /*ok*/) override {
    {
      absl::MutexLock lock(&mutex_);
      writing_ = false;
    }
    WriteNext();
  }
  void OnDone() override { delete this; }

 private:
  // The loop's thread, at most once and before Answer.
  void Ask(const Wanted& wanted) {
    {
      absl::MutexLock lock(&mutex_);
      wanted_ = intake_->ToProto(wanted);
    }
    WriteNext();
  }
  // The loop's thread, before Answer. During a write the newest is kept.
  void Progress(int computed_tokens) {
    {
      absl::MutexLock lock(&mutex_);
      computed_tokens_ = computed_tokens;
    }
    WriteNext();
  }
  // Mostly the loop's thread.
  void Answer(absl::StatusOr<Outcome> outcome) {
    id_ = 0;  // refused or over: the loop need not hear of it
    if (!outcome.ok() || outcome->prompt_logprobs.empty()) return End(outcome);
    const bool taken = writers_->TryRun([this, outcome = std::move(outcome)] { End(outcome); });
    TANDEM_CHECK(taken, "a pool without a bound refuses nothing");
  }
  void End(const absl::StatusOr<Outcome>& outcome) {
    const absl::Status status = outcome.status();
    if (outcome.ok()) *answer_.mutable_done() = intake_->ToProto(*outcome);
    {
      absl::MutexLock lock(&mutex_);
      end_ = ToGrpcStatus(absl::IsResourceExhausted(status) ? WithRetryAfter(status, kRetryWhenFull)
                                                            : status);
    }
    WriteNext();
  }
  // One write at a time. This may be gone when it returns.
  void WriteNext() {
    std::optional<grpc::Status> end;
    {
      absl::MutexLock lock(&mutex_);
      if (writing_) return;
      if (wanted_.has_value()) {
        *event_.mutable_wanted() = *std::exchange(wanted_, std::nullopt);
      } else if (end_.has_value()) {
        end = std::exchange(end_, std::nullopt);
      } else if (computed_tokens_.has_value()) {
        event_.set_computed_tokens(
            static_cast<uint32_t>(*std::exchange(computed_tokens_, std::nullopt)));
      } else {
        return;
      }
      writing_ = true;
    }
    if (!end.has_value()) return StartWrite(&event_);
    if (end->ok()) {
      StartWriteAndFinish(&answer_, grpc::WriteOptions(), *end);
    } else {
      Finish(*end);
    }
  }

  Intake* const intake_;
  WorkPool* const writers_;
  std::atomic<uint64_t> id_;          // 0: nothing to cancel
  internal::v1::PrefillEvent event_;  // gRPC's while `writing_`
  internal::v1::PrefillEvent answer_;
  absl::Mutex mutex_;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  // To be written, in this order; nothing follows the end.
  std::optional<internal::v1::KvTarget> wanted_ ABSL_GUARDED_BY(mutex_);
  std::optional<grpc::Status> end_ ABSL_GUARDED_BY(mutex_);
  std::optional<int> computed_tokens_ ABSL_GUARDED_BY(mutex_);
};

// Answers with an error and nothing else.
class RefusalReactor final : public grpc::ServerWriteReactor<internal::v1::PrefillEvent> {
 public:
  explicit RefusalReactor(const absl::Status& status) { Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

}  // namespace

absl::Status PrefillService::CheckTarget(const grpc::AuthContext& context,
                                         const internal::v1::KvTarget& target) const {
  // Blocks go to the caller's own pool: nobody can have this worker dial, or speak of, another.
  const std::optional<Party> caller = CallerOf(context);
  if (caller.has_value() && caller->id != target.worker_id()) {
    return PermissionDenied("target.worker_id is not the caller's");
  }
  if (vouchers_ == nullptr) return absl::OkStatus();
  const absl::Status vouched =
      vouchers_->Check(target.worker_id(), target.address(), target.voucher());
  if (!absl::IsUnavailable(vouched)) return vouched;
  // The router may send the first prompt before its answer to Hello is here: that is no failure of
  // this worker.
  return WithRetryAfter(absl::ResourceExhaustedError(vouched.message()), kRetryWhenFull);
}

grpc::ServerWriteReactor<internal::v1::PrefillEvent>* PrefillService::Prefill(
    grpc::CallbackServerContext* context, const internal::v1::PrefillRequest* request) {
  if (const absl::Status status = CheckTarget(*context->auth_context(), request->target());
      !status.ok()) {
    return new RefusalReactor(status);
  }
  auto* reactor = new PrefillReactor(intake_, writers_);
  reactor->Start(*request, absl::FromChrono(context->deadline()) - absl::Now(), TraceOf(*context));
  return reactor;
}

}  // namespace tandem::prefill
