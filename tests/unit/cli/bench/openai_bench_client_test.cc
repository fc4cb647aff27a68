// The client of OpenAI servers against one that the test is.
#include "cli/bench/openai_bench_client.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_split.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

#include "cli/bench/recorder.h"
#include "cli/bench/sse_parser.h"
#include "common/base/clock.h"
#include "httplib.h"
#include "tests/support/paths.h"

namespace tandem::cli {
namespace {

using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

TEST(SseParser, TakesEventsInPiecesOfAnySize) {
  const std::string stream =
      ": a comment\nevent: x\ndata: {\"a\": 1}\r\n\r\ndata:two\n\nid: 3\ndata: [DONE]\n\n";
  for (size_t size = 1; size <= stream.size(); ++size) {
    SseParser parser;
    std::vector<std::string> events;
    for (size_t at = 0; at < stream.size(); at += size) {
      parser.Push(std::string_view(stream).substr(at, size),
                  [&](std::string_view data) { events.emplace_back(data); });
    }
    EXPECT_THAT(events, ElementsAre("{\"a\": 1}", "two", "[DONE]")) << size;
  }
}

TEST(HttpUrl, TakesHostPortAndPath) {
  const auto url = ParseHttpUrl("--url", "http://host:8080/v1/");
  ASSERT_OK(url);
  EXPECT_EQ(url->Origin(), "http://host:8080");
  EXPECT_EQ(url->path, "/v1");
  EXPECT_EQ(ParseHttpUrl("--url", "http://host")->port, 80);
  EXPECT_EQ(ParseHttpUrl("--url", "http://[::1]:1/v1")->host, "::1");
  for (const char* wrong : {"", "host:80", "https://host", "http://", "http://host:port/v1"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(ParseHttpUrl("--url", wrong).status())) << wrong;
  }
}

std::string Event(const json& data) { return "data: " + data.dump() + "\n\n"; }
std::string Delta(const std::string& text) {
  const json choice = {{"delta", {{"content", text}}}};
  return Event({{"choices", json::array({choice})}});
}

// Answers every chat with what the test says, piece by piece.
class OpenAiServer {
 public:
  OpenAiServer() {
    server_.Get("/v1/models", [](const httplib::Request&, httplib::Response& response) {
      response.set_content(R"({"data": [{"id": "m", "max_model_len": 4096}, {"id": "n"}]})",
                           "application/json");
    });
    server_.Post("/v1/chat/completions", [this](const httplib::Request& request,
                                                httplib::Response& response) {
      ports_.insert(request.remote_port);
      last_ = json::parse(request.body);
      authorization_ = request.get_header_value("Authorization");
      if (!last_.value("stream", false)) {
        if (count) {
          const json usage = {{"prompt_tokens", count(Text())}};
          response.set_content(json{{"usage", usage}}.dump(), "application/json");
        }
        return;
      }
      if (status != 200) {
        response.status = status;
        response.set_content(R"({"error": {"message": "too much"}})", "application/json");
        return;
      }
      response.set_chunked_content_provider("text/event-stream",
                                            [this](size_t, httplib::DataSink& sink) {
                                              for (const std::string& piece : pieces) {
                                                if (!sink.write(piece.data(), piece.size()))
                                                  return false;
                                              }
                                              const auto waited = hang;
                                              if (waited) waited->WaitForNotification();
                                              sink.done();
                                              return true;
                                            });
    });
    port_ = server_.bind_to_any_port("127.0.0.1");
    thread_ = std::thread([this] { server_.listen_after_bind(); });
    while (!server_.is_running()) std::this_thread::yield();
  }
  ~OpenAiServer() {
    server_.stop();
    thread_.join();
  }
  OpenAiBenchClientOptions Options() const {
    OpenAiBenchClientOptions options;
    options.url = *ParseHttpUrl("--url", "http://127.0.0.1:" + std::to_string(port_) + "/v1");
    options.api_key = "secret";
    return options;
  }
  // Once it has been answered.
  const json& last() const { return last_; }
  std::string Text() const { return last_["messages"][0]["content"]; }
  const std::string& authorization() const { return authorization_; }
  size_t connections() const { return ports_.size(); }

  int status = 200;
  // What is said of a text whose answer is not streamed; without it nothing.
  std::function<int(const std::string&)> count;
  std::vector<std::string> pieces;
  // Before the end of an answer; whoever waits keeps it.
  std::shared_ptr<absl::Notification> hang;

