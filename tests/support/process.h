// A child process of a test: spawn, read its stdout by lines, signal, wait. Every wait has a bound.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <sys/types.h>
#include <vector>

#include "tests/support/temp_dir.h"

namespace tandem {

// Not thread-safe. The destructor kills (SIGKILL) and reaps; no child outlives its test.
class Process {
 public:
  // `env` holds NAME=VALUE pairs added to this process's environment. stderr goes to `stderr_path`
  // if given, so that a test can quote it; otherwise it is inherited.
  static std::unique_ptr<Process> Spawn(const std::vector<std::string>& args,
                                        const std::vector<std::string>& env = {},
                                        const std::string& stderr_path = "");
  ~Process();

  pid_t pid() const { return pid_; }
  // Next line of stdout without its newline; nullopt at end of file or after `seconds`.
  std::optional<std::string> ReadLine(double seconds);
  // All of stdout until end of file, at most `seconds`.
  std::string ReadAll(double seconds);
  void Write(const std::string& text);  // to stdin
  void CloseStdin();
  void Signal(int signal);
  // Exit code, or 128 + signal; nullopt if it still runs after `seconds`.
  std::optional<int> Wait(double seconds);

 private:
  Process() = default;
  bool FillBuffer(double seconds);

  pid_t pid_ = -1;
  int stdin_ = -1;
  int stdout_ = -1;
  std::string buffer_;
  bool eof_ = false;
  std::optional<int> exit_code_;
};

struct Completed {
  int exit_code = -1;  // -1: had to be killed
  std::string out;
  std::string err;
};
// Runs a command to its end.
Completed RunCommand(const std::vector<std::string>& args, double seconds,
                     const std::string& input = "");

}  // namespace tandem
