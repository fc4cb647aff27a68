#include "cli/cancel_on_interrupt.h"

#include <csignal>
#include <cstdio>
#include <unistd.h>

namespace tandem::cli {

CancelOnInterrupt::CancelOnInterrupt(SignalWaiter* signals, InferenceClient* client)
    : signals_(signals), client_(client), thread_([this] { Run(); }) {}

CancelOnInterrupt::~CancelOnInterrupt() {
  signals_->Wake();
  thread_.join();
}

void CancelOnInterrupt::Run() {
  while (const int signal = signals_->Wait()) {
    if (signal == SIGINT && client_->Cancel()) continue;
    // The main thread may be inside a read from the terminal, which nothing else ends.
    std::fflush(nullptr);
    _exit(128 + signal);
  }
}

}  // namespace tandem::cli
