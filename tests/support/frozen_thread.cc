#include "tests/support/frozen_thread.h"

#include <chrono>
#include <csignal>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>

namespace tandem {
namespace {

constexpr std::chrono::milliseconds kLook{10};
// While it runs from one system call to the next.
constexpr std::chrono::milliseconds kShortLook{1};
constexpr int kNoMessages = -1;
// What PTRACE_O_TRACESYSGOOD makes of the stops at system calls.
constexpr int kSystemCall = SIGTRAP | 0x80;
constexpr long kOptions = PTRACE_O_TRACESYSGOOD;  // as wide as ptrace takes it

}  // namespace

FrozenThread::FrozenThread(pid_t thread) : FrozenThread(thread, kNoMessages) {}

FrozenThread::FrozenThread(pid_t thread, int messages)
    : messages_(messages), holder_([this, thread] { Hold(thread); }) {
  state_.wait(State::kStarting);
}

FrozenThread::~FrozenThread() {
  release_ = true;
  holder_.join();
}

bool FrozenThread::AwaitFrozen(double seconds) const {
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (state_ == State::kWatched && std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(kLook);
  }
  return frozen();
}

void FrozenThread::Hold(pid_t thread) {
  int status = 0;
  const bool stopped = ptrace(PTRACE_SEIZE, thread, nullptr, kOptions) == 0 &&
                       ptrace(PTRACE_INTERRUPT, thread, nullptr, nullptr) == 0 &&
                       waitpid(thread, &status, __WALL) == thread && WIFSTOPPED(status);
  state_ = !stopped ? State::kGone : messages_ == kNoMessages ? State::kFrozen : State::kWatched;
  state_.notify_all();
  if (state_ == State::kWatched) GoOn(thread, status);
  // A process is reported as dead only when all its traced threads have been waited for.
  while (state_ != State::kGone && !release_) {
    const bool told = waitpid(thread, &status, __WALL | WNOHANG) == thread;
    if (told && !WIFSTOPPED(status)) {
      state_ = State::kGone;
    } else if (told && state_ == State::kWatched) {
      if (Sends(thread, status) && messages_-- == 0) {
        state_ = State::kFrozen;
      } else {
        GoOn(thread, status);
      }
    } else {
      std::this_thread::sleep_for(state_ == State::kWatched ? kShortLook : kLook);
    }
  }
  // One that runs is let go by the end of this thread.
  if (state_ == State::kFrozen) ptrace(PTRACE_DETACH, thread, nullptr, nullptr);
}

void FrozenThread::GoOn(pid_t thread, int status) {
  // A signal is passed on; what else stops a traced thread is none.
  const long signal = WSTOPSIG(status) != kSystemCall && status >> 16 == 0 ? WSTOPSIG(status) : 0;
  ptrace(PTRACE_SYSCALL, thread, nullptr, signal);
}

bool FrozenThread::Sends(pid_t thread, int status) {
  if (WSTOPSIG(status) != kSystemCall) return false;
  __ptrace_syscall_info call;
  return ptrace(PTRACE_GET_SYSCALL_INFO, thread, sizeof(call), &call) > 0 &&
         call.op == PTRACE_SYSCALL_INFO_ENTRY && call.entry.nr == SYS_sendmsg;
}

}  // namespace tandem
