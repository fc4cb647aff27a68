// A router with few descriptors and more connections than that: further ones are refused at once,
// the log says so, and when they are gone the router serves as before. Without a bound, gRPC's
// listener gives up at the first connection that it has no descriptor for, and everybody after it
// waits until the deadline.
#include <algorithm>
#include <arpa/inet.h>
#include <chrono>
#include <memory>
#include <netinet/in.h>
#include <string>
#include <sys/socket.h>
#include <unistd.h>
#include <vector>

#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"

#include "tandem/v1/inference.grpc.pb.h"
#include "tests/support/paths.h"
#include "tests/support/process.h"

namespace tandem {
namespace {

using testing::HasSubstr;

constexpr int kDescriptors = 128;

// Connections of clients that have greeted and ask for nothing, so that the router keeps them.
class IdleConnections {
 public:
  ~IdleConnections() { CloseAll(); }
  void Open(int port) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    ASSERT_GE(fd, 0);
    fds_.push_back(fd);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    ASSERT_EQ(connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
    // HTTP/2's preface and an empty SETTINGS frame; who was refused does not take it any more.
    const std::string hello("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0", 33);
    [[maybe_unused]] const ssize_t sent = send(fd, hello.data(), hello.size(), MSG_NOSIGNAL);
  }
  void CloseAll() {
    for (const int fd : fds_) close(fd);
    fds_.clear();
  }

 private:
  std::vector<int> fds_;
};

// On a connection of its own.
grpc::Status ListModels(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto stub = v1::Inference::NewStub(
      grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  v1::ListModelsResponse response;
  return stub->ListModels(&context, v1::ListModelsRequest(), &response);
}

TEST(DescriptorsTest, ConnectionsBeyondThemAreRefusedAndDoNoHarm) {
  const TempDir dir;
  const std::string log = dir.path() + "/stderr";
  const auto router =
      Process::Spawn({"/bin/sh", "-c",
                      "ulimit -n " + std::to_string(kDescriptors) + "; exec " +
                          BinaryPath("tandem_router") + " --model " + SourcePath("models/demo")},
                     {}, log);
  const std::string line = router->ReadLine(60).value_or("");
  ASSERT_THAT(line, HasSubstr("listening 127.0.0.1:")) << ReadWholeFile(log);
  const std::string address = line.substr(10, line.find(' ', 10) - 10);
  const int port = std::stoi(address.substr(address.find(':') + 1));
  EXPECT_THAT(ReadWholeFile(log), HasSubstr("only 128 descriptors may be open"));
  EXPECT_EQ(ListModels(address).error_code(), grpc::StatusCode::OK);

  IdleConnections idle;
  for (int i = 0; i < kDescriptors + 20; ++i) ASSERT_NO_FATAL_FAILURE(idle.Open(port));
  // Refused, not left waiting: that would be DEADLINE_EXCEEDED.
  EXPECT_EQ(ListModels(address).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(ReadWholeFile(log), HasSubstr("a connection was refused"));

  idle.CloseAll();
  grpc::Status after;
  for (int i = 0; i < 100; ++i) {  // until the router has seen them go
    after = ListModels(address);
    if (after.ok()) break;
    usleep(100'000);
  }
  EXPECT_TRUE(after.ok()) << after.error_message();
}

}  // namespace
}  // namespace tandem
