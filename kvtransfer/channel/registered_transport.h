// A transport that one end may use, and its own pool as that transport reaches it.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

#include "kvtransfer/store/kv_store.h"
#include "kvtransfer/transport/kv_transport.h"

namespace tandem::kvtransfer {

struct RegisteredTransport {
  KvTransport* transport = nullptr;
  std::unique_ptr<KvRegistration> registration;
};

// Registers `store` with the transports that `text` names (ParseTransports), in that order.
absl::StatusOr<std::vector<RegisteredTransport>> RegisterTransports(const std::string& text,
                                                                    const KvStore* store,
                                                                    const LinkTimeouts& timeouts);

}  // namespace tandem::kvtransfer
