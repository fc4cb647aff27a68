// The public API of a real cluster with --tls-cert: who is let in, what those are told who are not,
// and certificates that change while it serves.
#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "grpc/grpc_security_constants.h"
#include "gtest/gtest.h"

#include "common/rpc/public_server.h"
#include "tests/support/certificates.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr absl::Duration kExpired = -absl::Minutes(1);

class TlsTest : public ::testing::Test {
 protected:
  TlsTest() { Install(ca_.Issue()); }

  // Writes the server's files, one after the other, as people do.
  void Install(const TestCertificate& certificate) {
    WriteFile(Path("cert.pem"), certificate.certificate);
    WriteFile(Path("key.pem"), certificate.key);
  }
  std::string Path(const std::string& name) const { return dir_.path() + "/" + name; }

  void Start(std::vector<std::string> more = {}) {
    ClusterSpec spec;
    spec.model_dir = SourcePath("tests/data/models/small");
    spec.router_flags = {"--tls-cert=" + Path("cert.pem"), "--tls-key=" + Path("key.pem")};
    spec.router_flags.insert(spec.router_flags.end(), more.begin(), more.end());
    spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                         "--kv-cache-memory-bytes=64MiB"};
    cluster_ = TestCluster::Start(spec);
    ASSERT_NE(cluster_, nullptr);
  }
  // With the CA of clients that Start's `more` should have named.
  std::string ClientCaFlag() {
    WriteFile(Path("client_ca.pem"), client_ca_.certificate());
    return "--tls-client-ca=" + Path("client_ca.pem");
  }

  PublicServer Server(const TestCa& known_by) const {
    PublicServer server;
    server.address = cluster_->address();
    server.tls = true;
    server.tls_ca = known_by.certificate();
    return server;
  }
  PublicServer Server() const { return Server(ca_); }
  PublicServer With(const TestCertificate& own) const {
    PublicServer server = Server();
    server.tls_certificate = own.certificate;
    server.tls_key = own.key;
    return server;
  }
  // Over a connection of its own.
  static grpc::Status Ask(const PublicServer& server) {
    return TestClient(MakeChannel(server, Patience::kPatient))
        .Generate(TokenRequest({1, 2, 3}, 2), 30)
        .status;
  }
  // The certificate that a new connection is shown.
  std::string Shown() const {
    auto stub = v1::Inference::NewStub(MakeChannel(Server(), Patience::kPatient));
    grpc::ClientContext context;
    v1::ListModelsResponse response;
    EXPECT_TRUE(stub->ListModels(&context, {}, &response).ok());
    const auto values =
        context.auth_context()->FindPropertyValues(GRPC_X509_PEM_CERT_PROPERTY_NAME);
    return values.empty() ? "" : std::string(values[0].data(), values[0].size());
  }
  std::string Log() const { return ReadWholeFile(cluster_->router().stderr_path); }
  // For what the router does about once a second; false after a minute.
  static bool Await(const std::function<bool()>& condition) {
    for (int i = 0; i < 600; ++i) {
      if (condition()) return true;
      SleepMilliseconds(100);
    }
    return false;
  }
  Completed Generate(const std::vector<std::string>& more) const {
    std::vector<std::string> args = {
        BinaryPath("tandem"), "generate", "--server",     cluster_->address(),
        "--token-ids",        "1,2,3",    "--max-tokens", "2"};
    args.insert(args.end(), more.begin(), more.end());
    return RunCommand(args, 60);
  }

  TempDir dir_;
  const TestCa ca_{"servers"};
  const TestCa client_ca_{"clients"};
  std::unique_ptr<TestCluster> cluster_;
};

