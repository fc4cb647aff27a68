// The public API of a real cluster with --api-keys-file: who is let in, for how much, and what the
// router says of it.
#include <csignal>
#include <map>
#include <regex>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "common/rpc/status.h"
#include "tests/support/cluster.h"
#include "tests/support/paths.h"

namespace tandem {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// Tokens that fill whole blocks many times over, the same each time.
v1::GenerateRequest LongPrompt(int max_tokens = 4) {
  return TokenRequest(RandomTokens(320, 512, 5), max_tokens);
}

// A file of keys as people make it: with `tandem key new`.
class KeysFile {
 public:
  // Returns the new key.
  std::string Add(const std::string& name, std::vector<std::string> flags = {}) {
    flags.insert(flags.begin(), {BinaryPath("tandem"), "key", "new", "--name", name});
    const Completed made = RunCommand(flags, 30);
    EXPECT_EQ(made.exit_code, 0) << made.err;
    text_ += made.out;
    Write(text_);
    std::string key = made.err;
    if (!key.empty()) key.pop_back();  // the line's end
    EXPECT_TRUE(key.starts_with("tdm-")) << key;
    EXPECT_THAT(made.out, Not(HasSubstr(key))) << "the file holds no key";
    return key;
  }
  void Clear() { text_.clear(); }
  void Write(const std::string& text) const { WriteFile(path(), text); }
  std::string path() const { return dir_.path() + "/keys.yaml"; }

 private:
  TempDir dir_;
  std::string text_;
};

class ApiKeyTest : public ::testing::Test {
 protected:
  void Start() {
    ClusterSpec spec;
    spec.model_dir = SourcePath("tests/data/models/small");
    spec.router_flags = {"--api-keys-file=" + keys_.path()};
    spec.worker_flags = {"--load-format=dummy", "--dtype=float32", "--num-threads=1",
                         "--kv-cache-memory-bytes=64MiB"};
    spec.decode_flags = {"--local-prefill-max-tokens=0"};
    cluster_ = TestCluster::Start(spec);
    ASSERT_NE(cluster_, nullptr);
  }

  Answer Ask(const std::string& key, const v1::GenerateRequest& request = LongPrompt()) {
    return TestClient(cluster_->channel(), key).Generate(request);
  }
  grpc::StatusCode Code(const std::string& key) { return Ask(key).status.error_code(); }
  std::string Metrics() { return TestCluster::Scrape(cluster_->router()); }
  std::string Log() { return ReadWholeFile(cluster_->router().stderr_path); }
  // For what the router does about once a second; false after a minute.
  template <typename Condition>
  static bool Await(Condition condition) {
    for (int i = 0; i < 600; ++i) {
      if (condition()) return true;
      SleepMilliseconds(100);
    }
    return false;
  }

