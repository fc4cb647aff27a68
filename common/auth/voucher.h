// The router's word to a prefill worker that a decode worker takes KV blocks at an address: a
// prefill worker dials no other. The decode worker passes it on with its calls.
//
// It is keyed by what only the router and that prefill worker know, and not by the cluster secret:
// who passes it on has that too. The key is told in the answer to Hello, and stays the same for as
// long as the router's process lives. Each router has its own.
#pragma once

#include <map>
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

// A prefill worker's half. Routers go by the addresses that it dials. Thread-safe.
class VoucherCheck {
 public:
  // Hello goes out to `router`, who may vouch before its answer is here. The key that it had holds
  // until then: it is the same one, unless another process listens there now.
  void Await(const std::string& router);
  void SetKey(const std::string& router, std::string key);
  // `router` is dialled no more.
  void Forget(const std::string& router);
  // PERMISSION_DENIED for what no router vouched for; UNAVAILABLE while one might have whose key is
  // awaited.
  absl::Status Check(std::string_view decode_worker, std::string_view kv_address,
                     std::string_view voucher) const;

 private:
  struct Router {
    std::string key;  // empty: none yet
    bool awaited = false;
  };

  mutable absl::Mutex mutex_;
  std::map<std::string, Router> routers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem
