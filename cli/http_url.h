// Addresses of HTTP servers, as users give them. Pure.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace tandem::cli {

struct HttpUrl {
  std::string host;
  int port = 80;
  std::string path;  // "" or "/v1": without a slash at its end

  // What httplib calls a client's address.
  std::string Origin() const;
};

// "http://HOST[:PORT][/PATH]"; INVALID_ARGUMENT names `flag` and what is wrong.
absl::StatusOr<HttpUrl> ParseHttpUrl(const std::string& flag, const std::string& url);

}  // namespace tandem::cli
