// What the processes of a cluster log of its requests, as an operator's tools read it.
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::Not;

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) out.push_back(line);
  return out;
}

std::string TrailingId(const grpc::ClientContext& context) {
  const auto& trailing = context.GetServerTrailingMetadata();
  const auto found = trailing.find("x-request-id");
  return found == trailing.end() ? "" : std::string(found->second.data(), found->second.size());
}

class LogTest : public ::testing::Test {
 protected:
  void Start(const std::vector<std::string>& log_flags) {
    ClusterSpec spec;
    spec.model_dir = SourcePath("models/demo");
    spec.router_flags = log_flags;
    spec.worker_flags = {"--num-threads=1", "--kv-cache-memory-bytes=32MiB"};
    spec.worker_flags.insert(spec.worker_flags.end(), log_flags.begin(), log_flags.end());
    cluster_ = TestCluster::Start(spec);
    ASSERT_NE(cluster_, nullptr);
    stub_ = v1::Inference::NewStub(cluster_->channel());
  }

  grpc::StatusCode Ask(grpc::ClientContext* context, const v1::GenerateRequest& request,
                       bool cancel = false) {
    auto reader = stub_->Generate(context, request);
    v1::GenerateResponse message;
    while (reader->Read(&message)) {
      if (cancel) context->TryCancel();
    }
    return reader->Finish().error_code();
  }

  static v1::GenerateRequest Prompt(const std::string& text, int max_tokens) {
    v1::GenerateRequest request;
    request.set_text(text);
    request.mutable_sampling()->set_max_tokens(static_cast<uint32_t>(max_tokens));
    request.mutable_sampling()->set_ignore_eos(true);
    return request;
  }

  // The router's line of a request, once it is there.
  std::string RequestLine(const std::string& id) {
    for (int i = 0; i < 1500; ++i) {
      for (const std::string& line : Lines(ReadWholeFile(cluster_->router().stderr_path))) {
        if (line.find(id) != std::string::npos &&
            line.find("generated_tokens") != std::string::npos) {
          return line;
        }
      }
      SleepMilliseconds(20);
    }
    return "";
  }

  std::unique_ptr<TestCluster> cluster_;
  std::unique_ptr<v1::Inference::Stub> stub_;
};

