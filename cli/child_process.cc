#include "cli/child_process.h"

#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "common/base/status.h"

extern char** environ;

namespace tandem::cli {
namespace {

std::vector<char*> Pointers(std::vector<std::string>* strings) {
  std::vector<char*> out;
  for (std::string& text : *strings) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

std::vector<std::string> MergedEnvironment(const std::map<std::string, std::string>& added) {
  std::vector<std::string> out;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    if (added.count(text.substr(0, text.find('='))) == 0) out.push_back(text);
  }
  for (const auto& [name, value] : added) out.push_back(name + "=" + value);
  return out;
}

// Between fork and exec of a process with threads: async-signal-safe calls only.
[[noreturn]] void BecomeChild(pid_t parent, char* const* argv, char* const* envp, int out_fd,
                              int err_fd, int failure_fd) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(1);  // the parent died before prctl
  setpgid(0, 0);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, nullptr);
  signal(SIGPIPE, SIG_DFL);
  const int null_fd = open("/dev/null", O_RDONLY);
  dup2(null_fd, STDIN_FILENO);
  dup2(out_fd, STDOUT_FILENO);
  dup2(err_fd, STDERR_FILENO);
  execve(argv[0], argv, envp);
  const int error = errno;
  [[maybe_unused]] const ssize_t written = write(failure_fd, &error, sizeof(error));
  _exit(127);
}

}  // namespace

LineReader::~LineReader() {
  if (fd_ >= 0) close(fd_);
}

std::vector<std::string> LineReader::ReadLines() {
  std::vector<std::string> lines;
  char buffer[4096];
  while (fd_ >= 0) {
    const ssize_t n = read(fd_, buffer, sizeof(buffer));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) break;
    if (n <= 0) {
      close(fd_);
      fd_ = -1;
      if (!rest_.empty()) lines.push_back(std::move(rest_));
      rest_.clear();
      break;
    }
    rest_.append(buffer, static_cast<size_t>(n));
    for (size_t end; (end = rest_.find('\n')) != std::string::npos; rest_.erase(0, end + 1)) {
      lines.push_back(rest_.substr(0, end));
    }
  }
  return lines;
}

absl::StatusOr<std::unique_ptr<ChildProcess>> ChildProcess::Start(
    const std::vector<std::string>& arguments,
    const std::map<std::string, std::string>& environment) {
  std::vector<std::string> argv = arguments;
  std::vector<std::string> envp = MergedEnvironment(environment);
  const std::vector<char*> argv_pointers = Pointers(&argv);
  const std::vector<char*> envp_pointers = Pointers(&envp);
  int out[2], err[2], failure[2];
  if (pipe2(out, O_CLOEXEC) != 0 || pipe2(err, O_CLOEXEC) != 0 || pipe2(failure, O_CLOEXEC) != 0) {
    return Internal("cannot start {}: {}", argv[0], std::strerror(errno));
  }
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid == 0) {
    BecomeChild(parent, argv_pointers.data(), envp_pointers.data(), out[1], err[1], failure[1]);
  }
  const int fork_error = errno;
  close(out[1]);
  close(err[1]);
  close(failure[1]);
  if (pid < 0) {
    for (const int fd : {out[0], err[0], failure[0]}) close(fd);
    return Internal("cannot start {}: {}", argv[0], std::strerror(fork_error));
  }
  fcntl(out[0], F_SETFL, O_NONBLOCK);
  fcntl(err[0], F_SETFL, O_NONBLOCK);
  std::unique_ptr<ChildProcess> child(new ChildProcess(pid, out[0], err[0]));
  int error = 0;
  const ssize_t n = read(failure[0], &error, sizeof(error));  // ends when exec closes it
  close(failure[0]);
  if (n == sizeof(error)) {
    return NotFound("cannot start {}: {}", argv[0], std::strerror(error));
  }
  return child;
}

ChildProcess::~ChildProcess() {
  if (Poll().has_value()) return;
  Signal(SIGKILL);
  Wait();
}

void ChildProcess::Signal(int signal) {
  if (!status_.has_value()) kill(pid_, signal);
}

std::optional<int> ChildProcess::Poll() {
  int status = 0;
  if (!status_.has_value() && waitpid(pid_, &status, WNOHANG) == pid_) status_ = status;
  return status_;
}

int ChildProcess::Wait() {
  int status = 0;
  while (!status_.has_value()) {
    if (waitpid(pid_, &status, 0) == pid_) status_ = status;
  }
  return *status_;
}

std::string DescribeWaitStatus(int status) {
  if (WIFEXITED(status)) return fmt::format("exit code {}", WEXITSTATUS(status));
  return fmt::format("signal {} ({})", WTERMSIG(status), strsignal(WTERMSIG(status)));
}

}  // namespace tandem::cli
