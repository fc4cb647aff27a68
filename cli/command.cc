#include "cli/command.h"

#include <unistd.h>

#include "fmt/format.h"

#include "cli/terminal.h"
#include "common/base/status.h"
#include "common/rpc/status.h"

namespace tandem::cli {

namespace {

// What gRPC says of an address where nobody listens ends with the cause, behind much else.
std::string Unreachable(const std::string& server, const absl::Status& status) {
  const std::string message = MessageOf(status);
  if (!message.starts_with("failed to connect")) return "";
  return fmt::format(
      "nothing answers at {} ({}); start a cluster with `tandem up`, or name another with --server",
      server, message.substr(message.rfind(": ") + 2));
}

}  // namespace

void Complain(const std::string& text) {
  fmt::print(stderr, "{}\n", WrappedFor(STDERR_FILENO, text));
}

std::optional<int> ParseOrExit(FlagSet* flags, const Arguments& arguments) {
  const absl::Status status = flags->Parse(arguments);
  if (!status.ok()) {
    Complain(fmt::format("{}: {}", flags->program(), MessageOf(status)));
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
  std::string error = DescribeError(status);
  if (absl::IsUnavailable(status) && !server.empty()) {
    const std::string unreachable = Unreachable(server, status);
    error = unreachable.empty() ? fmt::format("server {}: {}", server, error) : unreachable;
  }
  Complain(fmt::format("tandem {}: {}", command, error));
  return kExitFailed;
}

}  // namespace tandem::cli
