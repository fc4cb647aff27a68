// Keeps a set of child processes running: shows what they say, restarts those that die, stops them
// in order.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "cli/child_process.h"
#include "cli/loading.h"
#include "cli/up_screen.h"

namespace tandem::cli {

struct ChildSpec {
  std::string name;  // prefix of its lines on stderr
  std::vector<std::string> arguments;
};

// What a child announced on stdout: "listening HOST:PORT metrics HOST:PORT", and a router also
// "internal HOST:PORT".
struct ListeningLine {
  std::string address;
  std::string metrics_address;
  std::string internal_address;  // of a router
};
std::optional<ListeningLine> ParseListeningLine(const std::string& line);

// How a child died. `last_line` says why: what it wrote on stderr at last, if that was an error.
struct ChildDeath {
  std::string name;
  int wait_status = 0;
  std::string last_line;
};

enum class StopOutcome {
  kClean,
  kNotClean,  // some had to be killed, or ended with an error
  kKilled,    // all at once, as a second signal wished
};

// Not thread-safe: one thread starts the children and calls Step. It also blocks SIGINT, SIGTERM
// and SIGCHLD for itself and all threads started later, so create it before any other.
class Supervisor {
 public:
  // `screen` outlives this.
  Supervisor(std::map<std::string, std::string> environment, UpScreen* screen);
  ~Supervisor();
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  absl::Status Start(ChildSpec spec);
  // A restart of `name` uses these from now on.
  void SetArguments(const std::string& name, std::vector<std::string> arguments);

  // Waits up to `timeout` for something to happen and deals with it: lines of children, deaths,
  // restarts that are due. Returns the signal (SIGINT, SIGTERM) that came, or 0.
  int Step(absl::Duration timeout);
  // Also deals with `fd`, by `on_readable`, whenever it can be read.
  void Watch(int fd, std::function<void()> on_readable);
  void Unwatch(int fd) { watched_.erase(fd); }
  // Until this is called a death is final (see `deaths`), and its last line is not shown, because
  // whoever ends by it says it; after it the dead are started again, after 0.2 s at first, at most
  // 10 s. `explain` adds to what is said of a death ("": nothing).
  void RestartTheDead(std::function<std::string(const ChildDeath&)> explain = nullptr);
  const std::vector<ChildDeath>& deaths() const { return deaths_; }
  // What `name` announced last; nothing as long as it has not.
  std::optional<ListeningLine> listening(const std::string& name) const;
  // How far those that load are.
  const Loading& loading() const { return loading_; }
  // Bytes that `name` holds at present; none where that cannot be told.
  std::optional<size_t> MemoryOf(const std::string& name) const;
  bool Has(const std::string& name) const { return Find(name) != nullptr; }
  std::vector<std::string> Names() const;
  // For people: "runs", "starting", "ended (signal 9 (Killed)), starting it again in 3.2s"; of one
  // that is held "leaving", "held out".
  std::string StateOf(const std::string& name) const;

  // When `name` ends it is not started again, until it is released.
  void Hold(const std::string& name);
  void Release(const std::string& name);
  // SIGTERM; once ended, `name` is forgotten.
  void Retire(const std::string& name);

  // SIGTERM to the named children; waits until they have ended, up to `bound`, then SIGKILL. They
  // are not restarted. A second signal kills at once, also those of later calls: Ctrl-C, or a
  // signal that comes more than 1 s after the first Stop. Clean: none had to be killed and all exit
  // codes were 0 (or SIGTERM ended a child before it came to handling it).
  StopOutcome Stop(const std::vector<std::string>& names, absl::Duration bound);

 private:
  struct Child;

  Child* Find(const std::string& name) const;
  absl::Status Launch(Child* child);
  void ReadOutput(Child* child);
  void TakeErrorLine(Child* child, const std::string& line);
  void ShowHeldLine(Child* child);
  void Reap(Child* child);
  void PlanRestart(Child* child, const ChildDeath& death);
  int TakeSignals();
  void Kill(Child* child);

  const std::map<std::string, std::string> environment_;
  UpScreen* const screen_;
  std::vector<std::unique_ptr<Child>> children_;
  std::map<int, std::function<void()>> watched_;
  std::vector<ChildDeath> deaths_;
  Loading loading_;
  bool restart_ = false;
  std::function<std::string(const ChildDeath&)> explain_;
  absl::Time stop_began_ = absl::InfiniteFuture();
  bool from_terminal_ = false;  // the last signal was a key
  bool killing_ = false;        // a second signal came
  int signal_fd_ = -1;
};

}  // namespace tandem::cli
