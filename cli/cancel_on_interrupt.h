// Ctrl-C cancels the running answer or leaves the line that is being typed; where there is neither
// it ends the program.
#pragma once

#include <atomic>
#include <thread>

#include "cli/inference_client.h"
#include "cli/line_editor.h"
#include "common/rpc/server.h"

namespace tandem::cli {

// What a program ended by SIGINT exits with.
inline constexpr int kExitInterrupted = 130;

// `signals` (made before any thread started), `client` and `editor` (null: no line is ever typed)
// outlive this. SIGTERM always ends the program.
class CancelOnInterrupt {
 public:
  CancelOnInterrupt(SignalWaiter* signals, InferenceClient* client, LineEditor* editor = nullptr);
  ~CancelOnInterrupt();

  // Whether a call was cancelled since this was asked last.
  bool TakeCancelled() { return cancelled_.exchange(false); }

 private:
  void Run();

  SignalWaiter* const signals_;
  InferenceClient* const client_;
  LineEditor* const editor_;
  std::atomic<bool> cancelled_ = false;
  std::thread thread_;  // last: uses the above
};

}  // namespace tandem::cli
