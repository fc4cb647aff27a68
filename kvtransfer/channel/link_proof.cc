#include "kvtransfer/channel/link_proof.h"

#include "absl/strings/escaping.h"

#include "common/auth/proof.h"
#include "common/base/status.h"
#include "kvtransfer/channel/control_frames.h"

namespace tandem::kvtransfer {
namespace {

// Of CHALLENGE, and the beginning of PROOF.
struct Introduction {
  std::string nonce;
  std::string worker_id;
};

absl::Status SendText(KvConnection* connection, FrameType type, const std::string& payload,
                      absl::Duration timeout) {
  FrameHeader header;
  header.type = type;
  return SendControl(connection, header, payload, timeout);
}

// The payload of the next frame, which must be of `type`.
absl::StatusOr<std::string> ReceiveText(KvConnection* connection, FrameType type,
                                        absl::Duration timeout) {
  TANDEM_ASSIGN_OR_RETURN(const FrameHeader header, connection->ReceiveHeader(timeout));
  if (header.type != type && header.type != FrameType::kRefuse) {
    return InvalidArgument("expected {}, got {}", FrameTypeName(type), FrameTypeName(header.type));
  }
  TANDEM_ASSIGN_OR_RETURN(std::string payload, ReceiveControl(connection, header, timeout));
  if (header.type == type) return payload;
  return FailedPrecondition("{} refused the connection: {}", connection->peer(),
                            absl::CEscape(payload));
}

// Takes an introduction from the end of `payload`, whose first `before` bytes are something else.
absl::StatusOr<Introduction> ParseIntroduction(std::string_view payload, size_t before) {
  const size_t id_at = before + kNonceBytes;
  if (payload.size() <= id_at || payload.size() > id_at + kMaxPartyIdBytes) {
    return InvalidArgument("malformed introduction of {} bytes", payload.size());
  }
  return Introduction{std::string(payload.substr(before, kNonceBytes)),
                      std::string(payload.substr(id_at))};
}

absl::Status NoProof(std::string_view who) {
  return absl::UnauthenticatedError(fmt::format(
      "the {} does not prove the cluster secret (TANDEM_CLUSTER_SECRET must be the same)", who));
}

}  // namespace

absl::StatusOr<std::string> ProveToSender(KvConnection* connection, const KvParty& self,
                                          absl::Duration timeout) {
  const std::string nonce = MakeNonce();
  TANDEM_RETURN_IF_ERROR(
      SendText(connection, FrameType::kChallenge, nonce + std::string(self.worker_id), timeout));
  TANDEM_ASSIGN_OR_RETURN(const std::string payload,
                          ReceiveText(connection, FrameType::kProof, timeout));
  TANDEM_ASSIGN_OR_RETURN(const Introduction sender, ParseIntroduction(payload, kProofBytes));
  if (!CheckProof(self.secret, ProofPurpose::kKvSender,
                  {sender.worker_id, sender.nonce, self.worker_id, nonce},
                  std::string_view(payload).substr(0, kProofBytes))) {
    const absl::Status why = NoProof("sender");
    (void)SendStatus(connection, FrameType::kRefuse, {}, why, timeout);
    return why;
  }
  TANDEM_RETURN_IF_ERROR(SendText(connection, FrameType::kProved,
                                  Prove(self.secret, ProofPurpose::kKvReceiver,
                                        {sender.worker_id, sender.nonce, self.worker_id, nonce}),
                                  timeout));
  return sender.worker_id;
}

absl::StatusOr<std::string> ProveToReceiver(KvConnection* connection, const KvParty& self,
                                            std::string_view expected, absl::Duration timeout) {
  TANDEM_ASSIGN_OR_RETURN(const std::string payload,
                          ReceiveText(connection, FrameType::kChallenge, timeout));
  TANDEM_ASSIGN_OR_RETURN(const Introduction receiver, ParseIntroduction(payload, 0));
  if (!expected.empty() && receiver.worker_id != expected) {
    return FailedPrecondition("{} is worker {}, not {}", connection->peer(),
                              absl::CEscape(receiver.worker_id), expected);
  }
  const std::string nonce = MakeNonce();
  const std::string proof = Prove(self.secret, ProofPurpose::kKvSender,
                                  {self.worker_id, nonce, receiver.worker_id, receiver.nonce});
  TANDEM_RETURN_IF_ERROR(SendText(connection, FrameType::kProof,
                                  proof + nonce + std::string(self.worker_id), timeout));
  TANDEM_ASSIGN_OR_RETURN(const std::string answer,
                          ReceiveText(connection, FrameType::kProved, timeout));
  if (!CheckProof(self.secret, ProofPurpose::kKvReceiver,
                  {self.worker_id, nonce, receiver.worker_id, receiver.nonce}, answer)) {
    return NoProof("receiver");
  }
  return receiver.worker_id;
}

}  // namespace tandem::kvtransfer
