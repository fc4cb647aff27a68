#include "cli/command.h"

#include "fmt/format.h"

#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::cli {

std::optional<int> ParseOrExit(FlagSet* flags, const Arguments& arguments) {
  const absl::Status status = flags->Parse(arguments);
  if (!status.ok()) {
    fmt::print(stderr, "{}: {}\n", flags->program(), MessageOf(status));
    return kExitUsage;
  }
  if (flags->HelpRequested()) {
    fmt::print("{}", flags->Help());
    return kExitOk;
  }
  return std::nullopt;
}

void AddServerFlag(FlagSet* flags, std::string* server) {
  *server = kDefaultServer;
  flags->Add("--server", server, "the router's address", "HOST:PORT");
  flags->SetEnvironment("--server", "TANDEM_SERVER");
}

std::string DescribeError(const absl::Status& status) {
  std::string out =
      fmt::format("{}: {}", absl::StatusCodeToString(status.code()), MessageOf(status));
  for (const FieldViolation& violation : FieldViolations(status)) {
    out += fmt::format(" (field {}", violation.field);
    if (status.message() != violation.description) out += ": " + violation.description;
    out += ")";
  }
  if (const auto delay = RetryAfter(status)) {
    out += fmt::format(" (try again in {:.1f} s)", absl::ToDoubleSeconds(*delay));
  }
  for (char& c : out) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  return out;
}

int Fail(const std::string& command, const absl::Status& status, const std::string& server) {
  const bool name_server = status.code() == absl::StatusCode::kUnavailable && !server.empty();
  fmt::print(stderr, "tandem {}: {}{}\n", command,
             name_server ? fmt::format("server {}: ", server) : "", DescribeError(status));
  return kExitFailed;
}

}  // namespace tandem::cli
