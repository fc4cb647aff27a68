// The client commands against a router made of fakes, in this process.
#include "cli/command.h"

#include <algorithm>
#include <cstdlib>
#include <fcntl.h>
#include <filesystem>
#include <iostream>
#include <sstream>
#include <unistd.h>

#include "fmt/format.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "cli/cluster_note.h"
#include "cli/inference_client.h"
#include "common/base/stage.h"
#include "common/rpc/server.h"
#include "common/rpc/status.h"
#include "tandem/v1/admin.grpc.pb.h"
#include "tandem/v1/inference.grpc.pb.h"
#include "tests/support/credentials.h"
#include "tests/support/paths.h"
#include "tests/support/temp_dir.h"

namespace tandem::cli {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// Answers in two messages; what it says depends on the request.
class FakeInference : public v1::Inference::Service {
 public:
  grpc::Status Generate(grpc::ServerContext* /*context*/, const v1::GenerateRequest* request,
                        grpc::ServerWriter<v1::GenerateResponse>* writer) override {
    generate = *request;
    if (request->text() == "no worker") return {grpc::StatusCode::UNAVAILABLE, "no worker"};
    if (request->text() == "bad") {
      return ToGrpcStatus(WithRetryAfter(
          WithField(absl::InvalidArgumentError("temperature must be >= 0"), "sampling.temperature"),
          absl::Seconds(2)));
    }
    if (request->options().progress()) {
      v1::GenerateResponse message;
      message.mutable_progress()->set_computed_tokens(16);
      writer->Write(message);
    }
    const bool ids_only = request->token_ids().ids_size() == 1;
    Write(writer, ids_only ? "" : "Hello", ids_only ? "" : "!");
    return grpc::Status::OK;
  }
  grpc::Status Chat(grpc::ServerContext* /*context*/, const v1::ChatRequest* request,
                    grpc::ServerWriter<v1::GenerateResponse>* writer) override {
    chat = *request;
    const std::string last = request->messages(request->messages_size() - 1).content();
    if (last == "fail") return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "full");
    if (last == "endless") {
      v1::GenerateResponse message;
      message.set_text("on ");
      while (writer->Write(message)) {
      }
      return grpc::Status::CANCELLED;
    }
    Write(writer, "you said ", last);
    return grpc::Status::OK;
  }

  v1::GenerateRequest generate;
  v1::ChatRequest chat;

 private:
  static void Write(grpc::ServerWriter<v1::GenerateResponse>* writer, const std::string& first,
                    const std::string& second) {
    v1::GenerateResponse message;
    message.set_request_id("r1");
    message.set_text(first);
    message.add_token_ids(7);
    message.add_logprobs()->set_logprob(-0.5);
    message.mutable_usage()->set_prompt_tokens(20);
    message.mutable_usage()->set_completion_tokens(1);
    writer->Write(message);
    message.set_text(second);
    message.set_token_ids(0, 8);
    message.set_finish_reason(v1::FINISH_REASON_STOP);
    message.mutable_usage()->set_cached_tokens(16);
    message.mutable_usage()->set_completion_tokens(2);
    message.mutable_timing()->set_ttft(10);
    message.mutable_timing()->set_total(110);
    message.mutable_timing()->set_kv_bytes(4096);
    message.mutable_timing()->set_prefill_worker("prefill-0");
    message.mutable_timing()->set_decode_worker("decode-1");
    message.mutable_timing()->set_transport("tcp");
    writer->Write(message);
  }
};

class FakeAdmin : public v1::Admin::Service {
 public:
  grpc::Status GetCluster(grpc::ServerContext* /*context*/,
                          const v1::GetClusterRequest* /*request*/,
                          v1::GetClusterResponse* response) override {
    response->set_model("demo");
    response->set_max_model_len(2048);
    v1::Worker* worker = response->add_workers();
    worker->set_worker_id("prefill-0");
    worker->set_role("prefill");
    worker->set_state("ready");
    worker->set_address("127.0.0.1:4711");
    worker->set_blocks_total(100);
    return grpc::Status::OK;
  }
  grpc::Status DrainWorker(grpc::ServerContext* /*context*/, const v1::DrainWorkerRequest* request,
                           v1::DrainWorkerResponse* /*response*/) override {
    if (request->worker_id() == "prefill-0") return grpc::Status::OK;
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "no worker " + request->worker_id());
  }
};

