#include "kvtransfer/channel/registered_transport.h"

#include "spdlog/spdlog.h"

#include "common/base/status.h"

namespace tandem::kvtransfer {

absl::StatusOr<std::vector<RegisteredTransport>> RegisterTransports(const std::string& text,
                                                                    const KvStore* store,
                                                                    const LinkTimeouts& timeouts) {
  TANDEM_ASSIGN_OR_RETURN(const std::vector<KvTransport*> chosen, ParseTransports(text));
  std::vector<RegisteredTransport> registered;
  absl::Status last;
  for (KvTransport* transport : chosen) {
    auto registration = transport->Register(store, timeouts);
    if (!registration.ok()) {
      last = registration.status();
      // Nobody asked for it by name where all are tried; and whoever says shm means what there is.
      const bool asked = text != "auto" && transport != ShmTransport();
      spdlog::log(asked ? spdlog::level::warn : spdlog::level::info,
                  "kv transport {} cannot be used here: {}", transport->name(), MessageOf(last));
      continue;
    }
    // The price of a pool that the transport cannot reach by itself is told, not hidden.
    if (store->HostAddress(0) == nullptr && transport->capabilities().host_memory) {
      spdlog::info(
          "kv transport {}: blocks are staged through memory of the host, because the KV "
          "pool is in memory that only copies reach",
          transport->name());
    }
    registered.push_back({transport, *std::move(registration)});
  }
  if (registered.empty()) return last;
  return registered;
}

}  // namespace tandem::kvtransfer
