#include "cli/http_url.h"

#include <algorithm>
#include <string_view>

#include "fmt/format.h"

#include "common/base/host_port.h"
#include "common/base/status.h"

namespace tandem::cli {

std::string HttpUrl::Origin() const { return "http://" + HostPort{host, port}.ToString(); }

absl::StatusOr<HttpUrl> ParseHttpUrl(const std::string& flag, const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  if (!url.starts_with(kScheme)) {
    return InvalidArgument("{} must be http://HOST:PORT, got '{}'", flag, url);
  }
  const std::string rest = url.substr(kScheme.size());
  const size_t slash = std::min(rest.find('/'), rest.size());
  std::string authority = rest.substr(0, slash);
  const bool has_port = authority.find(':', authority.rfind(']') + 1) != std::string::npos;
  if (!has_port) authority += ":80";
  const absl::StatusOr<HostPort> address = ParseHostPort(authority);
  if (!address.ok() || address->host.empty() || address->port == 0) {
    return InvalidArgument("{} must be http://HOST:PORT, got '{}'", flag, url);
  }
  HttpUrl out{address->host, address->port, rest.substr(slash)};
  while (out.path.ends_with('/')) out.path.pop_back();
  return out;
}

}  // namespace tandem::cli
