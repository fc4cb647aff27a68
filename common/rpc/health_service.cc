#include "common/rpc/health_service.h"

namespace tandem {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;

namespace {

// Streams that nothing ends but their clients, who are anyone.
constexpr size_t kMaxWatchers = 1024;

}  // namespace

// One Watch stream. Writes the newest state whenever it differs from the one written last; states
// that come while a write is under way are coalesced. Its members are guarded by the service's
// mutex.
class HealthService::WatchReactor : public grpc::ServerWriteReactor<HealthCheckResponse> {
 public:
  WatchReactor(HealthService* service, std::string name)
      : service_(service), name_(std::move(name)) {}

  // Under the service's mutex.
  void Advance() {
    if (writing_ || finished_) return;
    const ServingStatus status = Status();
    if (!written_ || status != response_.status()) {
      response_.set_status(status);
      written_ = writing_ = true;
      StartWrite(&response_);
    } else if (Ending()) {
      Finish(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the server is stopping"));
      finished_ = true;
    }
  }

  // Under the service's mutex, instead of any Advance.
  void Refuse() {
    Finish(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED,
                        "too many streams watch the health of this server; ask with Check"));
    finished_ = true;
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&service_->mutex_);
    writing_ = false;
    if (ok) {
      Advance();
    } else {
      Cancel();
    }
  }
  void OnCancel() override {
    absl::MutexLock lock(&service_->mutex_);
    Cancel();
  }
  void OnDone() override {
    {
      absl::MutexLock lock(&service_->mutex_);
      service_->watchers_.erase(this);
    }
    delete this;
  }

 private:
  ServingStatus Status() ABSL_NO_THREAD_SAFETY_ANALYSIS { return service_->StatusOf(name_); }
  bool Ending() ABSL_NO_THREAD_SAFETY_ANALYSIS { return service_->shutdown_; }
  void Cancel() {
    if (finished_) return;
    Finish(grpc::Status::CANCELLED);
    finished_ = true;
  }

  HealthService* const service_;
  const std::string name_;
  HealthCheckResponse response_;
  bool written_ = false;
  bool writing_ = false;
  bool finished_ = false;
};

HealthService::ServingStatus HealthService::StatusOf(const std::string& service) {
  if (services_.count(service) == 0) return HealthCheckResponse::SERVICE_UNKNOWN;
  return serving_ && !shutdown_ ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
}

void HealthService::NotifyAll() {
  for (WatchReactor* watcher : watchers_) watcher->Advance();
}

void HealthService::SetServices(const std::vector<std::string>& names) {
  absl::MutexLock lock(&mutex_);
  services_.insert(names.begin(), names.end());
  NotifyAll();
}

void HealthService::SetServing(bool serving) {
  absl::MutexLock lock(&mutex_);
  serving_ = serving;
  NotifyAll();
}

void HealthService::Shutdown() {
  absl::MutexLock lock(&mutex_);
  shutdown_ = true;
  NotifyAll();
}

grpc::ServerUnaryReactor* HealthService::Check(grpc::CallbackServerContext* context,
                                               const HealthCheckRequest* request,
                                               HealthCheckResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  absl::MutexLock lock(&mutex_);
  const ServingStatus status = StatusOf(request->service());
  if (status == HealthCheckResponse::SERVICE_UNKNOWN) {
    reactor->Finish(grpc::Status(grpc::StatusCode::NOT_FOUND,
                                 "service '" + request->service() + "' is not offered here"));
  } else {
    response->set_status(status);
    reactor->Finish(grpc::Status::OK);
  }
  return reactor;
}

grpc::ServerWriteReactor<HealthCheckResponse>* HealthService::Watch(
    grpc::CallbackServerContext* /*context*/, const HealthCheckRequest* request) {
  auto* watcher = new WatchReactor(this, request->service());  // deletes itself in OnDone
  absl::MutexLock lock(&mutex_);
  if (watchers_.size() >= kMaxWatchers) {
    watcher->Refuse();
    return watcher;
  }
  watchers_.insert(watcher);
  watcher->Advance();
  return watcher;
}

}  // namespace tandem
