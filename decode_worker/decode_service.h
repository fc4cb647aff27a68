// The RPC edge of the decode worker: one server-streaming call per request.
#pragma once

#include "grpcpp/grpcpp.h"

#include "common/base/work_pool.h"
#include "decode_worker/intake.h"
#include "tandem/internal/v1/decode.grpc.pb.h"

namespace tandem::decode {

// Thread-safe. Reactions never block: they push to the loop's inbox and write what its stream
// holds. Nor do they do what grows with a prompt: requests come as raw bytes, and long ones are
// read on a thread of their own, so that the tokens of others do not wait in gRPC's threads.
class DecodeService final
    : public internal::v1::Decode::WithRawCallbackMethod_Generate<internal::v1::Decode::Service> {
 public:
  // `intake` outlives the service and every call.
  explicit DecodeService(Intake* intake);

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Generate(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request) override;

 private:
  Intake* const intake_;
  WorkPool readers_;
};

}  // namespace tandem::decode
