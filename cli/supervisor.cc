#include "cli/supervisor.h"

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <poll.h>
#include <sstream>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>
#include <utility>

#include "absl/time/clock.h"
#include "fmt/format.h"

#include "cli/log_line.h"
#include "cli/units.h"
#include "common/base/check.h"
#include "common/base/host_memory.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(200);
constexpr absl::Duration kMaxBackoff = absl::Seconds(10);
// Who lived this long is started at once again.
constexpr absl::Duration kGoodLife = absl::Seconds(30);
// `timeout` and shells send a signal to a process and once more to its group: that is no
// impatience.
constexpr absl::Duration kSameSignal = absl::Seconds(1);

}  // namespace

struct Supervisor::Child {
  ChildSpec spec;
  std::unique_ptr<ChildProcess> process;  // null while dead
  std::optional<ListeningLine> listening;
  std::string last_line;   // on stderr, if that was an error: it may say why the child ends
  bool line_held = false;  // it is not shown yet
  absl::Time started;
  absl::Time restart_at = absl::InfiniteFuture();
  absl::Duration backoff = kFirstBackoff;
  bool stopping = false;
  bool held = false;     // not to be started again
  bool retired = false;  // to be forgotten
  std::optional<int> final_status;
};

std::optional<ListeningLine> ParseListeningLine(const std::string& line) {
  std::istringstream words(line);
  std::string listening, metrics;
  ListeningLine out;
  words >> listening >> out.address >> metrics >> out.metrics_address;
  if (listening != "listening" || metrics != "metrics" || out.metrics_address.empty()) {
    return std::nullopt;
  }
  std::string internal;
  words >> internal >> out.internal_address;
  return out;
}

Supervisor::Supervisor(std::map<std::string, std::string> environment, UpScreen* screen)
    : environment_(std::move(environment)), screen_(screen) {
  sigset_t signals;
  sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGCHLD}) sigaddset(&signals, signal);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
  TANDEM_CHECK(signal_fd_ >= 0, "signalfd: {}", std::strerror(errno));
}

Supervisor::~Supervisor() { close(signal_fd_); }

Supervisor::Child* Supervisor::Find(const std::string& name) const {
  for (const auto& child : children_) {
    if (child->spec.name == name) return child.get();
  }
  return nullptr;
}

absl::Status Supervisor::Start(ChildSpec spec) {
  TANDEM_CHECK(Find(spec.name) == nullptr, "{} runs already", spec.name);
  children_.push_back(std::make_unique<Child>());
  children_.back()->spec = std::move(spec);
  return Launch(children_.back().get());
}

void Supervisor::SetArguments(const std::string& name, std::vector<std::string> arguments) {
  Find(name)->spec.arguments = std::move(arguments);
}

std::optional<ListeningLine> Supervisor::listening(const std::string& name) const {
  const Child* child = Find(name);
  return child == nullptr ? std::nullopt : child->listening;
}

std::optional<size_t> Supervisor::MemoryOf(const std::string& name) const {
  const Child* child = Find(name);
  if (child == nullptr || child->process == nullptr) return 0;
  return ReadProcessMemory(child->process->pid());
}

std::vector<std::string> Supervisor::Names() const {
  std::vector<std::string> names;
  for (const auto& child : children_) names.push_back(child->spec.name);
  return names;
}

std::string Supervisor::StateOf(const std::string& name) const {
  const Child* child = Find(name);
  if (child == nullptr) return "unknown";
  const bool lives = child->process != nullptr;
  if (child->held) return lives ? "leaving" : "held out";
  if (lives) return child->listening.has_value() ? "runs" : "starting";
  return fmt::format("ended ({}), starting it again in {}",
                     child->final_status ? DescribeWaitStatus(*child->final_status) : "?",
                     TimeText(std::max(child->restart_at - absl::Now(), absl::ZeroDuration())));
}

void Supervisor::Watch(int fd, std::function<void()> on_readable) {
  watched_[fd] = std::move(on_readable);
}

