// Values of the prefill worker <-> messages. Functions without state: thread-safe. No gRPC.
#pragma once

#include <string>

#include "absl/status/statusor.h"

#include "prefill_worker/request.h"
#include "tandem/internal/v1/prefill.pb.h"

namespace tandem::prefill {

// What a request is measured against.
struct RequestLimits {
  std::string worker_id;
  std::string capability_digest;  // callers must present the same
  int vocab_size = 0;
  int max_model_len = 0;  // tokens
  int block_size = 16;    // tokens
  int num_blocks = 0;     // of this worker's pool
};

// All of Work that the request says; errors name the field. INVALID_ARGUMENT, or
// FAILED_PRECONDITION for another capability digest.
absl::StatusOr<Work> WorkFromProto(const internal::v1::PrefillRequest& request,
                                   const RequestLimits& limits);
internal::v1::PrefillResponse OutcomeToProto(const Outcome& outcome, const std::string& worker_id);
// `num_blocks`: of this worker's pool.
internal::v1::KvTarget WantedToProto(const Wanted& wanted, int num_blocks);

}  // namespace tandem::prefill
