#include "kvtransfer/transport/posix_fd.h"

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>

#include "common/base/clock.h"
#include "common/base/status.h"

namespace tandem::kvtransfer {

std::string ErrnoText(int error) { return std::strerror(error); }

absl::Status Poll(std::span<pollfd> entries, absl::Duration timeout) {
  const absl::Time deadline = Clock::Real()->Now() + timeout;
  while (true) {
    int wait_ms = -1;
    if (timeout != absl::InfiniteDuration()) {
      const absl::Duration left = deadline - Clock::Real()->Now();
      wait_ms = static_cast<int>(std::clamp<int64_t>(
          absl::ToInt64Milliseconds(left + absl::Microseconds(999)), 0, 1 << 30));
    }
    const int n = poll(entries.data(), entries.size(), wait_ms);
    if (n > 0) return absl::OkStatus();
    if (n == 0) return DeadlineExceeded("no progress for {}", absl::FormatDuration(timeout));
    if (errno != EINTR) return Internal("poll: {}", ErrnoText(errno));
  }
}

absl::Status Poll(int fd, short events, absl::Duration timeout) {
  pollfd entry = {fd, events, 0};
  return Poll({&entry, 1}, timeout);
}

}  // namespace tandem::kvtransfer
