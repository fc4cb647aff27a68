#include "common/rpc/end_on_signal.h"

#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstring>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>
#include <utility>

#include "spdlog/spdlog.h"

#include "common/base/check.h"
#include "common/base/log.h"

namespace tandem {
namespace {

int SignalFd() {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  return signalfd(-1, &signals, SFD_CLOEXEC);
}

}  // namespace

EndOnSignal::EndOnSignal(std::string doing)
    : doing_(std::move(doing)), signal_fd_(SignalFd()), done_fd_(eventfd(0, EFD_CLOEXEC)) {
  TANDEM_CHECK(signal_fd_ >= 0 && done_fd_ >= 0, "no file descriptors: {}", std::strerror(errno));
  thread_ = std::thread([this] { Run(); });
}

EndOnSignal::~EndOnSignal() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(done_fd_, &one, sizeof(one));
  thread_.join();
  close(signal_fd_);
  close(done_fd_);
}

void EndOnSignal::Run() const {
  pollfd fds[2] = {{.fd = signal_fd_, .events = POLLIN, .revents = 0},
                   {.fd = done_fd_, .events = POLLIN, .revents = 0}};
  while (poll(fds, 2, -1) < 0) {  // EINTR
  }
  // A signal that is not read stays for who waits next.
  if (fds[1].revents != 0) return;
  spdlog::info("stopped by a signal while {}", doing_);
  FlushLog();
  // Other threads are at work: no destructors, which would take what they use.
  _exit(0);
}

}  // namespace tandem
