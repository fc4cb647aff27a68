// Ctrl-C cancels the running answer; where none runs it ends the program.
#pragma once

#include <thread>

#include "cli/inference_client.h"
#include "common/rpc/server.h"

namespace tandem::cli {

// `signals` (made before any thread started) and `client` outlive this. SIGTERM always ends the
// program.
class CancelOnInterrupt {
 public:
  CancelOnInterrupt(SignalWaiter* signals, InferenceClient* client);
  ~CancelOnInterrupt();

 private:
  void Run();

  SignalWaiter* const signals_;
  InferenceClient* const client_;
  std::thread thread_;  // last: uses the above
};

}  // namespace tandem::cli
