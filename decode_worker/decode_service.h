// The RPC edge of the decode worker: one server-streaming call per request.
#pragma once

#include "decode_worker/intake.h"
#include "tandem/internal/v1/decode.grpc.pb.h"

namespace tandem::decode {

// Thread-safe. Reactions never block: they push to the loop's inbox and write what its stream
// holds.
class DecodeService final : public internal::v1::Decode::CallbackService {
 public:
  // `intake` outlives the service and every call.
  explicit DecodeService(Intake* intake) : intake_(intake) {}

  grpc::ServerWriteReactor<internal::v1::TokenEvent>* Generate(
      grpc::CallbackServerContext* context, const internal::v1::DecodeRequest* request) override;

 private:
  Intake* const intake_;
};

}  // namespace tandem::decode
