// tandem.v1.Admin as plain calls with a deadline.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"

#include "tandem/v1/admin.grpc.pb.h"

namespace tandem::cli {

// Thread-safe.
class ClusterAdminClient {
 public:
  explicit ClusterAdminClient(const std::string& server);

  absl::StatusOr<v1::GetClusterResponse> GetCluster(absl::Duration timeout) const;
  absl::Status DrainWorker(const std::string& worker_id, absl::Duration timeout) const;

 private:
  const std::unique_ptr<v1::Admin::Stub> stub_;
};

}  // namespace tandem::cli
