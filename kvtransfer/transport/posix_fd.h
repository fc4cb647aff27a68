// Small things that every transport over POSIX descriptors needs.
#pragma once

#include <poll.h>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

#include "common/base/fd.h"

namespace tandem::kvtransfer {

std::string ErrnoText(int error);

// Waits until one of `entries` has an event. OK also for errors of a descriptor: the next call on
// it reports them. DEADLINE_EXCEEDED after `timeout`.
absl::Status Poll(std::span<pollfd> entries, absl::Duration timeout);
absl::Status Poll(int fd, short events, absl::Duration timeout);

}  // namespace tandem::kvtransfer
