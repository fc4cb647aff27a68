// A real cluster and those who do not belong: without the secret they reach nothing that is
// internal; with it, a worker that misbehaves is refused in one short line.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <thread>
#include <unistd.h>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/base/model_config.h"
#include "common/base/model_digest.h"
#include "common/rpc/cluster_client.h"
#include "common/rpc/server.h"
#include "tandem/internal/v1/cluster.grpc.pb.h"
#include "tandem/internal/v1/decode.grpc.pb.h"
#include "tandem/internal/v1/prefill.grpc.pb.h"
#include "tests/support/cluster.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"
#include "tests/support/process_usage.h"
#include "tests/support/sanitizer.h"

namespace tandem {
namespace {

using testing::HasSubstr;
using testing::Not;

std::chrono::system_clock::time_point Soon() {
  return std::chrono::system_clock::now() + std::chrono::seconds(5);
}

grpc::Status Join(const std::shared_ptr<grpc::Channel>& channel, const internal::v1::Hello& hello) {
  grpc::ClientContext context;
  context.set_deadline(Soon());
  auto stream = internal::v1::Cluster::NewStub(channel)->Join(&context);
  internal::v1::WorkerMessage message;
  *message.mutable_hello() = hello;
  stream->Write(message);
  internal::v1::RouterMessage answer;
  EXPECT_FALSE(stream->Read(&answer)) << answer.DebugString();
  return stream->Finish();
}

internal::v1::Hello RogueHello() {
  internal::v1::Hello hello;
  hello.set_worker_id("rogue");
  hello.set_role("unified");
  hello.set_address("127.0.0.1:1");
  hello.mutable_capability()->set_block_size(16);
  hello.set_max_model_len(1);
  return hello;
}

// What the workers of this file's clusters have, which whoever is one of the cluster can know.
internal::v1::Capability DemoCapability() {
  const std::string dir = SourcePath("models/demo");
  const ModelConfig config = ModelConfig::Load(dir).value();
  internal::v1::Capability out;
  out.set_model("demo");
  out.set_model_digest(CheckpointDigest(dir).value());
  out.set_dtype("float32");
  out.set_kv_dtype("float32");
  out.set_num_layers(static_cast<uint32_t>(config.num_layers));
  out.set_num_kv_heads(static_cast<uint32_t>(config.num_kv_heads));
  out.set_head_dim(static_cast<uint32_t>(config.head_dim));
  out.set_block_size(16);
  out.set_layout(kBlockLayout);
  out.set_tokenizer_digest(TokenizerDigest(dir));
  out.set_protocol_version(kProtocolVersion);
  out.set_vocab_size(static_cast<uint32_t>(config.vocab_size));
  return out;
}

class Strangers : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("models/demo");
    spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
    cluster_ = TestCluster::Start(spec).release();
  }
  static void TearDownTestSuite() { delete cluster_; }

  // Everything internal, on a channel of a stranger's to each process; all of it must be refused.
  template <typename MakeChannelTo>
  void ExpectNothing(MakeChannelTo channel_to) {
    const auto router = channel_to(cluster_->router().internal_address, kRouterRole);
    EXPECT_EQ(Join(router, RogueHello()).error_code(), grpc::StatusCode::UNAVAILABLE);
    {
      grpc::ClientContext context;
      context.set_deadline(Soon());
      v1::DrainWorkerRequest request;
      request.set_worker_id("decode-0");
      v1::DrainWorkerResponse response;
      EXPECT_EQ(v1::Admin::NewStub(router)->DrainWorker(&context, request, &response).error_code(),
                grpc::StatusCode::UNAVAILABLE);
    }
    {
      grpc::ClientContext context;
      context.set_deadline(Soon());
      internal::v1::PrefillRequest request;
      request.add_token_ids(1);
      request.set_capability_digest("guess");
      internal::v1::PrefillEvent event;
      auto stub = internal::v1::Prefill::NewStub(
          channel_to(cluster_->worker("prefill-0").address, kPrefillRole));
      auto reader = stub->Prefill(&context, request);
      EXPECT_FALSE(reader->Read(&event));
      const grpc::Status status = reader->Finish();
      EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
    }
    {
      grpc::ClientContext context;
      context.set_deadline(Soon());
      internal::v1::DecodeRequest request;
      request.add_token_ids(1);
      auto stub = internal::v1::Decode::NewStub(
          channel_to(cluster_->worker("decode-0").address, kDecodeRole));
      auto reader = stub->Generate(&context, request);
      internal::v1::TokenEvent event;
      EXPECT_FALSE(reader->Read(&event));
      EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
    }
  }