struct Outcome {
  int exit_code = -1;
  std::string out;
  std::string err;
};

class CommandTest : public testing::Test {
 protected:
  CommandTest() {
    auto server = RpcServer::Start({}, {&inference_});
    EXPECT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    auto internal = RpcServer::Start(
        {.credentials = TestCredentials(kRouterRole, "router", "s"), .callers = {kOperatorRole}},
        {&admin_});
    EXPECT_TRUE(internal.ok()) << internal.status();
    internal_ = *std::move(internal);
    setenv("XDG_RUNTIME_DIR", home_.path().c_str(), 1);
    EXPECT_TRUE(WriteClusterNote(server_->address(), {internal_->address(), "s"}).ok());
    // A terminal would make the chat interactive.
    const int null_fd = open("/dev/null", O_RDONLY);
    dup2(null_fd, STDIN_FILENO);
    close(null_fd);
  }

  Outcome Execute(int (*command)(const Arguments&), Arguments arguments,
                  const std::string& input = "") {
    arguments.insert(arguments.begin(), {"--server", server_->address()});
    std::istringstream in(input);
    std::streambuf* const before = std::cin.rdbuf(in.rdbuf());
    std::cin.clear();
    testing::internal::CaptureStdout();
    testing::internal::CaptureStderr();
    Outcome run;
    run.exit_code = command(arguments);
    run.out = testing::internal::GetCapturedStdout();
    run.err = testing::internal::GetCapturedStderr();
    std::cin.rdbuf(before);
    return run;
  }

  // Notes of its own: an ended test's server may have had this one's port.
  const TempDir home_;
  FakeInference inference_;
  FakeAdmin admin_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<RpcServer> internal_;
};

TEST_F(CommandTest, GenerateStreamsText) {
  const Outcome run = Execute(RunGenerate, {"--prompt", "hi", "--max-tokens=5", "--temperature=0",
                                            "--seed=3", "--stop=x", "--stats"});
  EXPECT_EQ(run.exit_code, kExitOk) << run.err;
  EXPECT_EQ(run.out, "Hello!\n");
  EXPECT_THAT(run.err, AllOf(HasSubstr("20 prompt tokens (16 cached)"), HasSubstr("10.0 tok/s"),
                             HasSubstr("prefill-0 -> decode-1")));
  EXPECT_EQ(inference_.generate.text(), "hi");
  EXPECT_EQ(inference_.generate.sampling().max_tokens(), 5u);
  EXPECT_EQ(inference_.generate.sampling().temperature(), 0);
  EXPECT_EQ(inference_.generate.sampling().seed(), 3u);
  EXPECT_FALSE(inference_.generate.sampling().has_top_p());
  EXPECT_EQ(inference_.generate.sampling().stop(0), "x");
}

TEST_F(CommandTest, GenerateJson) {
  const Outcome run =
      Execute(RunGenerate, {"--token-ids", "[1, 2,3]", "--json", "--logprobs", "0"});
  ASSERT_EQ(run.exit_code, kExitOk) << run.err;
  const json out = json::parse(run.out, nullptr, false);
  ASSERT_TRUE(out.is_object()) << run.out;
  EXPECT_EQ(out["text"], "Hello!");
  EXPECT_EQ(out["token_ids"], json({7, 8}));
  EXPECT_EQ(out["finish_reason"], "stop");
  EXPECT_EQ(out["usage"]["cached_tokens"], 16);
  EXPECT_EQ(out["timing"]["decode_worker"], "decode-1");
  EXPECT_EQ(out["timing"]["kv_bytes"], 4096);
  EXPECT_EQ(out["timing"]["ttft_ms"], 10);
  EXPECT_EQ(out["timing"]["total_ms"], 110);
  EXPECT_EQ(out["timing"]["decode_ms"], 100);
  EXPECT_EQ(out["timing"]["tpot_ms"], 100);  // two tokens
  EXPECT_EQ(out["tokens_per_second"], 10);
  // What is a time says so; the others are counts and names.
  for (const StageInfo& stage : kStages) {
    EXPECT_FALSE(out["timing"].contains(stage.name)) << stage.name;
    EXPECT_TRUE(out["timing"].contains(std::string(stage.name) + "_ms")) << stage.name;
  }
  EXPECT_EQ(out["logprobs"].size(), 2u);
  EXPECT_EQ(inference_.generate.token_ids().ids_size(), 3);
}

