// tandem_prefill_worker: computes prompts and ships their KV blocks to decode workers.
#include "common/base/build_info.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/config/flags.h"
#include "common/rpc/worker_process.h"
#include "prefill_worker/worker.h"
#include "prefill_worker/worker_flags.h"

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
  FlagSet flags(kPrefillProgram, kPrefillSummary);
  AddWorkerFlags(&flags, &options);
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
