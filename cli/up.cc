// `tandem up`: a cluster on this machine, supervised.
#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <sched.h>
#include <sys/wait.h>

#include "absl/strings/escaping.h"
#include "absl/time/clock.h"
#include "fmt/format.h"

#include "cli/cluster_admin_client.h"
#include "cli/cluster_note.h"
#include "cli/command.h"
#include "cli/gpu_placement.h"
#include "cli/supervisor.h"
#include "cli/worker_flags.h"
#include "common/base/file.h"
#include "common/base/host_port.h"
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
  std::optional<uint64_t> prefill;
  std::optional<uint64_t> decode;
  uint64_t unified = 0;
  std::string host = "127.0.0.1";
  int port = 8000;
  int internal_port = 0;
  double start_timeout_s = 600;
  double stop_timeout_s = 45;
  std::vector<std::string> forwarded;
};

void AddFlags(FlagSet* parser, UpFlags* flags) {
  parser->Add("--model", &flags->model, "checkpoint; required", "directory");
  parser->Add("--prefill", &flags->prefill, "prefill workers; default 1, or 0 with --unified");
  parser->Add("--decode", &flags->decode, "decode workers; default 1, or 0 with --unified");
  parser->Add("--unified", &flags->unified, "workers that do both by themselves");
  parser->Add("--host", &flags->host, "where the router listens");
  parser->Add("--port", &flags->port, "the router's port; 0: any");
  parser->Add("--internal-port", &flags->internal_port,
              "the router's port for workers and operators, on 127.0.0.1; 0: any");
  parser->Add("--start-timeout", &flags->start_timeout_s, "time to become ready", "s");
  parser->Add("--stop-timeout", &flags->stop_timeout_s, "time to finish requests when stopped",
              "s");
  parser->CollectUnknown(&flags->forwarded);
}

// Worker counts are filled in; errors name the flag.
absl::Status Complete(UpFlags* flags) {
  if (flags->model.empty()) return InvalidArgument("--model DIR is missing");
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
  return absl::OkStatus();
}