TEST_F(CommandTest, ProgressIsNoPartOfTheAnswerAndIsAskedForAtATerminalOnly) {
  InferenceClient client({.address = server_->address()});
  v1::GenerateRequest request;
  request.set_text("hi");
  request.mutable_options()->set_progress(true);
  std::string events;
  const Answer answer = client.Generate(
      request, absl::InfiniteDuration(), [&](const std::string& text) { events += text; },
      [&](const v1::PromptProgress& at) { events += fmt::format("{} ", at.computed_tokens()); });
  EXPECT_EQ(events, "16 Hello!");
  EXPECT_FALSE(answer.whole.has_progress());
  EXPECT_GT(answer.to_first, absl::ZeroDuration());
  EXPECT_EQ(Execute(RunGenerate, {"hi"}).err, "");
  EXPECT_FALSE(inference_.generate.options().progress());
  EXPECT_EQ(Execute(RunChat, {"hi"}).err, "");
  EXPECT_FALSE(inference_.chat.options().progress());
}

TEST_F(CommandTest, GenerateTakesItsPromptFromAnArgumentOrStdin) {
  EXPECT_EQ(Execute(RunGenerate, {"an argument"}).out, "Hello!\n");
  EXPECT_EQ(inference_.generate.text(), "an argument");
  EXPECT_EQ(Execute(RunGenerate, {}, "from\nstdin\n").out, "Hello!\n");
  EXPECT_EQ(inference_.generate.text(), "from\nstdin\n");
  EXPECT_EQ(Execute(RunGenerate, {"twice", "--prompt=twice"}).exit_code, kExitUsage);
}

TEST_F(CommandTest, GenerateShowsTokenIdsWhereThereIsNoText) {
  EXPECT_EQ(Execute(RunGenerate, {"--token-ids=5"}).out, "7,8\n");
}

TEST_F(CommandTest, ChatAnswersOneQuestion) {
  const Outcome run = Execute(RunChat, {"What?"}, "not read\n");
  EXPECT_EQ(run.exit_code, kExitOk) << run.err;
  EXPECT_EQ(run.out, "you said What?\n");
  EXPECT_EQ(Execute(RunChat, {"fail"}).exit_code, kExitFailed);
}

TEST_F(CommandTest, GenerateErrorsNameTheField) {
  const Outcome run = Execute(RunGenerate, {"--prompt", "bad"});
  EXPECT_EQ(run.exit_code, kExitFailed);
  EXPECT_EQ(run.err,
            "tandem generate: INVALID_ARGUMENT: temperature must be >= 0 (field "
            "sampling.temperature) (try again in 2.0 s)\n");
}

TEST_F(CommandTest, GenerateUsageMistakes) {
  EXPECT_EQ(Execute(RunGenerate, {}).exit_code, kExitUsage);
  EXPECT_EQ(Execute(RunGenerate, {"--prompt=a", "--token-ids=1"}).exit_code, kExitUsage);
  EXPECT_THAT(Execute(RunGenerate, {"--token-ids=1,x"}).err, HasSubstr("'x' at position 1"));
  EXPECT_THAT(Execute(RunGenerate, {"--prompt", "a\xff"}).err, HasSubstr("UTF-8 at byte 1"));
  EXPECT_THAT(Execute(RunGenerate, {"--promt=a"}).err, HasSubstr("--prompt"));
}

TEST_F(CommandTest, UnreachableServerIsNamed) {
  const std::string address = server_->address();
  server_->Shutdown(absl::ZeroDuration());
  internal_->Shutdown(absl::ZeroDuration());
  const Outcome run = Execute(RunStatus, {});
  EXPECT_EQ(run.exit_code, kExitFailed);
  EXPECT_THAT(run.err, HasSubstr(address));
  // Whoever asks learns what to do.
  for (const Outcome& ask : {Execute(RunChat, {"What?"}), Execute(RunChat, {}, "What?\n"),
                             Execute(RunGenerate, {"x"})}) {
    EXPECT_EQ(ask.exit_code, kExitFailed);
    EXPECT_THAT(ask.err, AllOf(HasSubstr(address), HasSubstr("tandem up"), HasSubstr("--server")));
    EXPECT_EQ(std::count(ask.err.begin(), ask.err.end(), '\n'), 1) << ask.err;
  }
}

