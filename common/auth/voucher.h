// The router's word to a prefill worker that a decode worker takes KV blocks at an address: a
// prefill worker dials no other. The decode worker passes it on with its calls.
//
// It is keyed by what only the router and that prefill worker know, and not by the cluster secret:
// who passes it on has that too. The key is told in the answer to Hello, and stays the same for as
// long as the router's process lives.
#pragma once

#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"

namespace tandem {

// The key of one prefill worker; `root` is random and never leaves the router.
std::string VouchKeyFor(std::string_view root, std::string_view prefill_worker);
std::string Vouch(std::string_view key, std::string_view decode_worker,
                  std::string_view kv_address);

// A prefill worker's half. Thread-safe.
class VoucherCheck {
 public:
  void SetKey(std::string key);
  // UNAVAILABLE before the first key, PERMISSION_DENIED for what the router did not vouch for.
  absl::Status Check(std::string_view decode_worker, std::string_view kv_address,
                     std::string_view voucher) const;

 private:
  mutable absl::Mutex mutex_;
  std::string key_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem
