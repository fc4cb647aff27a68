#include "cli/cluster_admin_client.h"

#include <cstdlib>

#include "fmt/format.h"

#include "cli/cluster_note.h"
#include "cli/command.h"
#include "common/base/check.h"
#include "common/base/status.h"
#include "common/rpc/cluster_flags.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"

namespace tandem::cli {

ClusterAdminClient::ClusterAdminClient(const std::string& internal_address,
                                       const std::string& secret,
                                       std::shared_ptr<CertificateFiles> certificate) {
  const auto credentials =
      ClusterCredentials::Make(secret, {kOperatorRole, "tandem"}, std::move(certificate));
  TANDEM_CHECK(credentials.ok(), "{}", MessageOf(credentials.status()));
  stub_ = v1::Admin::NewStub(
      MakeChannel(internal_address, **credentials, {kRouterRole, ""}, Patience::kPatient));
}

absl::StatusOr<v1::GetClusterResponse> ClusterAdminClient::GetCluster(
    absl::Duration timeout) const {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  v1::GetClusterResponse response;
  const grpc::Status status = stub_->GetCluster(&context, v1::GetClusterRequest(), &response);
  if (!status.ok()) return FromGrpcStatus(status);
  return response;
}

absl::Status ClusterAdminClient::DrainWorker(const std::string& worker_id,
                                             absl::Duration timeout) const {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  v1::DrainWorkerRequest request;
  request.set_worker_id(worker_id);
  v1::DrainWorkerResponse response;
  return FromGrpcStatus(stub_->DrainWorker(&context, request, &response));
}

void AddAdminFlags(FlagSet* flags, AdminTarget* target) {
  AddServerFlag(flags, &target->server);
  AddInternalFlag(flags, target);
}

void AddInternalFlag(FlagSet* flags, AdminTarget* target) {
  flags->Add("--internal", &target->internal,
             "the router's --internal-listen, where TANDEM_CLUSTER_SECRET is proved; a cluster "
             "that this user's `tandem up` runs is found by --server alone",
             "HOST:PORT");
  flags->SetEnvironment("--internal", "TANDEM_INTERNAL");
  AddClusterTlsFlags(flags, &target->tls);
  flags->SetEnvironment("--cluster-cert", "TANDEM_CLUSTER_CERT");
  flags->SetEnvironment("--cluster-key", "TANDEM_CLUSTER_KEY");
  flags->SetEnvironment("--cluster-ca", "TANDEM_CLUSTER_CA");
}

namespace {

// Clusters of this user's `tandem up`, and what `address` is in one of them, so that who asked the
// wrong process learns whom to ask; "" if there are none.
std::string DescribeNeighbours(const std::string& address) {
  std::string others;
  for (const std::string& server : ListClusterNotes()) {
    const absl::StatusOr<ClusterNote> note = ReadClusterNote(server);
    if (!note.ok()) continue;
    if (note->internal_address == address) {
      return fmt::format("{} is where workers join the router at {}: --server {}", address, server,
                         server);
    }
    const auto cluster = ClusterAdminClient(note->internal_address, note->secret)
                             .GetCluster(absl::Milliseconds(500));
    if (!cluster.ok()) continue;
    for (const v1::Worker& worker : cluster->workers()) {
      if (worker.address() != address && worker.metrics_address() != address) continue;
      return fmt::format("{} is worker {}{}; ask its router: --server {}", address,
                         worker.worker_id(), worker.address() == address ? "" : "'s /metrics",
                         server);
    }
    others += fmt::format("{}{}", others.empty() ? "" : ", ", server);
  }
  return others.empty() ? "" : "clusters of this user run at " + others;
}

}  // namespace

absl::StatusOr<ClusterAdminClient> FindCluster(const AdminTarget& target) {
  const char* secret = std::getenv("TANDEM_CLUSTER_SECRET");
  if (!target.internal.empty()) {
    TANDEM_ASSIGN_OR_RETURN(std::shared_ptr<CertificateFiles> certificate,
                            OpenClusterCertificate(target.tls));
    return ClusterAdminClient(target.internal, secret != nullptr ? secret : "",
                              std::move(certificate));
  }
  const absl::StatusOr<ClusterNote> note = ReadClusterNote(target.server);
  if (!note.ok()) {
    const std::string neighbours = DescribeNeighbours(target.server);
    return absl::Status(note.status().code(),
                        fmt::format("no `tandem up` of this user runs a cluster at {} ({}); {}for "
                                    "another give --internal and TANDEM_CLUSTER_SECRET",
                                    target.server, MessageOf(note.status()),
                                    neighbours.empty() ? "" : neighbours + "; "));
  }
  return ClusterAdminClient(note->internal_address, note->secret);
}

}  // namespace tandem::cli