void Supervisor::RestartTheDead(std::function<std::string(const ChildDeath&)> explain) {
  restart_ = true;
  explain_ = std::move(explain);
  for (const auto& child : children_) ShowHeldLine(child.get());
}

void Supervisor::Hold(const std::string& name) {
  Child* child = Find(name);
  child->held = true;
  child->restart_at = absl::InfiniteFuture();
}

void Supervisor::Release(const std::string& name) {
  Child* child = Find(name);
  child->held = false;
  child->backoff = kFirstBackoff;
  if (child->process == nullptr) child->restart_at = absl::Now();
}

void Supervisor::Retire(const std::string& name) {
  Child* child = Find(name);
  child->held = child->retired = true;
  child->restart_at = absl::InfiniteFuture();
  if (child->process != nullptr) child->process->Signal(SIGTERM);
}

absl::Status Supervisor::Launch(Child* child) {
  child->listening.reset();
  child->last_line.clear();
  child->line_held = false;
  child->restart_at = absl::InfiniteFuture();
  child->started = absl::Now();
  TANDEM_ASSIGN_OR_RETURN(child->process, ChildProcess::Start(child->spec.arguments, environment_));
  return absl::OkStatus();
}

void Supervisor::ReadOutput(Child* child) {
  const std::string& name = child->spec.name;
  for (const std::string& line : child->process->out().ReadLines()) {
    if (auto listening = ParseListeningLine(line)) {
      child->listening = std::move(listening);
      loading_.Forget(name);
    } else if (const auto loading = ParseLoadingLine(line)) {
      loading_.Report(name, *loading, absl::Now());
    } else {
      screen_->Child(name, line);
    }
  }
  for (const std::string& line : child->process->err().ReadLines()) TakeErrorLine(child, line);
}

void Supervisor::TakeErrorLine(Child* child, const std::string& line) {
  ShowHeldLine(child);
  const LineKind kind = KindOf(line);
  const bool error = kind == LineKind::kBare || kind == LineKind::kError;
  child->last_line = error ? line : "";
  child->line_held = error && !restart_ && !child->stopping;
  if (!child->line_held) screen_->Child(child->spec.name, line);
}

void Supervisor::ShowHeldLine(Child* child) {
  if (std::exchange(child->line_held, false)) {
    screen_->Child(child->spec.name, child->last_line);
  }
}

void Supervisor::Reap(Child* child) {
  const std::optional<int> status = child->process->Poll();
  if (!status.has_value()) return;
  ReadOutput(child);  // what it said last
  child->process.reset();
  child->final_status = status;
  child->listening.reset();
  loading_.Forget(child->spec.name);
  if (child->stopping) return ShowHeldLine(child);
  const ChildDeath death = {child->spec.name, *status, TextOf(child->last_line)};
  deaths_.push_back(death);
  if (restart_) PlanRestart(child, death);
}

void Supervisor::PlanRestart(Child* child, const ChildDeath& death) {
  const std::string ended =
      fmt::format("{} ended ({})", death.name, DescribeWaitStatus(death.wait_status));
  if (child->held) {
    screen_->Say(child->retired ? ended : ended + "; tandem undrain starts it again");
    return;
  }
  if (absl::Now() - child->started > kGoodLife) child->backoff = kFirstBackoff;
  child->restart_at = absl::Now() + child->backoff;
  const std::string why = explain_ ? explain_(death) : "";
  screen_->Say(fmt::format("{}{}{}; starting it again in {:.1f} s", ended, why.empty() ? "" : ": ",
                           why, absl::ToDoubleSeconds(child->backoff)),
               Colour::kYellow);
  child->backoff = std::min(2 * child->backoff, kMaxBackoff);
}

int Supervisor::TakeSignals() {
  int taken = 0;
  signalfd_siginfo info;
  while (read(signal_fd_, &info, sizeof(info)) == sizeof(info)) {
    if (info.ssi_signo == SIGCHLD) continue;
    taken = static_cast<int>(info.ssi_signo);
    from_terminal_ = info.ssi_code == SI_KERNEL;
  }
  return taken;
}

