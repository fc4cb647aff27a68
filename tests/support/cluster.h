// A real cluster of processes on loopback, and a client for it.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "grpcpp/grpcpp.h"

#include "common/auth/certificate_files.h"
#include "tandem/v1/admin.grpc.pb.h"
#include "tandem/v1/inference.grpc.pb.h"
#include "tests/support/process.h"

namespace tandem {

// Workers compute on the CPU, also where a GPU is there, unless a test's flags say otherwise. After
// these every worker of every cluster gets the flags of the environment variable
// TANDEM_TEST_WORKER_FLAGS: scripts/gpu_check runs tests of tests/integration on a GPU by them.
// TANDEM_TEST_GPUS (1): to so many cards workers are dealt in turn.
// True if those flags name a GPU.
bool OnGpu();

// Tokens of models/demo; above lie the special ones.
inline constexpr int kDemoVocab = 2040;

struct ClusterSpec {
  std::string model_dir;
  int routers = 1;
  int prefill = 1;
  int decode = 1;
  int unified = 0;
  std::vector<std::string> router_flags;
  std::vector<std::string> worker_flags;  // for every worker
  std::vector<std::string> decode_flags;  // decode and unified workers
  std::vector<std::string> prefill_flags;
  TlsFiles cluster_tls;  // of all processes, and of the operator; empty: none
};

// What the processes of a TestCluster share.
inline constexpr char kClusterSecret[] = "test";

// One process of the cluster.
struct Member {
  std::string id;
  int number = 0;  // of a worker, in the order in which they were first started
  std::string address;
  std::string metrics_address;
  std::string internal_address;  // of the router
  std::string health_address;    // of a worker with --health-listen
  std::unique_ptr<Process> process;
  std::string stderr_path;
};

// Not thread-safe. Start() returns once every worker is ready at every router. The destructor stops
// all. What names no router is about the first.
class TestCluster {
 public:
  // Null, with a gtest failure that quotes the processes' stderr, if it does not come up.
  static std::unique_ptr<TestCluster> Start(const ClusterSpec& spec);
  ~TestCluster();

  const std::string& address(size_t router = 0) const { return routers_[router].member.address; }
  Member& router(size_t i = 0) { return routers_[i].member; }
  Member& worker(const std::string& id) { return *workers_.at(id); }
  std::map<std::string, std::unique_ptr<Member>>& workers() { return workers_; }
  std::shared_ptr<grpc::Channel> channel(size_t router = 0) const {
    return routers_[router].channel;
  }
  // An operator's, for Admin.
  std::shared_ptr<grpc::Channel> admin_channel(size_t router = 0) const {
    return routers_[router].admin_channel;
  }
  // Starts a router again, where it was.
  void StartRouter(size_t i);
  // Starts (again) a worker of that id, e.g. "prefill-0".
  void StartWorker(const std::string& id);
  // True once the router lists exactly `count` ready workers.
  bool WaitForWorkers(int count, double seconds, size_t router = 0);
  tandem::v1::GetClusterResponse GetCluster(size_t router = 0);
  // Polls GetCluster until `condition` holds.
  template <typename Condition>
  bool WaitFor(Condition condition, double seconds, size_t router = 0);
  // Until the decode workers together report `count` running streams. Reports are some moments old:
  // who lets streams run a second time waits for none in between.
  bool WaitForStreams(size_t count, double seconds);
  // /metrics of a member, as who sends this Accept header gets it.
  static std::string Scrape(const Member& member, const std::string& accept = "*/*");
  // stderr of all processes, for failure messages.
  std::string Logs() const;

 private:
  struct Router {
    Member member;
    std::shared_ptr<grpc::Channel> channel;
    std::shared_ptr<grpc::Channel> admin_channel;
    std::unique_ptr<tandem::v1::Admin::Stub> admin;
  };

  TestCluster() = default;
  std::vector<std::string> TlsFlags() const;
  void Launch(Member* member, std::vector<std::string> args);

  ClusterSpec spec_;
  TempDir dir_;
  std::shared_ptr<CertificateFiles> certificate_;  // the operator's; null: none
  std::vector<Router> routers_;
  std::map<std::string, std::unique_ptr<Member>> workers_;
};

void SleepMilliseconds(int milliseconds);

template <typename Condition>
bool TestCluster::WaitFor(Condition condition, double seconds, size_t router) {
  for (int i = 0; i < static_cast<int>(seconds * 50) + 1; ++i) {
    if (condition(GetCluster(router))) return true;
    SleepMilliseconds(20);
  }
  return false;
}

// Everything one request gave.
struct Answer {
  grpc::Status status;
  std::string text;
  std::vector<uint32_t> token_ids;
  std::vector<float> logprobs;
  tandem::v1::FinishReason finish_reason = tandem::v1::FINISH_REASON_UNSPECIFIED;
  tandem::v1::Usage usage;
  tandem::v1::Timing timing;
  int messages = 0;
  double longest_gap_ms = 0;  // between two messages, as the client saw them
};

// Thread-safe; blocking calls with a deadline.
class TestClient {
 public:
  // Every call but those with a context of the caller's shows `api_key`, if there is one.
  explicit TestClient(std::shared_ptr<grpc::Channel> channel, std::string api_key = "");
  Answer Generate(const tandem::v1::GenerateRequest& request, double seconds = 120);
  // Calls `on_message` after each message, which may cancel the context.
  Answer Generate(const tandem::v1::GenerateRequest& request, grpc::ClientContext* context,
                  const std::function<void(const Answer& so_far)>& on_message);
  Answer Chat(const tandem::v1::ChatRequest& request, double seconds = 120);
  tandem::v1::Inference::Stub& stub() { return *stub_; }

 private:
  void Prepare(grpc::ClientContext* context, double seconds) const;

  const std::string api_key_;
  std::unique_ptr<tandem::v1::Inference::Stub> stub_;
};

// A greedy request over token ids that ends after exactly `max_tokens`.
tandem::v1::GenerateRequest TokenRequest(const std::vector<uint32_t>& ids, int max_tokens);
// `length` ids in [1, vocab), the same for the same seed.
std::vector<uint32_t> RandomTokens(int length, int vocab, uint64_t seed);

}  // namespace tandem
