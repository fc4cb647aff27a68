#include "common/rpc/cluster_clients.h"

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/status.h"
#include "common/rpc/server.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"
#include "tests/unit/common/rpc/fake_router.h"

namespace tandem {
namespace {

using internal::v1::BlockEvents;

constexpr char kDecode[] = "d0";
constexpr char kKvAddress[] = "10.0.0.2:1";

// Two hosts of this machine, which one name may have.
constexpr std::array<const char*, 2> kHosts = {"127.0.0.1", "127.0.0.2"};

class ClusterClientsTest : public testing::Test {
 protected:
  // Outlives the clients: see ClusterClientsOptions::resolve.
  struct Names {
    absl::Mutex mutex;
    std::vector<std::string> hosts ABSL_GUARDED_BY(mutex);
  };

  // Router i on its host; both have the same port.
  void StartRouter(size_t i) {
    const std::string address = std::string(kHosts[i]) + ":" + std::to_string(port_);
    auto server = RpcServer::Start({.listen_address = address,
                                    .credentials = TestCredentials(kRouterRole, "router"),
                                    .callers = {kPrefillRole}},
                                   {&routers_[i]});
    ASSERT_TRUE(server.ok()) << server.status();
    servers_[i] = *std::move(server);
    port_ = servers_[i]->port();
  }
  void StopRouter(size_t i) {
    servers_[i]->Shutdown(absl::ZeroDuration());
    servers_[i].reset();
  }
  std::string AddressOf(size_t i) const { return HostPort{kHosts[i], port_}.ToString(); }

  // The name "routers" has these.
  void SetHosts(std::vector<std::string> hosts) {
    absl::MutexLock lock(&names_->mutex);
    names_->hosts = std::move(hosts);
  }

  ClusterClientsOptions Options(std::vector<HostPort> routers) {
    ClusterClientsOptions options;
    options.routers = std::move(routers);
    options.credentials = TestCredentials(kPrefillRole, "p0");
    options.hello.set_worker_id("p0");
    options.hello.set_incarnation(7);
    options.vouchers = &vouchers_;
    options.calm = options.eager = absl::Milliseconds(20);
    options.resolve =
        [names = names_](const std::string& host) -> absl::StatusOr<std::vector<std::string>> {
      if (host != "routers") return std::vector<std::string>{host};
      absl::MutexLock lock(&names->mutex);
      if (names->hosts.empty()) return absl::UnavailableError("the name service is away");
      return names->hosts;
    };
    options.on_joined = [this] {
      absl::MutexLock lock(&mutex_);
      ++snapshots_wanted_;
    };
    options.on_drain = [this] { drained_.Notify(); };
    options.on_refused = [this](const absl::Status& status) {
      absl::MutexLock lock(&mutex_);
      refusal_ = status;
    };
    options.on_look = [this](size_t routers, size_t joined) {
      absl::MutexLock lock(&mutex_);
      routers_seen_ = routers;
      joined_seen_ = joined;
      ++looks_;
    };
    return options;
  }
  std::unique_ptr<ClusterClients> StartWithName() {
    return std::make_unique<ClusterClients>(Options({{"routers", port_}}));
  }

