// A child process whose output is read line by line.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <sys/types.h>
#include <vector>

#include "absl/status/statusor.h"

namespace tandem::cli {

// Splits what is read from a descriptor into lines.
class LineReader {
 public:
  explicit LineReader(int fd) : fd_(fd) {}
  ~LineReader();
  LineReader(const LineReader&) = delete;
  LineReader& operator=(const LineReader&) = delete;

  // All whole lines that are there; does not block. At the end of the input also a last line
  // without its newline.
  std::vector<std::string> ReadLines();
  int fd() const { return fd_; }  // -1 after the end

 private:
  int fd_;
  std::string rest_;
};

// Not thread-safe. The child is killed (SIGKILL) when the thread that started it ends, whatever the
// reason, and by the destructor: nothing is orphaned. It stands in a process group of its own, so a
// Ctrl-C in the terminal reaches only its parent.
class ChildProcess {
 public:
  // `environment` is added to this process's own. Error: the program cannot be started.
  static absl::StatusOr<std::unique_ptr<ChildProcess>> Start(
      const std::vector<std::string>& arguments,
      const std::map<std::string, std::string>& environment);
  ~ChildProcess();

  pid_t pid() const { return pid_; }
  LineReader& out() { return out_; }
  LineReader& err() { return err_; }
  void Signal(int signal);
  // The wait status, once the child has ended.
  std::optional<int> Poll();
  // Waits for the end.
  int Wait();

 private:
  ChildProcess(pid_t pid, int out_fd, int err_fd) : pid_(pid), out_(out_fd), err_(err_fd) {}

  const pid_t pid_;
  LineReader out_;
  LineReader err_;
  std::optional<int> status_;
};

// "exit code 1", "signal 9 (Killed)".
std::string DescribeWaitStatus(int status);

}  // namespace tandem::cli
