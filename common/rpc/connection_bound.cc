#include "common/rpc/connection_bound.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <fcntl.h>
#include <limits>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "spdlog/spdlog.h"

#include "common/base/log_limiter.h"

namespace tandem {
namespace {

// For files, links between workers and the connections that this process opens itself; a small
// limit keeps an eighth.
constexpr rlim_t kKeptDescriptors = 64;
constexpr rlim_t kFew = 4096;

std::atomic<int> bound{0};

rlim_t DescriptorLimit() {
  rlimit limit;
  return getrlimit(RLIMIT_NOFILE, &limit) == 0 ? limit.rlim_cur : 0;
}

// Where even the kept ones are used up, one more: it is given back for a moment, so that the
// connection can be taken and closed.
class SpareDescriptor {
 public:
  SpareDescriptor() : fd_(Open()) {}
  bool Refuse(int listener) {
    absl::MutexLock lock(&mutex_);
    if (fd_ < 0) return false;
    close(fd_);
    const auto taken = static_cast<int>(syscall(SYS_accept4, listener, nullptr, nullptr, 0));
    if (taken >= 0) close(taken);
    fd_ = Open();
    return taken >= 0;
  }

 private:
  static int Open() { return open("/dev/null", O_RDONLY | O_CLOEXEC); }

  absl::Mutex mutex_;
  int fd_ ABSL_GUARDED_BY(mutex_);
};

SpareDescriptor& Spare() {
  static auto* const spare = new SpareDescriptor;
  return *spare;
}

void LogRefusal() {
  static auto* const limiter = new LogLimiter;
  if (!limiter->Allow()) return;
  spdlog::error(
      "a connection was refused: {} of at most {} descriptors are in use (ulimit -n; LimitNOFILE= "
      "of a systemd unit){}",
      bound.load(), DescriptorLimit(), limiter->Withheld());
}

}  // namespace

void BoundConnections() {
  rlimit limit;
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  if (limit.rlim_cur != limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit) != 0) spdlog::warn("cannot have more descriptors");
  }
  const rlim_t limited = DescriptorLimit();
  const rlim_t most = limited - std::min(kKeptDescriptors, limited / 8);
  Spare();
  bound = static_cast<int>(std::min<rlim_t>(most, std::numeric_limits<int>::max()));
}

int ConnectionBound() { return bound; }

void WarnOfFewDescriptors() {
  const rlim_t limit = DescriptorLimit();
  if (limit >= kFew) return;
  spdlog::warn(
      "only {} descriptors may be open: clients beyond about {} connections will be refused; raise "
      "the hard limit (ulimit -Hn; LimitNOFILE= of a systemd unit)",
      limit, ConnectionBound());
}

}  // namespace tandem

// A descriptor's number says how many are in use: the kernel gives the lowest that is free.
extern "C" __attribute__((visibility("default"))) int accept4(int listener, sockaddr* address,
                                                              socklen_t* length, int flags) {
  const socklen_t room = length != nullptr ? *length : 0;
  while (true) {
    if (length != nullptr) *length = room;
    const auto fd = static_cast<int>(syscall(SYS_accept4, listener, address, length, flags));
    const int most = tandem::bound;
    if (most == 0) return fd;
    if (fd >= 0 && fd < most) return fd;
    if (fd >= 0) {
      close(fd);
    } else if ((errno != EMFILE && errno != ENFILE) || !tandem::Spare().Refuse(listener)) {
      return fd;
    }
    tandem::LogRefusal();
  }
}
