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

#include "absl/time/clock.h"
#include "fmt/format.h"

#include "common/base/check.h"
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
  std::string last_line;
  absl::Time started;
  absl::Time restart_at = absl::InfiniteFuture();
  absl::Duration backoff = kFirstBackoff;
  bool stopping = false;
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

Supervisor::Supervisor(std::map<std::string, std::string> environment)
    : environment_(std::move(environment)) {
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

absl::Status Supervisor::Launch(Child* child) {
  child->listening.reset();
  child->last_line.clear();
  child->restart_at = absl::InfiniteFuture();
  child->started = absl::Now();
  TANDEM_ASSIGN_OR_RETURN(child->process, ChildProcess::Start(child->spec.arguments, environment_));
  return absl::OkStatus();
}

void Supervisor::ReadOutput(Child* child) {
  for (const std::string& line : child->process->out().ReadLines()) {
    if (auto listening = ParseListeningLine(line)) {
      child->listening = std::move(listening);
    } else {
      fmt::print(stderr, "{} | {}\n", child->spec.name, line);
    }
  }
  for (const std::string& line : child->process->err().ReadLines()) {
    fmt::print(stderr, "{} | {}\n", child->spec.name, line);
    if (!line.empty()) child->last_line = line;
  }
}

void Supervisor::Reap(Child* child) {
  const std::optional<int> status = child->process->Poll();
  if (!status.has_value()) return;
  ReadOutput(child);  // what it said last
  child->process.reset();
  child->final_status = status;
  child->listening.reset();
  if (child->stopping) return;
  deaths_.push_back({child->spec.name, *status, child->last_line});
  if (!restart_) return;
  if (absl::Now() - child->started > kGoodLife) child->backoff = kFirstBackoff;
  child->restart_at = absl::Now() + child->backoff;
  fmt::print(stderr, "tandem up: {} ended ({}); starting it again in {:.1f} s\n", child->spec.name,
             DescribeWaitStatus(*status), absl::ToDoubleSeconds(child->backoff));
  child->backoff = std::min(2 * child->backoff, kMaxBackoff);
}

int Supervisor::TakeSignals() {
  int taken = 0;
  signalfd_siginfo info;
  while (read(signal_fd_, &info, sizeof(info)) == sizeof(info)) {
    if (info.ssi_signo != SIGCHLD) taken = static_cast<int>(info.ssi_signo);
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
  // `wake` may lie in the infinite future, from where no further millisecond can be added.
  const absl::Duration wait =
      std::clamp(wake - absl::Now(), absl::ZeroDuration(), absl::Minutes(1));
  poll(polls.data(), polls.size(), static_cast<int>(absl::ToInt64Milliseconds(wait)) + 1);

  const int signal = TakeSignals();
  for (const auto& child : children_) {
    if (child->process != nullptr) {
      ReadOutput(child.get());
      Reap(child.get());
    } else if (!child->stopping && child->restart_at <= absl::Now()) {
      if (const absl::Status status = Launch(child.get()); !status.ok()) {
        fmt::print(stderr, "tandem up: {}\n", MessageOf(status));
        child->restart_at = absl::Now() + kMaxBackoff;
      }
    }
  }
  return signal;
}

bool Supervisor::Stop(const std::vector<std::string>& names, absl::Duration bound) {
  std::vector<Child*> waiting;
  for (const auto& child : children_) {
    const bool named = std::find(names.begin(), names.end(), child->spec.name) != names.end();
    if (!named || child->stopping) continue;
    child->stopping = true;
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
    const absl::Duration left = deadline - absl::Now();
    const bool signalled = Step(std::max(left, absl::ZeroDuration())) != 0;
    const bool impatient = signalled && absl::Now() - stop_began_ > kSameSignal;
    if (!running() || (!impatient && left > absl::ZeroDuration())) continue;
    clean = false;
    for (Child* child : waiting) {
      if (child->process == nullptr) continue;
      fmt::print(stderr, "tandem up: {} did not stop in time; killing it\n", child->spec.name);
      child->process->Signal(SIGKILL);
      child->process->Wait();
      Reap(child);
    }
  }
  for (const Child* child : waiting) {
    const int status = *child->final_status;
    const bool exited = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    // Just started, it does not take the signal itself yet and has nothing to finish.
    const bool ended_by_term = WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM;
    clean = clean && (exited || ended_by_term);
  }
  return clean;
}

}  // namespace tandem::cli
