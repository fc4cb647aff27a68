// A real cluster with --cluster-cert: who knows the secret and shows no certificate of the CA is
// refused by every internal port before anything of a call is read, and certificates change while
// it serves.
#include <atomic>
#include <csignal>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "gtest/gtest.h"

#include "common/rpc/cluster_flags.h"
#include "common/rpc/server.h"
#include "tests/support/certificates.h"
#include "tests/support/cluster.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

class ClusterTlsTest : public ::testing::Test {
 protected:
  ClusterTlsTest() : files_(Write("cluster", ca_.Issue(), ca_.certificate())) {}

  TlsFiles Write(const std::string& name, const TestCertificate& own, const std::string& ca) const {
    const std::string path = dir_.path() + "/" + name;
    WriteFile(path + ".pem", own.certificate);
    WriteFile(path + "_key.pem", own.key);
    WriteFile(path + "_ca.pem", ca);
    return {path + ".pem", path + "_key.pem", path + "_ca.pem"};
  }

  void Start(int decode = 1, const std::vector<std::string>& more = {}) {
    ClusterSpec spec;
    spec.model_dir = SourcePath("tests/data/models/small");
    spec.decode = decode;
    spec.cluster_tls = files_;
    // Blocks go over the network, as between hosts.
    spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                         "--kv-cache-memory-bytes=64MiB", "--kv-transport=tcp"};
    spec.decode_flags = {"--local-prefill-max-tokens=0"};
    spec.router_flags = more;
    spec.worker_flags.insert(spec.worker_flags.end(), more.begin(), more.end());
    cluster_ = TestCluster::Start(spec);
    ASSERT_NE(cluster_, nullptr);
  }
  Answer Ask(uint64_t seed = 1) const {
    return TestClient(cluster_->channel()).Generate(TokenRequest(RandomTokens(100, 512, seed), 8));
  }

  // One who calls each internal port: whom the port is for.
  struct Port {
    std::string address;
    std::string caller;
    Party callee;
    const Member* member;
  };
  std::vector<Port> Ports() const {
    Member& router = cluster_->router();
    Member& prefill = cluster_->worker("prefill-0");
    Member& decode = cluster_->worker("decode-0");
    return {{router.internal_address, kOperatorRole, {kRouterRole, ""}, &router},
            {prefill.address, kDecodeRole, {kPrefillRole, "prefill-0"}, &prefill},
            {decode.address, kRouterRole, {kDecodeRole, "decode-0"}, &decode}};
  }
  static grpc::Status Check(const std::shared_ptr<grpc::Channel>& channel) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    grpc::health::v1::HealthCheckResponse response;
    return grpc::health::v1::Health::NewStub(channel)->Check(&context, {}, &response);
  }
  static std::shared_ptr<grpc::Channel> ChannelTo(const Port& port,
                                                  const ClusterCredentials& credentials) {
    return MakeChannel(port.address, credentials, port.callee, Patience::kPatient);
  }
  // `files` null: the secret alone.
  static grpc::Status Call(const Port& port, const TlsFiles* files,
                           const std::string& secret = kClusterSecret) {
    std::shared_ptr<CertificateFiles> certificate;
    if (files != nullptr) {
      auto opened = OpenClusterCertificate(*files);
      EXPECT_OK(opened);
      certificate = *std::move(opened);
    }
    return Check(ChannelTo(port, *TestCredentials(port.caller, "decode-0", secret, certificate)));
  }

  TempDir dir_;
  const TestCa ca_{"cluster"};
  const TlsFiles files_;
  std::unique_ptr<TestCluster> cluster_;
};

