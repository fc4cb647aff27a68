// tandem_prefill_worker: computes prompts and ships their KV blocks to decode workers.
#include "common/base/build_info.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/rpc/worker_process.h"
#include "engine/runtime/engine_flags.h"
#include "prefill_worker/worker.h"

namespace tandem::prefill {
namespace {

absl::Status Validate(const WorkerOptions& o) {
  if (o.engine.model_dir.empty()) return InvalidArgument("--model is required: a model directory");
  if (o.max_waiting < 1) {
    return InvalidArgument("--max-waiting must be >= 1, got {}", o.max_waiting);
  }
  if (!(o.kv_return_timeout >= 0)) {
    return InvalidArgument("--kv-return-timeout must be >= 0 s, got {}", o.kv_return_timeout);
  }
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  WorkerOptions options;
  FlagSet flags("tandem_prefill_worker",
                "Computes prompts in chunks and ships their KV blocks to decode workers.");
  engine::AddEngineFlags(&flags, &options.engine);
  AddWorkerProcessFlags(&flags, &options.process);
  flags.Group("Batching");
  flags.Add("--max-waiting", &options.max_waiting,
            "prompts that may wait for KV blocks; more are refused");
  flags.Group("Timeouts");
  flags.Add("--kv-return-timeout", &options.kv_return_timeout,
            "how long no block may arrive of those that a decode worker gives back before they are "
            "computed here; 0: none are asked for",
            "s");
  flags.AnswerVersion(VersionText(flags.program()));
  WorkerMain parts{.flags = &flags, .options = &options.process, .kind = "prefill"};
  parts.validate = [&] {
    TANDEM_RETURN_IF_ERROR(Validate(options));
    return ResolveModelDir("--model", &options.engine.model_dir);
  };
  parts.start = [&](SignalWaiter* signals) { return StartWorker(options, signals); };
  return RunWorkerProcess(parts, argc, argv);
}

}  // namespace
}  // namespace tandem::prefill

int main(int argc, char** argv) { return tandem::prefill::Main(argc, argv); }
