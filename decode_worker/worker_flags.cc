#include "decode_worker/worker_flags.h"

#include "engine/runtime/engine_flags.h"

namespace tandem::decode {

void AddWorkerFlags(FlagSet* flags, WorkerOptions* options) {
  engine::AddEngineFlags(flags, &options->engine);
  AddWorkerProcessFlags(flags, &options->process);
  flags->Group("Batching");
  flags->AddChoice("--role", &options->role, {"decode", "unified"},
                   "unified: prefill everything here, the baseline without disaggregation");
  flags->Add("--local-prefill-max-tokens", &options->local_prefill_max_tokens,
             "prompts with at most so many uncached tokens are prefilled here", "tokens");
  flags->Add("--prefill-window", &options->prefill_window,
             "prompt tokens asked of one prefill worker at once; what is beyond them waits without "
             "slot or blocks",
             "tokens");
  flags->Add(
      "--target-step-ms", &options->target_step_ms,
      "prompts computed here are cut so that a step takes no longer while others draw tokens; "
      "0: not; -1: 30 on a GPU, not on a CPU",
      "ms");
  flags->AddChoice(
      "--speculative", &options->speculative, {"none", "ngram"},
      "ngram: guess tokens from what stood in the prompt and the answer before, and "
      "compute them ahead; same tokens (on a GPU: with --batch-invariant), sooner where an "
      "answer repeats");
  flags->Group("Timeouts");
  flags->Add("--kv-seal-timeout", &options->kv_seal_timeout,
             "how long no KV block may arrive after the first token before they are computed here",
             "s");
  flags->Add("--prefill-timeout", &options->prefill_timeout,
             "how long one prefill worker may take for one prompt", "s");
}

}  // namespace tandem::decode
