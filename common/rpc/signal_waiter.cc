#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "common/base/check.h"
#include "common/rpc/server.h"

namespace tandem {

SignalWaiter::SignalWaiter() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  signal_fd_ = signalfd(-1, &signals, SFD_CLOEXEC);
  wake_fd_ = eventfd(0, EFD_CLOEXEC);
  TANDEM_CHECK(signal_fd_ >= 0 && wake_fd_ >= 0, "no file descriptors: {}", std::strerror(errno));
}

SignalWaiter::~SignalWaiter() {
  close(signal_fd_);
  close(wake_fd_);
}

int SignalWaiter::Wait() {
  pollfd fds[2] = {{.fd = signal_fd_, .events = POLLIN, .revents = 0},
                   {.fd = wake_fd_, .events = POLLIN, .revents = 0}};
  while (true) {
    if (poll(fds, 2, -1) < 0) continue;  // EINTR
    if (fds[0].revents != 0) {
      signalfd_siginfo info;
      if (read(signal_fd_, &info, sizeof(info)) == sizeof(info)) {
        return static_cast<int>(info.ssi_signo);
      }
    }
    if (fds[1].revents != 0) {
      uint64_t count = 0;
      if (read(wake_fd_, &count, sizeof(count)) == sizeof(count)) return 0;
    }
  }
}

void SignalWaiter::Wake() {
  const uint64_t one = 1;
  // Fails only where 2^64 - 2 wakes are pending.
  [[maybe_unused]] const ssize_t written = write(wake_fd_, &one, sizeof(one));
}

}  // namespace tandem
