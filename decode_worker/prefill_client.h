// Asks prefill workers over gRPC.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "common/base/work_pool.h"
#include "common/rpc/cluster_credentials.h"
#include "decode_worker/decode_wire.h"
#include "decode_worker/event.h"
#include "decode_worker/prefill_caller.h"
#include "tandem/internal/v1/prefill.grpc.pb.h"

namespace tandem::decode {

// Thread-safe. One channel per worker, kept for as long as that is where it was. Long prompts
// become messages on a thread of their own: the loop, whose every step waits for Call, does nothing
// that grows with them.
class PrefillClient final : public PrefillCaller {
 public:
  // `inbox` and `clock` outlive the client.
  PrefillClient(CallerIdentity identity, std::shared_ptr<const ClusterCredentials> credentials,
                int vocab_size, EventInbox* inbox, Clock* clock);
  // Cancels what is in flight and waits until gRPC has let go of it.
  ~PrefillClient() override;

  void Call(PrefillCall call) override;
  void Cancel(uint64_t call_id) override;

 private:
  using Stub = internal::v1::Prefill::Stub;
  class Active;
  struct Connection {
    std::string address;
    std::shared_ptr<Stub> stub;
  };

  void Send(const std::shared_ptr<Active>& active);
  std::shared_ptr<Stub> StubFor(const PrefillPeer& peer) ABSL_LOCKS_EXCLUDED(mutex_);
  // Of a call; on gRPC's threads.
  void OnWanted(const PrefillCall& call, const internal::v1::KvTarget& wanted);
  void OnAnswer(const PrefillCall& call, const internal::v1::PrefillResponse& response);
  void OnFailure(const PrefillCall& call, const absl::Status& why, bool reached);
  void Forget(uint64_t call_id) ABSL_LOCKS_EXCLUDED(mutex_);

  const CallerIdentity identity_;
  const std::shared_ptr<const ClusterCredentials> credentials_;
  const int vocab_size_;
  EventInbox* const inbox_;
  Clock* const clock_;
  absl::Mutex mutex_;
  absl::flat_hash_map<std::string, Connection> connections_
      ABSL_GUARDED_BY(mutex_);  // by worker id
  absl::flat_hash_map<uint64_t, std::shared_ptr<Active>> active_ ABSL_GUARDED_BY(mutex_);
  WorkPool senders_;
};

}  // namespace tandem::decode
