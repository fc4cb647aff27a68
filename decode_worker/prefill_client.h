// Asks prefill workers over gRPC.
#pragma once

#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "common/base/clock.h"
#include "decode_worker/loop_event.h"
#include "decode_worker/prefill_caller.h"
#include "tandem/internal/v1/prefill.grpc.pb.h"

namespace tandem::decode {

struct PrefillClientOptions {
  std::string kv_transport = "tcp";
  std::string kv_address;  // HOST:PORT of this worker's KV listener
  std::string worker_id;   // of this worker
  int num_blocks = 0;      // of this worker's pool
  std::string capability_digest;
  int vocab_size = 0;
};

// Thread-safe. One channel per address, kept.
class PrefillClient final : public PrefillCaller {
 public:
  // `inbox` and `clock` outlive the client.
  PrefillClient(PrefillClientOptions options, DecodeInbox* inbox, Clock* clock);
  // Cancels what is in flight and waits until gRPC has let go of it.
  ~PrefillClient() override;

  void Call(PrefillCall call) override;
  void Cancel(uint64_t call_id) override;

 private:
  using Stub = internal::v1::Prefill::Stub;
  struct Active;

  std::shared_ptr<Stub> StubFor(const std::string& address) ABSL_LOCKS_EXCLUDED(mutex_);
  void OnDone(const std::shared_ptr<Active>& active, const grpc::Status& status);

  const PrefillClientOptions options_;
  DecodeInbox* const inbox_;
  Clock* const clock_;
  absl::Mutex mutex_;
  absl::flat_hash_map<std::string, std::shared_ptr<Stub>> stubs_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<uint64_t, std::shared_ptr<Active>> active_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::decode
