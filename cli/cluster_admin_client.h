// tandem.v1.Admin as plain calls with a deadline.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "common/auth/certificate_files.h"
#include "common/config/flags.h"
#include "tandem/v1/admin.grpc.pb.h"

namespace tandem::cli {

// Thread-safe.
class ClusterAdminClient {
 public:
  // `internal_address` is the router's; what is asked there must prove `secret`, and show
  // `certificate` where there is one.
  ClusterAdminClient(const std::string& internal_address, const std::string& secret,
                     std::shared_ptr<CertificateFiles> certificate = nullptr);

  absl::StatusOr<v1::GetClusterResponse> GetCluster(absl::Duration timeout) const;
  absl::Status DrainWorker(const std::string& worker_id, absl::Duration timeout) const;

 private:
  std::unique_ptr<v1::Admin::Stub> stub_;
};

// Where an operator's command finds the cluster.
struct AdminTarget {
  std::string server;    // the public address
  std::string internal;  // the router's internal one; empty: as `tandem up` noted it for `server`
  TlsFiles tls;          // for `internal`; all empty: the secret is enough
};
void AddAdminFlags(FlagSet* flags, AdminTarget* target);
// Only --internal and what is shown there, beside a --server of the command's own.
void AddInternalFlag(FlagSet* flags, AdminTarget* target);
// NOT_FOUND says what to give.
absl::StatusOr<ClusterAdminClient> FindCluster(const AdminTarget& target);

}  // namespace tandem::cli