  KeysFile keys_;
  std::unique_ptr<TestCluster> cluster_;
};

TEST_F(ApiKeyTest, WithoutAKeyNothingAnswersButHealth) {
  const std::string key = keys_.Add("team-a");
  ASSERT_NO_FATAL_FAILURE(Start());
  for (const std::string& wrong : {std::string(), std::string("tdm-guess"), key + "x"}) {
    const Answer answer = Ask(wrong);
    EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAUTHENTICATED)
        << answer.status.error_message();
    EXPECT_THAT(answer.status.error_message(), HasSubstr("API key"));
  }
  TestClient client(cluster_->channel());
  v1::Inference::Stub& stub = client.stub();
  {
    grpc::ClientContext context;
    v1::ListModelsResponse response;
    EXPECT_EQ(stub.ListModels(&context, {}, &response).error_code(),
              grpc::StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(response.models_size(), 0);
  }
  {
    grpc::ClientContext context;
    v1::TokenizeRequest request;
    request.set_text("hello");
    v1::TokenizeResponse response;
    EXPECT_EQ(stub.Tokenize(&context, request, &response).error_code(),
              grpc::StatusCode::UNAUTHENTICATED);
  }
  {
    grpc::ClientContext context;
    v1::DetokenizeRequest request;
    request.add_ids(1);
    v1::DetokenizeResponse response;
    EXPECT_EQ(stub.Detokenize(&context, request, &response).error_code(),
              grpc::StatusCode::UNAUTHENTICATED);
  }
  EXPECT_EQ(
      RunCommand({BinaryPath("tandem"), "health", "--server", cluster_->address()}, 30).exit_code,
      0);
  EXPECT_THAT(Log(), AllOf(Not(HasSubstr(key)), Not(HasSubstr("tdm-guess"))));
}

TEST_F(ApiKeyTest, TheLineOfARequestAndTheMetricsNameTheKey) {
  const std::string key = keys_.Add("team-a");
  ASSERT_NO_FATAL_FAILURE(Start());
  const Answer answer = Ask(key);
  ASSERT_TRUE(answer.status.ok()) << answer.status.error_message();
  EXPECT_TRUE(Await([&] { return Log().find("key=team-a") != std::string::npos; })) << Log();
  const std::string metrics = Metrics();
  EXPECT_TRUE(std::regex_search(
      metrics, std::regex("tandem_api_key_requests_total\\{[^}]*key=\"team-a\"[^}]*\\} 1\n")))
      << metrics;
  EXPECT_TRUE(std::regex_search(
      metrics, std::regex("tandem_api_key_tokens_total\\{[^}]*key=\"team-a\"[^}]*\\} 324\n")))
      << metrics;
  EXPECT_THAT(Log(), Not(HasSubstr(key)));
}

TEST_F(ApiKeyTest, OverTheLimitsIsToldWhenToComeAgain) {
  // One request in 100 minutes, or 10 tokens a minute: what a slow machine does not outlast.
  const std::string once = keys_.Add("once", {"--requests-per-minute=0.01"});
  const std::string short_of = keys_.Add("short", {"--tokens-per-minute=10"});
  ASSERT_NO_FATAL_FAILURE(Start());
  for (const auto& [key, limit] :
       std::map<std::string, std::string>{{once, "'once' is over its 0.01 requests per minute"},
                                          {short_of, "'short' is over its 10 tokens per minute"}}) {
    const Answer first = Ask(key);
    EXPECT_TRUE(first.status.ok()) << first.status.error_message();
    const absl::Status refused = FromGrpcStatus(Ask(key).status);
    EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(refused.message()), HasSubstr(limit));
    EXPECT_GT(RetryAfter(refused).value_or(absl::ZeroDuration()), absl::Minutes(5));
  }
}

TEST_F(ApiKeyTest, APriorityAboveTheKeysIsRefused) {
  const std::string key = keys_.Add("a", {"--max-priority=0"});
  ASSERT_NO_FATAL_FAILURE(Start());
  v1::GenerateRequest request = LongPrompt();
  request.mutable_options()->set_priority(1);
  const Answer refused = Ask(key, request);
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_THAT(refused.status.error_message(), HasSubstr("at most 0 with this API key"));
  request.mutable_options()->set_priority(0);
  EXPECT_TRUE(Ask(key, request).status.ok());
  EXPECT_TRUE(std::regex_search(
      Metrics(),
      std::regex("tandem_api_key_refused_total\\{[^}]*reason=\"priority\"[^}]*\\} 1\n")));
}

TEST_F(ApiKeyTest, AChangedFileIsReadAndABrokenOneIsNot) {
  const std::string old_key = keys_.Add("old");
  ASSERT_NO_FATAL_FAILURE(Start());
  EXPECT_EQ(Code(old_key), grpc::StatusCode::OK);
  keys_.Clear();
  const std::string new_key = keys_.Add("new");
  EXPECT_TRUE(Await([&] { return Code(new_key) == grpc::StatusCode::OK; }));
  EXPECT_EQ(Code(old_key), grpc::StatusCode::UNAUTHENTICATED);

  keys_.Write("- name: newer\n  sha256: oops\n");
  EXPECT_TRUE(Await([&] {
    return Log().find(
               "line 2: sha256 must be 64 hex digits, as `tandem key new` prints them; what "
               "was in force before stays so") != std::string::npos;
  })) << Log();
  EXPECT_EQ(Code(new_key), grpc::StatusCode::OK);
  EXPECT_TRUE(
      std::regex_search(Metrics(), std::regex("tandem_api_keys_file_broken\\{[^}]*\\} 1\n")));
}

