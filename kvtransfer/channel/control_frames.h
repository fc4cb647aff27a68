// Frames other than DATA: small payloads, digested, sent and received whole.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/channel/transfer_key.h"
#include "kvtransfer/transport/kv_connection.h"

namespace tandem::kvtransfer {

// For a receiver's replies. They are small and rare; a peer whose buffer is full of them does not
// read and is dead.
inline constexpr absl::Duration kReplyTimeout = absl::Seconds(2);

// Sends `header` with `payload`, whose length and digest it fills in.
absl::Status SendControl(KvConnection* connection, FrameHeader header, std::string_view payload,
                         absl::Duration timeout);

// Sends a frame of `type` about one transfer that carries a status: its code and its message, which
// is cut to fit.
absl::Status SendStatus(KvConnection* connection, FrameType type, const TransferKey& key,
                        const absl::Status& status, absl::Duration timeout);

// The payload of the frame whose `header` was just received. DATA_LOSS if it is not what its digest
// says. Allocates header.payload_bytes, so callers bound it first.
absl::StatusOr<std::string> ReceiveControl(KvConnection* connection, const FrameHeader& header,
                                           absl::Duration timeout);

// The status that a frame carries; OK for code 0.
absl::Status StatusOfFrame(const FrameHeader& header, std::string_view message);

}  // namespace tandem::kvtransfer
