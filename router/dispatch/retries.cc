#include "router/dispatch/retries.h"

#include <algorithm>
#include <utility>

namespace tandem::router {
namespace {

// How long a request avoids a worker that failed it but is still in the cluster: the first time,
// and at most.
constexpr absl::Duration kAvoidLost = absl::Milliseconds(250);
constexpr absl::Duration kAvoidLostAgain = absl::Seconds(2);
// How long it avoids a full one whose reports never show the room: it might be the report.
constexpr absl::Duration kAvoidFull = absl::Seconds(5);
// How long it goes to another prefill worker than one that was lost with it, where there is one:
// until a stopped one, which may be back meanwhile, has had time to lose all of its connections.
constexpr absl::Duration kAvoidLostPrefill = absl::Seconds(10);
// The second refusal holds a request for the first of these, the others for twice as long each
// time: four tries in the first second, and fewer in any other.
constexpr absl::Duration kFirstHold = absl::Milliseconds(200);
constexpr absl::Duration kMaxHold = absl::Seconds(1);

}  // namespace

bool MayBeLost(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kUnimplemented:
      return true;
    default:
      return false;
  }
}

void Retries::Avoid(const Route& route, Avoided avoided) {
  avoided.worker = route.decode.id;
  avoided.incarnation = route.decode.incarnation;
  avoided.reported = route.reported;
  avoided.remote = !route.prefill.empty();
  Avoid(std::move(avoided));
}

void Retries::Avoid(Avoided avoided) {
  std::erase_if(avoided_, [&](const Avoided& other) { return other.worker == avoided.worker; });
  avoided_.push_back(std::move(avoided));
}

int Retries::Lose(const Route::Worker& worker, absl::Time now) {
  if (broken_++ == 0) first_broken_ = now;
  last_broken_ = now;
  const Loss loss = {worker.id, worker.incarnation, now};
  last_losses_.push_back(loss);
  auto it = std::find_if(lost_.begin(), lost_.end(),
                         [&](const Lost& lost) { return lost.loss.SameProcess(loss); });
  if (it == lost_.end()) it = lost_.insert(it, Lost{});
  it->loss = loss;
  it->fate = Fate::kUnknown;
  return ++it->times;
}

void Retries::AddLost(const Route& route, absl::Time now) {
  last_losses_.clear();
  const int times = Lose(route.decode, now);
  const absl::Duration avoid =
      std::min(kAvoidLostAgain, kAvoidLost * (1 << std::min(times - 1, 10)));
  Avoid(route, {.why = Exclusion::kLost, .until = now + avoid});
}

void Retries::LookFor(const ClusterView& view) {
  for (Lost& lost : lost_) lost.fate = FateOf(lost.loss, view);
}

int Retries::lost() const {
  return static_cast<int>(std::count_if(
      lost_.begin(), lost_.end(), [](const Lost& lost) { return lost.fate != Fate::kLives; }));
}

bool Retries::in_doubt() const {
  return lost() > kMaxLost && !broken_too_often() &&
         std::any_of(lost_.begin(), lost_.end(),
                     [](const Lost& lost) { return lost.fate == Fate::kUnknown; });
}

void Retries::AddRefused(const Route& route, const Refusal& refusal, absl::Time now) {
  remote_ = !route.prefill.empty();
  last_losses_.clear();
  bool elsewhere = true;  // another worker may have room
  switch (refusal.reason) {
    case Refusal::Reason::kBlocks:
    case Refusal::Reason::kSequences:
      Avoid(route, {.why = Exclusion::kFull, .needed = refusal.needed, .until = now + kAvoidFull});
      break;
    case Refusal::Reason::kInbox:
      Avoid(route, {.why = Exclusion::kFull, .until = now + kFirstHold});
      break;
    case Refusal::Reason::kLeaving:
      Avoid(route, {.why = Exclusion::kLost, .until = now + kAvoidLost});
      break;
    case Refusal::Reason::kPrefill:
      for (size_t i = 0; i < std::min<size_t>(route.prefill.size(), kMaxPrefillWorkers); ++i) {
        if ((refusal.lost >> i & 1) == 0) continue;
        Lose(route.prefill[i], now);
        Avoid({.worker = route.prefill[i].id,
               .incarnation = route.prefill[i].incarnation,
               .why = Exclusion::kSuspect,
               .until = now + kAvoidLostPrefill});
      }
      elsewhere = false;
      break;
  }
  const int step = refusals_++ - (elsewhere ? 1 : 0);
  if (step < 0) return;
  held_until_ = now + std::min(kMaxHold, kFirstHold * (1 << std::min(step, 10)));
}

bool Retries::HasLost() const {
  return std::any_of(avoided_.begin(), avoided_.end(),
                     [](const Avoided& avoided) { return avoided.why == Exclusion::kLost; });
}

Exclusion Retries::ExclusionOf(const WorkerView& worker, absl::Time now) const {
  for (const Avoided& avoided : avoided_) {
    // Another incarnation is another process: what its predecessor did is no reason to avoid it.
    if (avoided.worker != worker.identity->id ||
        avoided.incarnation != worker.identity->incarnation || now >= avoided.until) {
      continue;
    }
    const int admits =
        worker.load->admits_blocks - (avoided.remote ? worker.load->promised_blocks : 0);
    const bool has_room = worker.reported > avoided.reported && admits >= avoided.needed;
    if (avoided.why == Exclusion::kFull && has_room) continue;
    return avoided.why;
  }
  return Exclusion::kNone;
}

absl::Time Retries::NextChange(absl::Time now) const {
  absl::Time next = held_until_ > now ? held_until_ : absl::InfiniteFuture();
  for (const Avoided& avoided : avoided_) {
    if (avoided.until > now) next = std::min(next, avoided.until);
  }
  return next;
}

}  // namespace tandem::router
