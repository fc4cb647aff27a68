#include "router/request/request.h"

#include "absl/strings/escaping.h"
#include "fmt/format.h"

namespace tandem::router {

std::string LogName(const Request& request) {
  if (request.session_id.empty()) return request.id;
  return fmt::format("{} (session {})", request.id, absl::CHexEscape(request.session_id));
}

}  // namespace tandem::router