TEST_F(ClusterTlsTest, EveryInternalPortWantsACertificateOfTheCa) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const Answer answer = Ask();
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message() << cluster_->Logs();
  EXPECT_EQ(answer.timing.transport(), "tcp");
  const TestCa other("another");
  const TlsFiles good = Write("good", ca_.Issue(), ca_.certificate());
  const TlsFiles others = Write("others", other.Issue(), ca_.certificate());
  for (const Port& port : Ports()) {
    SCOPED_TRACE(port.member->id);
    const grpc::Status status = Call(port, &good);
    EXPECT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(Call(port, nullptr).error_code(), grpc::StatusCode::UNAVAILABLE) << "no certificate";
    EXPECT_EQ(Call(port, &others).error_code(), grpc::StatusCode::UNAVAILABLE) << "another CA's";
    EXPECT_EQ(Call(port, &good, "guess").error_code(), grpc::StatusCode::UNAVAILABLE)
        << "wrong secret";
    EXPECT_EQ(Check(MakeChannel(port.address, Patience::kPatient)).error_code(),
              grpc::StatusCode::UNAVAILABLE)
        << "no TLS";
    EXPECT_THAT(ReadWholeFile(port.member->stderr_path),
                HasSubstr("internal rpc refused: the peer shows no certificate"));
  }
}

TEST_F(ClusterTlsTest, AWorkerWithTheSecretAloneIsNoMember) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const std::string log = dir_.path() + "/stranger.log";
  const auto stranger = Process::Spawn(
      {BinaryPath("tandem_decode_worker"), "--model", SourcePath("tests/data/models/small"),
       "--load-format=dummy", "--dtype=float32", "--kv-cache-memory-bytes=64MiB", "--device=cpu",
       "--worker-id=stranger", "--router", cluster_->router().internal_address},
      {std::string("TANDEM_CLUSTER_SECRET=") + kClusterSecret}, log);
  ASSERT_THAT(stranger->ReadLine(60).value_or(""), HasSubstr("listening"));
  for (int i = 0; i < 600 && ReadWholeFile(log).find("cannot join") == std::string::npos; ++i) {
    SleepMilliseconds(50);
  }
  EXPECT_THAT(ReadWholeFile(log), HasSubstr("cannot join router"));
  EXPECT_TRUE(cluster_->WaitForWorkers(2, 10));
}

// By somebody else's HTTPS, as Prometheus scrapes.
TEST_F(ClusterTlsTest, MetricsAreForWhoShowsOne) {
  ASSERT_NO_FATAL_FAILURE(Start(1, {"--metrics-tls"}));
  const auto scrape = [this](const Member& member, bool shows) {
    std::vector<std::string> args = {
        "/usr/bin/python3", "-c",
        "import ssl, sys, urllib.request\n"
        "context = ssl.create_default_context(cafile=sys.argv[2])\n"
        "if len(sys.argv) > 3: context.load_cert_chain(sys.argv[3], sys.argv[4])\n"
        "page = urllib.request.urlopen(sys.argv[1], timeout=10, context=context)\n"
        "sys.stdout.write(page.read().decode())",
        "https://" + member.metrics_address + "/metrics", files_.ca};
    if (shows) args.insert(args.end(), {files_.certificate, files_.key});
    return RunCommand(args, 30);
  };
  for (const Member* member : {&cluster_->router(), &cluster_->worker("decode-0")}) {
    const Completed good = scrape(*member, /*shows=*/true);
    EXPECT_EQ(good.exit_code, 0) << good.err;
    EXPECT_THAT(good.out, HasSubstr("# TYPE tandem_build_info gauge"));
    EXPECT_NE(scrape(*member, /*shows=*/false).exit_code, 0);
    EXPECT_THAT(TestCluster::Scrape(*member), testing::IsEmpty());
  }
}

TEST_F(ClusterTlsTest, TheCommandLineShowsOne) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto status = [this](std::vector<std::string> more) {
    std::vector<std::string> args = {
        "/usr/bin/env",       std::string("TANDEM_CLUSTER_SECRET=") + kClusterSecret,
        BinaryPath("tandem"), "status",
        "--internal",         cluster_->router().internal_address};
    args.insert(args.end(), more.begin(), more.end());
    return RunCommand(args, 30);
  };
  const std::vector<std::string> flags = {"--cluster-cert=" + files_.certificate,
                                          "--cluster-key=" + files_.key,
                                          "--cluster-ca=" + files_.ca};
  const Completed good = status(flags);
  EXPECT_EQ(good.exit_code, 0) << good.err;
  EXPECT_THAT(good.out, HasSubstr("decode-0"));
  EXPECT_EQ(good.err, "");
  std::vector<std::string> json = flags;
  json.push_back("--json");
  EXPECT_THAT(status(json).out, testing::StartsWith("{"));  // and no line of a log before it
  EXPECT_EQ(status({}).exit_code, 1);
  const Completed half = status({flags[0]});
  EXPECT_NE(half.exit_code, 0);
  EXPECT_THAT(half.err, HasSubstr("--cluster-cert, --cluster-key and --cluster-ca go together"));
}

