#include "kvtransfer/channel/control_frames.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {

absl::Status SendControl(KvConnection* connection, FrameHeader header, std::string_view payload,
                         absl::Duration timeout) {
  const auto* bytes = reinterpret_cast<const std::byte*>(payload.data());
  header.payload_bytes = static_cast<uint32_t>(payload.size());
  header.payload_digest = PayloadDigest({bytes, payload.size()});
  const ConstBytes part(bytes, payload.size());
  return connection->Send(header, {&part, payload.empty() ? 0u : 1u}, timeout);
}

absl::Status SendStatus(KvConnection* connection, FrameType type, const TransferKey& key,
                        const absl::Status& status, absl::Duration timeout) {
  constexpr size_t kMaxMessage = 512;
  FrameHeader header;
  header.type = type;
  header.id = key.id;
  header.epoch = key.epoch;
  header.code = static_cast<uint32_t>(status.code());
  const std::string message(status.message());
  return SendControl(connection, header, std::string_view(message).substr(0, kMaxMessage), timeout);
}

absl::StatusOr<std::string> ReceiveControl(KvConnection* connection, const FrameHeader& header,
                                           absl::Duration timeout) {
  std::string payload(header.payload_bytes, '\0');
  const MutableBytes bytes(reinterpret_cast<std::byte*>(payload.data()), payload.size());
  TANDEM_RETURN_IF_ERROR(ReceiveAll(connection, bytes, timeout));
  if (PayloadDigest(bytes) != header.payload_digest) {
    return DataLoss("{} frame from {} fails its digest", FrameTypeName(header.type),
                    connection->peer());
  }
  return payload;
}

absl::Status StatusOfFrame(const FrameHeader& header, std::string_view message) {
  return absl::Status(static_cast<absl::StatusCode>(header.code), std::string(message));
}

}  // namespace tandem::kvtransfer
