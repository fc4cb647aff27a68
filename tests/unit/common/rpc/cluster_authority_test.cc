// Internal RPC where certificates of an authority are shown beside the proof of the secret.
#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/rpc/authority_check.h"
#include "common/rpc/cluster_credentials.h"
#include "common/rpc/cluster_flags.h"
#include "common/rpc/server.h"
#include "tandem/v1/admin.grpc.pb.h"
#include "tests/support/certificates.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"
#include "tests/support/temp_dir.h"

namespace tandem {
namespace {

using testing::HasSubstr;

class CountsCalls : public v1::Admin::CallbackService {
 public:
  grpc::ServerUnaryReactor* GetCluster(grpc::CallbackServerContext* context,
                                       const v1::GetClusterRequest* /*request*/,
                                       v1::GetClusterResponse* /*response*/) override {
    ++calls;
    auto* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }
  std::atomic<int> calls = 0;
};

class ClusterAuthorityTest : public testing::Test {
 protected:
  TlsFiles Write(const std::string& name, const TestCertificate& own, const std::string& ca) {
    const std::string path = dir_.path() + "/" + name;
    WriteFile(path + ".pem", own.certificate);
    WriteFile(path + "_key.pem", own.key);
    WriteFile(path + "_ca.pem", ca);
    return {path + ".pem", path + "_key.pem", path + "_ca.pem"};
  }
  std::shared_ptr<CertificateFiles> Open(const std::string& name, const TestCertificate& own,
                                         const std::string& ca) {
    auto files = OpenClusterCertificate(Write(name, own, ca));
    EXPECT_OK(files);
    return *std::move(files);
  }
  void StartServer(std::shared_ptr<CertificateFiles> certificate) {
    auto server = RpcServer::Start(
        {.credentials = TestCredentials(kDecodeRole, "decode-0", "s3cret", std::move(certificate)),
         .callers = {kRouterRole}},
        {&service_});
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  // Each has a connection of its own.
  std::shared_ptr<grpc::Channel> ChannelOf(const ClusterCredentials& credentials) {
    return MakeChannel(server_->address(), credentials, {kDecodeRole, "decode-0"});
  }
  std::shared_ptr<grpc::Channel> Channel(std::shared_ptr<CertificateFiles> certificate,
                                         const std::string& secret = "s3cret") {
    return ChannelOf(*TestCredentials(kRouterRole, "router", secret, std::move(certificate)));
  }
  static grpc::Status Call(const std::shared_ptr<grpc::Channel>& channel) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
    v1::GetClusterResponse response;
    return v1::Admin::NewStub(channel)->GetCluster(&context, {}, &response);
  }
  // Fails, and nothing of it has arrived.
  void ExpectRefused(const grpc::Status& status) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
    EXPECT_EQ(service_.calls, 0);
  }

