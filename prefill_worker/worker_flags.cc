#include "prefill_worker/worker_flags.h"

#include "engine/runtime/engine_flags.h"

namespace tandem::prefill {

void AddWorkerFlags(FlagSet* flags, WorkerOptions* options) {
  engine::AddEngineFlags(flags, &options->engine);
  AddWorkerProcessFlags(flags, &options->process);
  flags->Group("Batching");
  flags->Add("--max-waiting", &options->max_waiting,
             "prompts that may wait for KV blocks; more are refused");
  flags->Group("Timeouts");
  flags->Add(
      "--kv-return-timeout", &options->kv_return_timeout,
      "how long no block may arrive of those that a decode worker gives back before they are "
      "computed here; 0: none are asked for",
      "s");
}

}  // namespace tandem::prefill
