#include "common/auth/voucher.h"

#include <utility>

#include "common/auth/proof.h"
#include "common/base/status.h"

namespace tandem {

std::string VouchKeyFor(std::string_view root, std::string_view prefill_worker) {
  return Prove(root, ProofPurpose::kVouchKey, {prefill_worker});
}

std::string Vouch(std::string_view key, std::string_view decode_worker,
                  std::string_view kv_address) {
  return Prove(key, ProofPurpose::kKvAddress, {decode_worker, kv_address});
}

void VoucherCheck::SetKey(std::string key) {
  absl::MutexLock lock(&mutex_);
  key_ = std::move(key);
}

absl::Status VoucherCheck::Check(std::string_view decode_worker, std::string_view kv_address,
                                 std::string_view voucher) const {
  std::string key;
  {
    absl::MutexLock lock(&mutex_);
    key = key_;
  }
  if (key.empty()) return Unavailable("this worker has not joined its router yet");
  if (CheckProof(key, ProofPurpose::kKvAddress, {decode_worker, kv_address}, voucher)) {
    return absl::OkStatus();
  }
  return PermissionDenied("the router has not vouched for target.address");
}

}  // namespace tandem
