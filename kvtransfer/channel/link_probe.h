// The link self-test at channel set-up: a short burst, so that a slow path is never silent.
#pragma once

#include <cstddef>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

inline constexpr size_t kProbeBurstBytes = size_t{8} << 20;

// Sends PROBE frames for at most kProbeBurstBytes or 20 ms, then waits for the peer to have read
// them. Returns bytes per second.
absl::StatusOr<double> ProbeLink(KvConnection* connection, absl::Duration timeout);

}  // namespace tandem::kvtransfer
