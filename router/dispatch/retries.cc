#include "router/dispatch/retries.h"

#include <algorithm>

namespace tandem::router {
namespace {

// How long a request avoids a worker that failed it but is still in the cluster.
constexpr absl::Duration kAvoidLost = absl::Milliseconds(250);
// How long it avoids one that was full and does not report.
constexpr absl::Duration kAvoidFull = absl::Seconds(1);

}  // namespace

bool MayBeLost(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnimplemented:
      return true;
    default:
      return false;
  }
}

void Retries::Add(Kind kind, const Route& route, absl::Time now) {
  std::erase_if(refusals_, [&](const Refusal& r) { return r.worker == route.decode.id; });
  refusals_.push_back({kind, route.decode.id, route.incarnation, route.reported,
                       now + (kind == Kind::kLost ? kAvoidLost : kAvoidFull)});
  if (kind == Kind::kLost) ++lost_;
}

bool Retries::HasLost() const {
  return std::any_of(refusals_.begin(), refusals_.end(),
                     [](const Refusal& refusal) { return refusal.kind == Kind::kLost; });
}

Exclusion Retries::ExclusionOf(const WorkerView& worker, absl::Time now) const {
  for (const Refusal& refusal : refusals_) {
    // Another incarnation is another process: what its predecessor did is no reason to avoid it.
    if (refusal.worker != worker.identity->id ||
        refusal.incarnation != worker.identity->incarnation || now >= refusal.until) {
      continue;
    }
    if (refusal.kind == Kind::kLost) return Exclusion::kLost;
    if (worker.reported <= refusal.reported) return Exclusion::kFull;
  }
  return Exclusion::kNone;
}

absl::Time Retries::NextChange(absl::Time now) const {
  absl::Time next = absl::InfiniteFuture();
  for (const Refusal& refusal : refusals_) {
    if (refusal.until > now) next = std::min(next, refusal.until);
  }
  return next;
}

}  // namespace tandem::router