 private:
  httplib::Server server_;
  int port_ = 0;
  json last_;
  std::string authorization_;
  std::set<int> ports_;
  std::thread thread_;
};

// One request, as the runner sends it.
struct Asked {
  RequestRecord record;
  std::vector<uint32_t> answer;
};
class OpenAiBenchClientTest : public testing::Test {
 protected:
  Asked Ask(
      OpenAiBenchClient* client, std::vector<uint32_t> prompt,
      const std::function<void()>& meanwhile = [] {}, absl::Duration timeout = absl::Seconds(60),
      const std::string& salt = "salt") {
    Asked asked;
    absl::Notification ended;
    BenchRequest request{std::move(prompt), 3, salt, timeout};
    RequestRecord record;
    record.prompt_tokens = static_cast<int>(request.prompt.size());
    client->Start(request,
                  std::make_shared<Recorder>(record, Clock::Real(), &tokens_,
                                             [&](RequestRecord done, std::vector<uint32_t> answer) {
                                               asked = {std::move(done), std::move(answer)};
                                               ended.Notify();
                                             }));
    meanwhile();
    ended.WaitForNotification();
    return asked;
  }

  OpenAiServer server_;
  std::atomic<int64_t> tokens_ = 0;
};

TEST_F(OpenAiBenchClientTest, NamesTheModel) {
  OpenAiBenchClient first(server_.Options());
  const auto model = first.Describe();
  ASSERT_OK(model);
  EXPECT_EQ(model->id, "m");
  EXPECT_EQ(model->max_model_len, 4096u);
  OpenAiBenchClientOptions options = server_.Options();
  options.model = "n";
  EXPECT_EQ(OpenAiBenchClient(options).Describe()->max_model_len, 0u);
  options.model = "other";
  EXPECT_TRUE(absl::IsNotFound(OpenAiBenchClient(options).Describe().status()));
  options.url.path = "/elsewhere";
  EXPECT_TRUE(absl::IsNotFound(OpenAiBenchClient(options).Describe().status()));
  options.url.port = 1;
  EXPECT_TRUE(absl::IsUnavailable(OpenAiBenchClient(options).Describe().status()));
}

TEST_F(OpenAiBenchClientTest, StreamsAnAnswer) {
  server_.pieces = {
      Delta(""), Delta(" one") + Delta(" two"), Delta(" three"),
      R"(data: {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": 5, )"
      R"("prompt_tokens_details": {"cached_tokens": 8}}})"
      "\n\n",
      "data: [DONE]\n\n"};
  OpenAiBenchClient client(server_.Options());
  ASSERT_OK(client.Describe());
  const Asked asked = Ask(&client, {1, 2});
  EXPECT_OK(asked.record.status);
  EXPECT_EQ(asked.record.arrivals.size(), 3u);
  EXPECT_EQ(asked.record.output_tokens(), 5);  // as the server counts
  EXPECT_EQ(asked.record.prompt_tokens, 12);
  EXPECT_EQ(asked.record.usage.cached_tokens, 8);
  EXPECT_EQ(server_.authorization(), "Bearer secret");
  EXPECT_EQ(server_.last()["model"], "m");
  EXPECT_EQ(server_.last()["max_tokens"], 3);
  EXPECT_EQ(server_.last()["stream"], true);
  const std::string first = server_.Text();

