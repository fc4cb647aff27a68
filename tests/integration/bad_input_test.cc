// Bad input: each a clear error that names the field or the position, and the process lives on.
#include <cmath>
#include <functional>
#include <limits>

#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"

#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using tandem::v1::ChatRequest;
using tandem::v1::GenerateRequest;
using testing::HasSubstr;

// The field that the google.rpc.BadRequest detail of a status names; "" without one.
std::string ViolatedField(const grpc::Status& status) {
  google::rpc::Status details;
  google::rpc::BadRequest bad_request;
  if (!details.ParseFromString(status.error_details())) return "";
  for (const auto& any : details.details()) {
    if (any.UnpackTo(&bad_request) && bad_request.field_violations_size() > 0) {
      return bad_request.field_violations(0).field();
    }
  }
  return "";
}

class BadInput : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("models/demo");
    spec.worker_flags = {"--dtype=float32", "--num-threads=1", "--kv-cache-memory-bytes=64MiB"};
    cluster_ = TestCluster::Start(spec).release();
  }
  static void TearDownTestSuite() { delete cluster_; }
  void SetUp() override { ASSERT_NE(cluster_, nullptr); }
  void TearDown() override {
    // Alive, and serving.
    TestClient client(cluster_->channel());
    EXPECT_TRUE(client.Generate(Valid()).status.ok());
  }

  static GenerateRequest Valid() {
    GenerateRequest request;
    request.set_text("hello");
    request.mutable_sampling()->set_max_tokens(2);
    return request;
  }
  void ExpectRefused(const GenerateRequest& request, const std::string& field,
                     const std::string& message,
                     grpc::StatusCode code = grpc::StatusCode::INVALID_ARGUMENT) {
    Check(TestClient(cluster_->channel()).Generate(request, 20).status, field, message, code);
  }
  void ExpectRefused(const ChatRequest& request, const std::string& field,
                     const std::string& message,
                     grpc::StatusCode code = grpc::StatusCode::INVALID_ARGUMENT) {
    Check(TestClient(cluster_->channel()).Chat(request, 20).status, field, message, code);
  }
  void Check(const grpc::Status& status, const std::string& field, const std::string& message,
             grpc::StatusCode code) {
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(message));
    if (code == grpc::StatusCode::INVALID_ARGUMENT) {
      EXPECT_EQ(ViolatedField(status), field) << status.error_message();
    }
  }

  static TestCluster* cluster_;
};

TestCluster* BadInput::cluster_ = nullptr;

TEST_F(BadInput, EmptyPrompts) {
  ExpectRefused(GenerateRequest(), "prompt", "prompt");
  GenerateRequest request;
  request.set_text("");
  ExpectRefused(request, "text", "empty");
  request.mutable_token_ids();
  ExpectRefused(request, "token_ids", "empty");
  ExpectRefused(ChatRequest(), "messages", "messages");
}

