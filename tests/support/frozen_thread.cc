#include "tests/support/frozen_thread.h"

#include <chrono>
#include <sys/ptrace.h>
#include <sys/wait.h>

namespace tandem {
namespace {

constexpr std::chrono::milliseconds kLook{10};

}  // namespace

FrozenThread::FrozenThread(pid_t thread) : holder_([this, thread] { Hold(thread); }) {
  state_.wait(State::kStarting);
}

FrozenThread::~FrozenThread() {
  release_ = true;
  holder_.join();
}

void FrozenThread::Hold(pid_t thread) {
  int status = 0;
  const bool stopped = ptrace(PTRACE_SEIZE, thread, nullptr, nullptr) == 0 &&
                       ptrace(PTRACE_INTERRUPT, thread, nullptr, nullptr) == 0 &&
                       waitpid(thread, &status, __WALL) == thread && WIFSTOPPED(status);
  state_ = stopped ? State::kFrozen : State::kGone;
  state_.notify_all();
  // A process is reported as dead only when all its traced threads have been waited for.
  while (state_ == State::kFrozen) {
    if (waitpid(thread, &status, __WALL | WNOHANG) == thread && !WIFSTOPPED(status)) {
      state_ = State::kGone;
    } else if (release_) {
      ptrace(PTRACE_DETACH, thread, nullptr, nullptr);
      return;
    } else {
      std::this_thread::sleep_for(kLook);
    }
  }
}

}  // namespace tandem
