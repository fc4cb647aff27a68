// The way of one request's tokens from the loop to its RPC: coalescing and bounded, so that a slow
// reader neither blocks the loop nor piles up messages.
//
// Thread-safe: one writer (the loop), one taker (the RPC reaction). Tokens appended while a write
// is in flight merge into one delta. The writer looks at pending() and stops computing the request
// when its reader is behind; when the reader has caught up, `on_drained` wakes the loop.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <variant>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

#include "decode_worker/request.h"

namespace tandem::decode {

class TokenStream {
 public:
  // What Take() finds: nothing (the taker goes idle and is woken), tokens, or the end of the
  // stream.
  using Item = std::variant<std::monostate, TokenDelta, absl::Status>;

  // `wake` is called when the taker is idle and there is something to take; never under the lock,
  // on the writer's thread. `on_drained` is called on the taker's thread when it took everything
  // after NotifyWhenDrained().
  TokenStream(std::function<void()> wake, std::function<void()> on_drained);

  // ---- the loop ----
  void Append(TokenDelta delta);
  // The last call. OK after a delta with a finish reason; tokens not yet taken are still delivered
  // first.
  void End(absl::Status status);
  size_t pending() const;  // tokens appended and not taken
  void NotifyWhenDrained();

  // ---- the taker ----
  Item Take();

 private:
  // Wakes an idle taker once.
  bool TakeIdle() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::function<void()> wake_;
  const std::function<void()> on_drained_;
  mutable absl::Mutex mutex_;
  bool idle_ ABSL_GUARDED_BY(mutex_) = true;
  bool notify_drained_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<TokenDelta> pending_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::decode