// To another CA by way of believing both, under load, while workers come and go. Whoever begins
// then shows what is in force.
TEST_F(ClusterTlsTest, CertificatesAndCaChangeUnderLoadWithoutAnError) {
  ASSERT_NO_FATAL_FAILURE(Start(/*decode=*/2));
  std::atomic<bool> done = false;
  std::atomic<int> asked = 0;
  std::atomic<int> failed = 0;
  std::vector<std::thread> clients;
  for (int i = 0; i < 3; ++i) {
    clients.emplace_back([&, i] {
      for (uint64_t n = 0; !done; ++n) {
        const Answer answer = Ask(1000 * n + static_cast<uint64_t>(i));
        ++asked;
        if (!answer.status.ok() && failed++ == 0) ADD_FAILURE() << answer.status.error_message();
      }
    });
  }
  const TestCa next("next");
  const std::string both = ca_.certificate() + next.certificate();
  // Until all processes have taken it, and show it.
  int change = 0;
  const auto install = [&](const TestCertificate& own, const std::string& ca) {
    Write("cluster", own, ca);
    ++change;
    const auto taken = [&](const Member& member) {
      const std::string log = ReadWholeFile(member.stderr_path);
      int times = -1;  // once at the start
      for (size_t at = 0; (at = log.find("TLS: the certificate of", at)) != std::string::npos;
           ++at) {
        ++times;
      }
      return times >= change;
    };
    for (int i = 0; i < 600; ++i) {
      bool all = taken(cluster_->router());
      for (const auto& [id, member] : cluster_->workers()) all = all && taken(*member);
      if (all) return;
      SleepMilliseconds(50);
    }
    ADD_FAILURE() << "not all have taken change " << change << "\n" << cluster_->Logs();
  };
  install(ca_.Issue(), both);
  install(next.Issue(), both);
  // gRPC looks about every second for what it shows.
  auto probe = OpenClusterCertificate(Write("probe", next.Issue(), next.certificate()));
  ASSERT_OK(probe);
  for (const Port& port : Ports()) {
    const auto credentials = TestCredentials(port.caller, "decode-0", kClusterSecret, *probe);
    for (int i = 0; i < 600 && !Check(ChannelTo(port, *credentials)).ok(); ++i) {
      SleepMilliseconds(50);
    }
  }
  install(next.Issue(), next.certificate());
  // A worker begins again, and all of its connections with it.
  cluster_->worker("decode-1").process->Signal(SIGTERM);
  EXPECT_EQ(cluster_->worker("decode-1").process->Wait(60), 0);
  cluster_->StartWorker("decode-1");
  EXPECT_TRUE(cluster_->WaitForWorkers(3, 60)) << cluster_->Logs();
  const int before = asked;
  for (int i = 0; i < 1200 && asked < before + 12; ++i) SleepMilliseconds(50);
  done = true;
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(failed, 0) << "of " << asked << "\n" << cluster_->Logs();
  const TlsFiles old = Write("old", ca_.Issue(), both);
  for (const Port& port : Ports()) EXPECT_FALSE(Call(port, &old).ok()) << port.member->id;
  EXPECT_THAT(TestCluster::Scrape(cluster_->worker("decode-0")),
              AllOf(HasSubstr("tandem_tls_certificate_expiry_timestamp_seconds{"),
                    HasSubstr("certificate=\"cluster\"")));
}

}  // namespace
}  // namespace tandem
