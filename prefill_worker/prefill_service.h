// The RPC edge of the prefill worker: one unary call per prompt.
#pragma once

#include "prefill_worker/intake.h"
#include "tandem/internal/v1/prefill.grpc.pb.h"

namespace tandem::prefill {

// Thread-safe. Reactions never block: they push to the loop's inbox.
class PrefillService final : public internal::v1::Prefill::CallbackService {
 public:
  // `intake` outlives the service and every call.
  explicit PrefillService(Intake* intake) : intake_(intake) {}

  grpc::ServerUnaryReactor* Prefill(grpc::CallbackServerContext* context,
                                    const internal::v1::PrefillRequest* request,
                                    internal::v1::PrefillResponse* response) override;

 private:
  Intake* const intake_;
};

}  // namespace tandem::prefill
