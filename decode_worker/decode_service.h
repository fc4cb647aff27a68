// The RPC edge of the decode worker: one server-streaming call per request.
#pragma once

#include <atomic>
#include <cstdint>

#include "common/base/clock.h"
#include "decode_worker/loop_event.h"
#include "tandem/internal/v1/decode.grpc.pb.h"

namespace tandem::decode {

// Thread-safe. Reactions never block: they validate, push to the loop's inbox and write what its
// stream holds.
class DecodeService final : public internal::v1::Decode::CallbackService {
 public:
  // Both outlive the service and every call.
  DecodeService(DecodeInbox* inbox, Clock* clock, int vocab_size);

  grpc::ServerWriteReactor<internal::v1::TokenEvent>* Generate(
      grpc::CallbackServerContext* context, const internal::v1::DecodeRequest* request) override;

 private:
  DecodeInbox* const inbox_;
  Clock* const clock_;
  const int vocab_size_;
  std::atomic<uint64_t> last_id_ = 0;
};

}  // namespace tandem::decode