TEST_F(TlsTest, ServesWhoKnowsItsCaAndNobodyWhoDoesNot) {
  ASSERT_NO_FATAL_FAILURE(Start());
  EXPECT_TRUE(Ask(Server()).ok());
  const TestCa other("others");
  EXPECT_EQ(Ask(Server(other)).error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(TlsTest, WantsACertificateOfTheClientsCa) {
  ASSERT_NO_FATAL_FAILURE(Start({ClientCaFlag()}));
  EXPECT_TRUE(Ask(With(client_ca_.Issue())).ok());
  EXPECT_EQ(Ask(Server()).error_code(), grpc::StatusCode::UNAVAILABLE) << "no certificate";
  EXPECT_EQ(Ask(With(ca_.Issue())).error_code(), grpc::StatusCode::UNAVAILABLE) << "another CA's";
  EXPECT_EQ(Ask(With(client_ca_.Issue(kExpired))).error_code(), grpc::StatusCode::UNAVAILABLE)
      << "expired";
}

TEST_F(TlsTest, AnExpiredCertificateOfTheServerIsNoStart) {
  Install(ca_.Issue(kExpired));
  const Completed router =
      RunCommand({BinaryPath("tandem_router"), "--model", SourcePath("models/demo"), "--tls-cert",
                  Path("cert.pem"), "--tls-key", Path("key.pem")},
                 30);
  EXPECT_EQ(router.exit_code, 1);
  EXPECT_THAT(router.err, HasSubstr("the certificate has expired at "));
}

TEST_F(TlsTest, BothMismatchesAreToldInOneSentence) {
  ASSERT_NO_FATAL_FAILURE(Start());
  WriteFile(Path("ca.pem"), ca_.certificate());
  const Completed good = Generate({"--tls-ca", Path("ca.pem")});
  EXPECT_EQ(good.exit_code, 0) << good.err;
  const Completed plain = Generate({});
  EXPECT_EQ(plain.exit_code, 1);
  EXPECT_THAT(plain.err, HasSubstr(cluster_->address() + " speaks TLS: give --tls, or --tls-ca"));

  cluster_.reset();
  ClusterSpec spec;
  spec.model_dir = SourcePath("tests/data/models/small");
  spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                       "--kv-cache-memory-bytes=64MiB"};
  cluster_ = TestCluster::Start(spec);
  ASSERT_NE(cluster_, nullptr);
  const Completed tls = Generate({"--tls-ca", Path("ca.pem")});
  EXPECT_EQ(tls.exit_code, 1);
  EXPECT_THAT(tls.err, HasSubstr(cluster_->address() + " speaks no TLS: leave out --tls"));
  EXPECT_EQ(Generate({}).exit_code, 0);
}

TEST_F(TlsTest, TheCommandLineShowsItsCertificateAndHealthNeedsNone) {
  ASSERT_NO_FATAL_FAILURE(Start({ClientCaFlag(), "--health-listen=127.0.0.1:0"}));
  WriteFile(Path("ca.pem"), ca_.certificate());
  const TestCertificate own = client_ca_.Issue();
  WriteFile(Path("own.pem"), own.certificate);
  WriteFile(Path("own_key.pem"), own.key);
  const Completed good = Generate({"--tls-ca", Path("ca.pem"), "--tls-cert", Path("own.pem"),
                                   "--tls-key", Path("own_key.pem")});
  EXPECT_EQ(good.exit_code, 0) << good.err;
  const Completed without = Generate({"--tls-ca", Path("ca.pem")});
  EXPECT_EQ(without.exit_code, 1);
  const Completed half = Generate({"--tls-cert", Path("own.pem")});
  EXPECT_EQ(half.exit_code, 2);
  EXPECT_THAT(half.err, HasSubstr("go together"));
  const Completed health = RunCommand(
      {BinaryPath("tandem"), "health", "--server", cluster_->router().health_address}, 30);
  EXPECT_EQ(health.exit_code, 0) << health.err;
}

// Some clients ask over one connection each, others over a new one each time, while certificates
// change under them. None of them sees an error.
TEST_F(TlsTest, CertificatesChangeUnderLoadWithoutAnError) {
  ASSERT_NO_FATAL_FAILURE(Start());
  std::atomic<bool> done = false;
  std::atomic<int> asked = 0;
  std::atomic<int> failed = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back([&, i] {
      const bool keeps = i % 2 == 0;
      const auto channel = MakeChannel(Server(), Patience::kPatient);
      while (!done) {
        const grpc::Status status =
            keeps ? TestClient(channel).Generate(TokenRequest({1, 2, 3}, 20), 60).status
                  : Ask(Server());
        ++asked;
        if (!status.ok() && failed++ == 0) ADD_FAILURE() << status.error_message();
      }
    });
  }
  for (int change = 0; change < 3; ++change) {
    const TestCertificate next = ca_.Issue();
    const int before = asked;
    Install(next);
    EXPECT_TRUE(Await([&] { return Shown() == next.certificate; })) << Log();
    EXPECT_TRUE(Await([&] { return asked > before + 8; }));
  }
  done = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(failed, 0) << "of " << asked;
  EXPECT_THAT(TestCluster::Scrape(cluster_->router()),
              HasSubstr("tandem_tls_certificate_expiry_timestamp_seconds{"));
}

