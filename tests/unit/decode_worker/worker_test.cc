// Both kinds of worker process but their main(), over real gRPC, a real engine and a real KV
// channel.
#include "decode_worker/worker.h"

#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "grpcpp/grpcpp.h"
#include "nlohmann/json.hpp"

#include "common/rpc/status.h"
#include "engine/wire/wire.h"
#include "prefill_worker/worker.h"
#include "tandem/internal/v1/decode.grpc.pb.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"
#include "worker/kv_ends.h"

namespace tandem::decode {
namespace {

using internal::v1::DecodeRequest;
using internal::v1::TokenEvent;

SignalWaiter* Signals() {
  static auto* signals = new SignalWaiter;
  return signals;
}

engine::EngineOptions TestEngine(const std::string& model_dir, const std::string& load_format) {
  engine::EngineOptions options;
  options.device = "cpu";
  options.model_dir = model_dir;
  options.load_format = load_format;
  options.dtype = "float32";
  options.max_model_len = 384;
  options.max_num_batched_tokens = 128;
  options.max_num_seqs = 8;
  options.kv_cache_memory_bytes = 4 << 20;
  options.num_threads = 1;
  return options;
}

// A directory with a config of a tiny model; weights are made up by load_format dummy.
std::string TinyModelDir() {
  static const std::string* dir = [] {
    auto* path = new std::string(testing::TempDir() + "/tandem_tiny_model");
    std::filesystem::create_directories(*path);
    std::ofstream(*path + "/config.json") << R"({
      "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 300,
      "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
      "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
      "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": false,
      "hidden_act": "silu", "torch_dtype": "bfloat16", "eos_token_id": 299})";
    return path;
  }();
  return *dir;
}

struct Answer {
  std::vector<uint32_t> tokens;
  std::vector<float> logprobs;
  TokenEvent last;
  grpc::Status status;
};

class WorkerTest : public testing::Test {
 protected:
  static std::unique_ptr<WorkerProcess> StartPrefill(const engine::EngineOptions& engine) {
    prefill::WorkerOptions options;
    options.engine = engine;
    options.process.worker_id = "p0";
    options.process.served_model_name = "model";
    auto worker = prefill::StartWorker(options, Signals());
    EXPECT_OK(worker);
    return worker.ok() ? *std::move(worker) : nullptr;
  }
  static std::unique_ptr<WorkerProcess> Start(const engine::EngineOptions& engine,
                                              const std::string& role) {
    WorkerOptions options;
    options.engine = engine;
    options.process.worker_id = "d0";
    options.role = role;
    options.process.served_model_name = "model";
    options.local_prefill_max_tokens = 8;
    auto worker = decode::StartWorker(options, Signals());
    EXPECT_OK(worker);
    return worker.ok() ? *std::move(worker) : nullptr;
  }

  static DecodeRequest MakeRequest(const std::vector<int32_t>& prompt, uint32_t max_tokens) {
    DecodeRequest request;
    request.set_request_id("r");
    engine::TokensToProto(prompt, request.mutable_token_ids());
    request.mutable_sampling()->set_temperature(0);
    request.mutable_sampling()->set_max_tokens(max_tokens);
    request.mutable_sampling()->set_logprobs(0);
    request.mutable_sampling()->set_ignore_eos(true);
    return request;
  }

  static Answer Ask(const std::string& address, const DecodeRequest& request) {
    auto stub = internal::v1::Decode::NewStub(
        MakeChannel(address, *TestCredentials(kRouterRole, "router"), {kDecodeRole, "d0"}));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    auto reader = stub->Generate(&context, request);
    Answer answer;
    TokenEvent event;
    while (reader->Read(&event)) {
      for (uint32_t id : event.token_ids()) answer.tokens.push_back(id);
      for (const auto& logprob : event.logprobs()) answer.logprobs.push_back(logprob.logprob());
      answer.last = event;
    }
    answer.status = reader->Finish();
    return answer;
  }

  static std::vector<int32_t> Prompt(int length, int seed) {
    std::vector<int32_t> out;
    for (int i = 0; i < length; ++i) out.push_back((seed * 97 + i * i * 31 + i) % 290);
    return out;
  }
};

