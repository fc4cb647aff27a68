#include "tests/support/cluster.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iterator>
#include <random>
#include <sstream>
#include <thread>

#include "gtest/gtest.h"

#include "common/rpc/cluster_flags.h"
#include "common/rpc/server.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

constexpr double kStartSeconds = 60;

std::vector<std::string> FlagsOfTheRun() {
  const char* flags = std::getenv("TANDEM_TEST_WORKER_FLAGS");
  std::istringstream in(flags != nullptr ? flags : "");
  return {std::istream_iterator<std::string>(in), {}};
}

int GpusOfTheRun() {
  const char* gpus = std::getenv("TANDEM_TEST_GPUS");
  return gpus != nullptr ? std::max(1, std::atoi(gpus)) : 1;
}

// What the router must know of its workers, as `tandem up` tells it.
bool IsForTheRouterToo(const std::string& flag) {
  const std::vector<std::string> names = {"--load-format",    "--seed",         "--dtype",
                                          "--kv-cache-dtype", "--quantization", "--block-size"};
  const std::string name = flag.substr(0, flag.find('='));
  return flag.size() > name.size() && std::find(names.begin(), names.end(), name) != names.end();
}

std::chrono::system_clock::time_point DeadlineIn(double seconds) {
  return std::chrono::system_clock::now() +
         std::chrono::duration_cast<std::chrono::system_clock::duration>(
             std::chrono::duration<double>(seconds));
}

template <typename Reader>
Answer Collect(Reader reader, const std::function<void(const Answer&)>& on_message = {}) {
  Answer answer;
  tandem::v1::GenerateResponse message;
  std::chrono::steady_clock::time_point last;
  while (reader->Read(&message)) {
    const auto now = std::chrono::steady_clock::now();
    const double gap_ms = std::chrono::duration<double, std::milli>(now - last).count();
    if (answer.messages++ > 0) answer.longest_gap_ms = std::max(answer.longest_gap_ms, gap_ms);
    last = now;
    answer.text += message.text();
    for (uint32_t id : message.token_ids()) answer.token_ids.push_back(id);
    for (const auto& logprob : message.logprobs()) answer.logprobs.push_back(logprob.logprob());
    if (message.finish_reason() != tandem::v1::FINISH_REASON_UNSPECIFIED) {
      answer.finish_reason = message.finish_reason();
    }
    if (message.has_usage()) answer.usage = message.usage();
    if (message.has_timing()) answer.timing = message.timing();
    if (on_message) on_message(answer);
  }
  answer.status = reader->Finish();
  return answer;
}

}  // namespace

bool OnGpu() {
  const std::vector<std::string> flags = FlagsOfTheRun();
  return std::find(flags.begin(), flags.end(), "--device=cuda") != flags.end();
}

void SleepMilliseconds(int milliseconds) {
  std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
}

void TestCluster::Launch(Member* member, std::vector<std::string> args) {
  member->stderr_path = dir_.path() + "/" + member->id + ".log";
  // NCCL joins two processes on one card only if it takes them for ones of different hosts.
  const std::string host = std::to_string(member->number / GpusOfTheRun());
  member->process = Process::Spawn(args,
                                   {std::string("TANDEM_CLUSTER_SECRET=") + kClusterSecret,
                                    "NCCL_HOSTID=" + host, "NCCL_SOCKET_IFNAME=lo"},
                                   member->stderr_path);
  const auto line = member->process->ReadLine(kStartSeconds);
  std::map<std::string, std::string> addresses;
  std::istringstream words(line.value_or(""));
  for (std::string name, address; words >> name >> address;) addresses[name] = address;
  member->address = addresses["listening"];
  member->metrics_address = addresses["metrics"];
  member->internal_address = addresses["internal"];
  member->health_address = addresses["health"];
  if (member->address.empty() || member->metrics_address.empty()) {
    ADD_FAILURE() << member->id << " did not start: stdout '" << line.value_or("(nothing)")
                  << "', stderr:\n"
                  << ReadWholeFile(member->stderr_path);
  }
}

