// The RPC edge of the prefill worker: one unary call per prompt.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

#include "common/base/clock.h"
#include "prefill_worker/prefill_work.h"
#include "tandem/internal/v1/prefill.grpc.pb.h"

namespace tandem::prefill {

struct PrefillServiceOptions {
  std::string worker_id;
  std::string capability_digest;  // callers must present the same
  int vocab_size = 0;
  int max_model_len = 0;  // tokens
  int block_size = 16;    // tokens
};

// All of PrefillWork that the request says; errors name the field. INVALID_ARGUMENT, or
// FAILED_PRECONDITION for another capability digest.
absl::StatusOr<PrefillWork> WorkFromProto(const internal::v1::PrefillRequest& request,
                                          const PrefillServiceOptions& options);
void OutcomeToProto(const PrefillOutcome& outcome, const std::string& worker_id,
                    internal::v1::PrefillResponse* response);

// Thread-safe. Reactions never block: they validate and push to the loop's inbox.
class PrefillService final : public internal::v1::Prefill::CallbackService {
 public:
  // Both pointers outlive the service and every call.
  PrefillService(PrefillServiceOptions options, PrefillInbox* inbox, Clock* clock);

  grpc::ServerUnaryReactor* Prefill(grpc::CallbackServerContext* context,
                                    const internal::v1::PrefillRequest* request,
                                    internal::v1::PrefillResponse* response) override;

 private:
  const PrefillServiceOptions options_;
  PrefillInbox* const inbox_;
  Clock* const clock_;
  std::atomic<uint64_t> last_id_ = 0;
};

}  // namespace tandem::prefill
