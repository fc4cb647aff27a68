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
#include "cli/cluster_summary.h"
#include "cli/command.h"
#include "cli/control_socket.h"
#include "cli/gpu_placement.h"
#include "cli/metrics_targets.h"
#include "cli/oom_kills.h"
#include "cli/program_flags.h"
#include "cli/shared_memory.h"
#include "cli/start_check.h"
#include "cli/supervisor.h"
#include "cli/up_screen.h"
#include "cli/worker_death.h"
#include "common/base/file.h"
#include "common/base/host_memory.h"
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

constexpr uint64_t kMaxWorkersOfARole = 64;
// What is ready sooner is not worth a bar.
constexpr absl::Duration kWorthABar = absl::Milliseconds(500);

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
  std::string share_weights = "auto";
  bool dry_run = false;
  std::vector<std::string> forwarded;
};

// Flags of the processes that `tandem up` sets itself, and what to use instead.
struct ManagedFlag {
  const char* name;
  const char* instead;
};
constexpr char kChosen[] = "every process chooses a free port and says which";
constexpr std::array<ManagedFlag, 13> kManaged = {{
    {"--listen", "use --host and --port"},
    {"--internal-listen", "use --internal-port"},
    {"--cluster-secret", "set TANDEM_CLUSTER_SECRET, which `ps` does not show"},
    {"--router", "the cluster has its own"},
    {"--worker-id", "workers are named prefill-0, decode-0, ..."},
    {"--role", "use --unified N"},
    {"--report-loading", "it is how the loading bar is made"},
    {"--metrics-listen", "use --metrics-port"},
    {"--health-listen", "up watches its workers itself"},
    {"--kv-listen", kChosen},
    {"--shared-weights", "use --share-weights"},
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
  parser->AddChoice("--share-weights", &flags->share_weights, {"auto", "on", "off"},
                    "workers on the CPU keep one copy of the weights together instead of one "
                    "each; auto: where shared memory has huge pages, or copies would not fit");
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

std::string RandomSecret() { return absl::BytesToHexString(RandomBytes(16)); }

std::string ClusterSecret() {
  const char* given = std::getenv("TANDEM_CLUSTER_SECRET");
  return given != nullptr && *given != '\0' ? given : RandomSecret();
}

int NumCores() {
  cpu_set_t set;
  return sched_getaffinity(0, sizeof(set), &set) == 0 ? std::max(1, CPU_COUNT(&set)) : 1;
}

// A worker that is meant to run.
struct Worker {
  std::string name;  // prefill-0
  std::string role;
  int place = 0;      // of the GPU places, where there are any
  bool held = false;  // out of service, as an operator wished
};

// One run of `tandem up`, from start to stop.
class LocalCluster {
 public:
  LocalCluster(UpFlags flags, std::string secret, Supervisor* supervisor, UpScreen* screen)
      : flags_(std::move(flags)),
        secret_(std::move(secret)),
        supervisor_(supervisor),
        screen_(screen),
        targets_(flags_.metrics_sd_file) {}
  ~LocalCluster() {
    control_.reset();
    if (!address_.empty()) RemoveClusterNote(address_);
  }

  int Run(const std::vector<FlagTable>& programs) {
    // All that can be said against it before anything starts.
    if (const absl::Status status = PlanArguments(programs); !status.ok()) return Failed(status);
    if (flags_.dry_run) {
      fmt::print("{}", CheckedStartText(start_, checked_));
      return kExitOk;
    }
    for (const std::string& warning : checked_.warnings) {
      screen_->Say("warning: " + warning, Colour::kYellow);
    }
    begin_ = absl::Now();
    oom_kills_ = CountOomKills();
    screen_->SetQuiet(true);
    const absl::Status started = Start();
    screen_->SetBar("");
    if (started.ok()) {
      supervisor_->RestartTheDead([this](const ChildDeath& death) { return Explain(death); });
      ListenForOperators();
      fmt::print("ready {}\n", address_);
      std::fflush(stdout);
      Report();
      Serve();
    }
    if (!started.ok() && !absl::IsCancelled(started)) {
      // What the others say of being stopped, or of the same mistake, would bury the cause.
      screen_->MuteChildren();
      StopAll();
      return Failed(started);
    }
    SayStopping();
    switch (StopAll()) {
      case StopOutcome::kClean:
        return kExitOk;
      case StopOutcome::kNotClean:
        return kExitFailed;
      case StopOutcome::kKilled:
        screen_->Say("killed all processes; streams that ran are lost", Colour::kYellow);
        return kExitKilled;
    }
    return kExitFailed;
  }

 private:
  int Failed(const absl::Status& status) {
    screen_->Say(MessageOf(status), Colour::kRed);
    return absl::IsInvalidArgument(status) ? kExitUsage : kExitFailed;
  }

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
              .share_weights = flags_.share_weights == "on" ||
                               (flags_.share_weights == "auto" && SharedMemoryHasHugePages()),
              .on_cpu = places_.empty()};
    if (weights_.path().empty()) start_.share_weights = false;
    const HostMemory memory = ReadHostMemory();
    absl::StatusOr<CheckedStart> checked = CheckStart(start_, memory);
    if (absl::IsResourceExhausted(checked.status()) && flags_.share_weights == "auto" &&
        !weights_.path().empty()) {
      StartRequest shared = start_;
      shared.share_weights = true;
      if (absl::StatusOr<CheckedStart> fits = CheckStart(shared, memory); fits.ok()) {
        start_ = std::move(shared);
        checked = std::move(fits);
      }
    }
    TANDEM_ASSIGN_OR_RETURN(checked_, std::move(checked));
    if (!checked_.plan) return absl::OkStatus();
    if (start_.share_weights && !SharedMemoryHasHugePages()) {
      checked_.warnings.emplace_back(
          "the weights that workers share lie in pages of 4 KiB, which makes steps up to a fourth "
          "slower; cure: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled");
    }
    GiveMemory(*checked_.plan);
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
      screen_->Say(
          fmt::format("`tandem status` will need --internal {}: {}", internal_, MessageOf(noted)),
          Colour::kYellow);
    }
    for (const auto& [role, count] : WantedAtStart()) {
      for (uint64_t i = 0; i < count; ++i) TANDEM_RETURN_IF_ERROR(StartWorker(role));
    }
    admin_ = std::make_unique<ClusterAdminClient>(internal_, secret_);
    return StepUntil([this] { return AllReady(); });
  }

  std::vector<std::pair<std::string, uint64_t>> WantedAtStart() const {
    return {{"prefill", *flags_.prefill}, {"decode", *flags_.decode}, {"unified", flags_.unified}};
  }

  // One more of that role, with the lowest number and place that are free.
  absl::Status StartWorker(const std::string& role) {
    Worker worker = {.role = role};
    for (int i = 0; worker.name.empty(); ++i) {
      const std::string name = fmt::format("{}-{}", role, i);
      if (!supervisor_->Has(name)) worker.name = name;
    }
    const auto taken = [this](int place) {
      return std::any_of(workers_.begin(), workers_.end(),
                         [place](const Worker& other) { return other.place == place; });
    };
    while (taken(worker.place)) ++worker.place;
    std::vector<std::string> more = {
        "--router",
        internal_,
        "--worker-id",
        worker.name,
        "--report-loading",
        "--metrics-listen",
        MetricsListen(flags_.host, flags_.metrics_port, 1 + worker.place)};
    if (role == "unified") more.push_back("--role=unified");
    if (!places_.empty()) {
      if (static_cast<size_t>(worker.place) >= places_.size()) {
        return ResourceExhausted(
            "all {} places on GPUs are taken; start `tandem up` with more workers", places_.size());
      }
      const std::vector<std::string> flags = PlaceFlags(places_[worker.place]);
      more.insert(more.end(), flags.begin(), flags.end());
    }
    workers_.push_back(worker);
    return supervisor_->Start(
        Spec(worker.name, role == "prefill" ? kPrefillWorker : kDecodeWorker, more));
  }

  bool AllReady() {
    const auto cluster = admin_->GetCluster(absl::Milliseconds(500));
    if (!cluster.ok()) return false;
    return std::all_of(workers_.begin(), workers_.end(), [&cluster](const Worker& wanted) {
      return std::any_of(cluster->workers().begin(), cluster->workers().end(),
                         [&wanted](const v1::Worker& worker) {
                           return worker.worker_id() == wanted.name && worker.state() == "ready";
                         });
    });
  }

  // A worker that was started again may have another port.
  void TellPrometheus() {
    std::vector<std::string> addresses;
    for (const std::string& name : supervisor_->Names()) {
      const auto listening = supervisor_->listening(name);
      if (listening.has_value()) addresses.push_back(listening->metrics_address);
    }
    const absl::Status written = targets_.Set(addresses);
    if (!written.ok()) screen_->Say(MessageOf(written), Colour::kYellow);
  }

  // People get a summary, scripts an address a line.
  void Report() const {
    const auto router = supervisor_->listening("router");
    if (screen_->terminal()) {
      const auto cluster = admin_->GetCluster(absl::Seconds(2));
      if (!cluster.ok()) return;
      screen_->Print(SummaryText(*cluster,
                                 {address_, internal_, router ? router->metrics_address : ""},
                                 screen_->width()));
      return;
    }
    screen_->Say(fmt::format("workers and operators reach the router at {}", internal_));
    for (const std::string& name : supervisor_->Names()) {
      const auto listening = supervisor_->listening(name);
      if (!listening) continue;
      screen_->Say(fmt::format("{} at {}, metrics at http://{}/metrics", name, listening->address,
                               listening->metrics_address));
    }
  }

  // Until a signal. What processes still say of their start is not put below the summary.
  void Serve() {
    const absl::Time settled = absl::Now() + absl::Milliseconds(500);
    do {
      if (absl::Now() > settled) screen_->SetQuiet(false);
      TellPrometheus();
    } while (supervisor_->Step(screen_->quiet() ? absl::Milliseconds(100) : absl::Seconds(60)) ==
             0);
  }

  // ---- operators ----
  void ListenForOperators() {
    auto control = ControlSocket::Listen(
        address_, [this](const nlohmann::json& request) { return Answer(request); });
    if (!control.ok()) {
      screen_->Say(fmt::format("drain --stay, undrain and scale will not work: {}",
                               MessageOf(control.status())),
                   Colour::kYellow);
      return;
    }
    control_ = *std::move(control);
    supervisor_->Watch(control_->fd(), [this] { control_->Answer(); });
  }

  absl::StatusOr<nlohmann::json> Answer(const nlohmann::json& request) {
    const auto text = [&request](const char* name) {
      const auto found = request.find(name);
      return found != request.end() && found->is_string() ? found->get<std::string>() : "";
    };
    const std::string command = text("command");
    if (command == "get") return Wanted();
    if (command == "hold" || command == "release") {
      TANDEM_RETURN_IF_ERROR(SetHeld(text("worker"), command == "hold"));
      return Wanted();
    }
    if (command == "scale") {
      const auto count = request.find("count");
      if (count == request.end() || !count->is_number_unsigned()) {
        return InvalidArgument("scale: count must be a number");
      }
      TANDEM_RETURN_IF_ERROR(Scale(text("role"), count->get<uint64_t>()));
      return Wanted();
    }
    return InvalidArgument("unknown command '{}'", command);
  }

  // {"wanted": {"decode": 2, ...}, "workers": {"decode-0": {"role": ..., "state": ...}, ...}}
  nlohmann::json Wanted() const {
    std::map<std::string, int> wanted;
    nlohmann::json workers = nlohmann::json::object();
    for (const Worker& worker : workers_) {
      wanted[worker.role] += worker.held ? 0 : 1;
      workers[worker.name] = {{"role", worker.role}, {"state", supervisor_->StateOf(worker.name)}};
    }
    return nlohmann::json{{"wanted", wanted}, {"workers", workers}};
  }

  absl::Status SetHeld(const std::string& name, bool held) {
    const auto worker = std::find_if(workers_.begin(), workers_.end(),
                                     [&name](const Worker& w) { return w.name == name; });
    if (worker == workers_.end()) return NotFound("'{}' is not a worker of this cluster", name);
    if (!held && !worker->held) return FailedPrecondition("{} is not held out", name);
    worker->held = held;
    if (held) {
      supervisor_->Hold(name);
    } else {
      supervisor_->Release(name);
    }
    return absl::OkStatus();
  }

  // Takes the newest away first; those that are held out do not count and stay.
  absl::Status Scale(const std::string& role, uint64_t count) {
    if (role != "prefill" && role != "decode" && role != "unified") {
      return InvalidArgument("the role must be prefill, decode or unified, got '{}'", role);
    }
    if (count > kMaxWorkersOfARole) {
      return InvalidArgument("at most {} workers of a role, got {}", kMaxWorkersOfARole, count);
    }
    const auto counts = [&role](const Worker& w) { return w.role == role && !w.held; };
    auto now = static_cast<uint64_t>(std::count_if(workers_.begin(), workers_.end(), counts));
    for (; now < count; ++now) TANDEM_RETURN_IF_ERROR(StartWorker(role));
    for (; now > count; --now) {
      const auto last = std::find_if(workers_.rbegin(), workers_.rend(), counts);
      screen_->Say(fmt::format("{} leaves once its requests have ended", last->name));
      supervisor_->Retire(last->name);
      workers_.erase(std::next(last).base());
    }
    return absl::OkStatus();
  }

  // ---- ends ----
  // CANCELLED on a signal; the error of the first child that dies.
  template <typename Condition>
  absl::Status StepUntil(Condition condition) {
    while (!condition()) {
      if (supervisor_->Step(absl::Milliseconds(50)) != 0) return Cancelled("stopped by a signal");
      if (!supervisor_->deaths().empty()) return DescribeDeath(supervisor_->deaths().front());
      if (absl::Now() > begin_ + absl::Seconds(flags_.start_timeout_s)) {
        return DeadlineExceeded("the cluster was not ready within --start-timeout {} s",
                                flags_.start_timeout_s);
      }
      ShowProgress();
    }
    return absl::OkStatus();
  }

  void ShowProgress() {
    const absl::Time now = absl::Now();
    if (now - begin_ < kWorthABar) return;
    const Loading& loading = supervisor_->loading();
    screen_->SetBar(loading.active() ? loading.Text(now, screen_->width()) : "starting ...");
  }

  std::string Explain(const ChildDeath& death) {
    const std::optional<uint64_t> oom_kills = CountOomKills();
    MemoryAtDeath memory;
    if (oom_kills && oom_kills_) memory.oom_killed = *oom_kills > *oom_kills_;
    oom_kills_ = oom_kills;
    memory.workers = static_cast<int>(workers_.size());
    memory.worker_bytes = supervisor_->loading().worker_bytes();
    return ExplainDeath(death.wait_status, memory);
  }

  absl::Status DescribeDeath(const ChildDeath& death) {
    const std::string killed = Explain(death);
    const std::string why = killed.empty() ? death.last_line : killed;
    const std::string message =
        fmt::format("{} failed ({}){}{}", death.name, DescribeWaitStatus(death.wait_status),
                    why.empty() ? "" : ": ", why);
    const bool usage = WIFEXITED(death.wait_status) && WEXITSTATUS(death.wait_status) == kExitUsage;
    return usage ? absl::InvalidArgumentError(message) : absl::InternalError(message);
  }

  void SayStopping() {
    screen_->SetQuiet(true);
    if (control_ != nullptr) supervisor_->Unwatch(control_->fd());
    std::string streams;
    if (admin_ != nullptr) {
      const auto cluster = admin_->GetCluster(absl::Milliseconds(300));
      const uint32_t open =
          cluster.ok() ? cluster->running_requests() + cluster->queued_requests() : 0;
      streams = fmt::format(", {} stream{} to finish", open, open == 1 ? "" : "s");
    }
    screen_->Say(fmt::format("stopping{}; {} again to kill", streams,
                             screen_->terminal() ? "Ctrl-C" : "signal"));
  }

  // The router first: it lets its streams end, for which it needs the workers.
  StopOutcome StopAll() {
    const absl::Time end = absl::Now() + absl::Seconds(flags_.stop_timeout_s);
    const StopOutcome router = supervisor_->Stop({"router"}, end - absl::Now());
    const StopOutcome workers =
        supervisor_->Stop(supervisor_->Names(),
                          std::max(end - absl::Now(), absl::Seconds(flags_.stop_timeout_s / 4)));
    return std::max(router, workers);
  }

  const UpFlags flags_;
  const std::string secret_;
  Supervisor* const supervisor_;
  UpScreen* const screen_;
  MetricsTargetsFile targets_;
  std::map<std::string, std::vector<std::string>> given_;  // by program
  std::vector<GpuPlace> places_;                           // of the workers; empty: no GPU
  bool shares_memory_ = false;                             // nobody said what a worker may take
  StartRequest start_;
  CheckedStart checked_;
  const SharedMemory weights_{"tandem-weights"};  // of all workers, if they share them
  std::vector<Worker> workers_;                   // oldest first
  std::string address_;                           // the router's, public
  std::string internal_;                          // and internal
  std::unique_ptr<ClusterAdminClient> admin_;
  std::unique_ptr<ControlSocket> control_;
  std::optional<uint64_t> oom_kills_;  // as counted last
  absl::Time begin_;
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
  UpScreen screen(UpScreen::OfStderr());
  Supervisor supervisor({{"TANDEM_CLUSTER_SECRET", secret}}, &screen);
  return LocalCluster(std::move(flags), secret, &supervisor, &screen).Run(*programs);
}

}  // namespace tandem::cli
