#include "decode_worker/intake.h"

#include <utility>

#include "common/base/refusal.h"
#include "common/base/status.h"

namespace tandem::decode {

Intake::Intake(RequestLimits limits, EventInbox* inbox, Clock* clock)
    : limits_(limits), inbox_(inbox), clock_(clock) {}

absl::StatusOr<Work> Intake::Read(const internal::v1::DecodeRequest& request, absl::Duration left) {
  TANDEM_ASSIGN_OR_RETURN(Work work, WorkFromProto(request, limits_));
  work.id = ++last_id_;
  work.arrived = clock_->Now();
  // By what is left of it: the loop's clock does not follow a wall clock that is set.
  work.deadline = work.arrived + left;
  return work;
}

std::shared_ptr<TokenStream> Intake::MakeStream(std::function<void()> wake) const {
  return std::make_shared<TokenStream>(std::move(wake), [inbox = inbox_] { inbox->Wake(); });
}

absl::Status Intake::Push(Work work, std::shared_ptr<TokenStream> stream) {
  Event event = WorkArrived{std::move(work), std::move(stream)};
  if (inbox_->TryPush(std::move(event))) return absl::OkStatus();
  return inbox_->closed()
             ? WithRefusal(Unavailable("the worker stops"), {.reason = Refusal::Reason::kLeaving})
             : WithRefusal(ResourceExhausted("the worker's inbox is full"),
                           {.reason = Refusal::Reason::kInbox});
}

void Intake::Cancel(uint64_t id) { inbox_->Push(WorkCancelled{id}); }

}  // namespace tandem::decode
