// How requests and cancellations reach the loop, whatever carries them: the RPC edge without RPC.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "decode_worker/decode_wire.h"
#include "decode_worker/event.h"
#include "decode_worker/request.h"
#include "decode_worker/token_stream.h"

namespace tandem::decode {

// Thread-safe; nothing here blocks.
//
// The owner of a call reads the message, makes a stream whose `wake` takes until nothing is left,
// keeps both, and pushes. From Push() on the stream may be woken on another thread, and ends
// exactly once if Push() returned OK.
class Intake {
 public:
  // Both pointers outlive the intake.
  Intake(RequestLimits limits, EventInbox* inbox, Clock* clock);

  // Validated, with an id and its times; `left`: until the caller's deadline.
  absl::StatusOr<Work> Read(const internal::v1::DecodeRequest& request, absl::Duration left);
  std::shared_ptr<TokenStream> MakeStream(std::function<void()> wake) const;
  // RESOURCE_EXHAUSTED or UNAVAILABLE: the loop will not see it, and the stream is not used.
  absl::Status Push(Work work, std::shared_ptr<TokenStream> stream);
  // Idempotent; unknown ids are ignored.
  void Cancel(uint64_t id);

 private:
  const RequestLimits limits_;
  EventInbox* const inbox_;
  Clock* const clock_;
  std::atomic<uint64_t> last_id_ = 0;
};

}  // namespace tandem::decode