std::vector<std::string> TestCluster::TlsFlags() const {
  const TlsFiles& tls = spec_.cluster_tls;
  if (tls.certificate.empty()) return {};
  return {"--cluster-cert=" + tls.certificate, "--cluster-key=" + tls.key,
          "--cluster-ca=" + tls.ca};
}

void TestCluster::StartWorker(const std::string& id) {
  auto& member = workers_[id];
  const int number = member ? member->number : static_cast<int>(workers_.size()) - 1;
  member = std::make_unique<Member>();
  member->id = id;
  member->number = number;
  const bool is_prefill = id.starts_with("prefill");
  std::vector<std::string> args = {
      BinaryPath(is_prefill ? "tandem_prefill_worker" : "tandem_decode_worker"),
      "--model",
      spec_.model_dir,
      "--worker-id",
      id,
      "--device=cpu"};  // unless the test or the run says otherwise
  for (const Router& router : routers_) {
    args.insert(args.end(), {"--router", router.member.internal_address});
  }
  if (id.starts_with("unified")) args.push_back("--role=unified");
  args.insert(args.end(), spec_.worker_flags.begin(), spec_.worker_flags.end());
  const auto& own = is_prefill ? spec_.prefill_flags : spec_.decode_flags;
  args.insert(args.end(), own.begin(), own.end());
  for (const std::string& flag : TlsFlags()) args.push_back(flag);
  const std::vector<std::string> of_the_run = FlagsOfTheRun();
  args.insert(args.end(), of_the_run.begin(), of_the_run.end());
  const auto names_gpus = [](const std::string& arg) { return arg.starts_with("--devices="); };
  if (std::find(args.begin(), args.end(), "--device=cuda") != args.end() &&
      std::none_of(args.begin(), args.end(), names_gpus)) {
    args.push_back("--gpu=" + std::to_string(number % GpusOfTheRun()));
  }
  Launch(member.get(), args);
}

void TestCluster::StartRouter(size_t i) {
  Router& router = routers_[i];
  Member& member = router.member;
  std::vector<std::string> args = {BinaryPath("tandem_router"), "--model", spec_.model_dir};
  std::vector<std::string> for_all = FlagsOfTheRun();
  for_all.insert(for_all.begin(), spec_.worker_flags.begin(), spec_.worker_flags.end());
  std::copy_if(for_all.begin(), for_all.end(), std::back_inserter(args), IsForTheRouterToo);
  args.insert(args.end(), spec_.router_flags.begin(), spec_.router_flags.end());
  for (const std::string& flag : TlsFlags()) args.push_back(flag);
  if (!member.address.empty()) {
    args.insert(args.end(), {"--listen", member.address, "--internal-listen",
                             member.internal_address, "--metrics-listen", member.metrics_address});
  }
  member.id = i == 0 ? "router" : "router-" + std::to_string(i);
  Launch(&member, args);
  router.channel = grpc::CreateChannel(member.address, grpc::InsecureChannelCredentials());
  router.admin_channel = MakeChannel(
      member.internal_address,
      *TestCredentials(kOperatorRole, "test", kClusterSecret, certificate_), {kRouterRole, ""});
  router.admin = tandem::v1::Admin::NewStub(router.admin_channel);
}

std::unique_ptr<TestCluster> TestCluster::Start(const ClusterSpec& spec) {
  std::unique_ptr<TestCluster> cluster(new TestCluster);
  cluster->spec_ = spec;
  absl::StatusOr<std::shared_ptr<CertificateFiles>> certificate =
      OpenClusterCertificate(spec.cluster_tls);
  if (!certificate.ok()) {
    ADD_FAILURE() << certificate.status();
    return nullptr;
  }
  cluster->certificate_ = *std::move(certificate);
  cluster->routers_.resize(static_cast<size_t>(spec.routers));
  for (size_t i = 0; i < cluster->routers_.size(); ++i) {
    cluster->StartRouter(i);
    if (testing::Test::HasFailure()) return nullptr;
  }
  for (int i = 0; i < spec.prefill; ++i) cluster->StartWorker("prefill-" + std::to_string(i));
  for (int i = 0; i < spec.decode; ++i) cluster->StartWorker("decode-" + std::to_string(i));
  for (int i = 0; i < spec.unified; ++i) cluster->StartWorker("unified-" + std::to_string(i));
  for (size_t i = 0; i < cluster->routers_.size(); ++i) {
    if (!cluster->WaitForWorkers(spec.prefill + spec.decode + spec.unified, kStartSeconds, i)) {
      ADD_FAILURE() << "the cluster did not become ready:\n" << cluster->Logs();
      return nullptr;
    }
  }
  return cluster;
}

