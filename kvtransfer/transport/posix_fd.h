// Small things that every transport over POSIX descriptors needs.
#pragma once

#include <poll.h>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace tandem::kvtransfer {

std::string ErrnoText(int error);

// Owns a descriptor.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  Fd(Fd&& other) noexcept;
  Fd& operator=(Fd&& other) noexcept;
  ~Fd();
  int get() const { return fd_; }
  bool valid() const { return fd_ >= 0; }

 private:
  int fd_ = -1;
};

// Waits until one of `entries` has an event. OK also for errors of a descriptor: the next call on
// it reports them. DEADLINE_EXCEEDED after `timeout`.
absl::Status Poll(std::span<pollfd> entries, absl::Duration timeout);
absl::Status Poll(int fd, short events, absl::Duration timeout);

}  // namespace tandem::kvtransfer