TEST_F(TlsTest, AChangeThatCannotBeUsedChangesNothing) {
  const TestCertificate first = ca_.Issue();
  Install(first);
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto says = [this](const std::string& what) {
    return Await([&] { return Log().find(what) != std::string::npos; });
  };
  WriteFile(Path("cert.pem"), ca_.Issue().certificate);
  EXPECT_TRUE(says("the key is not that of the certificate; what was in force before stays so"))
      << Log();
  EXPECT_EQ(Shown(), first.certificate);
  Install(ca_.Issue(kExpired));
  EXPECT_TRUE(says("the certificate has expired at")) << Log();
  EXPECT_EQ(Shown(), first.certificate);
  const TestCertificate last = ca_.Issue();
  Install(last);
  EXPECT_TRUE(Await([&] { return Shown() == last.certificate; })) << Log();
}

TEST(BeyondLoopback, ARouterNeedsKeysOrTlsOrTheWord) {
  const std::vector<std::string> exposed = {BinaryPath("tandem_router"), "--model",
                                            SourcePath("models/demo"), "--listen", "0.0.0.0:0"};
  const Completed refused = RunCommand(exposed, 30);
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("--listen 0.0.0.0:0 is reached from other hosts"),
                                 HasSubstr("--api-keys-file"), HasSubstr("--tls-cert"),
                                 HasSubstr("--insecure")));
  TempDir dir;
  const Completed key = RunCommand({BinaryPath("tandem"), "key", "new", "--name", "a"}, 30);
  WriteFile(dir.path() + "/keys.yaml", key.out);
  const TestCa ca("test");
  const TestCertificate own = ca.Issue();
  WriteFile(dir.path() + "/cert.pem", own.certificate);
  WriteFile(dir.path() + "/key.pem", own.key);
  for (const std::vector<std::string>& way :
       {std::vector<std::string>{"--insecure"},
        {"--api-keys-file=" + dir.path() + "/keys.yaml"},
        {"--tls-cert=" + dir.path() + "/cert.pem", "--tls-key=" + dir.path() + "/key.pem"}}) {
    std::vector<std::string> args = exposed;
    args.insert(args.end(), way.begin(), way.end());
    auto router = Process::Spawn(args, {}, dir.path() + "/stderr");
    EXPECT_THAT(router->ReadLine(60).value_or(""), HasSubstr("listening 0.0.0.0:"))
        << way.front() << ReadWholeFile(dir.path() + "/stderr");
  }
}

TEST(BeyondLoopback, MetricsNeedTlsOrTheWord) {
  for (const char* program : {"tandem_router", "tandem_prefill_worker", "tandem_decode_worker"}) {
    const Completed refused = RunCommand({BinaryPath(program), "--model", SourcePath("models/demo"),
                                          "--metrics-listen", "0.0.0.0:0"},
                                         30);
    EXPECT_EQ(refused.exit_code, 2) << program;
    EXPECT_THAT(refused.err, AllOf(HasSubstr("--metrics-listen 0.0.0.0:0 is reached"),
                                   HasSubstr("--metrics-tls"), HasSubstr("--metrics-insecure")))
        << program;
  }
  TempDir dir;
  auto router = Process::Spawn({BinaryPath("tandem_router"), "--model", SourcePath("models/demo"),
                                "--metrics-listen", "0.0.0.0:0", "--metrics-insecure"},
                               {}, dir.path() + "/stderr");
  EXPECT_THAT(router->ReadLine(60).value_or(""), HasSubstr("metrics 0.0.0.0:"))
      << ReadWholeFile(dir.path() + "/stderr");
}

TEST(TlsFlags, GoTogether) {
  const auto mistake = [](const std::vector<std::string>& flags) {
    std::vector<std::string> args = {BinaryPath("tandem_router"), "--model",
                                     SourcePath("models/demo")};
    args.insert(args.end(), flags.begin(), flags.end());
    const Completed router = RunCommand(args, 30);
    EXPECT_EQ(router.exit_code, 2) << router.err;
    return router.err;
  };
  EXPECT_THAT(mistake({"--tls-cert=x"}), HasSubstr("--tls-cert and --tls-key go together"));
  EXPECT_THAT(mistake({"--tls-client-ca=x"}), HasSubstr("needs --tls-cert"));
}

}  // namespace
}  // namespace tandem
