// One thread of another process, held still while all others of that process go on: to those around
// it a step that never ends. The debugger's interface does it, so the process needs no code for it.
#pragma once

#include <atomic>
#include <sys/types.h>
#include <thread>

namespace tandem {

class FrozenThread {
 public:
  // `thread` belongs to a child of this process. Returns once it stands still, or cannot be made to
  // (frozen() is false).
  explicit FrozenThread(pid_t thread);
  // Lets it go on, if it still lives.
  ~FrozenThread();
  FrozenThread(const FrozenThread&) = delete;
  FrozenThread& operator=(const FrozenThread&) = delete;

  bool frozen() const { return state_ == State::kFrozen; }

 private:
  enum class State { kStarting, kFrozen, kGone };
  void Hold(pid_t thread);

  std::atomic<State> state_ = State::kStarting;
  std::atomic<bool> release_ = false;
  std::thread holder_;  // ptrace belongs to the thread that began it
};

}  // namespace tandem
