// A router's public API: its server, and what a client knows of it.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"

#include "common/rpc/server.h"
#include "common/rpc/server_tls.h"

namespace tandem {

// Starts a server for anyone, or for anyone with a certificate; `tls` null: plain HTTP/2.
absl::StatusOr<std::unique_ptr<RpcServer>> StartPublicServer(
    const RpcServerOptions& options, const std::shared_ptr<ServerTls>& tls,
    const std::vector<grpc::Service*>& services);

// As a client knows it.
struct PublicServer {
  std::string address;
  std::string api_key;  // "": none
  bool tls = false;
  // PEM texts, with `tls`.
  std::string tls_ca;           // of the server's certificate; "": those that this system trusts
  std::string tls_certificate;  // what the client shows; "": nothing
  std::string tls_key;
};

// A channel with the arguments of server.h's MakeChannel.
std::shared_ptr<grpc::Channel> MakeChannel(const PublicServer& server,
                                           Patience patience = Patience::kEager);

// Shows the server's key with a call that was not started yet.
void ShowKey(const PublicServer& server, grpc::ClientContext* context);

// Whether TLS is what is spoken at `address`; nothing where that cannot be told within `timeout`.
// Made for the message after a call has failed: gRPC's own says only that a handshake did. One
// thread at a time: SIGPIPE is ignored meanwhile.
std::optional<bool> SpeaksTls(const std::string& address, absl::Duration timeout);

}  // namespace tandem