// A cluster that is there and has no worker is not helped by another one.
TEST_F(CommandTest, AnErrorOfTheServerIsNoMissingServer) {
  const Outcome run = Execute(RunGenerate, {"no worker"});
  EXPECT_EQ(run.exit_code, kExitFailed);
  EXPECT_THAT(run.err, AllOf(HasSubstr("UNAVAILABLE: no worker"), Not(HasSubstr("tandem up"))));
}

TEST_F(CommandTest, WhereNobodyListensPeopleAreToldHowToStart) {
  const Outcome run = Execute(RunGenerate, {"--server", "127.0.0.1:1", "hello"});
  EXPECT_EQ(run.exit_code, kExitFailed);
  EXPECT_EQ(run.err,
            "tandem generate: nothing answers at 127.0.0.1:1 (Connection refused); start a cluster "
            "with `tandem up`, or name another with --server\n");
}

TEST_F(CommandTest, ChatKeepsTheConversation) {
  const Outcome run =
      Execute(RunChat, {"--system", "be brief"}, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n");
  EXPECT_EQ(run.exit_code, kExitOk) << run.err;
  EXPECT_EQ(run.out, "you said one\nyou said two\nyou said three\n");
  ASSERT_EQ(inference_.chat.messages_size(), 2);
  EXPECT_EQ(inference_.chat.messages(0).role(), "system");
  EXPECT_EQ(inference_.chat.messages(1).content(), "three");
}

TEST_F(CommandTest, ChatJsonAndStatsAndTable) {
  const Outcome lines = Execute(RunChat, {"--json"}, "one\ntwo");
  std::istringstream in(lines.out);
  std::string line;
  for (int turn = 1; turn <= 2; ++turn) {
    ASSERT_TRUE(std::getline(in, line));
    const json out = json::parse(line, nullptr, false);
    ASSERT_TRUE(out.is_object()) << line;
    EXPECT_EQ(out["turn"], turn);
    EXPECT_EQ(out["text"], turn == 1 ? "you said one" : "you said two");
    EXPECT_EQ(out["usage"]["prompt_tokens"], 20);
  }
  EXPECT_FALSE(std::getline(in, line));
  ASSERT_EQ(inference_.chat.messages_size(), 3);
  EXPECT_EQ(inference_.chat.messages(1).role(), "assistant");
  EXPECT_EQ(inference_.chat.messages(1).content(), "you said one");

  const Outcome table = Execute(RunChat, {"--echo", "--stats", "--table"}, "one\n");
  EXPECT_THAT(table.out, AllOf(HasSubstr("you> one\ntandem> you said one\n[20 prompt tokens"),
                               HasSubstr("cached tokens"), HasSubstr("4096  tcp")));
}

TEST_F(CommandTest, ChatFromAPipeEndsAtTheFirstError) {
  const Outcome run = Execute(RunChat, {}, "one\nfail\ntwo\n");
  EXPECT_EQ(run.exit_code, kExitFailed);
  EXPECT_THAT(run.err, HasSubstr("RESOURCE_EXHAUSTED: full"));
  EXPECT_EQ(run.out, "you said one\n") << "no empty line for the answer that failed";
  EXPECT_EQ(inference_.chat.messages(2).content(), "fail");
}

TEST_F(CommandTest, CancelEndsTheRunningAnswerAndKeepsItsText) {
  InferenceClient client({.address = server_->address()});
  EXPECT_FALSE(client.Cancel());
  v1::ChatRequest request;
  request.add_messages()->set_content("endless");
  bool cancelled = false;
  const Answer answer =
      client.Chat(request, absl::InfiniteDuration(),
                  [&](const std::string& /*text*/) { cancelled = client.Cancel(); });
  EXPECT_TRUE(cancelled);
  EXPECT_EQ(answer.status.code(), absl::StatusCode::kCancelled);
  EXPECT_THAT(answer.whole.text(), testing::StartsWith("on "));
  EXPECT_FALSE(client.Cancel());
}

TEST_F(CommandTest, TimeoutEndsTheAnswer) {
  const Outcome run = Execute(RunChat, {"--timeout=0.05"}, "endless\n");
  EXPECT_EQ(run.exit_code, kExitFailed);
  EXPECT_THAT(run.err, HasSubstr("DEADLINE_EXCEEDED"));
}

TEST_F(CommandTest, StatusAsTableAndJson) {
  const Outcome table = Execute(RunStatus, {});
  EXPECT_EQ(table.exit_code, kExitOk);
  EXPECT_THAT(table.out, AllOf(HasSubstr("prefill-0"), HasSubstr("ready"), HasSubstr("2,048")));
  const json out = json::parse(Execute(RunStatus, {"--json"}).out, nullptr, false);
  ASSERT_TRUE(out.is_object());
  EXPECT_EQ(out["model"], "demo");
  EXPECT_EQ(out["workers"][0]["blocks_total"], 100);
}

TEST_F(CommandTest, OperatorsAreTakenToTheClusterByNoteOrByFlags) {
  RemoveClusterNote(server_->address());
  const Outcome unknown = Execute(RunStatus, {});
  EXPECT_EQ(unknown.exit_code, kExitFailed);
  EXPECT_THAT(unknown.err, AllOf(HasSubstr(server_->address()), HasSubstr("--internal")));
  setenv("TANDEM_CLUSTER_SECRET", "s", 1);
  EXPECT_EQ(Execute(RunStatus, {"--internal", internal_->address()}).exit_code, kExitOk);
  setenv("TANDEM_CLUSTER_SECRET", "guess", 1);
  const Outcome refused = Execute(RunStatus, {"--internal", internal_->address()});
  unsetenv("TANDEM_CLUSTER_SECRET");
  EXPECT_EQ(refused.exit_code, kExitFailed);
  EXPECT_THAT(refused.err, HasSubstr("does not prove the cluster secret"));
}

TEST(ClusterNote, OnlyThisUserCanReadOrForgeIt) {
  const TempDir dir;
  const std::string& home = dir.path();
  setenv("XDG_RUNTIME_DIR", home.c_str(), 1);
  ASSERT_TRUE(WriteClusterNote("127.0.0.1:8000", {"127.0.0.1:8001", "s3cret"}).ok());
  EXPECT_EQ(*ReadClusterNote("127.0.0.1:8000"), (ClusterNote{"127.0.0.1:8001", "s3cret"}));
  const auto permissions = std::filesystem::status(home + "/tandem/127.0.0.1:8000").permissions();
  EXPECT_EQ(permissions, std::filesystem::perms::owner_read | std::filesystem::perms::owner_write);
  std::filesystem::permissions(home + "/tandem", std::filesystem::perms::all);
  EXPECT_TRUE(absl::IsPermissionDenied(ReadClusterNote("127.0.0.1:8000").status()));
}

TEST_F(CommandTest, Drain) {
  // No other worker of its role is there, and nobody who could be asked.
  const Outcome last = Execute(RunDrain, {"prefill-0"});
  EXPECT_EQ(last.exit_code, kExitFailed);
  EXPECT_THAT(last.err, AllOf(HasSubstr("last prefill worker"), HasSubstr("--force")));
  EXPECT_EQ(Execute(RunDrain, {"prefill-0", "--force"}).exit_code, kExitOk);
  const Outcome unknown = Execute(RunDrain, {"prefill-9"});
  EXPECT_EQ(unknown.exit_code, kExitFailed);
  EXPECT_THAT(unknown.err, HasSubstr("prefill-9"));
  EXPECT_EQ(Execute(RunDrain, {}).exit_code, kExitUsage);
}

TEST_F(CommandTest, StayUndrainAndScaleNeedTheUpThatRunsTheCluster) {
  const Outcome stay = Execute(RunDrain, {"prefill-0", "--force", "--stay"});
  EXPECT_EQ(stay.exit_code, kExitFailed);
  EXPECT_THAT(stay.err, HasSubstr("tandem up"));
  EXPECT_THAT(Execute(RunUndrain, {"prefill-0"}).err, HasSubstr("tandem up"));
  EXPECT_THAT(Execute(RunScale, {"decode=2"}).err, HasSubstr("tandem up"));
  EXPECT_THAT(Execute(RunScale, {"decode=0"}).err, HasSubstr("--force"));
  for (const char* wish : {"decode", "decode=", "decode=x", "decode=-1"}) {
    EXPECT_EQ(Execute(RunScale, {wish}).exit_code, kExitUsage) << wish;
  }
}

TEST_F(CommandTest, StatusOfAWorkersAddressNamesItsRouter) {
  const std::string router = server_->address();
  const Outcome worker = Execute(RunStatus, {"--server", "127.0.0.1:4711"});
  EXPECT_EQ(worker.exit_code, kExitFailed);
  EXPECT_THAT(worker.err, AllOf(HasSubstr("127.0.0.1:4711 is worker prefill-0"),
                                HasSubstr("--server " + router)));
  EXPECT_THAT(Execute(RunStatus, {"--server", internal_->address()}).err,
              HasSubstr("where workers join the router at " + router));
  EXPECT_THAT(Execute(RunStatus, {"--server", "127.0.0.1:4712"}).err,
              HasSubstr("clusters of this user run at " + router));
}

TEST_F(CommandTest, HealthIsAnExitCodeAndALine) {
  const std::string address = server_->address();
  const Outcome starting = Execute(RunHealth, {});
  EXPECT_EQ(starting.exit_code, kExitFailed);
  EXPECT_EQ(starting.out, address + " NOT_SERVING\n");
  server_->SetServing(true);
  const Outcome serving = Execute(RunHealth, {});
  EXPECT_EQ(serving.exit_code, kExitOk) << serving.err;
  EXPECT_EQ(serving.out, address + " SERVING\n");
  server_->Shutdown(absl::ZeroDuration());
  const Outcome gone = Execute(RunHealth, {});
  EXPECT_EQ(gone.exit_code, kExitFailed);
  EXPECT_THAT(gone.err, HasSubstr("tandem health: nothing answers at " + address));
  EXPECT_EQ(Execute(RunHealth, {"--timeout=0"}).exit_code, kExitUsage);
}

TEST_F(CommandTest, WatchNeedsASensiblePeriod) {
  EXPECT_EQ(Execute(RunStatus, {"--watch", "0.01"}).exit_code, kExitUsage);
  EXPECT_EQ(Execute(RunStatus, {"--watch=-1"}).exit_code, kExitUsage);
}

class InspectTest : public testing::Test {
 protected:
  static Outcome Inspect(const Arguments& arguments) {
    testing::internal::CaptureStdout();
    testing::internal::CaptureStderr();
    Outcome run;
    run.exit_code = RunInspect(arguments);
    run.out = testing::internal::GetCapturedStdout();
    run.err = testing::internal::GetCapturedStderr();
    return run;
  }
  // Qwen2.5-7B's shape.
  InspectTest() {
    WriteFile(dir_ + "/config.json",
              R"({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2",
      "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
      "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
      "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
      "tie_word_embeddings": false, "torch_dtype": "bfloat16", "hidden_act": "silu"})");
  }

  const TempDir folder_;
  const std::string& dir_ = folder_.path();
};

