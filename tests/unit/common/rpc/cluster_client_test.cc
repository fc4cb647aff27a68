#include "common/rpc/cluster_client.h"

#include <string>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/rpc/server.h"
#include "tests/support/credentials.h"
#include "tests/unit/common/rpc/fake_router.h"

namespace tandem {
namespace {

using internal::v1::BlockEvents;
using internal::v1::WorkerMessage;

class ClusterClientTest : public testing::Test {
 protected:
  void StartRouter(const std::string& address = "127.0.0.1:0") {
    auto server = RpcServer::Start({.listen_address = address,
                                    .credentials = TestCredentials(kRouterRole, "router"),
                                    .callers = {kDecodeRole}},
                                   {&router_});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  ClusterClientOptions Options(const std::string& address) {
    ClusterClientOptions options;
    options.router_address = address;
    options.credentials = TestCredentials(kDecodeRole, "w0");
    options.hello.set_worker_id("w0");
    options.on_joined = [this] {
      absl::MutexLock lock(&mutex_);
      ++joined_;
    };
    options.on_drain = [this] { drained_.Notify(); };
    options.on_refused = [this](const absl::Status& status) {
      refusal_ = status;
      refused_.Notify();
    };
    return options;
  }
  void AwaitJoined(int times) {
    absl::MutexLock lock(&mutex_);
    const auto enough = [this, times]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return joined_ >= times; };
    mutex_.Await(absl::Condition(&enough));
  }

  FakeRouter router_;
  std::unique_ptr<RpcServer> server_;
  absl::Mutex mutex_;
  int joined_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Notification drained_;
  absl::Notification refused_;
  absl::Status refusal_;
};

TEST_F(ClusterClientTest, HelloThenReportsThenDrain) {
  StartRouter();
  auto client = ClusterClient::Start(Options(server_->address()));
  EXPECT_EQ(router_.Next().hello().worker_id(), "w0");
  AwaitJoined(1);
  EXPECT_TRUE(client->joined());
  internal::v1::LoadReport load;
  load.set_running(3);
  client->PostLoad(load);
  EXPECT_EQ(router_.Next().load().running(), 3u);
  BlockEvents blocks;
  blocks.add_stored("0123456789abcdef");
  client->PostBlocks(blocks);
  EXPECT_EQ(router_.Next().blocks().stored(0), "0123456789abcdef");
  router_.Drain();
  drained_.WaitForNotification();
  client->PostDraining();
  EXPECT_TRUE(router_.Next().has_draining());
}

TEST_F(ClusterClientTest, LoadsAreCoalescedWhileTheStreamIsBusy) {
  StartRouter();
  router_.Stall();  // takes Hello and then reads no more
  auto client = ClusterClient::Start(Options(server_->address()));
  router_.Next();
  AwaitJoined(1);
  // Large enough that flow control stops the stream after a few messages.
  constexpr uint32_t kReports = 2000;
  for (uint32_t i = 1; i <= kReports; ++i) {
    internal::v1::LoadReport load;
    load.set_running(i);
    load.add_links()->set_peer_worker_id(std::string(50'000, 'x'));
    client->PostLoad(std::move(load));
  }
  router_.Resume();
  uint32_t messages = 0;
  uint32_t last = 0;
  while (last != kReports) {
    const uint32_t running = router_.Next().load().running();
    EXPECT_GT(running, last);
    last = running;
    ++messages;
  }
  EXPECT_LT(messages, kReports);
}

TEST_F(ClusterClientTest, BlocksOverTheBoundAreReplacedByASnapshot) {
  StartRouter();
  router_.Stall();
  auto client = ClusterClient::Start(Options(server_->address()));
  router_.Next();
  AwaitJoined(1);
  BlockEvents blocks;
  for (int i = 0; i < 70'000; ++i) blocks.add_stored(std::to_string(i) + std::string(200, 'x'));
  client->PostBlocks(blocks);
  for (int i = 70'000; i < 140'000; ++i) {
    BlockEvents more;
    more.add_stored(std::to_string(i));
    client->PostBlocks(std::move(more));
  }
  AwaitJoined(2);
}

TEST_F(ClusterClientTest, RejoinsAfterTheStreamEndsAndRepeatsDraining) {
  StartRouter();
  auto client = ClusterClient::Start(Options(server_->address()));
  EXPECT_TRUE(router_.Next().has_hello());
  AwaitJoined(1);
  client->PostDraining();
  EXPECT_TRUE(router_.Next().has_draining());
  router_.EndAll();
  EXPECT_TRUE(router_.Next().has_hello());
  EXPECT_TRUE(router_.Next().has_draining());
  AwaitJoined(2);
}

TEST_F(ClusterClientTest, SurvivesARouterRestart) {
  StartRouter();
  const std::string address = server_->address();
  auto client = ClusterClient::Start(Options(address));
  AwaitJoined(1);
  router_.Next();
  server_->Shutdown(absl::ZeroDuration());
  server_.reset();
  internal::v1::LoadReport load;
  load.set_running(7);
  client->PostLoad(load);
  StartRouter(address);
  EXPECT_TRUE(router_.Next().has_hello());
  EXPECT_EQ(router_.Next().load().running(), 7u);
  AwaitJoined(2);
}

TEST_F(ClusterClientTest, JoinsARouterThatStartsLater) {
  StartRouter();
  const std::string address = server_->address();
  server_->Shutdown(absl::ZeroDuration());
  server_.reset();
  auto client = ClusterClient::Start(Options(address));
  EXPECT_FALSE(client->joined());
  StartRouter(address);
  AwaitJoined(1);
}

TEST_F(ClusterClientTest, RefusalIsFinal) {
  StartRouter();
  router_.Refuse("block_size 16 here, 32 there");
  auto client = ClusterClient::Start(Options(server_->address()));
  refused_.WaitForNotification();
  EXPECT_EQ(refusal_, absl::FailedPreconditionError("block_size 16 here, 32 there"));
  EXPECT_FALSE(client->joined());
}

// A router that was started again with wrong flags does not end all workers.
TEST_F(ClusterClientTest, AMemberThatIsRefusedKeepsTrying) {
  StartRouter();
  auto client = ClusterClient::Start(Options(server_->address()));
  AwaitJoined(1);
  router_.Refuse("block_size 16 here, 32 there");
  router_.EndAll();
  router_.Next();
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(router_.Next().has_hello());
  EXPECT_FALSE(refused_.HasBeenNotified());
  router_.Refuse("");
  AwaitJoined(2);
}

TEST_F(ClusterClientTest, DestructionAtAnyMoment) {
  StartRouter();
  const std::string address = server_->address();
  for (int i = 0; i < 20; ++i) {
    auto client = ClusterClient::Start(Options(address));
    if (i % 2 == 0) client->PostLoad(internal::v1::LoadReport());
    if (i % 3 == 0) AwaitJoined(1);
  }
  server_->Shutdown(absl::ZeroDuration());
  auto unreachable = ClusterClient::Start(Options(address));
}

}  // namespace
}  // namespace tandem