TestCluster::~TestCluster() {
  for (auto& [id, member] : workers_) member->process->Signal(SIGKILL);
}

tandem::v1::GetClusterResponse TestCluster::GetCluster(size_t router) {
  grpc::ClientContext context;
  context.set_deadline(DeadlineIn(5));
  tandem::v1::GetClusterResponse response;
  routers_[router].admin->GetCluster(&context, {}, &response);
  return response;
}

bool TestCluster::WaitForWorkers(int count, double seconds, size_t router) {
  return WaitFor(
      [count](const tandem::v1::GetClusterResponse& cluster) {
        int ready = 0;
        for (const auto& worker : cluster.workers()) ready += worker.state() == "ready";
        return ready == count && cluster.workers_size() == count;
      },
      seconds, router);
}

bool TestCluster::WaitForStreams(size_t count, double seconds) {
  return WaitFor(
      [count](const tandem::v1::GetClusterResponse& cluster) {
        size_t running = 0;
        for (const auto& worker : cluster.workers()) {
          if (worker.role() == "decode") running += worker.running();
        }
        return running == count;
      },
      seconds);
}

std::string TestCluster::Scrape(const Member& member, const std::string& accept) {
  return RunCommand({"/usr/bin/python3", "-c",
                     "import sys,urllib.request as u;r=u.Request(sys.argv[1],headers={'Accept':"
                     "sys.argv[2]});sys.stdout.write(u.urlopen(r,timeout=10).read().decode())",
                     "http://" + member.metrics_address + "/metrics", accept},
                    20)
      .out;
}

std::string TestCluster::Logs() const {
  std::string logs;
  for (const Router& router : routers_) {
    logs += "== " + router.member.id + "\n" + ReadWholeFile(router.member.stderr_path);
  }
  for (const auto& [id, member] : workers_)
    logs += "== " + id + "\n" + ReadWholeFile(member->stderr_path);
  return logs;
}

TestClient::TestClient(std::shared_ptr<grpc::Channel> channel, std::string api_key)
    : api_key_(std::move(api_key)), stub_(tandem::v1::Inference::NewStub(channel)) {}

void TestClient::Prepare(grpc::ClientContext* context, double seconds) const {
  context->set_deadline(DeadlineIn(seconds));
  if (!api_key_.empty()) context->AddMetadata("authorization", "Bearer " + api_key_);
}

Answer TestClient::Generate(const tandem::v1::GenerateRequest& request, double seconds) {
  grpc::ClientContext context;
  Prepare(&context, seconds);
  return Collect(stub_->Generate(&context, request));
}

Answer TestClient::Generate(const tandem::v1::GenerateRequest& request,
                            grpc::ClientContext* context,
                            const std::function<void(const Answer& so_far)>& on_message) {
  return Collect(stub_->Generate(context, request), on_message);
}

Answer TestClient::Chat(const tandem::v1::ChatRequest& request, double seconds) {
  grpc::ClientContext context;
  Prepare(&context, seconds);
  return Collect(stub_->Chat(&context, request));
}

tandem::v1::GenerateRequest TokenRequest(const std::vector<uint32_t>& ids, int max_tokens) {
  tandem::v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Assign(ids.begin(), ids.end());
  auto* sampling = request.mutable_sampling();
  sampling->set_temperature(0);
  sampling->set_repetition_penalty(1);
  sampling->set_max_tokens(max_tokens);
  sampling->set_ignore_eos(true);
  sampling->set_logprobs(0);
  return request;
}

std::vector<uint32_t> RandomTokens(int length, int vocab, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> ids(length);
  for (uint32_t& id : ids) id = 1 + random() % (vocab - 1);
  return ids;
}

}  // namespace tandem
