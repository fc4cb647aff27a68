// The RPC edge of the prefill worker: one call per prompt.
#pragma once

#include "absl/status/status.h"
#include "grpcpp/grpcpp.h"

#include "common/auth/voucher.h"
#include "common/base/work_pool.h"
#include "prefill_worker/intake.h"
#include "tandem/internal/v1/prefill.grpc.pb.h"

namespace tandem::prefill {

// Thread-safe. Reactions never block: they push to the loop's inbox.
class PrefillService final : public internal::v1::Prefill::CallbackService {
 public:
  // `intake` outlives the service and every call, as does `vouchers`, which looks at where blocks
  // are to go; null: a worker without a router, which ships wherever its callers are. `writers`, a
  // pool without a bound, writes long answers, which the loop does not wait for.
  PrefillService(Intake* intake, const VoucherCheck* vouchers, WorkPool* writers)
      : intake_(intake), vouchers_(vouchers), writers_(writers) {}

  grpc::ServerWriteReactor<internal::v1::PrefillEvent>* Prefill(
      grpc::CallbackServerContext* context, const internal::v1::PrefillRequest* request) override;

 private:
  absl::Status CheckTarget(const grpc::AuthContext& caller,
                           const internal::v1::KvTarget& target) const;

  Intake* const intake_;
  const VoucherCheck* const vouchers_;
  WorkPool* const writers_;
};

}  // namespace tandem::prefill