int Supervisor::Step(absl::Duration timeout) {
  std::vector<pollfd> polls = {{.fd = signal_fd_, .events = POLLIN, .revents = 0}};
  absl::Time wake = absl::Now() + timeout;
  for (const auto& child : children_) {
    wake = std::min(wake, child->restart_at);
    if (child->process == nullptr) continue;
    for (const int fd : {child->process->out().fd(), child->process->err().fd()}) {
      if (fd >= 0) polls.push_back({.fd = fd, .events = POLLIN, .revents = 0});
    }
  }
  for (const auto& [fd, on_readable] : watched_) {
    polls.push_back({.fd = fd, .events = POLLIN, .revents = 0});
  }
  // `wake` may lie in the infinite future, from where no further millisecond can be added.
  const absl::Duration wait =
      std::clamp(wake - absl::Now(), absl::ZeroDuration(), absl::Minutes(1));
  poll(polls.data(), polls.size(), static_cast<int>(absl::ToInt64Milliseconds(wait)) + 1);

  const int signal = TakeSignals();
  for (const pollfd& ready : polls) {
    const auto watched = watched_.find(ready.fd);
    if (watched != watched_.end() && ready.revents != 0) watched->second();
  }
  for (const auto& child : children_) {
    if (child->process != nullptr) {
      ReadOutput(child.get());
      Reap(child.get());
    } else if (!child->stopping && child->restart_at <= absl::Now()) {
      if (const absl::Status status = Launch(child.get()); !status.ok()) {
        screen_->Say(MessageOf(status), Colour::kRed);
        child->restart_at = absl::Now() + kMaxBackoff;
      }
    }
  }
  std::erase_if(children_, [](const auto& child) {
    return child->retired && child->process == nullptr && !child->stopping;
  });
  return signal;
}

void Supervisor::Kill(Child* child) {
  child->process->Signal(SIGKILL);
  child->process->Wait();
  Reap(child);
}

StopOutcome Supervisor::Stop(const std::vector<std::string>& names, absl::Duration bound) {
  std::vector<Child*> waiting;
  for (const auto& child : children_) {
    const bool named = std::find(names.begin(), names.end(), child->spec.name) != names.end();
    if (!named || child->stopping) continue;
    child->stopping = true;
    ShowHeldLine(child.get());
    if (child->process == nullptr) continue;
    child->process->Signal(SIGTERM);
    waiting.push_back(child.get());
  }
  const auto running = [&waiting] {
    return std::any_of(waiting.begin(), waiting.end(),
                       [](const Child* child) { return child->process != nullptr; });
  };
  stop_began_ = std::min(stop_began_, absl::Now());
  const absl::Time deadline = absl::Now() + bound;
  bool clean = true;
  while (running()) {
    const absl::Duration left = std::max(deadline - absl::Now(), absl::ZeroDuration());
    const bool signalled = Step(killing_ ? absl::ZeroDuration() : left) != 0;
    const bool again = from_terminal_ || absl::Now() - stop_began_ > kSameSignal;
    killing_ = killing_ || (signalled && again);
    if (!killing_ && left > absl::ZeroDuration()) continue;
    for (Child* child : waiting) {
      if (child->process == nullptr) continue;
      clean = false;
      if (!killing_) {
        screen_->Say(fmt::format("{} did not stop in time; killing it", child->spec.name),
                     Colour::kYellow);
      }
      Kill(child);
    }
  }
  if (killing_) return StopOutcome::kKilled;
  for (const Child* child : waiting) {
    const int status = *child->final_status;
    const bool exited = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    // Just started, it does not take the signal itself yet and has nothing to finish.
    const bool ended_by_term = WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM;
    clean = clean && (exited || ended_by_term);
  }
  return clean ? StopOutcome::kClean : StopOutcome::kNotClean;
}

}  // namespace tandem::cli
