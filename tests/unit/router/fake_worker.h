// Workers that do what a test tells them: real gRPC servers and Join streams, no engine behind.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"

#include "common/base/block_hash.h"
#include "common/rpc/cluster_client.h"
#include "common/rpc/server.h"
#include "tandem/internal/v1/decode.grpc.pb.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"

namespace tandem::router {

// One Decode/Generate call, from the worker's side. Thread-safe; gRPC owns it until its end.
class FakeCall : public grpc::ServerWriteReactor<internal::v1::TokenEvent>,
                 public std::enable_shared_from_this<FakeCall> {
 public:
  explicit FakeCall(const internal::v1::DecodeRequest& request) : request_(request) {}

  const internal::v1::DecodeRequest& request() const { return request_; }
  void KeepUntilDone() { self_ = shared_from_this(); }

  void Send(internal::v1::TokenEvent event) {
    absl::MutexLock lock(&mutex_);
    events_.push_back(std::move(event));
    Next();
  }
  // Sends one event with these tokens.
  void Send(const std::vector<int32_t>& tokens,
            v1::FinishReason reason = v1::FINISH_REASON_UNSPECIFIED) {
    internal::v1::TokenEvent event;
    event.mutable_token_ids()->Add(tokens.begin(), tokens.end());
    event.set_finish_reason(reason);
    Send(std::move(event));
  }
  // After what was sent.
  void End(grpc::Status status) {
    absl::MutexLock lock(&mutex_);
    ending_ = true;
    status_ = std::move(status);
    Next();
  }
  // Until the router has cancelled the call.
  void AwaitCancel() { cancelled_.WaitForNotification(); }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    events_.pop_front();
    if (!ok) events_.clear();
    Next();
  }
  void OnCancel() override {
    cancelled_.Notify();
    End(grpc::Status::CANCELLED);
  }
  void OnDone() override { self_.reset(); }

 private:
  void Next() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || ended_) return;
    if (!events_.empty()) {
      writing_ = true;
      StartWrite(&events_.front());
    } else if (ending_) {
      ended_ = true;
      Finish(status_);
    }
  }

  const internal::v1::DecodeRequest request_;
  std::shared_ptr<FakeCall> self_;
  absl::Notification cancelled_;
  absl::Mutex mutex_;
  std::deque<internal::v1::TokenEvent> events_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::Status status_ ABSL_GUARDED_BY(mutex_);
};

class FakeDecodeService : public internal::v1::Decode::CallbackService {
 public:
  using Handler = std::function<void(std::shared_ptr<FakeCall>)>;
  explicit FakeDecodeService(Handler handler) : handler_(std::move(handler)) {}

  grpc::ServerWriteReactor<internal::v1::TokenEvent>* Generate(
      grpc::CallbackServerContext*, const internal::v1::DecodeRequest* request) override {
    auto call = std::make_shared<FakeCall>(*request);
    call->KeepUntilDone();
    handler_(call);
    return call.get();
  }

 private:
  const Handler handler_;
};

// A member of the cluster; joined when constructed. `handler` runs in gRPC's reactions.
class FakeWorker {
 public:
  FakeWorker(const std::string& router, const std::string& id, const std::string& role,
             const internal::v1::Capability& capability, FakeDecodeService::Handler handler = {})
      : service_(std::move(handler)) {
    const auto credentials = TestCredentials(role == kPrefillRole ? kPrefillRole : kDecodeRole, id);
    auto server =
        RpcServer::Start({.credentials = credentials, .callers = {kRouterRole}}, {&service_});
    EXPECT_OK(server);
    server_ = *std::move(server);
    ClusterClientOptions options;
    options.credentials = credentials;
    options.router_address = router;
    options.hello.set_worker_id(id);
    options.hello.set_incarnation(std::hash<std::string>()(id));
    options.hello.set_role(role);
    options.hello.set_address(server_->address());
    *options.hello.mutable_capability() = capability;
    options.hello.set_max_model_len(2048);
    options.hello.set_max_num_seqs(8);
    options.hello.set_num_blocks(1000);
    options.hello.set_local_prefill_max_tokens(role == "unified" ? 0xffffffffu : 0);
    options.on_joined = [this] {
      if (!joined_.HasBeenNotified()) joined_.Notify();
    };
    options.on_drain = [this] { drained_.Notify(); };
    options.on_refused = [this](const absl::Status& status) {
      ADD_FAILURE() << status;
      joined_.Notify();
    };
    client_ = ClusterClient::Start(std::move(options));
    joined_.WaitForNotification();
  }
  ~FakeWorker() { Die(); }

  ClusterClient& cluster() { return *client_; }
  void AwaitDrain() { drained_.WaitForNotification(); }
  // Leaves and cuts off every stream.
  void Die() {
    client_.reset();
    if (server_ != nullptr) server_->Shutdown(absl::ZeroDuration());
    server_.reset();
  }

 private:
  FakeDecodeService service_;
  absl::Notification joined_, drained_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<ClusterClient> client_;
};

}  // namespace tandem::router
