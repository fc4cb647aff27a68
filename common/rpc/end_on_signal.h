// A start that takes long, and before which nothing is served, ends at once when it is told to.
#pragma once

#include <string>
#include <thread>

namespace tandem {

// While it lives, SIGINT or SIGTERM ends the process with exit code 0: there is nothing to finish.
// A signal that comes later is left to SignalWaiter::Wait(). Both are blocked already, by a
// SignalWaiter; nobody waits there meanwhile.
class EndOnSignal {
 public:
  // `doing` ("loading the model") is said.
  explicit EndOnSignal(std::string doing);
  ~EndOnSignal();
  EndOnSignal(const EndOnSignal&) = delete;
  EndOnSignal& operator=(const EndOnSignal&) = delete;

 private:
  void Run() const;

  const std::string doing_;
  const int signal_fd_;
  const int done_fd_;
  std::thread thread_;  // last: uses the above
};

}  // namespace tandem