  TempDir dir_;
  const TestCa ca_{"cluster"};
  const TestCa other_ca_{"another"};
  CountsCalls service_;
  std::unique_ptr<RpcServer> server_;
};

TEST_F(ClusterAuthorityTest, BothEndsShowACertificateOfTheCa) {
  StartServer(Open("server", ca_.Issue(), ca_.certificate()));
  const grpc::Status status = Call(Channel(Open("client", ca_.Issue(), ca_.certificate())));
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(service_.calls, 1);
}

TEST_F(ClusterAuthorityTest, TheSecretAloneIsNotEnough) {
  StartServer(Open("server", ca_.Issue(), ca_.certificate()));
  ExpectRefused(Call(Channel(nullptr)));
  ExpectRefused(Call(MakeChannel(server_->address())));  // no TLS at all
}

TEST_F(ClusterAuthorityTest, NorIsTheCertificateAlone) {
  StartServer(Open("server", ca_.Issue(), ca_.certificate()));
  ExpectRefused(Call(Channel(Open("client", ca_.Issue(), ca_.certificate()), "guess")));
}

TEST_F(ClusterAuthorityTest, AServerShowsOneToo) {
  StartServer(nullptr);
  const grpc::Status status = Call(Channel(Open("client", ca_.Issue(), ca_.certificate())));
  ExpectRefused(status);
  EXPECT_THAT(status.error_message(), HasSubstr("shows no certificate"));
}

TEST_F(ClusterAuthorityTest, AnotherCaIsRefusedByEither) {
  StartServer(Open("server", ca_.Issue(), ca_.certificate()));
  // The client believes the server, who does not believe the client.
  ExpectRefused(Call(Channel(Open("client", other_ca_.Issue(), ca_.certificate()))));
  // The other way round.
  const grpc::Status status = Call(Channel(Open("client", ca_.Issue(), other_ca_.certificate())));
  ExpectRefused(status);
  EXPECT_THAT(status.error_message(), HasSubstr("not good for --cluster-ca"));
}

// It held when the process started.
TEST_F(ClusterAuthorityTest, ACertificateThatHasExpiredIsRefused) {
  const absl::Duration left = absl::Seconds(2);
  const auto server = Open("server", ca_.Issue(left), ca_.certificate());
  absl::SleepFor(left + absl::Seconds(2));
  StartServer(server);
  const grpc::Status status = Call(Channel(Open("client", ca_.Issue(), ca_.certificate())));
  ExpectRefused(status);
  EXPECT_THAT(status.error_message(), HasSubstr("certificate has expired"));
}

// To another CA by way of believing both, while calls are made over one connection and over new
// ones. None fails; at the end the old CA's certificates are refused.
TEST_F(ClusterAuthorityTest, CertificatesAndCaChangeWithoutAnError) {
  const TestCa next("next");
  const std::string both = ca_.certificate() + next.certificate();
  const auto server = Open("server", ca_.Issue(), ca_.certificate());
  const auto client = Open("client", ca_.Issue(), ca_.certificate());
  StartServer(server);
  std::atomic<bool> done = false;
  std::atomic<int> failed = 0;
  std::thread calls([&] {
    const auto credentials = TestCredentials(kRouterRole, "router", "s3cret", client);
    const auto kept = ChannelOf(*credentials);
    while (!done) {
      for (const auto& channel : {kept, ChannelOf(*credentials)}) {
        const grpc::Status status = Call(channel);
        if (!status.ok() && failed++ == 0) ADD_FAILURE() << status.error_message();
      }
    }
  });
  const auto change = [&](const TestCertificate& own, const std::string& ca) {
    Write("server", own, ca);
    Write("client", own, ca);
    for (int i = 0; i < 600; ++i) {
      if (server->texts().certificate == own.certificate && server->texts().ca == ca &&
          client->texts().certificate == own.certificate && client->texts().ca == ca) {
        break;
      }
      absl::SleepFor(absl::Milliseconds(50));
    }
    EXPECT_EQ(client->texts().ca, ca);
  };
  change(ca_.Issue(), both);
  change(next.Issue(), both);
  // The server shows it, which gRPC looks for about every second.
  const auto probe = TestCredentials(kRouterRole, "router", "s3cret",
                                     Open("probe", next.Issue(), next.certificate()));
  for (int i = 0; i < 600 && !Call(ChannelOf(*probe)).ok(); ++i)
    absl::SleepFor(absl::Milliseconds(50));
  change(next.Issue(), next.certificate());
  done = true;
  calls.join();
  EXPECT_EQ(failed, 0);
  const int before = service_.calls;
  EXPECT_GT(before, 0);
  EXPECT_FALSE(Call(Channel(Open("late", ca_.Issue(), both))).ok());
  EXPECT_EQ(service_.calls, before);
}

// Who has only seen a certificate cannot show it: its key has not signed theirs.
TEST_F(ClusterAuthorityTest, AKeyMustBeSignedByTheCertificates) {
  AuthorityCheck check(Open("server", ca_.Issue(), ca_.certificate()));
  const TestCertificate seen = ca_.Issue();
  const TestCertificate mine = ca_.Issue();  // signed by the CA's key, not by that of `seen`
  const absl::Status status = check.Check(mine.certificate, mine.certificate + seen.certificate);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(status.message()), HasSubstr("does not hold the key"));
  EXPECT_EQ(check.Check("", "").code(), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(check.Check(mine.certificate, mine.certificate).code(),
            absl::StatusCode::kUnauthenticated);
  // Signed by the key of a certificate that is good: here that of the CA.
  EXPECT_OK(check.Check(mine.certificate, ca_.certificate()));
}

TEST(ClusterFlags, GoTogether) {
  EXPECT_OK(CheckClusterFlags({}));
  EXPECT_OK(CheckClusterFlags({"c", "k", "a"}));
  EXPECT_FALSE(CheckClusterFlags({"c", "k", ""}).ok());
  EXPECT_FALSE(CheckClusterFlags({"", "", "a"}).ok());
}

}  // namespace
}  // namespace tandem
