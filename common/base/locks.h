// What a process does about its mutexes beside locking them.
#pragma once

#include "absl/synchronization/mutex.h"

namespace tandem {

// An abseil that was built without NDEBUG, as Debian's is, notes in which order mutexes are locked
// and ends the process where two orders cross. Its notes have one lock: every Lock() of every
// thread takes it, gRPC's too, and with two busy threads costs 0.35 us instead of 0.01
// (docs/performance.md). Tests keep that watch, but for those under the thread
// sanitizer; a program calls this before it starts a thread.
inline void WatchNoLockOrders() {
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
}

}  // namespace tandem