TEST_F(LogTest, EveryRequestLeavesALineOfJsonAndNoPrompt) {
  ASSERT_NO_FATAL_FAILURE(Start({"--log-format=json", "--log-level=debug"}));
  const std::string secret = "xyzzy plugh";

  grpc::ClientContext good;
  good.AddMetadata("x-request-id", "mine-1");
  ASSERT_EQ(Ask(&good, Prompt(secret, 5)), grpc::StatusCode::OK);
  EXPECT_EQ(TrailingId(good), "mine-1");
  const json line = json::parse(RequestLine("mine-1"), nullptr, false);
  ASSERT_TRUE(line.is_object());
  EXPECT_EQ(line["process"], "router");
  EXPECT_EQ(line["level"], "info");
  EXPECT_EQ(line["code"], "OK");
  EXPECT_GT(line["prompt_tokens"], 0);
  EXPECT_EQ(line["cached_tokens"], 0);
  EXPECT_EQ(line["generated_tokens"], 5);
  EXPECT_EQ(line["attempts"], 1);
  EXPECT_EQ(line["decode_worker"], "decode-0");
  EXPECT_GT(line["ttft_ms"], 0);
  EXPECT_GE(line["total_ms"], line["ttft_ms"]);

  // Refused, with what would break a line; the message's own id goes before metadata's.
  grpc::ClientContext bad;
  bad.AddMetadata("x-request-id", "not this");
  v1::GenerateRequest request = Prompt(secret, 5);
  request.mutable_options()->set_request_id("\"quoted\"");
  request.mutable_sampling()->set_temperature(-1);
  ASSERT_EQ(Ask(&bad, request), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(TrailingId(bad), "\"quoted\"");
  const json refused = json::parse(RequestLine("\\\"quoted\\\""), nullptr, false);
  EXPECT_EQ(refused["code"], "INVALID_ARGUMENT");
  EXPECT_EQ(refused["field"], "sampling.temperature");
  EXPECT_EQ(refused["attempts"], 0);

  // An id that is none is escaped and cut; a name that quotes the prompt is not repeated.
  grpc::ClientContext strange;
  strange.AddMetadata("x-request-id", "a b" + std::string(1000, 'c'));
  request = Prompt(secret, 5);
  request.set_model(secret);
  ASSERT_EQ(Ask(&strange, request), grpc::StatusCode::NOT_FOUND);
  EXPECT_EQ(TrailingId(strange), "a%20b" + std::string(123, 'c'));
  EXPECT_EQ(json::parse(RequestLine("a%20b"), nullptr, false)["field"], "model");

  grpc::ClientContext garbage;
  garbage.AddMetadata("x-request-id", "garbage-1");
  ASSERT_EQ(Ask(&garbage, Prompt(secret + "\xff", 5)), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(json::parse(RequestLine("garbage-1"), nullptr, false)["field"], "text");

  grpc::ClientContext cancelled;
  cancelled.AddMetadata("x-request-id", "cancelled-1");
  Ask(&cancelled, Prompt(secret, 400), /*cancel=*/true);
  EXPECT_EQ(json::parse(RequestLine("cancelled-1"), nullptr, false)["code"], "CANCELLED");

  grpc::ClientContext unary;
  v1::ListModelsResponse models;
  ASSERT_TRUE(stub_->ListModels(&unary, {}, &models).ok());
  EXPECT_EQ(TrailingId(unary).size(), 32u);

  for (const std::string& entry : Lines(cluster_->Logs())) {
    if (entry.starts_with("== ")) continue;
    const json parsed = json::parse(entry, nullptr, false);
    ASSERT_TRUE(parsed.is_object()) << entry;
    for (const char* name : {"time", "level", "process", "message"}) {
      EXPECT_TRUE(parsed.contains(name)) << entry;
    }
  }
  EXPECT_THAT(cluster_->Logs(), Not(HasSubstr("xyzzy")));
  EXPECT_THAT(cluster_->Logs(), Not(HasSubstr("plugh")));
}

TEST_F(LogTest, TextHasOneFormatInAllProcesses) {
  ASSERT_NO_FATAL_FAILURE(Start({}));
  grpc::ClientContext context;
  ASSERT_EQ(Ask(&context, Prompt("1 + 1 =", 2)), grpc::StatusCode::OK);
  const std::string id = TrailingId(context);
  ASSERT_EQ(id.size(), 32u);
  EXPECT_THAT(RequestLine(id),
              ::testing::ContainsRegex("^20[-0-9]+T[:0-9]+\\.[0-9]+Z info  router: request id=" +
                                       id + " code=OK prompt_tokens=.* ttft_ms=.* total_ms="));
  std::string process = "none";
  for (const std::string& line : Lines(cluster_->Logs())) {
    if (line.starts_with("== ")) {
      process = line.substr(3);
      continue;
    }
    EXPECT_THAT(line, ::testing::ContainsRegex("^20[-0-9]+T[:0-9]+\\.[0-9]+Z (info |warn |error) " +
                                               process + ": "));
  }
}

TEST_F(LogTest, WorkersTooLogNoMoreThanAskedFor) {
  ASSERT_NO_FATAL_FAILURE(Start({"--log-level=error"}));
  grpc::ClientContext context;
  ASSERT_EQ(Ask(&context, Prompt("1 + 1 =", 2)), grpc::StatusCode::OK);
  for (const std::string& line : Lines(cluster_->Logs()))
    EXPECT_THAT(line, ::testing::StartsWith("== "));
}

}  // namespace
}  // namespace tandem