TEST_F(InspectTest, NumbersOfQwen25At7B) {
  const Outcome run = Inspect({dir_, "--memory", "24GB", "--json"});
  ASSERT_EQ(run.exit_code, kExitOk) << run.err;
  const json out = json::parse(run.out, nullptr, false);
  ASSERT_TRUE(out.is_object()) << run.out;
  EXPECT_EQ(out["parameters"], 7'615'616'512);
  EXPECT_EQ(out["kv_bytes_per_token"], 57'344);
  EXPECT_EQ(out["weight_bytes"], 15'231'233'024);
  // (24e9 - 15,231,233,024) / 917,504 = 9,557 whole blocks of 16.
  EXPECT_EQ(out["tokens_that_fit"], 9'557 * 16);
  EXPECT_THAT(Inspect({dir_}).out, AllOf(HasSubstr("Qwen2ForCausalLM"), HasSubstr("7,615,616,512"),
                                         HasSubstr("57,344")));
  EXPECT_THAT(Inspect({dir_, "--memory=1GiB"}).out, HasSubstr("nothing"));
  EXPECT_EQ(json::parse(Inspect({dir_, "--dtype=float32", "--json"}).out)["kv_bytes_per_token"],
            114'688);
}

TEST_F(InspectTest, SaysWhatFitsOnCards) {
  const json cards = json::parse(Inspect({dir_, "--json"}).out)["cards"];
  // (0.9 * 24 GiB - 0.75 GiB - 15,231,233,024) / 917,504 = 7,799 whole blocks of 16.
  EXPECT_EQ(cards, json::parse(R"([{"gigabytes": 24, "tokens_that_fit": 124784},
                                   {"gigabytes": 48, "tokens_that_fit": 529232},
                                   {"gigabytes": 80, "tokens_that_fit": 1068512}])"));
  EXPECT_THAT(Inspect({dir_}).out, HasSubstr("on a 48 GB GPU    529,232 tokens"));
  EXPECT_THAT(Inspect({dir_, "--dtype=float32"}).out, HasSubstr("on a 24 GB GPU    nothing"));
}

TEST_F(InspectTest, KvInFp8TakesHalf) {
  const json out = json::parse(Inspect({dir_, "--kv-cache-dtype=fp8", "--json"}).out);
  EXPECT_EQ(out["dtype"], "bfloat16");
  EXPECT_EQ(out["kv_dtype"], "fp8");
  EXPECT_EQ(out["kv_bytes_per_token"], 28'672);
  EXPECT_EQ(out["weight_bytes"], 15'231'233'024);
  // Of a card of 80 GB 256 MiB are for wide pages: 133,564 whole blocks would fit into 0.9 of it
  // less 0.75 GiB, and 585 of them are not there.
  EXPECT_EQ(out["cards"], json::parse(R"([{"gigabytes": 24, "tokens_that_fit": 249584},
                                          {"gigabytes": 48, "tokens_that_fit": 1058480},
                                          {"gigabytes": 80, "tokens_that_fit": 2127664}])"));
}

TEST_F(InspectTest, SaysWhatWeightsAreQuantisedWith) {
  EXPECT_EQ(json::parse(Inspect({dir_, "--json"}).out)["quantization"], nullptr);
  WriteFile(dir_ + "/quantize_config.json",
            R"({"bits": 4, "group_size": 128, "sym": true, "desc_act": true})");
  const json out = json::parse(Inspect({dir_, "--json"}).out);
  EXPECT_EQ(out["quantization"], json::parse(R"({"method": "gptq", "bits": 4, "group_size": 128,
                                                 "symmetric": true, "act_order": true})"));
  EXPECT_EQ(out["weight_bytes"], 15'231'233'024);  // as a CPU has them
  // 6,525,288,448 weights of 4 bits, 50,978,816 groups of them, and the rest.
  EXPECT_EQ(out["gpu_weight_bytes"],
            6'525'288'448 / 2 + 50'978'816 * 4 + (15'231'233'024 - 2 * 6'525'288'448));
  EXPECT_GT(out["cards"][0]["tokens_that_fit"], 2 * 124'784);
  EXPECT_THAT(Inspect({dir_}).out,
              AllOf(HasSubstr("GPTQ, 4 bits, groups of 128, symmetric, act-order"),
                    HasSubstr("as bfloat16, dequantised when loaded"),
                    HasSubstr("on a GPU          5,647,215,616 B")));
  WriteFile(dir_ + "/quantize_config.json", R"({"bits": 3, "group_size": 128})");
  EXPECT_THAT(Inspect({dir_}).err, HasSubstr("3-bit GPTQ weights are not supported; take"));
}

TEST_F(InspectTest, Mistakes) {
  EXPECT_EQ(Inspect({dir_, "--block-size=17"}).exit_code, kExitUsage);
  const Outcome missing = Inspect({"/no/such/model"});
  EXPECT_EQ(missing.exit_code, kExitFailed);
  EXPECT_THAT(missing.err, HasSubstr("/no/such/model"));
}

TEST(VersionTest, SaysSo) {
  testing::internal::CaptureStdout();
  EXPECT_EQ(RunVersion({}), kExitOk);
  EXPECT_THAT(testing::internal::GetCapturedStdout(), HasSubstr("tandem "));
}

}  // namespace
}  // namespace tandem::cli
