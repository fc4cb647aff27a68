#include "common/rpc/server.h"

#include <atomic>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "google/protobuf/descriptor.h"
#include "google/protobuf/dynamic_message.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"

#include "tandem/internal/v1/cluster.grpc.pb.h"
#include "tandem/v1/admin.grpc.pb.h"

namespace tandem {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using testing::HasSubstr;

// GetCluster waits for Release(): a call that is under way while the server stops.
class SlowAdmin : public tandem::v1::Admin::CallbackService {
 public:
  grpc::ServerUnaryReactor* GetCluster(grpc::CallbackServerContext* context,
                                       const v1::GetClusterRequest* /*request*/,
                                       v1::GetClusterResponse* response) override {
    response->set_model("slow");
    reactor_ = context->DefaultReactor();
    started.Notify();
    return reactor_;
  }
  void Release() { reactor_->Finish(grpc::Status::OK); }

  absl::Notification started;

 private:
  grpc::ServerUnaryReactor* reactor_ = nullptr;
};

class ServerTest : public testing::Test {
 protected:
  void Start(const std::vector<grpc::Service*>& services) {
    auto server = RpcServer::Start({}, services);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    channel_ = MakeChannel(server_->address(), Patience::kPatient);
    health_ = Health::NewStub(channel_);
  }
  HealthCheckResponse::ServingStatus Check(const std::string& service) {
    grpc::ClientContext context;
    HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    const grpc::Status status = health_->Check(&context, request, &response);
    if (status.error_code() == grpc::StatusCode::NOT_FOUND) {
      return HealthCheckResponse::SERVICE_UNKNOWN;
    }
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }

  std::unique_ptr<RpcServer> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<Health::Stub> health_;
};

TEST_F(ServerTest, HealthFollowsSetServing) {
  tandem::v1::Admin::CallbackService admin;
  Start({&admin});
  EXPECT_EQ(server_->address(), "127.0.0.1:" + std::to_string(server_->port()));
  EXPECT_EQ(Check(""), HealthCheckResponse::NOT_SERVING);
  server_->SetServing(true);
  EXPECT_EQ(Check(""), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("tandem.v1.Admin"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("grpc.health.v1.Health"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("tandem.v1.Nothing"), HealthCheckResponse::SERVICE_UNKNOWN);
}

TEST_F(ServerTest, WatchersSeeEveryChangeAndTheEnd) {
  Start({});
  grpc::ClientContext context;
  auto reader = health_->Watch(&context, HealthCheckRequest());
  HealthCheckResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  server_->SetServing(true);
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVING);
  // An open watch does not hold the shutdown up for its grace.
  std::thread stop([this] { server_->Shutdown(absl::InfiniteDuration()); });
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::NOT_SERVING);
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
  stop.join();
}

TEST_F(ServerTest, WatchOfUnknownServiceAndCancel) {
  Start({});
  grpc::ClientContext context;
  HealthCheckRequest request;
  request.set_service("nothing");
  auto reader = health_->Watch(&context, request);
  HealthCheckResponse response;
  ASSERT_TRUE(reader->Read(&response));
  EXPECT_EQ(response.status(), HealthCheckResponse::SERVICE_UNKNOWN);
  context.TryCancel();
  EXPECT_FALSE(reader->Read(&response));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

// Nothing but their clients ends such streams, and those may be anyone.
TEST_F(ServerTest, WatchersAndStreamsOfAConnectionAreBounded) {
  Start({});
  struct Watch {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<HealthCheckResponse>> reader;
  };
  std::vector<std::unique_ptr<Watch>> watches;
  const auto watch = [&](Health::Stub* stub, absl::Duration patience) {
    watches.push_back(std::make_unique<Watch>());
    Watch& last = *watches.back();
    last.context.set_deadline(absl::ToChronoTime(absl::Now() + patience));
    last.reader = stub->Watch(&last.context, HealthCheckRequest());
    HealthCheckResponse response;
    if (last.reader->Read(&response)) return grpc::StatusCode::OK;
    return last.reader->Finish().error_code();
  };
  const auto own = [this] {
    return Health::NewStub(MakeChannel(server_->address(), Patience::kPatient));
  };
  const auto second = own();
  for (int i = 0; i < 1000; ++i) {
    ASSERT_EQ(watch(health_.get(), absl::Seconds(60)), grpc::StatusCode::OK);
  }
  for (int i = 0; i < 24; ++i) {
    ASSERT_EQ(watch(second.get(), absl::Seconds(60)), grpc::StatusCode::OK);
  }
  EXPECT_EQ(watch(second.get(), absl::Seconds(60)), grpc::StatusCode::RESOURCE_EXHAUSTED);
  for (const auto& w : watches) w->context.TryCancel();
  server_->Shutdown(absl::ZeroDuration());

  auto narrow = RpcServer::Start({.max_streams_per_connection = 2}, {});
  ASSERT_TRUE(narrow.ok()) << narrow.status();
  server_ = *std::move(narrow);
  const auto full = own(), other = own();
  EXPECT_EQ(watch(full.get(), absl::Seconds(60)), grpc::StatusCode::OK);
  EXPECT_EQ(watch(full.get(), absl::Seconds(60)), grpc::StatusCode::OK);
  EXPECT_EQ(watch(full.get(), absl::Milliseconds(200)), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(watch(other.get(), absl::Seconds(60)), grpc::StatusCode::OK);
  for (const auto& w : watches) w->context.TryCancel();
}

// The request is written by hand (field 7, "*": list services); the messages' descriptors are in
// gRPC's reflection library.
std::string ListServices(const std::shared_ptr<grpc::Channel>& channel) {
  const std::string bytes = "\x3a\x01*";
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  absl::Notification done;
  grpc::Status status;
  stub.UnaryCall(&context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                 grpc::StubOptions(), &request, &response, [&](grpc::Status s) {
                   status = std::move(s);
                   done.Notify();
                 });
  done.WaitForNotification();
  EXPECT_TRUE(status.ok()) << status.error_message();
  std::string text;
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(response.Dump(&slices).ok());
  for (const grpc::Slice& part : slices) {
    text.append(reinterpret_cast<const char*>(part.begin()), part.size());
  }
  return text;
}

TEST_F(ServerTest, ReflectionListsAllServices) {
  tandem::v1::Admin::CallbackService admin;
  internal::v1::Cluster::CallbackService cluster;
  Start({&admin, &cluster});
  const std::string services = ListServices(channel_);
  EXPECT_THAT(services, HasSubstr("tandem.v1.Admin"));
  EXPECT_THAT(services, HasSubstr("tandem.internal.v1.Cluster"));
  EXPECT_THAT(services, HasSubstr("grpc.health.v1.Health"));
  EXPECT_THAT(services, HasSubstr("grpc.reflection.v1alpha.ServerReflection"));
  // What reflection serves descriptors from.
  EXPECT_NE(google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(
                "grpc.health.v1.Health"),
            nullptr);
}

TEST_F(ServerTest, PortInUseIsNamed) {
  Start({});
  const auto second = RpcServer::Start({.listen_address = server_->address()}, {});
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(server_->address()));
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("port in use"));
}

TEST_F(ServerTest, BadListenAddresses) {
  for (const char* address : {"", "8000", "127.0.0.1:70000", "no-such-host.invalid:0"}) {
    const auto server = RpcServer::Start({.listen_address = address}, {});
    EXPECT_FALSE(server.ok()) << address;
  }
}

TEST_F(ServerTest, ShutdownLetsRunningCallsEnd) {
  SlowAdmin admin;
  Start({&admin});
  grpc::Status status;
  v1::GetClusterResponse response;
  std::thread call([&] {
    grpc::ClientContext context;
    status = tandem::v1::Admin::NewStub(channel_)->GetCluster(&context, {}, &response);
  });
  admin.started.WaitForNotification();
  std::thread stop([this] { server_->Shutdown(absl::InfiniteDuration()); });
  admin.Release();
  call.join();
  stop.join();
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.model(), "slow");
}

