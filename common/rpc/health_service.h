// grpc.health.v1.Health, compiled from grpc-proto's health.proto: gRPC's built-in one is not in the
// descriptor pool, so reflection could not describe it.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpc/health/v1/health.grpc.pb.h"

namespace tandem {

// Thread-safe. One state for the whole process: "" and every name of SetServices share it.
class HealthService : public grpc::health::v1::Health::CallbackService {
 public:
  // What the health of may be asked for. Other names are NOT_FOUND (Check), SERVICE_UNKNOWN
  // (Watch).
  void SetServices(const std::vector<std::string>& names);
  // Tells all watchers.
  void SetServing(bool serving);
  // NOT_SERVING from now on; tells the watchers so and ends their streams, so that they do not hold
  // the server up.
  void Shutdown();

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const grpc::health::v1::HealthCheckRequest* request,
                                  grpc::health::v1::HealthCheckResponse* response) override;
  grpc::ServerWriteReactor<grpc::health::v1::HealthCheckResponse>* Watch(
      grpc::CallbackServerContext* context,
      const grpc::health::v1::HealthCheckRequest* request) override;

 private:
  using ServingStatus = grpc::health::v1::HealthCheckResponse::ServingStatus;
  class WatchReactor;

  ServingStatus StatusOf(const std::string& service) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void NotifyAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  absl::Mutex mutex_;
  std::set<std::string> services_ ABSL_GUARDED_BY(mutex_) = {""};
  std::set<WatchReactor*> watchers_ ABSL_GUARDED_BY(mutex_);
  bool serving_ ABSL_GUARDED_BY(mutex_) = false;
  bool shutdown_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace tandem
