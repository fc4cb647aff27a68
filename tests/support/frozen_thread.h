// One thread of another process, held still while all others of that process go on: to those around
// it a step that never ends, or a message that is never sent. The debugger's interface does it, so
// the process needs no code for it.
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
  // It goes on until it has sent so many messages (sendmsg) from now on, and stands still before it
  // sends another. Returns once that is arranged; AwaitFrozen tells when it is so.
  FrozenThread(pid_t thread, int messages);
  // Lets it go on, if it still lives.
  ~FrozenThread();
  FrozenThread(const FrozenThread&) = delete;
  FrozenThread& operator=(const FrozenThread&) = delete;

  bool frozen() const { return state_ == State::kFrozen; }
  // False if it is not so within that time, or cannot be.
  bool AwaitFrozen(double seconds) const;

 private:
  enum class State { kStarting, kWatched, kFrozen, kGone };
  void Hold(pid_t thread);
  // Lets the stopped thread go on to its next system call or signal. `status`: of the stop.
  static void GoOn(pid_t thread, int status);
  // Whether it stands before one that sends.
  static bool Sends(pid_t thread, int status);

  int messages_;  // that it may still send

  std::atomic<State> state_ = State::kStarting;
  std::atomic<bool> release_ = false;
  std::thread holder_;  // ptrace belongs to the thread that began it
};

}  // namespace tandem