TEST_F(ServerTest, ShutdownCancelsAfterItsGrace) {
  SlowAdmin admin;
  Start({&admin});
  grpc::Status status;
  std::thread call([&] {
    grpc::ClientContext context;
    v1::GetClusterResponse response;
    status = tandem::v1::Admin::NewStub(channel_)->GetCluster(&context, {}, &response);
  });
  admin.started.WaitForNotification();
  // The handler never reacts to the cancellation, so the server itself cannot end yet.
  std::thread stop([this] { server_->Shutdown(absl::ZeroDuration()); });
  call.join();
  EXPECT_FALSE(status.ok());
  admin.Release();
  stop.join();
}

// A TCP relay that can fall silent without closing anything, as a host does that lost its network.
class Relay {
 public:
  explicit Relay(int target_port) {
    listener_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(listener_, 4), 0);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size);
    port_ = ntohs(address.sin_port);
    thread_ = std::thread([this, target_port] { Run(target_port); });
  }
  ~Relay() {
    stop_ = true;
    thread_.join();
    close(listener_);
  }
  int port() const { return port_; }
  void Freeze() { frozen_ = true; }

 private:
  void Run(int target_port) {
    std::vector<int> fds;  // pairs: client, server
    while (!stop_) {
      std::vector<pollfd> polls = {{.fd = listener_, .events = POLLIN, .revents = 0}};
      for (const int fd : fds) polls.push_back({.fd = fd, .events = POLLIN, .revents = 0});
      poll(polls.data(), frozen_ ? 0 : polls.size(), 20);
      if (frozen_) continue;
      for (size_t i = 1; i < polls.size(); ++i) {
        char buffer[4096];
        if (polls[i].revents == 0) continue;
        const ssize_t n = read(polls[i].fd, buffer, sizeof(buffer));
        if (n <= 0) continue;
        EXPECT_EQ(write(fds[(i - 1) ^ 1], buffer, static_cast<size_t>(n)), n);
      }
      if (polls[0].revents == 0) continue;
      fds.push_back(accept(listener_, nullptr, nullptr));
      fds.push_back(socket(AF_INET, SOCK_STREAM, 0));
      sockaddr_in target{};
      target.sin_family = AF_INET;
      target.sin_port = htons(static_cast<uint16_t>(target_port));
      target.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
      EXPECT_EQ(connect(fds.back(), reinterpret_cast<sockaddr*>(&target), sizeof(target)), 0);
    }
    for (const int fd : fds) close(fd);
  }

  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stop_ = false;
  std::atomic<bool> frozen_ = false;
  std::thread thread_;
};

// No deadline anywhere: without keepalive this test hangs.
TEST_F(ServerTest, SilentPeerIsNoticed) {
  Start({});
  Relay relay(server_->port());
  const auto channel = MakeChannel("127.0.0.1:" + std::to_string(relay.port()));
  grpc::ClientContext context;
  auto reader = Health::NewStub(channel)->Watch(&context, HealthCheckRequest());
  HealthCheckResponse response;
  ASSERT_TRUE(reader->Read(&response));
  relay.Freeze();
  EXPECT_FALSE(reader->Read(&response));
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
}

}  // namespace
}  // namespace tandem