  void AwaitRouters(size_t routers, size_t joined) {
    absl::MutexLock lock(&mutex_);
    const auto seen = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return routers_seen_ == routers && joined_seen_ == joined;
    };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&seen), absl::Seconds(30)))
        << routers_seen_ << " routers, " << joined_seen_ << " joined";
  }
  // Exactly so many in all, and what each router vouches with is known.
  void AwaitSnapshotsWanted(int times) {
    absl::MutexLock lock(&mutex_);
    const auto wanted = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return snapshots_wanted_ >= times; };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&wanted), absl::Seconds(30)));
    EXPECT_EQ(snapshots_wanted_, times);
  }
  // Some whole looks have passed.
  void AwaitLooks() {
    absl::MutexLock lock(&mutex_);
    const int until = looks_ + 3;
    const auto looked = [&]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return looks_ >= until; };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&looked), absl::Seconds(30)));
  }
  absl::Status AwaitRefusal() {
    absl::MutexLock lock(&mutex_);
    const auto refused = [this]() ABSL_NO_THREAD_SAFETY_ANALYSIS { return !refusal_.ok(); };
    mutex_.AwaitWithTimeout(absl::Condition(&refused), absl::Seconds(30));
    return refusal_;
  }
  absl::Status Refusal() {
    absl::MutexLock lock(&mutex_);
    return refusal_;
  }
  absl::StatusCode CodeOfVoucher(const std::string& key) {
    return vouchers_.Check(kDecode, kKvAddress, Vouch(key, kDecode, kKvAddress)).code();
  }
  static internal::v1::LoadReport Load(uint32_t running) {
    internal::v1::LoadReport load;
    load.set_running(running);
    return load;
  }
  static BlockEvents Stored(char hash, bool cleared = false) {
    BlockEvents events;
    events.add_stored(std::string(16, hash));
    events.set_cleared(cleared);
    return events;
  }

  std::array<FakeRouter, 2> routers_;
  std::array<std::unique_ptr<RpcServer>, 2> servers_;
  int port_ = 0;
  VoucherCheck vouchers_;
  absl::Notification drained_;
  absl::Mutex mutex_;
  int snapshots_wanted_ ABSL_GUARDED_BY(mutex_) = 0;
  const std::shared_ptr<Names> names_ = std::make_shared<Names>();
  absl::Status refusal_ ABSL_GUARDED_BY(mutex_);
  size_t routers_seen_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t joined_seen_ ABSL_GUARDED_BY(mutex_) = 0;
  int looks_ ABSL_GUARDED_BY(mutex_) = 0;
};

TEST_F(ClusterClientsTest, TellsEveryRouterTheSame) {
  StartRouter(0);
  StartRouter(1);
  routers_[0].SetVouchKey("key of 0");
  routers_[1].SetVouchKey("key of 1");
  ClusterClients clients(Options({{kHosts[0], port_}, {kHosts[1], port_}}));
  AwaitRouters(2, 2);
  AwaitSnapshotsWanted(2);
  clients.PostBlocks(Stored('s', /*cleared=*/true));
  for (FakeRouter& router : routers_) {
    const auto hello = router.Next();
    EXPECT_EQ(hello.hello().worker_id(), "p0");
    EXPECT_EQ(hello.hello().incarnation(), 7u);
    EXPECT_TRUE(router.Next().blocks().cleared());
  }
  clients.PostLoad(Load(3));
  for (FakeRouter& router : routers_) EXPECT_EQ(router.Next().load().running(), 3u);
  clients.PostHeartbeat(absl::Seconds(2));
  for (FakeRouter& router : routers_) {
    EXPECT_EQ(router.Next().heartbeat().seconds_without_progress(), 2);
  }
  clients.PostBlocks(Stored('t'));
  for (FakeRouter& router : routers_) EXPECT_EQ(router.Next().blocks().stored_size(), 1);
  EXPECT_EQ(CodeOfVoucher("key of 0"), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOfVoucher("key of 1"), absl::StatusCode::kOk);
  EXPECT_EQ(CodeOfVoucher("key of 2"), absl::StatusCode::kPermissionDenied);
  // Any router may ask for a drain; all hear of it.
  routers_[1].Drain();
  drained_.WaitForNotification();
  clients.PostDraining();
  for (FakeRouter& router : routers_) EXPECT_TRUE(router.Next().has_draining());
}

TEST_F(ClusterClientsTest, ANameWithoutAnAddressIsARouterThatIsMissing) {
  StartRouter(0);
  const auto clients = StartWithName();
  AwaitRouters(1, 0);
  SetHosts({kHosts[0]});
  AwaitRouters(1, 1);
}

