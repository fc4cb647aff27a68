#include "cli/up_flags.h"

#include <algorithm>
#include <array>

#include "fmt/format.h"

#include "common/base/host_port.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

// Flags of the processes that `tandem up` sets itself, and what to use instead.
struct ManagedFlag {
  const char* name;
  const char* instead;
};
constexpr char kChosen[] = "every process chooses a free port and says which";
constexpr char kAllLocal[] = "its processes are on this machine, where the secret is enough";
constexpr std::array<ManagedFlag, 17> kManaged = {{
    {"--listen", "use --host and --port"},
    {"--internal-listen", "use --internal-port"},
    {"--cluster-secret", "set TANDEM_CLUSTER_SECRET, which `ps` does not show"},
    {"--cluster-cert", kAllLocal},
    {"--cluster-key", kAllLocal},
    {"--cluster-ca", kAllLocal},
    {"--metrics-tls", kAllLocal},
    {"--router", "the cluster has its own"},
    {"--worker-id", "workers are named prefill-0, decode-0, ..."},
    {"--role", "use --unified N"},
    {"--report-loading", "it is how the loading bar is made"},
    {"--metrics-listen", "use --metrics-port"},
    {"--health-listen", "up watches its workers itself"},
    {"--kv-listen", kChosen},
    {"--shared-weights", "use --share-weights"},
    {"--gpu",
     "workers take the GPUs in turn, as many as their model has ranks; CUDA_VISIBLE_DEVICES says "
     "which there are"},
    {"--advertise-host", "all workers are local"},
}};

}  // namespace

void AddUpFlags(FlagSet* parser, const std::vector<FlagTable>& programs, UpFlags* flags) {
  parser->AddPositional("MODEL_DIR", &flags->model_dir, "the same as --model MODEL_DIR", false);
  parser->Group("Cluster");
  parser->Add("--model", &flags->model, "checkpoint; required", "directory");
  parser->Add("--prefill", &flags->prefill, "prefill workers; default 1, or 0 with --unified");
  parser->Add("--decode", &flags->decode, "decode workers; default 1, or 0 with --unified");
  parser->Add("--unified", &flags->unified, "workers that do both by themselves");
  parser->Add("--host", &flags->host, "where the router listens");
  parser->Add("--port", &flags->port, "the router's port; 0: any");
  parser->Add("--internal-port", &flags->internal_port,
              "the router's port for workers and operators, on 127.0.0.1; 0: any");
  parser->Add("--metrics-port", &flags->metrics_port,
              "port of the router's /metrics; workers have those behind it, prefill first; 0: any");
  parser->Add("--metrics-insecure", &flags->metrics_insecure,
              "/metrics on --host, for anybody who reaches it; else on 127.0.0.1");
  parser->Add("--metrics-sd-file", &flags->metrics_sd_file,
              "kept up to date with all metrics addresses, for Prometheus' file_sd_configs",
              "*.json");
  parser->Add("--start-timeout", &flags->start_timeout_s, "time to become ready", "s");
  parser->Add("--stop-timeout", &flags->stop_timeout_s, "time to finish requests when stopped",
              "s");
  parser->AddChoice("--share-weights", &flags->share_weights, {"auto", "on", "off"},
                    "workers on the CPU keep one copy of the weights together instead of one "
                    "each; auto: where shared memory has huge pages, or copies would not fit; not "
                    "with --tensor-parallel-size");
  parser->Add("--dry-run", &flags->dry_run,
              "check model, flags and memory, say what each worker would take, and end");
  for (const FlagTable& program : programs) parser->AddForeign(program, &flags->forwarded);
  for (const auto& [name, instead] : kManaged) {
    parser->Refuse(name, fmt::format("is set by tandem up itself; {}", instead));
  }
  parser->SetEnvironment("--cluster-secret", "");  // read by ClusterSecret, and by the processes
  parser->Example("tandem up models/demo");
  parser->Example("tandem up models/demo --prefill 2 --decode 2 --port 8800");
  parser->Example("tandem up models/demo --unified 1 --max-model-len 1k --max-num-seqs 32");
  parser->Example("tandem up --config cluster.yaml  # model: models/demo, prefill: 2, ...");
}

std::string MetricsHost(const UpFlags& flags) {
  return flags.metrics_insecure || IsLoopback(flags.host) ? flags.host : "127.0.0.1";
}

absl::Status CompleteUpFlags(UpFlags* flags) {
  if (!flags->model_dir.empty()) flags->model = flags->model_dir;
  if (flags->model.empty()) {
    return InvalidArgument("the model is missing: tandem up DIR, or --model DIR");
  }
  TANDEM_RETURN_IF_ERROR(ResolveModelDir("--model", &flags->model));
  const uint64_t otherwise = flags->unified > 0 ? 0 : 1;
  if (!flags->prefill) flags->prefill = otherwise;
  if (!flags->decode) flags->decode = otherwise;
  if (*flags->decode > 0 && *flags->prefill == 0) {
    return InvalidArgument("--prefill: must be at least 1 where there are decode workers");
  }
  if (*flags->decode + flags->unified == 0) {
    return InvalidArgument("--decode: must be at least 1 (or --unified at least 1)");
  }
  if (std::max({*flags->prefill, *flags->decode, flags->unified}) > kMaxWorkersOfARole) {
    return InvalidArgument("--prefill, --decode, --unified: at most {} workers of a kind",
                           kMaxWorkersOfARole);
  }
  if (flags->port < 0 || flags->port > 65535) {
    return InvalidArgument("--port: must be from 0 to 65535, got {}", flags->port);
  }
  if (flags->internal_port < 0 || flags->internal_port > 65535) {
    return InvalidArgument("--internal-port: must be from 0 to 65535, got {}",
                           flags->internal_port);
  }
  const auto workers = static_cast<int>(*flags->prefill + *flags->decode + flags->unified);
  if (flags->metrics_port < 0 || flags->metrics_port > 65535 - workers) {
    return InvalidArgument("--metrics-port: must be from 0 to {} with {} workers, got {}",
                           65535 - workers, workers, flags->metrics_port);
  }
  return absl::OkStatus();
}

}  // namespace tandem::cli
