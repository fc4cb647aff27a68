// tandem_prefill_worker: computes prompts and ships their KV blocks to decode workers.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "fmt/format.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

#include "common/base/status.h"
#include "common/base/transfer_id.h"
#include "common/config/flags.h"
#include "engine/runtime/engine_flags.h"
#include "prefill_worker/worker.h"

namespace tandem {
namespace {

void AddFlags(FlagSet* flags, PrefillWorkerOptions* o) {
  AddEngineFlags(flags, &o->engine);
  flags->Add("--router", &o->router, "router to join; empty: stand alone", "HOST:PORT");
  flags->Add("--listen", &o->listen, "address of the RPC service; port 0: any", "HOST:PORT");
  flags->Add("--metrics-listen", &o->metrics_listen, "address of /metrics; port 0: any",
             "HOST:PORT");
  flags->Add("--advertise-host", &o->advertise_host,
             "host that others reach this worker by; default: the host of --listen");
  flags->Add("--worker-id", &o->worker_id, "name in the cluster; default: drawn at random");
  flags->Add("--served-model-name", &o->served_model_name,
             "name of the model in the API; default: the name of the model directory");
  flags->Add("--cluster-secret", &o->cluster_secret,
             "shared by all processes of a cluster; default: TANDEM_CLUSTER_SECRET");
  flags->Add("--max-waiting", &o->max_waiting,
             "prompts that may wait for KV blocks; more are refused");
  flags->Add("--drain-timeout", &o->drain_timeout, "how long running prompts may take to finish",
             "s");
}

absl::Status Validate(const PrefillWorkerOptions& o) {
  if (o.engine.model_dir.empty()) return InvalidArgument("--model is required: a model directory");
  if (o.max_waiting < 1)
    return InvalidArgument("--max-waiting must be >= 1, got {}", o.max_waiting);
  if (!(o.drain_timeout > 0)) {
    return InvalidArgument("--drain-timeout must be more than 0 s, got {}", o.drain_timeout);
  }
  return absl::OkStatus();
}

int Fail(int code, const absl::Status& status) {
  fmt::print(stderr, "tandem_prefill_worker: {}\n", std::string(status.message()));
  return code;
}

int Main(int argc, char** argv) {
  SignalWaiter signals;
  PrefillWorkerOptions options;
  const char* secret = std::getenv("TANDEM_CLUSTER_SECRET");
  if (secret != nullptr) options.cluster_secret = secret;
  options.worker_id = fmt::format("prefill-{:08x}", RandomUint64() & 0xffffffff);
  FlagSet flags("tandem_prefill_worker",
                "Computes prompts in chunks and ships their KV blocks to decode workers.");
  AddFlags(&flags, &options);
  absl::Status status = flags.Parse(argc, argv);
  if (status.ok() && flags.HelpRequested()) {
    fmt::print("{}", flags.Help());
    return 0;
  }
  if (status.ok()) status = Validate(options);
  if (!status.ok()) return Fail(2, status);

  spdlog::set_default_logger(spdlog::stderr_logger_mt(options.worker_id));
  spdlog::set_pattern("%H:%M:%S.%e %n %l %v");
  absl::StatusOr<std::unique_ptr<PrefillWorker>> worker = PrefillWorker::Start(options, &signals);
  if (!worker.ok()) return Fail(1, worker.status());
  fmt::print("listening {} metrics {}\n", (*worker)->address(), (*worker)->metrics_address());
  std::fflush(stdout);
  signals.Wait();
  spdlog::info("draining");
  status = (*worker)->Drain();
  worker->reset();
  if (!status.ok()) return Fail(1, status);
  spdlog::info("stopped");
  return 0;
}

}  // namespace
}  // namespace tandem

int main(int argc, char** argv) { return tandem::Main(argc, argv); }
