// Calls to a decode worker that end at awkward moments: every one of them must end.
#include "router/api/grpc_decode_client.h"

#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"

#include "tests/support/paths.h"
#include "tests/unit/router/fake_worker.h"

namespace tandem::router {
namespace {

// Reads on until told to stop; then, like RequestStream, takes no notice of events.
class Reader : public DecodeHandler {
 public:
  void Begin(std::shared_ptr<DecodeCall> call) {
    absl::MutexLock lock(&mutex_);
    call_ = std::move(call);
    if (early_ && !stopped_ && !pausing_) call_->ReadNext();
  }
  void AwaitEvents(int count) {
    absl::MutexLock lock(&mutex_);
    const auto reached = [this, count]()
                             ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return events_ >= count; };
    mutex_.Await(absl::Condition(&reached));
  }
  void Cancel() {
    absl::MutexLock lock(&mutex_);
    stopped_ = true;
    call_->Cancel();
  }
  void ReadToEnd() {
    absl::MutexLock lock(&mutex_);
    stopped_ = true;
    call_->ReadToEnd();
  }
  bool AwaitEnd() { return ended_.WaitForNotificationWithTimeout(absl::Seconds(20)); }

  void OnEvent(TokenEvent) override {
    absl::MutexLock lock(&mutex_);
    ++events_;
    if (stopped_) return;
    if (call_ == nullptr) {
      early_ = true;
    } else if (!pausing_) {
      call_->ReadNext();
    }
  }
  void OnEnd(const absl::Status&) override { ended_.Notify(); }
  void PauseAfterFirst() { pausing_ = true; }

 private:
  absl::Mutex mutex_;
  std::shared_ptr<DecodeCall> call_ ABSL_GUARDED_BY(mutex_);
  int events_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  bool early_ ABSL_GUARDED_BY(mutex_) = false;
  bool pausing_ = false;  // constant after the start
  absl::Notification ended_;
};

class GrpcDecodeClientTest : public ::testing::Test {
 protected:
  void StartWorker(FakeDecodeService::Handler handler) {
    service_ = std::make_unique<FakeDecodeService>(std::move(handler));
    auto server = RpcServer::Start(
        {.credentials = TestCredentials(kDecodeRole, "d"), .callers = {kRouterRole}},
        {service_.get()});
    ASSERT_OK(server);
    server_ = *std::move(server);
    route_.decode.id = "d";
    route_.decode.address = server_->address();
    request_.deadline = absl::Now() + absl::Seconds(120);
    request_.message = std::make_shared<internal::v1::DecodeRequest>();
  }

  std::unique_ptr<FakeDecodeService> service_;
  std::unique_ptr<RpcServer> server_;
  Route route_;
  Request request_;
  GrpcDecodeClient client_{TestCredentials(kRouterRole, "router")};
};

TEST_F(GrpcDecodeClientTest, ACallCancelledWhileEventsPourInEnds) {
  StartWorker([](std::shared_ptr<FakeCall> call) {
    for (int i = 0; i < 200; ++i) call->Send({i});
  });
  for (int round = 0; round < 300; ++round) {
    auto reader = std::make_shared<Reader>();
    reader->Begin(client_.Start(route_, request_, {}, {}, reader));
    reader->AwaitEvents(1 + round % 50);
    reader->Cancel();
    ASSERT_TRUE(reader->AwaitEnd()) << "round " << round;
  }
}

TEST_F(GrpcDecodeClientTest, AWorkerThatGoesOnAfterItsLastEventIsCutOff) {
  StartWorker([](std::shared_ptr<FakeCall> call) {
    for (int i = 0; i < 10; ++i) call->Send({i});
  });
  auto reader = std::make_shared<Reader>();
  reader->PauseAfterFirst();
  reader->Begin(client_.Start(route_, request_, {}, {}, reader));
  reader->AwaitEvents(1);
  reader->ReadToEnd();
  EXPECT_TRUE(reader->AwaitEnd());
}

}  // namespace
}  // namespace tandem::router
