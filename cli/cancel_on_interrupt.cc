#include "cli/cancel_on_interrupt.h"

#include <csignal>
#include <cstdio>
#include <unistd.h>

namespace tandem::cli {

CancelOnInterrupt::CancelOnInterrupt(SignalWaiter* signals, InferenceClient* client,
                                     LineEditor* editor)
    : signals_(signals), client_(client), editor_(editor), thread_([this] { Run(); }) {}

CancelOnInterrupt::~CancelOnInterrupt() {
  signals_->Wake();
  thread_.join();
}

void CancelOnInterrupt::Run() {
  while (const int signal = signals_->Wait()) {
    if (signal == SIGINT) {
      // Before the call ends by it, and is asked whether it was.
      cancelled_ = true;
      if (client_->Cancel()) continue;
      cancelled_ = false;
      if (editor_ != nullptr) {
        editor_->Interrupt();
        continue;
      }
    }
    // The main thread may be inside a read or write that nothing else ends, and then holds the lock
    // of that stream: waiting for it here would wait for ever.
    if (ftrylockfile(stdout) == 0) std::fflush(stdout);
    if (editor_ != nullptr) editor_->GiveTerminalBack();
    _exit(128 + signal);
  }
}

}  // namespace tandem::cli
