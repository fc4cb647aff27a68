// `tandem up`: a cluster on this machine, supervised.
#include <algorithm>
#include <cstdlib>
#include <sys/wait.h>

#include "absl/strings/escaping.h"
#include "absl/time/clock.h"
#include "fmt/format.h"

#include "cli/cluster_admin_client.h"
#include "cli/cluster_note.h"
#include "cli/cluster_summary.h"
#include "cli/command.h"
#include "cli/control_socket.h"
#include "cli/metrics_targets.h"
#include "cli/oom_kills.h"
#include "cli/program_flags.h"
#include "cli/supervisor.h"
#include "cli/up_flags.h"
#include "cli/up_plan.h"
#include "cli/up_screen.h"
#include "cli/worker_death.h"
#include "common/base/file.h"
#include "common/base/host_memory.h"
#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"

namespace tandem::cli {
namespace {

// What is ready sooner is not worth a bar.
constexpr absl::Duration kWorthABar = absl::Milliseconds(500);

// Of the processes, and so of what is said beside them.
LogFormat LogFormatOf(const UpFlags& flags) {
  constexpr std::string_view kFlag = "--log-format=";
  LogFormat format = LogFormat::kText;
  for (const std::string& given : flags.forwarded) {
    if (!given.starts_with(kFlag)) continue;
    format = given.substr(kFlag.size()) == "json" ? LogFormat::kJson : LogFormat::kText;
  }
  return format;
}

std::string RandomSecret() { return absl::BytesToHexString(RandomBytes(16)); }

std::string ClusterSecret() {
  const char* given = std::getenv("TANDEM_CLUSTER_SECRET");
  return given != nullptr && *given != '\0' ? given : RandomSecret();
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
    auto plan = UpPlan::Make(flags_, programs, ThisMachine());
    if (!plan.ok()) return Failed(plan.status());
    plan_ = *std::move(plan);
    if (flags_.dry_run) {
      fmt::print("{}", plan_->Text());
      return kExitOk;
    }
    for (const std::string& warning : plan_->warnings()) {
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

  absl::Status Start() {
    const std::string listen = HostPort{flags_.host, flags_.port}.ToString();
    const std::string internal = HostPort{"127.0.0.1", flags_.internal_port}.ToString();
    TANDEM_RETURN_IF_ERROR(supervisor_->Start(
        {"router", plan_->Router(listen, internal,
                                 MetricsListen(MetricsHost(flags_), flags_.metrics_port, 0))}));
    TANDEM_RETURN_IF_ERROR(
        StepUntil([this] { return supervisor_->listening("router").has_value(); }));
    const ListeningLine router = *supervisor_->listening("router");
    address_ = router.address;
    internal_ = router.internal_address;
    // Started again, the router must be found where it was.
    supervisor_->SetArguments("router", plan_->Router(address_, internal_, router.metrics_address));
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
    TANDEM_ASSIGN_OR_RETURN(std::vector<std::string> arguments,
                            plan_->Worker(worker.name, worker.role, worker.place, internal_));
    workers_.push_back(worker);
    return supervisor_->Start({worker.name, std::move(arguments)});
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
    if (count > now) TANDEM_RETURN_IF_ERROR(CheckMemoryFor(workers_.size() + (count - now)));
    for (; now < count; ++now) TANDEM_RETURN_IF_ERROR(StartWorker(role));
    for (; now > count; --now) {
      const auto last = std::find_if(workers_.rbegin(), workers_.rend(), counts);
      screen_->Say(fmt::format("{} leaves once its requests have ended", last->name));
      supervisor_->Retire(last->name);
      workers_.erase(std::next(last).base());
    }
    return absl::OkStatus();
  }

  // Those that are held out count too: they may come back.
  absl::Status CheckMemoryFor(size_t workers) const {
    HostMemory memory = ReadHostMemory();
    for (const std::string& name : supervisor_->Names()) {
      const bool stays = std::any_of(workers_.begin(), workers_.end(),
                                     [&name](const Worker& worker) { return worker.name == name; });
      if (!stays && name != "router") continue;
      const std::optional<size_t> held = supervisor_->MemoryOf(name);
      if (!held) return absl::OkStatus();
      memory.available += *held;
    }
    return plan_->CheckWorkers(static_cast<int>(workers), memory);
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
    if (screen_->terminal()) screen_->Print("\n");  // behind the ^C
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
  std::unique_ptr<UpPlan> plan_;
  std::vector<Worker> workers_;  // oldest first
  std::string address_;          // the router's, public
  std::string internal_;         // and internal
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
  const std::vector<FlagTable> programs = ServerFlagTables();
  UpFlags flags;
  AddUpFlags(&parser, programs, &flags);
  if (const auto exit_code = ParseOrExit(&parser, arguments)) return *exit_code;
  UpScreen screen(UpScreen::OfStderr(LogFormatOf(flags)));
  if (const absl::Status status = CompleteUpFlags(&flags); !status.ok()) {
    screen.Say(MessageOf(status), Colour::kRed);
    return kExitUsage;
  }
  const std::string secret = ClusterSecret();
  // Before any thread: it blocks signals.
  Supervisor supervisor({{"TANDEM_CLUSTER_SECRET", secret}}, &screen);
  return LocalCluster(std::move(flags), secret, &supervisor, &screen).Run(programs);
}

}  // namespace tandem::cli