// A router that comes later is told what the others know, and they are not told again.
TEST_F(ClusterClientsTest, OneThatComesLaterLearnsWhatIsKnown) {
  StartRouter(0);
  SetHosts({kHosts[0]});
  const auto clients = StartWithName();
  AwaitRouters(1, 1);
  clients->PostBlocks(Stored('s', /*cleared=*/true));
  clients->PostLoad(Load(3));
  EXPECT_TRUE(routers_[0].Next().has_hello());
  for (int i = 0; i < 2; ++i) routers_[0].Next();  // in either order
  StartRouter(1);
  SetHosts({kHosts[0], kHosts[1]});
  AwaitRouters(2, 2);
  AwaitSnapshotsWanted(2);
  EXPECT_TRUE(routers_[1].Next().has_hello());
  EXPECT_EQ(routers_[1].Next().load().running(), 3u);
  clients->PostBlocks(Stored('s', /*cleared=*/true));
  EXPECT_TRUE(routers_[1].Next().blocks().cleared());
  clients->PostBlocks(Stored('t'));
  for (FakeRouter& router : routers_) {
    const auto message = router.Next();
    EXPECT_FALSE(message.blocks().cleared());
    EXPECT_EQ(message.blocks().stored(0), std::string(16, 't'));
  }
}

TEST_F(ClusterClientsTest, ALostRouterIsDialledWhileTheOtherGoesOn) {
  StartRouter(0);
  StartRouter(1);
  SetHosts({kHosts[0], kHosts[1]});
  const auto clients = StartWithName();
  AwaitRouters(2, 2);
  EXPECT_TRUE(routers_[1].Next().has_hello());
  StopRouter(0);
  AwaitRouters(2, 1);
  clients->PostLoad(Load(4));
  EXPECT_EQ(routers_[1].Next().load().running(), 4u);
  StartRouter(0);
  AwaitRouters(2, 2);
  AwaitSnapshotsWanted(3);
}

TEST_F(ClusterClientsTest, AnAddressIsGivenUpWhenItsNameAndItsStreamAreGone) {
  StartRouter(0);
  StartRouter(1);
  routers_[1].SetVouchKey("key of 1");
  SetHosts({kHosts[0], kHosts[1]});
  const auto clients = StartWithName();
  AwaitRouters(2, 2);
  AwaitSnapshotsWanted(2);
  // It drains, or is not ready: the name no longer has it, and its requests still run.
  SetHosts({kHosts[0]});
  AwaitLooks();
  AwaitRouters(2, 2);
  EXPECT_EQ(CodeOfVoucher("key of 1"), absl::StatusCode::kOk);
  StopRouter(1);
  AwaitRouters(1, 1);
  EXPECT_EQ(CodeOfVoucher("key of 1"), absl::StatusCode::kPermissionDenied);
  // A name service that is away takes nobody away.
  SetHosts({});
  StopRouter(0);
  AwaitRouters(1, 0);
  AwaitLooks();
  StartRouter(0);
  AwaitRouters(1, 1);
}

TEST_F(ClusterClientsTest, RefusalByAllIsFinal) {
  StartRouter(0);
  StartRouter(1);
  for (FakeRouter& router : routers_) router.Refuse("block_size 16 here, 32 there");
  ClusterClients clients(Options({{kHosts[0], port_}, {kHosts[1], port_}}));
  EXPECT_EQ(AwaitRefusal(), absl::FailedPreconditionError("block_size 16 here, 32 there"));
}

// One of several routers that was started wrongly, or is not yet of the new version, ends nobody,
// and takes the worker in when that is over.
TEST_F(ClusterClientsTest, RefusalByOneIsNot) {
  StartRouter(0);
  StartRouter(1);
  routers_[0].Refuse("block_size 16 here, 32 there");
  SetHosts({kHosts[1]});
  const auto clients = StartWithName();
  AwaitRouters(1, 1);
  SetHosts({kHosts[0], kHosts[1]});
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(routers_[0].Next().has_hello());
  AwaitRouters(2, 1);
  EXPECT_OK(Refusal());
  routers_[0].Refuse("");
  AwaitRouters(2, 2);
}

TEST_F(ClusterClientsTest, DestructionAtAnyMoment) {
  StartRouter(0);
  StartRouter(1);
  SetHosts({kHosts[0], kHosts[1]});
  for (int i = 0; i < 20; ++i) {
    const auto clients = StartWithName();
    if (i % 2 == 0) clients->PostLoad(Load(1));
    if (i % 3 == 0) AwaitLooks();
    if (i == 10) StopRouter(1);
  }
}

}  // namespace
}  // namespace tandem
