// How requests and cancellations reach the loop, whatever carries them: the RPC edge without RPC.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "prefill_worker/event.h"
#include "prefill_worker/prefill_wire.h"

namespace tandem::prefill {

// Thread-safe; nothing here blocks.
class Intake {
 public:
  using Reply = std::function<void(absl::StatusOr<Outcome>)>;
  using Want = std::function<void(const Wanted&)>;
  using Progress = std::function<void(int computed_tokens)>;

  // Both pointers outlive the intake and every call.
  Intake(RequestLimits limits, EventInbox* inbox, Clock* clock);

  // A name for a call, for Submit() and Cancel().
  uint64_t NewId() { return ++last_id_; }
  // `reply` is called exactly once: before the return where the request is refused at once, else on
  // the loop's thread. `want` and `progress`: as Work's, where the request says that its caller
  // gives blocks back, and that it wants to know. `left`: until the caller's deadline. `trace`: as
  // Work's.
  void Submit(uint64_t id, const internal::v1::PrefillRequest& request, Want want,
              Progress progress, Reply reply, absl::Duration left = absl::InfiniteDuration(),
              const TraceContext& trace = {});
  // What the caller gets of an outcome. Not on the loop's thread where it is long.
  internal::v1::PrefillResponse ToProto(const Outcome& outcome) const;
  internal::v1::KvTarget ToProto(const Wanted& wanted) const;
  // Idempotent; unknown ids are ignored.
  void Cancel(uint64_t id);

 private:
  const RequestLimits limits_;
  EventInbox* const inbox_;
  Clock* const clock_;
  std::atomic<uint64_t> last_id_ = 0;
};

}  // namespace tandem::prefill
