// The way of one request's tokens from the loop to its RPC: coalescing and bounded, so that a slow
// reader neither blocks the loop nor piles up messages.
//
// Thread-safe: one writer (the loop), one taker (the RPC reaction). Tokens appended while a write
// is in flight merge into one event. The writer looks at pending() and stops computing the request
// when its reader is behind; when the reader has caught up, `on_drained` wakes the loop.
//
// Appending never wakes the taker itself: serialising a message and starting its write takes
// microseconds, which 256 streams would add up on the loop's thread. The writer is told that the
// taker is idle, and has Wake() called elsewhere (stream_waker.h).
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <variant>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "common/base/token_event.h"

namespace tandem::decode {

class TokenStream {
 public:
  // What Take() finds: nothing (the taker goes idle and is woken), tokens, or the end of the
  // stream.
  using Item = std::variant<std::monostate, TokenEvent, absl::Status>;

  // `wake` is what Wake() calls: it takes until there is nothing left. `on_drained` is called on
  // the taker's thread when it took everything after NotifyWhenDrained(). Either may be empty.
  TokenStream(std::function<void()> wake, std::function<void()> on_drained);

  // ---- the loop ----
  // True: the taker is idle, and it is now the caller's to see that Wake() is called, once.
  [[nodiscard]] bool Append(TokenEvent event);
  // The last call. OK after an event with a finish reason; tokens not yet taken are still delivered
  // first. True as for Append.
  [[nodiscard]] bool End(absl::Status status);
  size_t pending() const;  // tokens appended and not taken
  void NotifyWhenDrained();

  // ---- the taker ----
  // Runs the taker. One thread at a time, because only one can have been told that it is idle.
  void Wake();
  Item Take();

 private:
  // Whether the taker was idle; it no longer is.
  bool TakeIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::function<void()> wake_;
  const std::function<void()> on_drained_;
  mutable absl::Mutex mutex_;
  bool idle_ ABSL_GUARDED_BY(mutex_) = true;
  bool notify_drained_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<TokenEvent> pending_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::decode
