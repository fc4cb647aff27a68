// tandem_decode_worker: streams tokens under continuous batching, from KV that prefill workers ship
// or that it computes itself.
#include "common/base/build_info.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/rpc/worker_process.h"
#include "decode_worker/worker.h"
#include "engine/runtime/engine_flags.h"

namespace tandem::decode {
namespace {

void AddFlags(FlagSet* flags, WorkerOptions* o) {
  flags->Group("Batching");
  flags->AddChoice("--role", &o->role, {"decode", "unified"},
                   "unified: prefill everything here, the baseline without disaggregation");
  flags->Add("--local-prefill-max-tokens", &o->local_prefill_max_tokens,
             "prompts with at most so many uncached tokens are prefilled here", "tokens");
  flags->Add("--prefill-window", &o->prefill_window,
             "prompt tokens asked of one prefill worker at once; what is beyond them waits without "
             "slot or blocks",
             "tokens");
  flags->Add(
      "--target-step-ms", &o->target_step_ms,
      "prompts computed here are cut so that a step takes no longer while others draw tokens; "
      "0: not; -1: 30 on a GPU, not on a CPU",
      "ms");
  flags->Group("Timeouts");
  flags->Add("--kv-seal-timeout", &o->kv_seal_timeout,
             "how long no KV block may arrive after the first token before they are computed here",
             "s");
  flags->Add("--prefill-timeout", &o->prefill_timeout,
             "how long one prefill worker may take for one prompt", "s");
}

absl::Status Validate(const WorkerOptions& o) {
  if (o.engine.model_dir.empty()) return InvalidArgument("--model is required: a model directory");
  if (o.local_prefill_max_tokens < 0) {
    return InvalidArgument("--local-prefill-max-tokens must be >= 0, got {}",
                           o.local_prefill_max_tokens);
  }
  if (o.prefill_window < 1) {
    return InvalidArgument("--prefill-window must be at least 1, got {}", o.prefill_window);
  }
  if (o.target_step_ms < 0 && o.target_step_ms != -1) {
    return InvalidArgument("--target-step-ms must be >= 0, or -1 for the default, got {}",
                           o.target_step_ms);
  }
  const auto positive = [](const char* flag, double value) {
    return value > 0 ? absl::OkStatus()
                     : InvalidArgument("{} must be more than 0 s, got {}", flag, value);
  };
  TANDEM_RETURN_IF_ERROR(positive("--kv-seal-timeout", o.kv_seal_timeout));
  return positive("--prefill-timeout", o.prefill_timeout);
}

int Main(int argc, char** argv) {
  WorkerOptions options;
  FlagSet flags("tandem_decode_worker",
                "Streams tokens under continuous batching, from KV blocks that prefill workers "
                "ship or that it computes itself.");
  engine::AddEngineFlags(&flags, &options.engine);
  AddWorkerProcessFlags(&flags, &options.process);
  AddFlags(&flags, &options);
  flags.AnswerVersion(VersionText(flags.program()));
  WorkerMain parts{.flags = &flags, .options = &options.process, .kind = "decode"};
  parts.validate = [&] {
    TANDEM_RETURN_IF_ERROR(Validate(options));
    return ResolveModelDir("--model", &options.engine.model_dir);
  };
  parts.start = [&](SignalWaiter* signals) { return StartWorker(options, signals); };
  return RunWorkerProcess(parts, argc, argv);
}

}  // namespace
}  // namespace tandem::decode

int main(int argc, char** argv) { return tandem::decode::Main(argc, argv); }
