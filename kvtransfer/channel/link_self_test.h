// The self-test of a link, made by the sender when the two ends have agreed on a transport and
// before anything is shipped: a pattern goes over and must come out right, then rates and the
// latency are measured. What moves is scratch memory of the transport, never a block
// (KvWriter::Probe).
#pragma once

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/base/clock.h"
#include "common/base/kv_link.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

struct LinkSelfTestOptions {
  // What the rates may take, about: what would take longer is cut, or left out. Zero: no rates.
  absl::Duration time = absl::Milliseconds(200);
  absl::Duration io_timeout = absl::Seconds(20);  // without any progress
  Clock* clock = Clock::Real();                   // not owned
};

// Receivers take no more of one connection: twice what a sender moves, for a bad network repeats
// frames, but does not go on for ever.
inline constexpr size_t kMaxProbedBytes = size_t{160} << 20;
inline constexpr int kMaxProbes = 1024;

// On the thread that `writer` and `connection`, its own, belong to. DATA_LOSS: the pattern came out
// wrong; other errors end the connection.
absl::StatusOr<KvLinkTest> TestLink(KvConnection* connection, KvWriter* writer,
                                    const LinkSelfTestOptions& options);

}  // namespace tandem::kvtransfer
