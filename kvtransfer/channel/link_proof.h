// The first words on a connection: both ends prove the cluster secret, before either says anything
// else (docs/adr/006-who-may-talk-to-whom.md).
//
//   receiver  CHALLENGE  its worker id, a nonce
//   sender    PROOF      its worker id, a nonce, HMAC("kv sender", both ids, both nonces)
//   receiver  PROVED     HMAC("kv receiver", both ids, both nonces); or REFUSE
//
// The receiver, whom anyone can dial, proves last: a stranger learns an id and a random number.
// Both proofs cover both nonces, so none that was heard serves again, and neither passes for the
// other.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "kvtransfer/transport/kv_connection.h"

namespace tandem::kvtransfer {

// A worker as one end of a connection.
struct KvParty {
  std::string_view secret;  // the cluster's
  std::string_view worker_id;
};

// The receiver's part; the sender's worker id. UNAUTHENTICATED if it does not prove the secret.
absl::StatusOr<std::string> ProveToSender(KvConnection* connection, const KvParty& self,
                                          absl::Duration timeout);
// The sender's part; the receiver's worker id. FAILED_PRECONDITION if that is not `expected`
// (empty: any), or if the receiver refuses; UNAUTHENTICATED if it does not prove the secret.
absl::StatusOr<std::string> ProveToReceiver(KvConnection* connection, const KvParty& self,
                                            std::string_view expected, absl::Duration timeout);

}  // namespace tandem::kvtransfer
