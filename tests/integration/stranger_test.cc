// A real cluster and those who do not belong: without the secret they reach nothing that is
// internal; with it, a worker that misbehaves is refused in one short line.
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/rpc/server.h"
#include "tandem/internal/v1/cluster.grpc.pb.h"
#include "tandem/internal/v1/decode.grpc.pb.h"
#include "tandem/internal/v1/prefill.grpc.pb.h"
#include "tests/support/cluster.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"

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

class Strangers : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("models/demo");
    spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
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
      internal::v1::PrefillResponse response;
      auto stub = internal::v1::Prefill::NewStub(
          channel_to(cluster_->worker("prefill-0").address, kPrefillRole));
      const grpc::Status status = stub->Prefill(&context, request, &response);
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
  const grpc::Status refused = Join(channel, huge);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_LT(refused.error_message().size(), 200u);
  internal::v1::Hello forged = RogueHello();
  forged.mutable_capability()->set_model("demo\n12:00:00 router: all is well");
  EXPECT_EQ(Join(channel, forged).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  // Nor does it learn what it would have to say.
  const grpc::Status differs = Join(channel, RogueHello());
  EXPECT_EQ(differs.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(differs.error_message(), HasSubstr("model demo here"));
  const std::string log = ReadWholeFile(cluster_->router().stderr_path);
  EXPECT_LT(log.size(), 20'000u);
  EXPECT_THAT(log, Not(HasSubstr("\n12:00:00 router")));

  TestClient client(cluster_->channel());
  const Answer answer = client.Generate(TokenRequest(RandomTokens(100, 2000, 1), 4));
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
              HasSubstr("model_digest differs; must be the same: the checkpoint in --model"));
  EXPECT_THAT(refusal_of("--block-size=32"),
              HasSubstr("block_size 16 here, 32 there; must be the same: --block-size"));
  cluster->StartWorker("unified-0");
  EXPECT_TRUE(cluster->WaitForWorkers(1, 30)) << cluster->Logs();
}

}  // namespace
}  // namespace tandem
