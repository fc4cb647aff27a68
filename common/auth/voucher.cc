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

void VoucherCheck::Await(const std::string& router) {
  absl::MutexLock lock(&mutex_);
  routers_[router].awaited = true;
}

void VoucherCheck::SetKey(const std::string& router, std::string key) {
  absl::MutexLock lock(&mutex_);
  routers_[router] = {.key = std::move(key)};
}

void VoucherCheck::Forget(const std::string& router) {
  absl::MutexLock lock(&mutex_);
  routers_.erase(router);
}

absl::Status VoucherCheck::Check(std::string_view decode_worker, std::string_view kv_address,
                                 std::string_view voucher) const {
  absl::MutexLock lock(&mutex_);
  bool awaited = routers_.empty();
  for (const auto& [address, router] : routers_) {
    if (!router.key.empty() &&
        CheckProof(router.key, ProofPurpose::kKvAddress, {decode_worker, kv_address}, voucher)) {
      return absl::OkStatus();
    }
    awaited = awaited || router.awaited;
  }
  if (awaited) return Unavailable("this worker has not joined all of its routers yet");
  return PermissionDenied("no router has vouched for target.address");
}

}  // namespace tandem
