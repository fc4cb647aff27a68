// "HOST:PORT" addresses, and why one of them cannot be listened on.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace tandem {

struct HostPort {
  std::string host;  // IPv6 without its brackets
  int port = 0;      // 0: any

  std::string ToString() const;
  bool operator==(const HostPort&) const = default;
};

// "127.0.0.1:8000", "name:0", "[::1]:8000". InvalidArgument names what is wrong.
absl::StatusOr<HostPort> ParseHostPort(std::string_view address);

// Whether only processes of this machine reach what listens on `host`, an address or "localhost".
bool IsLoopback(std::string_view host);

// Tries to bind `address` and says what is in the way ("address already in use: another process
// listens there"), "unknown reason" if the bind succeeds. Made for the message after a library has
// failed to listen without saying why.
std::string WhyCannotListen(const std::string& address);

}  // namespace tandem
