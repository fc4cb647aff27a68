// tandem_decode_worker: streams tokens under continuous batching, from KV that prefill workers ship
// or that it computes itself.
#include "common/base/build_info.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/rpc/worker_process.h"
#include "decode_worker/worker.h"
#include "decode_worker/worker_flags.h"

namespace tandem::decode {
namespace {

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
  FlagSet flags(kDecodeProgram, kDecodeSummary);
  AddWorkerFlags(&flags, &options);
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
