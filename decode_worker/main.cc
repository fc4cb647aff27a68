// tandem_decode_worker: streams tokens under continuous batching, from KV that prefill workers ship
// or that it computes itself.
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
#include "decode_worker/worker.h"
#include "engine/runtime/engine_flags.h"

namespace tandem {
namespace {

void AddFlags(FlagSet* flags, DecodeWorkerOptions* o) {
  AddEngineFlags(flags, &o->engine);
  flags->Add("--router", &o->router, "router to join; empty: stand alone", "HOST:PORT");
  flags->Add("--listen", &o->listen, "address of the RPC service; port 0: any", "HOST:PORT");
  flags->Add("--metrics-listen", &o->metrics_listen, "address of /metrics; port 0: any",
             "HOST:PORT");
  flags->Add("--kv-listen", &o->kv_listen,
             "address where prefill workers deliver KV blocks; port 0: any", "HOST:PORT");
  flags->Add("--advertise-host", &o->advertise_host,
             "host that others reach this worker by; default: the host of --listen");
  flags->Add("--worker-id", &o->worker_id, "name in the cluster; default: drawn at random");
  flags->Add("--served-model-name", &o->served_model_name,
             "name of the model in the API; default: the name of the model directory");
  flags->Add("--cluster-secret", &o->cluster_secret,
             "shared by all processes of a cluster; default: TANDEM_CLUSTER_SECRET");
  flags->AddChoice("--role", &o->role, {"decode", "unified"},
                   "unified: prefill everything here, the baseline without disaggregation");
  flags->Add("--local-prefill-max-tokens", &o->local_prefill_max_tokens,
             "prompts with at most so many uncached tokens are prefilled here", "tokens");
  flags->Add("--drain-timeout", &o->drain_timeout, "how long running requests may take to finish",
             "s");
  flags->Add("--kv-seal-timeout", &o->kv_seal_timeout,
             "how long KV blocks may take after the first token before they are computed here",
             "s");
  flags->Add("--prefill-timeout", &o->prefill_timeout,
             "how long one prefill worker may take for one prompt", "s");
}

absl::Status Validate(const DecodeWorkerOptions& o) {
  if (o.engine.model_dir.empty()) return InvalidArgument("--model is required: a model directory");
  if (o.local_prefill_max_tokens < 0) {
    return InvalidArgument("--local-prefill-max-tokens must be >= 0, got {}",
                           o.local_prefill_max_tokens);
  }
  const auto positive = [](const char* flag, double value) {
    return value > 0 ? absl::OkStatus()
                     : InvalidArgument("{} must be more than 0 s, got {}", flag, value);
  };
  TANDEM_RETURN_IF_ERROR(positive("--drain-timeout", o.drain_timeout));
  TANDEM_RETURN_IF_ERROR(positive("--kv-seal-timeout", o.kv_seal_timeout));
  return positive("--prefill-timeout", o.prefill_timeout);
}

int Fail(int code, const absl::Status& status) {
  fmt::print(stderr, "tandem_decode_worker: {}\n", std::string(status.message()));
  return code;
}

int Main(int argc, char** argv) {
  SignalWaiter signals;
  DecodeWorkerOptions options;
  const char* secret = std::getenv("TANDEM_CLUSTER_SECRET");
  if (secret != nullptr) options.cluster_secret = secret;
  options.worker_id = fmt::format("decode-{:08x}", RandomUint64() & 0xffffffff);
  FlagSet flags("tandem_decode_worker",
                "Streams tokens under continuous batching, from KV blocks that prefill workers "
                "ship or that it computes itself.");
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
  absl::StatusOr<std::unique_ptr<DecodeWorker>> worker = DecodeWorker::Start(options, &signals);
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
