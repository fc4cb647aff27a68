#include "cli/server_flags.h"

#include "fmt/format.h"

#include "common/base/file.h"
#include "common/base/pem.h"
#include "common/base/status.h"

namespace tandem::cli {
namespace {

constexpr size_t kMaxPemBytes = 16 << 20;

absl::StatusOr<PublicServer> ServerOf(const ServerFlags& from) {
  PublicServer server;
  server.address = from.address;
  server.api_key = from.api_key;
  server.tls = from.tls || !from.tls_ca.empty() || !from.tls_cert.empty();
  if (from.tls_cert.empty() != from.tls_key.empty()) {
    return InvalidArgument("--tls-cert and --tls-key go together");
  }
  if (!from.tls_ca.empty()) {
    TANDEM_ASSIGN_OR_RETURN(server.tls_ca, ReadFile(from.tls_ca, kMaxPemBytes));
    if (const absl::Status ca = CheckCertificates(server.tls_ca); !ca.ok()) {
      return InvalidArgument("--tls-ca {}: {}", from.tls_ca, MessageOf(ca));
    }
  }
  if (!from.tls_cert.empty()) {
    TANDEM_ASSIGN_OR_RETURN(server.tls_certificate, ReadFile(from.tls_cert, kMaxPemBytes));
    TANDEM_ASSIGN_OR_RETURN(server.tls_key, ReadFile(from.tls_key, kMaxPemBytes));
    const absl::Status pair =
        CheckCertificateAndKey(server.tls_certificate, server.tls_key, absl::Now()).status();
    if (!pair.ok()) {
      return InvalidArgument("--tls-cert {}, --tls-key {}: {}", from.tls_cert, from.tls_key,
                             MessageOf(pair));
    }
  }
  return server;
}

// What is wrong where one end speaks TLS and the other does not; "" if that is not it.
std::string Mismatch(const PublicServer& server) {
  const std::optional<bool> tls = SpeaksTls(server.address, absl::Seconds(2));
  if (!tls.has_value() || *tls == server.tls) return "";
  return *tls ? fmt::format(
                    "{} speaks TLS: give --tls, or --tls-ca FILE with the certificate of "
                    "the CA that it is to be known by",
                    server.address)
              : fmt::format("{} speaks no TLS: leave out --tls, --tls-ca and --tls-cert",
                            server.address);
}

}  // namespace

void ServerFlags::AddTo(FlagSet* flags) {
  AddServerFlag(flags, &address);
  const auto add = [flags](const char* name, auto* target, const char* help, const char* variable) {
    flags->Add(name, target, help);
    flags->SetEnvironment(name, variable);
  };
  add("--api-key", &api_key,
      "shown to a router that wants one; better in the environment, which `ps` does not show",
      "TANDEM_API_KEY");
  add("--tls", &tls, "the router speaks TLS, by a certificate that this system trusts",
      "TANDEM_TLS");
  add("--tls-ca", &tls_ca, "PEM file of the CA that the router's certificate is of; makes it --tls",
      "TANDEM_TLS_CA");
  add("--tls-cert", &tls_cert, "PEM file of a certificate for a router that wants one",
      "TANDEM_TLS_CLIENT_CERT");
  add("--tls-key", &tls_key, "PEM file of its key", "TANDEM_TLS_CLIENT_KEY");
}

std::optional<int> ParseOrExit(FlagSet* flags, const Arguments& arguments, const ServerFlags& from,
                               PublicServer* server) {
  if (const auto exit_code = ParseOrExit(flags, arguments)) return exit_code;
  absl::StatusOr<PublicServer> read = ServerOf(from);
  if (!read.ok()) {
    Complain(fmt::format("{}: {}", flags->program(), MessageOf(read.status())));
    return kExitUsage;
  }
  *server = *std::move(read);
  return std::nullopt;
}

int Fail(const std::string& command, const absl::Status& status, const PublicServer& server) {
  const std::string mismatch = absl::IsUnavailable(status) ? Mismatch(server) : "";
  if (mismatch.empty()) return Fail(command, status, server.address);
  Complain(fmt::format("tandem {}: {}", command, mismatch));
  return kExitFailed;
}

}  // namespace tandem::cli
