#include "tests/support/process.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <thread>
#include <unistd.h>
#include <utility>

#include "tests/support/deadline.h"

namespace tandem {
namespace {

std::vector<char*> Pointers(std::vector<std::string>& strings) {
  std::vector<char*> out;
  for (std::string& s : strings) out.push_back(s.data());
  out.push_back(nullptr);
  return out;
}

}  // namespace

std::unique_ptr<Process> Process::Spawn(const std::vector<std::string>& args,
                                        const std::vector<std::string>& env,
                                        const std::string& stderr_path) {
  signal(SIGPIPE, SIG_IGN);
  int in[2], out[2];
  if (pipe2(in, O_CLOEXEC) != 0 || pipe2(out, O_CLOEXEC) != 0) std::abort();
  std::vector<std::string> arg_copy = args, env_copy;
  for (char** e = environ; *e != nullptr; ++e) env_copy.push_back(*e);
  env_copy.insert(env_copy.end(), env.begin(), env.end());
  const std::vector<char*> argv = Pointers(arg_copy), envp = Pointers(env_copy);
  const pid_t pid = fork();
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    dup2(in[0], 0);
    dup2(out[1], 1);
    if (!stderr_path.empty()) {
      const int fd = open(stderr_path.c_str(), O_CREAT | O_APPEND | O_WRONLY, 0644);
      dup2(fd, 2);
    }
    execvpe(argv[0], argv.data(), envp.data());
    std::fprintf(stderr, "cannot run %s: %s\n", argv[0], std::strerror(errno));
    _exit(127);
  }
  close(in[0]);
  close(out[1]);
  std::unique_ptr<Process> process(new Process);
  process->pid_ = pid;
  process->stdin_ = in[1];
  process->stdout_ = out[0];
  return process;
}

Process::~Process() {
  if (!exit_code_.has_value()) {
    kill(pid_, SIGKILL);
    Wait(30);
  }
  CloseStdin();
  close(stdout_);
}

bool Process::FillBuffer(double seconds) {
  if (eof_) return false;
  pollfd fd{stdout_, POLLIN, 0};
  if (poll(&fd, 1, static_cast<int>(std::max(0.0, seconds) * 1000)) <= 0) return false;
  char chunk[65536];
  const ssize_t n = read(stdout_, chunk, sizeof(chunk));
  if (n <= 0) {
    eof_ = true;
    return false;
  }
  buffer_.append(chunk, static_cast<size_t>(n));
  return true;
}

std::optional<std::string> Process::ReadLine(double seconds) {
  const auto end = After(seconds);
  while (true) {
    const size_t newline = buffer_.find('\n');
    if (newline != std::string::npos) {
      std::string line = buffer_.substr(0, newline);
      buffer_.erase(0, newline + 1);
      return line;
    }
    if (!FillBuffer(SecondsUntil(end))) return std::nullopt;
  }
}

std::string Process::ReadAll(double seconds) {
  const auto end = After(seconds);
  while (FillBuffer(SecondsUntil(end))) {
  }
  return std::exchange(buffer_, "");
}

void Process::Write(const std::string& text) {
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t n = write(stdin_, text.data() + done, text.size() - done);
    if (n <= 0) return;
    done += static_cast<size_t>(n);
  }
}

void Process::CloseStdin() {
  if (stdin_ >= 0) close(stdin_);
  stdin_ = -1;
}

void Process::Signal(int signal) {
  if (!exit_code_.has_value()) kill(pid_, signal);
}

std::optional<int> Process::Wait(double seconds) {
  const auto end = After(seconds);
  while (!exit_code_.has_value()) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    } else if (SecondsUntil(end) <= 0) {
      return std::nullopt;
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }
  return exit_code_;
}

Completed RunCommand(const std::vector<std::string>& args, double seconds,
                     const std::string& input) {
  TempDir dir;
  const std::string err = dir.path() + "/stderr";
  auto process = Process::Spawn(args, {}, err);
  process->Write(input);
  process->CloseStdin();
  Completed completed;
  completed.out = process->ReadAll(seconds);
  completed.exit_code = process->Wait(5).value_or(-1);
  completed.err = ReadWholeFile(err);
  return completed;
}

}  // namespace tandem