  // What it said stands in the next prompt as it came.
  std::vector<uint32_t> next = {1, 2};
  next.insert(next.end(), asked.answer.begin(), asked.answer.end());
  Ask(&client, next);
  EXPECT_EQ(server_.Text(), first + " one two three");
}

// A tokenizer to which most words are more than a token, and most of those that begin a text one
// more; and a chat template of 20.
int CountTokens(const std::string& text) {
  int tokens = text[0] <= 'd' ? 20 : 21;
  for (const auto word : absl::StrSplit(text, ' ')) {
    tokens += word.size() <= 4 ? 1 : static_cast<int>(word.size()) - 2;
  }
  return tokens;
}

TEST_F(OpenAiBenchClientTest, PromptsAreAsLongAsTheyShouldBe) {
  server_.pieces = {"data: [DONE]\n\n"};
  const auto draw = [](size_t count) {
    std::vector<uint32_t> prompt(count);
    for (size_t i = 0; i < count; ++i) prompt[i] = static_cast<uint32_t>(i * 37);
    return prompt;
  };
  OpenAiBenchClient unknown(server_.Options());  // says nothing
  ASSERT_OK(unknown.Describe());
  Ask(&unknown, draw(200));
  EXPECT_GT(CountTokens(server_.Text()), 300);
  server_.count = CountTokens;
  OpenAiBenchClient client(server_.Options());
  const auto model = client.Describe();
  ASSERT_OK(model);
  EXPECT_LT(model->vocab_size, 40u);
  Ask(&client, draw(200));
  const std::string first = server_.Text();
  EXPECT_NEAR(CountTokens(first), 200, 1);
  // The next turn begins as this one.
  Ask(&client, draw(260));
  EXPECT_THAT(server_.Text(), testing::StartsWith(first));
  EXPECT_NEAR(CountTokens(server_.Text()), 260, 1);
  // What is hardly longer than the template keeps all its words.
  Ask(&client, draw(30));
  EXPECT_GE(CountTokens(server_.Text()), 20 + 30);
  // Where every word is one token all are kept.
  server_.count = [](const std::string& text) {
    return 5 + static_cast<int>(std::count(text.begin(), text.end(), ' ')) + 1;
  };
  OpenAiBenchClient usual(server_.Options());
  EXPECT_EQ(usual.Describe()->vocab_size, 64u);
  Ask(&usual, draw(100));
  EXPECT_NEAR(server_.count(server_.Text()), 100, 1);
}

TEST_F(OpenAiBenchClientTest, EachAnswerHasAConnectionOfItsOwn) {
  server_.pieces = {"data: [DONE]\n\n"};
  OpenAiBenchClient client(server_.Options());
  for (size_t i = 1; i <= 5; ++i) {
    EXPECT_OK(Ask(&client, {1}).record.status);
    EXPECT_EQ(server_.connections(), i);
  }
}

TEST_F(OpenAiBenchClientTest, RunsBeginWithWordsOfTheirOwn) {
  server_.pieces = {"data: [DONE]\n\n"};
  OpenAiBenchClient client(server_.Options());
  ASSERT_OK(client.Describe());
  const auto text_of = [&](const std::string& salt) {
    Ask(
        &client, {1, 2, 3}, [] {}, absl::Seconds(60), salt);
    return server_.Text();
  };
  EXPECT_EQ(text_of("one"), text_of("one"));
  std::set<std::string> texts;
  for (int i = 0; i < 50; ++i) texts.insert(text_of(std::to_string(i)));
  EXPECT_EQ(texts.size(), 50u);
}

TEST_F(OpenAiBenchClientTest, SaysWhyThereIsNoAnswer) {
  OpenAiBenchClient client(server_.Options());
  server_.status = 429;
  absl::Status status = Ask(&client, {1}).record.status;
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(status.ToString(), HasSubstr("HTTP 429: too much"));
  server_.status = 400;
  EXPECT_TRUE(absl::IsInvalidArgument(Ask(&client, {1}).record.status));
  server_.status = 200;
  server_.pieces = {Delta(" one")};  // and no end
  EXPECT_TRUE(absl::IsUnavailable(Ask(&client, {1}).record.status));
  server_.pieces = {"data: {\"error\": {\"message\": \"broken\"}}\n\n"};
  status = Ask(&client, {1}).record.status;
  EXPECT_TRUE(absl::IsInternal(status)) << status;
  EXPECT_THAT(status.ToString(), HasSubstr("broken"));
  server_.pieces = {"data: {not json\n\n"};
  EXPECT_TRUE(absl::IsInternal(Ask(&client, {1}).record.status));
  // After all that the connection, or a new one, still serves.
  server_.pieces = {Delta(" one"), "data: [DONE]\n\n"};
  EXPECT_OK(Ask(&client, {1}).record.status);
}

TEST_F(OpenAiBenchClientTest, EndsWhatIsStoppedOrLate) {
  OpenAiBenchClient client(server_.Options());
  server_.pieces = {Delta(" one")};
  const auto hang = std::make_shared<absl::Notification>();
  server_.hang = hang;
  // No whole milliseconds: the end of the wait may not be taken for an end of the connection.
  const absl::Status late = Ask(
                                &client, {1}, [] {}, absl::Microseconds(200900))
                                .record.status;
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  const absl::Status stopped = Ask(&client, {1}, [&] {
                                 // Until it is under way: what has not begun is dropped as well.
                                 while (tokens_ < 2) std::this_thread::yield();
                                 client.CancelAll();
                               }).record.status;
  EXPECT_TRUE(absl::IsCancelled(stopped)) << stopped;
  hang->Notify();
}

}  // namespace
}  // namespace tandem::cli
