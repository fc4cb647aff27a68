// Values of the decode worker <-> messages. Functions without state: thread-safe. No gRPC.
//
// What comes from the wire is validated here, because a worker must survive any peer. Errors are
// INVALID_ARGUMENT with a google.rpc.BadRequest that names the field.
#pragma once

#include <string>

#include "absl/status/statusor.h"

#include "decode_worker/prefill_caller.h"
#include "decode_worker/request.h"
#include "tandem/internal/v1/decode.pb.h"
#include "tandem/internal/v1/prefill.pb.h"

namespace tandem::decode {

// What a request is measured against.
struct RequestLimits {
  int vocab_size = 0;
  int max_model_len = 0;  // tokens
};

// All of Work that the request says; not its id and its times.
absl::StatusOr<Work> WorkFromProto(const internal::v1::DecodeRequest& request,
                                   const RequestLimits& limits);

// How this worker introduces itself to prefill workers.
struct CallerIdentity {
  std::string kv_transport = "auto";
  std::string kv_address;  // HOST:PORT of this worker's KV listener
  std::string worker_id;
  int num_blocks = 0;  // of this worker's pool
  std::string capability_digest;
};

internal::v1::PrefillRequest CallToProto(const PrefillCall& call, const CallerIdentity& identity);
// What the worker that has `call` wants of it. INVALID_ARGUMENT for what it was not offered.
absl::StatusOr<BlocksWanted> WantedFromProto(const internal::v1::KvTarget& wanted,
                                             const PrefillCall& call);
// INTERNAL for an answer that makes no sense: that is the prefill worker's fault, not the
// request's.
absl::StatusOr<PrefillOutcome> OutcomeFromProto(const internal::v1::PrefillResponse& response,
                                                int vocab_size);

}  // namespace tandem::decode
