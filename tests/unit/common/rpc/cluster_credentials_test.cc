#include "common/rpc/cluster_credentials.h"

#include <atomic>

#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "gtest/gtest.h"

#include "common/rpc/server.h"
#include "tandem/v1/admin.grpc.pb.h"
#include "tests/support/credentials.h"

namespace tandem {
namespace {

using testing::HasSubstr;
using testing::Not;

// Answers with who called.
class WhoCalls : public v1::Admin::CallbackService {
 public:
  grpc::ServerUnaryReactor* GetCluster(grpc::CallbackServerContext* context,
                                       const v1::GetClusterRequest* /*request*/,
                                       v1::GetClusterResponse* response) override {
    ++calls;
    const std::optional<Party> caller = CallerOf(*context->auth_context());
    response->set_model(caller.has_value() ? caller->role + " " + caller->id : "anyone");
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
  std::atomic<int> calls = 0;
};

class ClusterCredentialsTest : public testing::Test {
 protected:
  ClusterCredentialsTest() {
    auto server =
        RpcServer::Start({.credentials = TestCredentials(kDecodeRole, "decode-0", "s3cret"),
                          .callers = {kRouterRole}},
                         {&service_});
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }

  grpc::Status Call(const std::shared_ptr<grpc::Channel>& channel) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(3));
    return v1::Admin::NewStub(channel)->GetCluster(&context, {}, &response_);
  }
  grpc::Status CallAs(const std::string& secret, const Party& self,
                      const Party& callee = {kDecodeRole, "decode-0"}) {
    return Call(
        MakeChannel(server_->address(), *TestCredentials(self.role, self.id, secret), callee));
  }

  WhoCalls service_;
  std::unique_ptr<RpcServer> server_;
  v1::GetClusterResponse response_;
};

TEST_F(ClusterCredentialsTest, BothEndsKnowEachOther) {
  const std::string odd_id = "router/\n\"1\" with a long name: " + std::string(90, 'x');
  ASSERT_TRUE(CallAs("s3cret", {kRouterRole, odd_id}).ok());
  EXPECT_EQ(response_.model(), "router " + odd_id);
}

TEST_F(ClusterCredentialsTest, WithoutTheSecretNoCallArrives) {
  EXPECT_EQ(Call(MakeChannel(server_->address())).error_code(), grpc::StatusCode::UNAVAILABLE);
  const grpc::Status wrong = CallAs("guess", {kRouterRole, "router-0"});
  EXPECT_EQ(wrong.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(wrong.error_message(), HasSubstr("does not prove the cluster secret"));
  EXPECT_THAT(wrong.error_message(), Not(HasSubstr("s3cret")));
  EXPECT_EQ(service_.calls, 0);
}

// A server without the secret that took a worker's address: the client finds out before it sends.
TEST_F(ClusterCredentialsTest, AnImpostorGetsNoCall) {
  WhoCalls service;
  const auto impostor = RpcServer::Start(
      {.credentials = TestCredentials(kDecodeRole, "decode-0", "guess"), .callers = {kRouterRole}},
      {&service});
  ASSERT_TRUE(impostor.ok());
  const auto router = TestCredentials(kRouterRole, "router-0", "s3cret");
  const grpc::Status status =
      Call(MakeChannel((*impostor)->address(), *router, {kDecodeRole, "decode-0"}));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(service.calls, 0);
}

TEST_F(ClusterCredentialsTest, RolesAndIdsAreChecked) {
  const grpc::Status role = CallAs("s3cret", {kPrefillRole, "prefill-0"});
  EXPECT_EQ(role.error_code(), grpc::StatusCode::UNAVAILABLE);
  const grpc::Status id = CallAs("s3cret", {kRouterRole, "router-0"}, {kDecodeRole, "decode-1"});
  EXPECT_THAT(id.error_message(), HasSubstr("decode 'decode-0', not 'decode-1'"));
  EXPECT_EQ(service_.calls, 0);
  EXPECT_TRUE(CallAs("s3cret", {kRouterRole, "router-0"}, {kDecodeRole, ""}).ok());
}

TEST_F(ClusterCredentialsTest, PublicServersKnowNobody) {
  WhoCalls service;
  const auto server = RpcServer::Start({}, {&service});
  ASSERT_TRUE(server.ok());
  ASSERT_TRUE(Call(MakeChannel((*server)->address())).ok());
  EXPECT_EQ(response_.model(), "anyone");
}

TEST(ClusterCredentials, RefusesAnImpossibleParty) {
  EXPECT_FALSE(ClusterCredentials::Make("s", {"king", "k"}).ok());
  EXPECT_FALSE(ClusterCredentials::Make("s", {kRouterRole, std::string(129, 'x')}).ok());
}

}  // namespace
}  // namespace tandem
