// The flags of the commands that talk with a router's public API.
#pragma once

#include <optional>
#include <string>

#include "absl/status/status.h"

#include "cli/command.h"
#include "common/config/flags.h"
#include "common/rpc/public_server.h"

namespace tandem::cli {

struct ServerFlags {
  std::string address;
  std::string api_key;
  bool tls = false;
  // Paths of PEM files.
  std::string tls_ca;
  std::string tls_cert;
  std::string tls_key;

  // --server (see command.h), and how a client and it know each other: --api-key, --tls,
  // --tls-ca, --tls-cert, --tls-key. Every command takes these from the same variables.
  void AddTo(FlagSet* flags);
};

// ParseOrExit, and then what `from`, whose flags were added, says of the server.
std::optional<int> ParseOrExit(FlagSet* flags, const Arguments& arguments, const ServerFlags& from,
                               PublicServer* server);

// Fail, which looks whether one end speaks TLS and the other does not.
int Fail(const std::string& command, const absl::Status& status, const PublicServer& server);

}  // namespace tandem::cli
