#include "cli/cluster_admin_client.h"

#include "common/rpc/server.h"
#include "common/rpc/status.h"

namespace tandem::cli {

ClusterAdminClient::ClusterAdminClient(const std::string& server)
    : stub_(v1::Admin::NewStub(MakeChannel(server, Patience::kPatient))) {}

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

}  // namespace tandem::cli