TEST_F(WorkerTest, ShippedKvGivesTheTokensOfLocalPrefill) {
  const engine::EngineOptions engine = TestEngine(TinyModelDir(), "dummy");
  auto prefill = StartPrefill(engine);
  ASSERT_TRUE(prefill != nullptr);
  auto unified = Start(engine, "unified");
  auto decode = Start(engine, "decode");
  ASSERT_TRUE(unified != nullptr && decode != nullptr);
  for (int length : {9, 16, 17, 100, 245}) {
    SCOPED_TRACE(length);
    DecodeRequest request = MakeRequest(Prompt(length, length), 20);
    const Answer expected = Ask(unified->address(), request);
    ASSERT_TRUE(expected.status.ok()) << expected.status.error_message();
    ASSERT_EQ(expected.tokens.size(), 20u);
    EXPECT_EQ(expected.last.timing().transport(), "local");

    auto* candidate = request.mutable_route()->add_prefill();
    candidate->set_worker_id("p0");
    candidate->set_address(prefill->address());
    const Answer answer = Ask(decode->address(), request);
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
    EXPECT_EQ(answer.last.timing().prefill_attempts(), 1u);
    EXPECT_EQ(answer.tokens, expected.tokens);
    EXPECT_EQ(answer.logprobs, expected.logprobs);
    EXPECT_EQ(answer.last.finish_reason(), v1::FINISH_REASON_LENGTH);
    EXPECT_EQ(answer.last.timing().transport(), "shm");
    EXPECT_EQ(answer.last.timing().prefill_worker(), "p0");
    EXPECT_GT(answer.last.timing().kv_bytes(), 0u);
    EXPECT_GE(answer.last.timing().kv_transfer_exposed(), 0);

    // The same again: all but the last block's tokens are known here, nothing needs shipping.
    const Answer again = Ask(decode->address(), request);
    EXPECT_EQ(again.tokens, expected.tokens);
    if (length > 16) {
      EXPECT_GE(again.last.cached_tokens(), static_cast<uint32_t>((length - 1) / 16 * 16));
    }
  }
  EXPECT_OK(decode->Drain());
  EXPECT_OK(unified->Drain());
}

TEST_F(WorkerTest, KvIsAwaitedWhereTheWorkerIsAnnounced) {
  const auto listen = [](const std::string& kv, const std::string& rpc, const std::string& host) {
    WorkerProcessOptions process;
    process.listen = rpc;
    process.kv_listen = kv;
    process.advertise_host = host;
    const auto address = worker::KvListenAddress(process);
    return address.ok() ? address->ToString() : "refused";
  };
  EXPECT_EQ(listen("", "127.0.0.1:7000", ""), "127.0.0.1:0");
  EXPECT_EQ(listen("", "0.0.0.0:7000", "gpu-3"), "0.0.0.0:0");
  EXPECT_EQ(listen("", "10.0.0.3:7000", ""), "10.0.0.3:0");
  EXPECT_EQ(listen("0.0.0.0:7001", "10.0.0.3:7000", ""), "0.0.0.0:7001");
  EXPECT_EQ(listen("127.0.0.1:7001", "10.0.0.3:7000", ""), "refused");
  EXPECT_EQ(listen("127.0.0.1:7001", "127.0.0.1:7000", "gpu-3"), "refused");
  EXPECT_EQ(listen("", "127.0.0.1:7000", "localhost"), "127.0.0.1:0");
}

