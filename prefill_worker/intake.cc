#include "prefill_worker/intake.h"

#include <utility>

#include "common/base/status.h"

namespace tandem::prefill {

Intake::Intake(RequestLimits limits, EventInbox* inbox, Clock* clock)
    : limits_(std::move(limits)), inbox_(inbox), clock_(clock) {}

void Intake::Submit(uint64_t id, const internal::v1::PrefillRequest& request, Want want,
                    Progress progress, Reply reply, absl::Duration left,
                    const TraceContext& trace) {
  absl::StatusOr<Work> work = WorkFromProto(request, limits_);
  if (!work.ok()) return reply(work.status());
  work->id = id;
  work->arrived = clock_->Now();
  // By what is left of it: the loop's clock does not follow a wall clock that is set.
  work->deadline = work->arrived + left;
  work->trace = trace;
  if (request.gives_back()) work->want = std::move(want);
  work->reply = reply;
  if (request.progress()) work->progress = std::move(progress);
  Event event = WorkArrived{*std::move(work)};
  if (inbox_->TryPush(std::move(event))) return;
  reply(inbox_->closed()
            ? Unavailable("prefill worker {} is stopping", limits_.worker_id)
            : ResourceExhausted("prefill worker {} has a full queue", limits_.worker_id));
}

internal::v1::PrefillResponse Intake::ToProto(const Outcome& outcome) const {
  return OutcomeToProto(outcome, limits_.worker_id);
}

internal::v1::KvTarget Intake::ToProto(const Wanted& wanted) const {
  return WantedToProto(wanted, limits_.num_blocks);
}

void Intake::Cancel(uint64_t id) { inbox_->Push(WorkCancelled{id}); }

}  // namespace tandem::prefill
