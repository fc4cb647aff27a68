#include "common/auth/proof.h"

#include <algorithm>
#include <array>

#include "common/base/hmac.h"
#include "common/base/host_port.h"
#include "common/base/status.h"
#include "common/base/transfer_id.h"

namespace tandem {
namespace {

std::string_view PurposeLabel(ProofPurpose purpose) {
  switch (purpose) {
    case ProofPurpose::kRpcKey:
      return "tandem 1 rpc key";
    case ProofPurpose::kKvReceiver:
      return "tandem 1 kv receiver";
    case ProofPurpose::kKvSender:
      return "tandem 1 kv sender";
    case ProofPurpose::kVouchKey:
      return "tandem 1 vouch key";
    case ProofPurpose::kKvAddress:
      return "tandem 1 kv address";
  }
  return "";
}

}  // namespace

std::string MakeNonce() { return RandomBytes(kNonceBytes); }

std::string Prove(std::string_view secret, ProofPurpose purpose,
                  std::initializer_list<std::string_view> parts) {
  std::string message;
  AppendWithLength(PurposeLabel(purpose), &message);
  for (const std::string_view part : parts) AppendWithLength(part, &message);
  return HmacSha256(secret, message);
}

bool CheckProof(std::string_view secret, ProofPurpose purpose,
                std::initializer_list<std::string_view> parts, std::string_view proof) {
  return EqualInConstantTime(Prove(secret, purpose, parts), proof);
}

absl::Status ValidateParty(const Party& party) {
  static constexpr std::array<std::string_view, 4> kRoles = {kRouterRole, kPrefillRole, kDecodeRole,
                                                             kOperatorRole};
  if (std::find(kRoles.begin(), kRoles.end(), party.role) == kRoles.end()) {
    return InvalidArgument("unknown role of {} bytes", party.role.size());
  }
  if (party.id.empty() || party.id.size() > kMaxPartyIdBytes) {
    return InvalidArgument("an id must have 1 to {} bytes, got {}", kMaxPartyIdBytes,
                           party.id.size());
  }
  return absl::OkStatus();
}

absl::Status RequireSecretBeyondLoopback(std::string_view secret, const std::string& flag,
                                         const std::string& address) {
  if (!secret.empty()) return absl::OkStatus();
  TANDEM_ASSIGN_OR_RETURN(const HostPort parsed, ParseHostPort(address));
  if (IsLoopback(parsed.host)) return absl::OkStatus();
  return InvalidArgument(
      "{} {} is reached from other hosts: set TANDEM_CLUSTER_SECRET, to the same random text for "
      "all processes of the cluster",
      flag, address);
}

}  // namespace tandem
