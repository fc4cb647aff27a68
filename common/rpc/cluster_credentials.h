// Who is at the other end of an internal RPC: mutual TLS between keys that live as long as their
// process, each vouched for by a proof of the cluster secret
// (docs/adr/006-who-may-talk-to-whom.md).
//
// The proof is bound to the key, the role and the id, and TLS shows in every handshake, with fresh
// nonces of both ends, that the peer holds the key: so a proof that was seen is of no use to anyone
// else, and neither end sends a call, or reads one, before it knows the other. Everything internal
// goes through here; a public server or channel simply has no credentials.
//
// With certificates of an authority (--cluster-cert) the secret is not enough: each process has
// the key of this connection signed by that of its certificate, shows both, and wants the same of
// the other end, whose certificate must be of --cluster-ca and hold now. The files may change at
// any time: connections that are there go on, new ones show, and are judged by, what is in force.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "grpcpp/grpcpp.h"

#include "common/auth/certificate_files.h"
#include "common/auth/proof.h"

namespace tandem {

// Thread-safe, immutable.
class ClusterCredentials {
 public:
  // Draws a key. `certificate`, with a CA, may be null: the secret alone decides.
  // INVALID_ARGUMENT for an impossible party.
  static absl::StatusOr<std::shared_ptr<const ClusterCredentials>> Make(
      std::string secret, Party self, std::shared_ptr<CertificateFiles> certificate = nullptr);
  virtual ~ClusterCredentials() = default;

  virtual const Party& self() const = 0;
  // For a server that is called by parties of these roles only.
  virtual std::shared_ptr<grpc::ServerCredentials> ForServer(
      std::vector<std::string> callers) const = 0;
  // For a channel to a party of this role; `id` empty: any. What it shows changes as long as this
  // lives.
  virtual std::shared_ptr<grpc::ChannelCredentials> ForChannel(const Party& callee) const = 0;
};

// Who calls, as proved in the handshake; nothing on a server without credentials.
std::optional<Party> CallerOf(const grpc::AuthContext& context);

}  // namespace tandem