std::string ProgramPath(const std::string& name) {
  std::error_code error;
  return (std::filesystem::read_symlink("/proc/self/exe", error).parent_path() / name).string();
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

absl::StatusOr<FlagNames> AskForFlags(const std::string& program) {
  TANDEM_ASSIGN_OR_RETURN(auto child,
                          ChildProcess::Start({ProgramPath(program), "--list-flags"}, {}));
  const int status = child->Wait();
  std::string list;
  for (const std::string& line : child->out().ReadLines()) list += line;
  if (status != 0) return Internal("{} --list-flags: {}", program, DescribeWaitStatus(status));
  absl::StatusOr<FlagNames> names = ParseFlagList(list);
  if (!names.ok()) return Internal("{} --list-flags: {}", program, MessageOf(names.status()));
  return names;
}

// One run of `tandem up`, from start to stop.
class LocalCluster {
 public:
  LocalCluster(UpFlags flags, std::string secret, Supervisor* supervisor)
      : flags_(std::move(flags)), secret_(std::move(secret)), supervisor_(supervisor) {}
  ~LocalCluster() {
    if (!address_.empty()) RemoveClusterNote(address_);
  }

  int Run(const std::vector<std::string>& own_flags) {
    if (const absl::Status status = PlanArguments(own_flags); !status.ok()) {
      fmt::print(stderr, "tandem up: {}\n", MessageOf(status));
      return absl::IsInvalidArgument(status) ? kExitUsage : kExitFailed;
    }
    deadline_ = absl::Now() + absl::Seconds(flags_.start_timeout_s);
    const absl::Status started = Start();
    if (started.ok()) {
      supervisor_->RestartTheDead();
      ReportAddresses();
      fmt::print("ready {}\n", address_);
      std::fflush(stdout);
      while (supervisor_->Step(absl::Seconds(60)) == 0) {
      }
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
  absl::Status PlanArguments(const std::vector<std::string>& own_flags) {
    std::map<std::string, FlagNames> known;
    for (const char* program : {kRouter, kPrefillWorker, kDecodeWorker}) {
      TANDEM_ASSIGN_OR_RETURN(known[program], AskForFlags(program));
    }
    const std::string chosen = "every process chooses a free port and says which";
    const std::map<std::string, std::string> managed = {
        {"--listen", "use --host and --port"},
        {"--internal-listen", "use --internal-port"},
        {"--cluster-secret", "set TANDEM_CLUSTER_SECRET, which `ps` does not show"},
        {"--router", "the cluster has its own"},
        {"--worker-id", "workers are named prefill-0, decode-0, ..."},
        {"--role", "use --unified N"},
        {"--metrics-listen", chosen},
        {"--kv-listen", chosen},
        {"--gpu", "workers take the GPUs in turn; CUDA_VISIBLE_DEVICES says which there are"},
        {"--advertise-host", "all workers are local"}};
    TANDEM_ASSIGN_OR_RETURN(given_, DistributeFlags(flags_.forwarded, known, managed, own_flags));
    const uint64_t workers = *flags_.prefill + *flags_.decode + flags_.unified;
    const int threads = std::max<int>(1, NumCores() / static_cast<int>(workers));
    for (const char* program : {kPrefillWorker, kDecodeWorker}) {
      // First, so that a --num-threads of the user comes later and wins.
      if (known[program].count("--num-threads") == 0) continue;
      std::vector<std::string>& given = given_[program];
      given.insert(given.begin(), fmt::format("--num-threads={}", threads));
    }
    PlaceWorkers(static_cast<int>(workers));
    return absl::OkStatus();
  }

  // One GPU each, in turn; those that share one share its memory, unless the user said how much.
  void PlaceWorkers(int workers) {
    const std::vector<std::string>& given = given_[kDecodeWorker];
    const auto says = [&given](const std::string& flag) {
      return std::any_of(given.begin(), given.end(), [&flag](const std::string& argument) {
        return argument == flag || argument.rfind(flag + "=", 0) == 0;
      });
    };
    for (size_t i = 0; i < given.size(); ++i) {
      const bool device = given[i] == "--device" && i + 1 < given.size();
      if (given[i] == "--device=cpu" || (device && given[i + 1] == "cpu")) return;
    }
    places_ = PlaceOnGpus(workers, CountGpus("/dev", std::getenv("CUDA_VISIBLE_DEVICES")));
    shares_memory_ = !says("--gpu-memory-utilization") && !says("--kv-cache-memory-bytes");
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
        Spec("router", kRouter, {"--listen", listen, "--internal-listen", internal})));
    TANDEM_RETURN_IF_ERROR(
        StepUntil([this] { return supervisor_->listening("router").has_value(); }));
    address_ = supervisor_->listening("router")->address;
    internal_ = supervisor_->listening("router")->internal_address;
    // Started again, the router must be found where it was.
    supervisor_->SetArguments(
        "router",
        Spec("router", kRouter, {"--listen", address_, "--internal-listen", internal_}).arguments);
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
    const std::vector<std::string> fixed = {"--router", internal_, "--worker-id", name};
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
  std::map<std::string, std::vector<std::string>> given_;  // by program
  std::vector<GpuPlace> places_;                           // of the workers; empty: no GPU
  bool shares_memory_ = false;                             // nobody said what a worker may take
  std::vector<std::string> workers_;                       // their names
  std::string address_;                                    // the router's, public
  std::string internal_;                                   // and internal
  std::unique_ptr<ClusterAdminClient> admin_;
  absl::Time deadline_;
};

}  // namespace

int RunUp(const Arguments& arguments) {
  FlagSet parser("tandem up",
                 "Starts a router, prefill and decode workers on this machine and keeps them "
                 "running; prints `ready HOST:PORT`\nonce they serve. Flags of the router and of "
                 "the workers (see tandem_decode_worker --help) are passed on.");
  UpFlags flags;
  AddFlags(&parser, &flags);
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;
  if (const absl::Status status = Complete(&flags); !status.ok()) {
    fmt::print(stderr, "tandem up: {}\n", MessageOf(status));
    return kExitUsage;
  }
  const std::string secret = ClusterSecret();
  // Before any thread: it blocks signals.
  Supervisor supervisor({{"TANDEM_CLUSTER_SECRET", secret}});
  return LocalCluster(std::move(flags), secret, &supervisor).Run(parser.Names());
}

}  // namespace tandem::cli