TEST_F(WorkerTest, TheNextCandidateServesWhereTheFirstFails) {
  const engine::EngineOptions engine = TestEngine(TinyModelDir(), "dummy");
  auto prefill = StartPrefill(engine);
  ASSERT_TRUE(prefill != nullptr);
  auto decode = Start(engine, "decode");
  ASSERT_TRUE(decode != nullptr);
  DecodeRequest request = MakeRequest(Prompt(60, 3), 5);
  const Answer expected = Ask(decode->address(), request);  // no candidate: computed here
  ASSERT_EQ(expected.tokens.size(), 5u);

  request.set_cache_salt("apart");
  for (const std::string& address :
       {std::string("127.0.0.1:1"), std::string("127.0.0.1:2"), prefill->address()}) {
    auto* candidate = request.mutable_route()->add_prefill();
    candidate->set_worker_id("p0");
    candidate->set_address(address);
  }
  const Answer answer = Ask(decode->address(), request);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_EQ(answer.tokens, expected.tokens);
  EXPECT_EQ(answer.last.timing().prefill_attempts(), 3u);

  request.set_cache_salt("apart again");
  request.mutable_route()->mutable_prefill()->DeleteSubrange(2, 1);
  EXPECT_EQ(Ask(decode->address(), request).status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(WorkerTest, BadRequestsAreRefusedByName) {
  auto worker = Start(TestEngine(TinyModelDir(), "dummy"), "unified");
  ASSERT_TRUE(worker != nullptr);
  const auto expect = [&](const DecodeRequest& request, const std::string& part) {
    const Answer answer = Ask(worker->address(), request);
    EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_NE(answer.status.error_message().find(part), std::string::npos)
        << answer.status.error_message();
    EXPECT_EQ(FieldViolations(FromGrpcStatus(answer.status)).size(), 1u) << part;
  };
  expect(MakeRequest({}, 5), "token_ids");
  expect(MakeRequest({1, 300}, 5), "token_ids[1]");
  expect(MakeRequest(Prompt(384, 1), 5), "max_model_len");
  expect(MakeRequest({1}, 0), "max_tokens");
  EXPECT_TRUE(Ask(worker->address(), MakeRequest({1, 2}, 3)).status.ok());
}

TEST_F(WorkerTest, ManyAtOnceGetWhatTheyGetAlone) {
  auto worker = Start(TestEngine(TinyModelDir(), "dummy"), "unified");
  ASSERT_TRUE(worker != nullptr);
  std::map<int, std::vector<uint32_t>> alone;
  for (int i = 0; i < 8; ++i) {
    alone[i] = Ask(worker->address(), MakeRequest(Prompt(5 + 20 * i, i), 30)).tokens;
    ASSERT_EQ(alone[i].size(), 30u);
  }
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      DecodeRequest request = MakeRequest(Prompt(5 + 20 * i, i), 30);
      request.set_cache_salt("computed anew");
      const Answer answer = Ask(worker->address(), request);
      EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
      EXPECT_EQ(answer.tokens, alone[i]) << i;
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(WorkerTest, AgreesWithTheReferenceModel) {
  TANDEM_REQUIRE_SHARED();
  const std::string dir = SharedDir() + "/reference/tiny-gqa7";
  std::ifstream file(dir + "/reference.json");
  const nlohmann::json reference = nlohmann::json::parse(file, nullptr, false);
  ASSERT_FALSE(reference.is_discarded());
  const engine::EngineOptions engine = TestEngine(dir, "auto");
  auto prefill = StartPrefill(engine);
  ASSERT_TRUE(prefill != nullptr);
  auto decode = Start(engine, "decode");
  ASSERT_TRUE(decode != nullptr);
  for (const auto& entry : reference["cases"]) {
    const auto prompt = entry["prompt_token_ids"].get<std::vector<int32_t>>();
    DecodeRequest request = MakeRequest(prompt, 24);
    auto* candidate = request.mutable_route()->add_prefill();
    candidate->set_worker_id("p0");
    candidate->set_address(prefill->address());
    const Answer answer = Ask(decode->address(), request);
    ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
    EXPECT_EQ(answer.tokens, entry["greedy"].get<std::vector<uint32_t>>());
    const auto logprobs = entry["greedy_logprobs"].get<std::vector<float>>();
    ASSERT_EQ(answer.logprobs.size(), logprobs.size());
    for (size_t i = 0; i < logprobs.size(); ++i) {
      EXPECT_NEAR(answer.logprobs[i], logprobs[i], 1e-3);
    }
  }
}

}  // namespace
}  // namespace tandem::decode
