#include "kvtransfer/channel/link_probe.h"

#include <algorithm>
#include <vector>

#include "common/base/clock.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"

namespace tandem::kvtransfer {

absl::StatusOr<double> ProbeLink(KvConnection* connection, absl::Duration timeout) {
  constexpr size_t kFrameBytes = 256 << 10;
  constexpr absl::Duration kBurst = absl::Milliseconds(20);
  const std::vector<std::byte> zeros(kFrameBytes);
  const KvPiece piece = {zeros.data(), zeros.size(), 0};
  FrameHeader probe;
  probe.type = FrameType::kProbe;
  probe.payload_bytes = kFrameBytes;
  const absl::Time start = Clock::Real()->Now();
  size_t sent = 0;
  while (sent < kProbeBurstBytes && Clock::Real()->Now() - start < kBurst) {
    TANDEM_RETURN_IF_ERROR(connection->Send(probe, {&piece, 1}, timeout));
    sent += kFrameBytes;
  }
  FrameHeader end;
  end.type = FrameType::kProbeEnd;
  TANDEM_RETURN_IF_ERROR(SendControl(connection, end, "", timeout));
  TANDEM_ASSIGN_OR_RETURN(const FrameHeader reply, connection->ReceiveHeader(timeout));
  if (reply.type != FrameType::kProbeAck) {
    return InvalidArgument("expected PROBE_ACK, got {}", FrameTypeName(reply.type));
  }
  const absl::Duration elapsed = std::max(Clock::Real()->Now() - start, absl::Microseconds(1));
  return static_cast<double>(sent) / absl::ToDoubleSeconds(elapsed);
}

}  // namespace tandem::kvtransfer
