// Proof of the cluster secret between processes: HMAC-SHA256 over what it is for and what it binds.
// docs/adr/006-who-may-talk-to-whom.md says who proves what, when, and what an observer gains.
//
// Pure functions, thread-safe. Nothing here is derived from the secret alone: every proof binds a
// value that is new each time (a nonce, or a key of this process), so that it proves nothing again.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string>
#include <string_view>

#include "absl/status/status.h"

namespace tandem {

// One process of a cluster, as it presents itself.
struct Party {
  std::string role;  // one of the names below
  std::string id;    // of the worker or router; for people and logs

  bool operator==(const Party&) const = default;
};

inline constexpr char kRouterRole[] = "router";
inline constexpr char kPrefillRole[] = "prefill";
inline constexpr char kDecodeRole[] = "decode";      // unified workers too
inline constexpr char kOperatorRole[] = "operator";  // the command line

// What a proof is for: the same parts under another purpose give another proof, so that none can be
// taken from one place to another, or be sent back to whom it came from.
enum class ProofPurpose {
  kRpcKey,      // of an RPC peer: "this key is mine"
  kKvReceiver,  // of a KV connection's receiver
  kKvSender,    // of its sender
  kVouchKey,    // of a prefill worker; and what it vouches for, both common/auth/voucher.h
  kKvAddress,
};

inline constexpr size_t kNonceBytes = 32;
inline constexpr size_t kProofBytes = 32;
inline constexpr size_t kMaxPartyIdBytes = 128;

// Fresh random bytes.
std::string MakeNonce();

// kProofBytes of HMAC-SHA256, keyed by the secret, over the purpose and each part with its length.
std::string Prove(std::string_view secret, ProofPurpose purpose,
                  std::initializer_list<std::string_view> parts);
// Whether `proof` is what Prove() gives. Takes as long for any wrong proof of kProofBytes.
bool CheckProof(std::string_view secret, ProofPurpose purpose,
                std::initializer_list<std::string_view> parts, std::string_view proof);

// INVALID_ARGUMENT unless the role is known and the id has 1 to kMaxPartyIdBytes bytes.
absl::Status ValidateParty(const Party& party);

// What a process that listens beyond this host must have; INVALID_ARGUMENT names `flag` and says
// what to set where the host of `address` is not loopback and there is no secret.
absl::Status RequireSecretBeyondLoopback(std::string_view secret, const std::string& flag,
                                         const std::string& address);

}  // namespace tandem