TEST_F(BadInput, PromptLongerThanTheModelTakes) {
  GenerateRequest request;
  for (int i = 0; i < 5000; ++i) request.mutable_token_ids()->add_ids(5);
  ExpectRefused(request, "token_ids", "max_model_len");
  request.set_text(std::string(100'000, '7'));  // digits are one token each
  ExpectRefused(request, "text", "max_model_len");
}

TEST_F(BadInput, TokenIdOutOfRangeNamesItsPosition) {
  GenerateRequest request;
  for (uint32_t id : {1u, 2u, 4'000'000'000u, 3u}) request.mutable_token_ids()->add_ids(id);
  ExpectRefused(request, "token_ids.ids[2]", "4000000000");
}

TEST_F(BadInput, SamplingOutOfRange) {
  const float nan = std::nanf(""), inf = std::numeric_limits<float>::infinity();
  struct Case {
    const char* field;
    std::function<void(tandem::v1::SamplingParams*)> set;
  };
  const Case cases[] = {
      {"sampling.temperature", [&](auto* s) { s->set_temperature(nan); }},
      {"sampling.temperature", [&](auto* s) { s->set_temperature(inf); }},
      {"sampling.temperature", [&](auto* s) { s->set_temperature(-1); }},
      {"sampling.top_p", [&](auto* s) { s->set_top_p(0); }},
      {"sampling.top_p", [&](auto* s) { s->set_top_p(1.5); }},
      {"sampling.top_p", [&](auto* s) { s->set_top_p(nan); }},
      {"sampling.top_k", [&](auto* s) { s->set_top_k(-2); }},
      {"sampling.min_p", [&](auto* s) { s->set_min_p(2); }},
      {"sampling.repetition_penalty", [&](auto* s) { s->set_repetition_penalty(0); }},
      {"sampling.presence_penalty", [&](auto* s) { s->set_presence_penalty(3); }},
      {"sampling.frequency_penalty", [&](auto* s) { s->set_frequency_penalty(nan); }},
      {"sampling.max_tokens", [&](auto* s) { s->set_max_tokens(0); }},
      {"sampling.max_tokens", [&](auto* s) { s->set_max_tokens(4'000'000'000u); }},
      {"sampling.min_tokens", [&](auto* s) { s->set_min_tokens(3); }},  // max_tokens is 2
      {"sampling.logprobs", [&](auto* s) { s->set_logprobs(21); }},
      {"sampling.prompt_logprobs", [&](auto* s) { s->set_prompt_logprobs(1000); }},
      {"sampling.stop[0]", [&](auto* s) { s->add_stop(""); }},
      {"sampling.stop_token_ids[0]", [&](auto* s) { s->add_stop_token_ids(1'000'000); }},
      {"sampling.stop",
       [&](auto* s) {
         for (int i = 0; i < 17; ++i) s->add_stop("x");
       }},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(c.field);
    GenerateRequest request = Valid();
    c.set(request.mutable_sampling());
    const std::string last = std::string(c.field).substr(9);
    ExpectRefused(request, c.field, last.substr(0, last.find('[')));
  }
}

TEST_F(BadInput, HugeText) {
  GenerateRequest request = Valid();
  request.set_text(std::string(10 << 20, 'a'));
  ExpectRefused(request, "text", "text");
  ChatRequest chat;
  auto* message = chat.add_messages();
  message->set_role("user");
  message->set_content(std::string(10 << 20, 'a'));
  ExpectRefused(chat, "messages", "max_model_len");
}

TEST_F(BadInput, UnknownModelNamesTheOneThereIs) {
  GenerateRequest request = Valid();
  request.set_model("gpt-5");
  ExpectRefused(request, "model", "demo", grpc::StatusCode::NOT_FOUND);
}

TEST_F(BadInput, ChatRolesAndTools) {
  ChatRequest request;
  request.add_messages()->set_role("wizard");
  ExpectRefused(request, "messages[0].role", "wizard");
  request.mutable_messages(0)->set_role("user");
  request.mutable_messages(0)->set_content("hi");
  auto* call = request.add_messages();
  call->set_role("assistant");
  call->add_tool_calls()->mutable_function()->set_name("f");
  call->mutable_tool_calls(0)->mutable_function()->set_arguments("{not json");
  ExpectRefused(request, "messages[1].tool_calls[0].function.arguments", "JSON");
  request.mutable_messages()->RemoveLast();
  request.add_tools()->set_json("{");
  ExpectRefused(request, "tools[0]", "JSON");
}

// Writes invalid UTF-8 past protobuf's own check, as clients in other languages may.
TEST_F(BadInput, InvalidUtf8) {
  grpc::ClientContext context;
  GenerateRequest request = Valid();
  request.set_text(
      "ab\xff"
      "cd");
  const Answer answer = TestClient(cluster_->channel()).Generate(request, 20);
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT)
      << answer.status.error_message();
  EXPECT_THAT(answer.status.error_message(), HasSubstr("UTF-8"));
  EXPECT_THAT(answer.status.error_message(), HasSubstr("2"));  // the byte offset
}

}  // namespace
}  // namespace tandem