  static TestCluster* cluster_;
};
TestCluster* Strangers::cluster_ = nullptr;

TEST_F(Strangers, WithoutTheSecretNothingInternalAnswers) {
  ASSERT_NE(cluster_, nullptr);
  ExpectNothing([](const std::string& address, const char* /*role*/) {
    return grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  });
  ExpectNothing([](const std::string& address, const char* role) {
    return MakeChannel(address, *TestCredentials(kDecodeRole, "rogue", "guess"), {role, ""});
  });
  // Nobody is told the secret.
  EXPECT_THAT(cluster_->Logs(), Not(HasSubstr("guess")));
  const auto view = cluster_->GetCluster();
  EXPECT_EQ(view.workers_size(), 2);
  for (const auto& worker : view.workers()) EXPECT_EQ(worker.state(), "ready");
}

TEST_F(Strangers, ThePublicPortHasThePublicApiOnly) {
  ASSERT_NE(cluster_, nullptr);
  EXPECT_EQ(Join(cluster_->channel(), RogueHello()).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  grpc::ClientContext context;
  v1::GetClusterResponse response;
  EXPECT_EQ(
      v1::Admin::NewStub(cluster_->channel())->GetCluster(&context, {}, &response).error_code(),
      grpc::StatusCode::UNIMPLEMENTED);
}

TEST_F(Strangers, AWorkerThatDoesNotFitIsRefusedInAShortLine) {
  ASSERT_NE(cluster_, nullptr);
  const auto channel =
      MakeChannel(cluster_->router().internal_address,
                  *TestCredentials(kDecodeRole, "rogue", kClusterSecret), {kRouterRole, ""});
  // As another worker than it is; with texts of any size, and of more than one line.
  internal::v1::Hello other = RogueHello();
  other.set_worker_id("decode-0");
  EXPECT_EQ(Join(channel, other).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  internal::v1::Hello huge = RogueHello();
  huge.mutable_capability()->set_model(std::string(30 << 20, 'x'));
  grpc::Status refused = Join(channel, huge);
  for (int again = 0; again < 5 && refused.error_code() == grpc::StatusCode::UNAVAILABLE; ++again) {
    refused = Join(channel, huge);  // a slow machine may lose the connection under so much
  }
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << refused.error_message();
  EXPECT_LT(refused.error_message().size(), 200u);
  internal::v1::Hello forged = RogueHello();
  forged.mutable_capability()->set_model("demo\n12:00:00 router: all is well");
  EXPECT_EQ(Join(channel, forged).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  // Nor does it learn what it would have to say.
  const grpc::Status differs = Join(channel, RogueHello());
  EXPECT_EQ(differs.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(differs.error_message(), HasSubstr("cluster demo"));
  const std::string log = ReadWholeFile(cluster_->router().stderr_path);
  EXPECT_LT(log.size(), 20'000u);
  EXPECT_THAT(log, Not(HasSubstr("\n12:00:00 router")));

  TestClient client(cluster_->channel());
  const Answer answer = client.Generate(TokenRequest(RandomTokens(100, 2000, 1), 4));
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
}

// One that has the secret and says that it is the decode worker; so it proves. Its KV address is
// not the one that the router knows, so nothing is dialled.
TEST_F(Strangers, APrefillWorkerDialsOnlyWhatTheRouterVouchesFor) {
  ASSERT_NE(cluster_, nullptr);
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  sockaddr_in here = {};
  here.sin_family = AF_INET;
  here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(here);
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&here), length), 0);
  ASSERT_EQ(listen(listener, 1), 0);
  ASSERT_EQ(getsockname(listener, reinterpret_cast<sockaddr*>(&here), &length), 0);
  const auto channel = MakeChannel(cluster_->worker("prefill-0").address,
                                   *TestCredentials(kDecodeRole, "decode-0", kClusterSecret),
                                   {kPrefillRole, "prefill-0"});
  const auto ship_to_us = [&](const std::string& voucher) {
    grpc::ClientContext context;
    context.set_deadline(Soon());
    internal::v1::PrefillRequest request;
    request.add_token_ids(1);
    request.mutable_sampling()->set_max_tokens(1);
    request.set_capability_digest(CapabilityDigest(DemoCapability()));
    internal::v1::KvTarget& target = *request.mutable_target();
    target.set_transfer_id(std::string(16, 't'));
    target.set_token(std::string(32, 't'));
    target.set_epoch(1);
    target.set_transport("tcp");
    target.set_address("127.0.0.1:" + std::to_string(ntohs(here.sin_port)));
    target.set_worker_id("decode-0");
    target.set_num_blocks(16);
    target.add_block_ids(0);
    target.set_voucher(voucher);
    internal::v1::PrefillEvent event;
    const auto stub = internal::v1::Prefill::NewStub(channel);
    auto reader = stub->Prefill(&context, request);
    EXPECT_FALSE(reader->Read(&event));
    return reader->Finish();
  };
  for (const std::string& voucher : {std::string(), std::string(32, 'v')}) {
    const grpc::Status status = ship_to_us(voucher);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::PERMISSION_DENIED) << status.error_message();
  }
  SleepMilliseconds(200);
  EXPECT_EQ(accept(listener, nullptr, nullptr), -1) << "the prefill worker has dialled";
  close(listener);
}

int Connect(const std::string& address) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  sockaddr_in to = {};
  to.sin_family = AF_INET;
  to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
  (void)connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to));
  return fd;
}

