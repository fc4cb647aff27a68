// Keeps a set of child processes running: forwards what they say, restarts those that die, stops
// them in order.
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

// How a child died; the last line it wrote on stderr says why.
struct ChildDeath {
  std::string name;
  int wait_status = 0;
  std::string last_line;
};

// Not thread-safe: one thread starts the children and calls Step. It also blocks SIGINT, SIGTERM
// and SIGCHLD for itself and all threads started later, so create it before any other.
class Supervisor {
 public:
  explicit Supervisor(std::map<std::string, std::string> environment);
  ~Supervisor();
  Supervisor(const Supervisor&) = delete;
  Supervisor& operator=(const Supervisor&) = delete;

  absl::Status Start(ChildSpec spec);
  // A restart of `name` uses these from now on.
  void SetArguments(const std::string& name, std::vector<std::string> arguments);

  // Waits up to `timeout` for something to happen and deals with it: lines of children, deaths,
  // restarts that are due. Returns the signal (SIGINT, SIGTERM) that came, or 0.
  int Step(absl::Duration timeout);
  // Until this is called a death is final (see `deaths`); after it the dead are started again,
  // after 0.2 s at first, at most 10 s.
  void RestartTheDead() { restart_ = true; }
  const std::vector<ChildDeath>& deaths() const { return deaths_; }
  // What `name` announced last; nothing as long as it has not.
  std::optional<ListeningLine> listening(const std::string& name) const;

  // SIGTERM to the named children; waits until they have ended, up to `bound`, or until a signal
  // that comes more than 1 s after the first Stop; then SIGKILL. True if none had to be killed and
  // all exit codes were 0 (or SIGTERM ended a child before it came to handling it). They are not
  // restarted.
  bool Stop(const std::vector<std::string>& names, absl::Duration bound);

 private:
  struct Child;

  Child* Find(const std::string& name) const;
  absl::Status Launch(Child* child);
  void ReadOutput(Child* child);
  void Reap(Child* child);
  int TakeSignals();

  const std::map<std::string, std::string> environment_;
  std::vector<std::unique_ptr<Child>> children_;
  std::vector<ChildDeath> deaths_;
  bool restart_ = false;
  absl::Time stop_began_ = absl::InfiniteFuture();
  int signal_fd_ = -1;
};

}  // namespace tandem::cli