TEST_F(ApiKeyTest, TenantsShareNoCachedPrefix) {
  const std::string acme = keys_.Add("acme-1", {"--tenant=acme"});
  const std::string acme_too = keys_.Add("acme-2", {"--tenant=acme"});
  const std::string other = keys_.Add("other", {"--tenant=other"});
  const std::string none = keys_.Add("none");
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto cached = [this](const std::string& key, const std::string& salt = "") {
    v1::GenerateRequest request = LongPrompt();
    request.mutable_options()->set_cache_salt(salt);
    const Answer answer = Ask(key, request);
    EXPECT_TRUE(answer.status.ok()) << answer.status.error_message();
    // No tenant's prompt is skipped on its way between workers because of another's, either.
    if (answer.usage.cached_tokens() == 0) {
      EXPECT_GT(answer.timing.kv_bytes(), 0u);
    }
    return answer.usage.cached_tokens();
  };
  EXPECT_EQ(cached(acme), 0u);
  EXPECT_GE(cached(acme), 304u);
  EXPECT_GE(cached(acme_too), 304u) << "one tenant, two keys";
  EXPECT_EQ(cached(other), 0u);
  EXPECT_EQ(cached(none), 0u);
  EXPECT_GE(cached(none), 304u);
  // Nor by naming it: what a client gives stays within its tenant.
  EXPECT_EQ(cached(none, "acme"), 0u);
  EXPECT_EQ(cached(other, "acme"), 0u);
  v1::GenerateRequest forged = LongPrompt();
  forged.mutable_options()->set_cache_salt(
      "\x01"
      "acme\x01");
  EXPECT_EQ(Ask(none, forged).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ApiKeyTest, TheCommandLineShowsItsKey) {
  const std::string key = keys_.Add("a");
  ASSERT_NO_FATAL_FAILURE(Start());
  const std::string tandem = BinaryPath("tandem");
  const std::vector<std::string> generate = {
      tandem,        "generate", "--server",     cluster_->address(),
      "--token-ids", "1,2,3",    "--max-tokens", "2"};
  const Completed refused = RunCommand(generate, 30);
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_THAT(refused.err, AllOf(HasSubstr("UNAUTHENTICATED"), HasSubstr("TANDEM_API_KEY")));

  std::vector<std::string> with_flag = generate;
  with_flag.insert(with_flag.end(), {"--api-key", key});
  const Completed answered = RunCommand(with_flag, 30);
  EXPECT_EQ(answered.exit_code, 0) << answered.err;

  // A key out of a file may have a line's end behind it, and a wrong one anything in it.
  const std::string variable = "TANDEM_API_KEY=";
  std::vector<std::string> with_variable = generate;
  with_variable.insert(with_variable.begin(), {"/usr/bin/env", variable + key + "\n"});
  EXPECT_EQ(RunCommand(with_variable, 30).exit_code, 0);
  with_variable[1] = variable + "a\nb\xFF";
  EXPECT_EQ(RunCommand(with_variable, 30).exit_code, 1);

  const Completed bench =
      RunCommand({tandem, "bench", "--server", cluster_->address(), "--api-key", key,
                  "--num-prompts", "4", "--random-input-len", "32", "--random-output-len", "2"},
                 60);
  EXPECT_EQ(bench.exit_code, 0) << bench.err << bench.out;
}

TEST(ApiKeyStart, ARouterDoesNotStartWithABadFile) {
  TempDir dir;
  const std::string path = dir.path() + "/keys.yaml";
  WriteFile(path, "- name: a\n");
  const Completed router = RunCommand(
      {BinaryPath("tandem_router"), "--model", SourcePath("models/demo"), "--api-keys-file", path},
      30);
  EXPECT_EQ(router.exit_code, 1);
  EXPECT_THAT(router.err, HasSubstr("keys.yaml: line 1: a has no sha256"));
}

TEST(KeyCommand, RefusesWhatTheFileWouldNotTake) {
  const auto fails = [](std::vector<std::string> flags) {
    flags.insert(flags.begin(), {BinaryPath("tandem"), "key"});
    return RunCommand(flags, 30);
  };
  for (const std::vector<std::string>& flags :
       {std::vector<std::string>{"new"},
        {"new", "--name", "a b"},
        {"old", "--name", "a"},
        {"new", "--name", "a", "--tenant", "b/c"},
        {"new", "--name", "a", "--requests-per-minute", "0"}}) {
    const Completed result = fails(flags);
    EXPECT_EQ(result.exit_code, 2) << result.out;
    EXPECT_EQ(result.out, "");
  }
}

}  // namespace
}  // namespace tandem