int64_t MebibytesOf(pid_t pid) { return UsageOf(pid).value_or(ProcessUsage()).resident_kib / 1024; }
int DescriptorsOf(pid_t pid) { return UsageOf(pid).value_or(ProcessUsage()).descriptors; }

// Each port of the cluster gets 1,000 connections that say nothing, or what nobody understands, as
// much of it as goes in. That costs a bounded amount of memory and of lines, for some seconds, and
// others are served meanwhile.
TEST_F(Strangers, AThousandConnectionsCostLittleAndLockNobodyOut) {
  ASSERT_NE(cluster_, nullptr);
  struct Victim {
    Member* member;
    std::string address;
  };
  const std::vector<Victim> victims = {
      {&cluster_->router(), cluster_->router().address},
      {&cluster_->router(), cluster_->router().internal_address},
      {&cluster_->worker("prefill-0"), cluster_->worker("prefill-0").address},
      {&cluster_->worker("decode-0"), cluster_->worker("decode-0").address}};
  const std::string garbage(64 << 10, '\x16');
  for (const Victim& victim : victims) {
    const pid_t pid = victim.member->process->pid();
    const int64_t memory = MebibytesOf(pid);
    const int descriptors = DescriptorsOf(pid);
    const size_t log = ReadWholeFile(victim.member->stderr_path).size();
    std::vector<int> connections;
    for (int i = 0; i < 1000; ++i) connections.push_back(Connect(victim.address));
    for (size_t i = 0; i < connections.size(); i += 2) {
      (void)send(connections[i], garbage.data(), garbage.size(), MSG_NOSIGNAL);
    }
    // A new client, a worker's and an operator's connections.
    TestClient client(grpc::CreateChannel(cluster_->address(), grpc::InsecureChannelCredentials()));
    const Answer answer = client.Generate(TokenRequest(RandomTokens(100, 2000, 2), 4), 20);
    EXPECT_TRUE(answer.status.ok()) << victim.address << ": " << answer.status.error_message();
    EXPECT_TRUE(cluster_->WaitForWorkers(2, 10)) << victim.address;
    EXPECT_LT(MebibytesOf(pid), memory + 128 + SanitizerKeepsMib()) << victim.address;
    EXPECT_LT(ReadWholeFile(victim.member->stderr_path).size(), log + 10'000) << victim.address;
    // Who has not spoken in 5 s is gone.
    const int most = descriptors + 50;
    for (int i = 0; i < 200 && DescriptorsOf(pid) > most; ++i) SleepMilliseconds(50);
    EXPECT_LE(DescriptorsOf(pid), most) << victim.address;
    for (const int fd : connections) close(fd);
  }
}

// Clients that send what is far too long, all at once: gRPC refuses a message when it has it whole,
// and what it holds meanwhile is bounded for all of them together.
TEST(LargeMessages, CostWhatTheRouterIsAllowedForAllOfThem) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.prefill = spec.decode = 0;
  spec.unified = 1;
  spec.router_flags = {"--rpc-memory-bytes=64MiB"};
  spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
  const auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  const pid_t pid = cluster->router().process->pid();
  const int64_t before = MebibytesOf(pid);
  v1::GenerateRequest huge = TokenRequest({1}, 1);
  huge.set_text(std::string(60 << 20, 'a'));
  std::vector<std::thread> clients;
  for (int i = 0; i < 8; ++i) {
    clients.emplace_back([&] {
      TestClient client(
          grpc::CreateChannel(cluster->address(), grpc::InsecureChannelCredentials()));
      EXPECT_FALSE(client.Generate(huge, 30).status.ok());
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_LT(MebibytesOf(pid), before + 200 + SanitizerKeepsMib());
  const Answer answer =
      TestClient(cluster->channel()).Generate(TokenRequest(RandomTokens(100, 2000, 3), 4), 20);
  EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
}

// The first worker of a cluster, and not what the router serves: it ends with a line that says what
// to mend, and is in nobody's way.
TEST(FirstToJoin, DoesNotDefineTheCluster) {
  ClusterSpec spec;
  spec.model_dir = SourcePath("models/demo");
  spec.prefill = spec.decode = 0;
  spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
  const auto cluster = TestCluster::Start(spec);
  ASSERT_NE(cluster, nullptr);
  TempDir dir;
  const auto refusal_of = [&](const std::string& flag) {
    const std::string log = dir.path() + "/stderr";
    const auto odd = Process::Spawn(
        {BinaryPath("tandem_decode_worker"), "--role=unified", "--device=cpu", "--worker-id=odd",
         "--model=" + spec.model_dir, "--router=" + cluster->router().internal_address, flag,
         "--num-threads=1", "--kv-cache-memory-bytes=64MiB"},
        {std::string("TANDEM_CLUSTER_SECRET=") + kClusterSecret}, log);
    EXPECT_EQ(odd->Wait(30), 1) << flag;
    return ReadWholeFile(log);
  };
  EXPECT_THAT(refusal_of("--load-format=dummy"),
              HasSubstr("model_digest differs; start it with the same: the checkpoint in --model"));
  EXPECT_THAT(refusal_of("--block-size=32"),
              HasSubstr("block_size: this worker 32, cluster 16; start it with --block-size=16"));
  cluster->StartWorker("unified-0");
  EXPECT_TRUE(cluster->WaitForWorkers(1, 30)) << cluster->Logs();
}

}  // namespace
}  // namespace tandem
