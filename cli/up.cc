// `tandem up`: a cluster on this machine, supervised.
#include <algorithm>
#include <array>
#include <csignal>
#include <cstdlib>
#include <sched.h>
#include <sys/wait.h>

#include "absl/strings/escaping.h"
#include "absl/time/clock.h"
#include "fmt/format.h"

#include "cli/cluster_admin_client.h"
#include "cli/cluster_note.h"
#include "cli/command.h"
#include "cli/gpu_placement.h"
#include "cli/metrics_targets.h"
#include "cli/program_flags.h"
#include "cli/shared_memory.h"
#include "cli/start_check.h"
#include "cli/supervisor.h"
#include "common/base/file.h"
#include "common/base/host_port.h"
#include "common/base/model_dir.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"

namespace tandem::cli {
namespace {

constexpr char kRouter[] = "tandem_router";
constexpr char kPrefillWorker[] = "tandem_prefill_worker";
constexpr char kDecodeWorker[] = "tandem_decode_worker";

// Of a GPU's memory, for all workers on it together.
constexpr double kGpuMemoryUtilization = 0.9;

struct UpFlags {
  std::string model;
  std::string model_dir;  // the same without a flag's name
  std::optional<uint64_t> prefill;
  std::optional<uint64_t> decode;
  uint64_t unified = 0;
  std::string host = "127.0.0.1";
  int port = 8000;
  int internal_port = 0;
  int metrics_port = 0;
  std::string metrics_sd_file;
  double start_timeout_s = 600;
  double stop_timeout_s = 45;
  bool share_weights = true;
  bool dry_run = false;
  std::vector<std::string> forwarded;
};

// Flags of the processes that `tandem up` sets itself, and what to use instead.
struct ManagedFlag {
  const char* name;
  const char* instead;
};
constexpr char kChosen[] = "every process chooses a free port and says which";
constexpr std::array<ManagedFlag, 11> kManaged = {{
    {"--listen", "use --host and --port"},
    {"--internal-listen", "use --internal-port"},
    {"--cluster-secret", "set TANDEM_CLUSTER_SECRET, which `ps` does not show"},
    {"--router", "the cluster has its own"},
    {"--worker-id", "workers are named prefill-0, decode-0, ..."},
    {"--role", "use --unified N"},
    {"--metrics-listen", "use --metrics-port"},
    {"--kv-listen", kChosen},
    {"--shared-weights", "use --share-weights or --no-share-weights"},
    {"--gpu", "workers take the GPUs in turn; CUDA_VISIBLE_DEVICES says which there are"},
    {"--advertise-host", "all workers are local"},
}};

void AddFlags(FlagSet* parser, const std::vector<FlagTable>& programs, UpFlags* flags) {
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
              "port of the router's /metrics on --host; workers have those behind it, prefill "
              "first; 0: any");
  parser->Add("--metrics-sd-file", &flags->metrics_sd_file,
              "kept up to date with all metrics addresses, for Prometheus' file_sd_configs",
              "*.json");
  parser->Add("--start-timeout", &flags->start_timeout_s, "time to become ready", "s");
  parser->Add("--stop-timeout", &flags->stop_timeout_s, "time to finish requests when stopped",
              "s");
  parser->Add("--share-weights", &flags->share_weights,
              "workers on the CPU keep one copy of the weights together instead of one each");
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

// Worker counts are filled in; errors name the flag.
absl::Status Complete(UpFlags* flags) {
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
  if (*flags->prefill > 64 || *flags->decode > 64 || flags->unified > 64) {
    return InvalidArgument("--prefill, --decode, --unified: at most 64 workers of a kind");
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

std::string RandomSecret() { return absl::BytesToHexString(RandomBytes(16)); }

std::string ClusterSecret() {
  const char* given = std::getenv("TANDEM_CLUSTER_SECRET");
  return given != nullptr && *given != '\0' ? given : RandomSecret();
}

int NumCores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

// One run of `tandem up`, from start to stop.
class LocalCluster {
 public:
  LocalCluster(UpFlags flags, std::string secret, Supervisor* supervisor)
      : flags_(std::move(flags)),
        secret_(std::move(secret)),
        supervisor_(supervisor),
        targets_(flags_.metrics_sd_file) {}
  ~LocalCluster() {
    if (!address_.empty()) RemoveClusterNote(address_);
  }

  int Run(const std::vector<FlagTable>& programs) {
    if (const absl::Status status = PlanArguments(programs); !status.ok()) {
      fmt::print(stderr, "tandem up: {}\n", MessageOf(status));
      return absl::IsInvalidArgument(status) ? kExitUsage : kExitFailed;
    }
    if (flags_.dry_run) {
      fmt::print("{}", CheckedStartText(start_, checked_));
      return kExitOk;
    }
    for (const std::string& warning : checked_.warnings) {
      fmt::print(stderr, "tandem up: warning: {}\n", warning);
    }
    deadline_ = absl::Now() + absl::Seconds(flags_.start_timeout_s);
    const absl::Status started = Start();
    if (started.ok()) {
      supervisor_->RestartTheDead();
      ReportAddresses();
      fmt::print("ready {}\n", address_);
      std::fflush(stdout);
      do {
        TellPrometheus();
      } while (supervisor_->Step(absl::Seconds(60)) == 0);
      return StopAll() ? kExitOk : kExitFailed;
    }
    if (absl::IsCancelled(started)) return StopAll() ? kExitOk : kExitFailed;
    fmt::print(stderr, "tandem up: {}\n", MessageOf(started));
    const bool bad_flags = absl::IsInvalidArgument(started);
    StopAll();
    return bad_flags ? kExitUsage : kExitFailed;
  }

 private:
  // What each program is given, and who runs it.
  absl::Status PlanArguments(const std::vector<FlagTable>& programs) {
    given_ = DistributeFlags(flags_.forwarded, programs);
    const uint64_t workers = *flags_.prefill + *flags_.decode + flags_.unified;
    const int threads = std::max<int>(1, NumCores() / static_cast<int>(workers));
    for (const char* program : {kPrefillWorker, kDecodeWorker}) {
      // First, so that a --num-threads of the user comes later and wins.
      std::vector<std::string>& given = given_[program];
      given.insert(given.begin(), fmt::format("--num-threads={}", threads));
    }
    PlaceWorkers(static_cast<int>(workers));
    start_ = {.model_dir = flags_.model,
              .flags = given_[kDecodeWorker],
              .workers = WorkerNames(),
              .threads = threads,
              .share_weights = flags_.share_weights && !weights_.path().empty(),
              .on_cpu = places_.empty()};
    TANDEM_ASSIGN_OR_RETURN(checked_, CheckStart(start_, ReadHostMemory()));
    if (checked_.plan) GiveMemory(*checked_.plan);
    return absl::OkStatus();
  }

  std::vector<std::string> WorkerNames() const {
    std::vector<std::string> names;
    const auto add = [&names](const char* role, uint64_t count) {
      for (uint64_t i = 0; i < count; ++i) names.push_back(fmt::format("{}-{}", role, i));
    };
    add("prefill", *flags_.prefill);
    add("decode", *flags_.decode);
    add("unified", flags_.unified);
    return names;
  }

  // Workers start at once and cannot see what the others are about to take.
  void GiveMemory(const StartPlan& plan) {
    for (const char* program : {kPrefillWorker, kDecodeWorker}) {
      std::vector<std::string>& given = given_[program];
      if (checked_.inputs.kv_bytes == 0) {
        given.push_back(fmt::format("--kv-cache-memory-bytes={}", plan.kv_pool));
      }
      if (start_.share_weights) given.push_back("--shared-weights=" + weights_.path());
    }
  }

  // One GPU each, in turn; those that share one share its memory, unless the user said how much.
  void PlaceWorkers(int workers) {
    const std::vector<std::string>& given = given_[kDecodeWorker];
    const auto says = [&given](const std::string& start) {
      return std::any_of(given.begin(), given.end(), [&start](const std::string& argument) {
        return argument.starts_with(start);
      });
    };
    if (says("--device=cpu")) return;
    places_ = PlaceOnGpus(workers, CountGpus("/dev", std::getenv("CUDA_VISIBLE_DEVICES")));
    shares_memory_ = !says("--gpu-memory-utilization=") && !says("--kv-cache-memory-bytes=");
  }

  // Flags of the next worker to start.
  std::vector<std::string> PlaceFlags(const GpuPlace& place) const {
    std::vector<std::string> flags = {fmt::format("--gpu={}", place.gpu)};
    if (shares_memory_ && place.memory_share < 1) {
      flags.push_back(fmt::format("--gpu-memory-utilization={:.4f}",
                                  kGpuMemoryUtilization * place.memory_share));
    }
    return flags;
  }

  ChildSpec Spec(const std::string& name, const std::string& program,
                 const std::vector<std::string>& more) {
    ChildSpec spec{.name = name, .arguments = {ProgramPath(program), "--model", flags_.model}};
    spec.arguments.insert(spec.arguments.end(), more.begin(), more.end());
    const std::vector<std::string>& given = given_[program];
    spec.arguments.insert(spec.arguments.end(), given.begin(), given.end());
    return spec;
  }

  absl::Status Start() {
    const std::string listen = HostPort{flags_.host, flags_.port}.ToString();
    const std::string internal = HostPort{"127.0.0.1", flags_.internal_port}.ToString();
    TANDEM_RETURN_IF_ERROR(supervisor_->Start(
        Spec("router", kRouter,
             {"--listen", listen, "--internal-listen", internal, "--metrics-listen",
              MetricsListen(flags_.host, flags_.metrics_port, 0)})));
    TANDEM_RETURN_IF_ERROR(
        StepUntil([this] { return supervisor_->listening("router").has_value(); }));
    address_ = supervisor_->listening("router")->address;
    internal_ = supervisor_->listening("router")->internal_address;
    // Started again, the router must be found where it was.
    supervisor_->SetArguments(
        "router", Spec("router", kRouter,
                       {"--listen", address_, "--internal-listen", internal_, "--metrics-listen",
                        supervisor_->listening("router")->metrics_address})
                      .arguments);
    if (const auto noted = WriteClusterNote(address_, {internal_, secret_}); !noted.ok()) {
      fmt::print(stderr, "tandem up: `tandem status` will need --internal {}: {}\n", internal_,
                 MessageOf(noted));
    }
    for (uint64_t i = 0; i < *flags_.prefill; ++i) {
      TANDEM_RETURN_IF_ERROR(StartWorker(fmt::format("prefill-{}", i), kPrefillWorker, {}));
    }
    for (uint64_t i = 0; i < *flags_.decode; ++i) {
      TANDEM_RETURN_IF_ERROR(StartWorker(fmt::format("decode-{}", i), kDecodeWorker, {}));
    }
    for (uint64_t i = 0; i < flags_.unified; ++i) {
      TANDEM_RETURN_IF_ERROR(
          StartWorker(fmt::format("unified-{}", i), kDecodeWorker, {"--role=unified"}));
    }
    admin_ = std::make_unique<ClusterAdminClient>(internal_, secret_);
    return StepUntil([this] { return AllReady(); });
  }

  absl::Status StartWorker(const std::string& name, const std::string& program,
                           std::vector<std::string> more) {
    const std::string metrics =
        MetricsListen(flags_.host, flags_.metrics_port, 1 + static_cast<int>(workers_.size()));
    const std::vector<std::string> fixed = {"--router", internal_,          "--worker-id",
                                            name,       "--metrics-listen", metrics};
    more.insert(more.begin(), fixed.begin(), fixed.end());
    if (!places_.empty()) {
      const GpuPlace& place = places_[workers_.size()];
      const std::vector<std::string> flags = PlaceFlags(place);
      more.insert(more.end(), flags.begin(), flags.end());
    }
    workers_.push_back(name);
    return supervisor_->Start(Spec(name, program, more));
  }

  bool AllReady() {
    const auto cluster = admin_->GetCluster(absl::Milliseconds(500));
    if (!cluster.ok()) return false;
    return std::all_of(workers_.begin(), workers_.end(), [&cluster](const std::string& name) {
      return std::any_of(cluster->workers().begin(), cluster->workers().end(),
                         [&name](const v1::Worker& worker) {
                           return worker.worker_id() == name && worker.state() == "ready";
                         });
    });
  }

  // A worker that was started again may have another port.
  void TellPrometheus() {
    std::vector<std::string> addresses;
    const auto add = [&](const std::string& name) {
      const auto listening = supervisor_->listening(name);
      if (listening.has_value()) addresses.push_back(listening->metrics_address);
    };
    add("router");
    for (const std::string& name : workers_) add(name);
    const absl::Status written = targets_.Set(addresses);
    if (!written.ok()) fmt::print(stderr, "tandem up: {}\n", MessageOf(written));
  }

  void ReportAddresses() const {
    std::vector<std::string> names = {"router"};
    names.insert(names.end(), workers_.begin(), workers_.end());
    fmt::print(stderr, "tandem up: workers and operators reach the router at {}\n", internal_);
    for (const std::string& name : names) {
      const auto listening = supervisor_->listening(name);
      if (!listening) continue;
      fmt::print(stderr, "tandem up: {} at {}, metrics at http://{}/metrics\n", name,
                 listening->address, listening->metrics_address);
    }
  }

  // CANCELLED on a signal; the error of the first child that dies.
  template <typename Condition>
  absl::Status StepUntil(Condition condition) {
    while (!condition()) {
      if (supervisor_->Step(absl::Milliseconds(50)) != 0) return Cancelled("stopped by a signal");
      if (!supervisor_->deaths().empty()) return DescribeDeath(supervisor_->deaths().front());
      if (absl::Now() > deadline_) {
        return DeadlineExceeded("the cluster was not ready within --start-timeout {} s",
                                flags_.start_timeout_s);
      }
    }
    return absl::OkStatus();
  }

  static absl::Status DescribeDeath(const ChildDeath& death) {
    const std::string message =
        fmt::format("{} failed ({}){}{}", death.name, DescribeWaitStatus(death.wait_status),
                    death.last_line.empty() ? "" : ": ", death.last_line);
    const bool usage = WIFEXITED(death.wait_status) && WEXITSTATUS(death.wait_status) == kExitUsage;
    return usage ? absl::InvalidArgumentError(message) : absl::InternalError(message);
  }

  // The router first: it lets its streams end, for which it needs the workers.
  bool StopAll() {
    const absl::Time end = absl::Now() + absl::Seconds(flags_.stop_timeout_s);
    const bool router_clean = supervisor_->Stop({"router"}, end - absl::Now());
    const bool workers_clean = supervisor_->Stop(
        workers_, std::max(end - absl::Now(), absl::Seconds(flags_.stop_timeout_s / 4)));
    return router_clean && workers_clean;
  }

  const UpFlags flags_;
  const std::string secret_;
  Supervisor* const supervisor_;
  MetricsTargetsFile targets_;
  std::map<std::string, std::vector<std::string>> given_;  // by program
  std::vector<GpuPlace> places_;                           // of the workers; empty: no GPU
  bool shares_memory_ = false;                             // nobody said what a worker may take
  StartRequest start_;
  CheckedStart checked_;
  const SharedMemory weights_{"tandem-weights"};  // of all workers, if they share them
  std::vector<std::string> workers_;              // their names
  std::string address_;                           // the router's, public
  std::string internal_;                          // and internal
  std::unique_ptr<ClusterAdminClient> admin_;
  absl::Time deadline_;
};

}  // namespace

int RunUp(const Arguments& arguments) {
  FlagSet parser("tandem up",
                 "Starts a router, prefill and decode workers on this machine and keeps them "
                 "running; prints `ready HOST:PORT` once they serve. Flags of the router and of "
                 "the workers are passed on.");
  const auto programs = AskForFlags(
      {{ProgramPath(kRouter)}, {ProgramPath(kPrefillWorker)}, {ProgramPath(kDecodeWorker)}});
  if (!programs.ok()) return Fail("up", programs.status());
  UpFlags flags;
  AddFlags(&parser, *programs, &flags);
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;
  if (const absl::Status status = Complete(&flags); !status.ok()) {
    fmt::print(stderr, "tandem up: {}\n", MessageOf(status));
    return kExitUsage;
  }
  const std::string secret = ClusterSecret();
  // Before any thread: it blocks signals.
  Supervisor supervisor({{"TANDEM_CLUSTER_SECRET", secret}});
  return LocalCluster(std::move(flags), secret, &supervisor).Run(*programs);
}

}  // namespace tandem::cli
