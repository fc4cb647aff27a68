#include "cli/bench/openai_bench_client.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <span>

#include "absl/time/clock.h"
#include "nlohmann/json.hpp"

#include "cli/bench/sse_parser.h"
#include "common/base/status.h"
#include "httplib.h"

namespace tandem::cli {
namespace {

using nlohmann::json;

// Of a workload's tokens; ids of pieces of answers lie above all of them.
constexpr uint32_t kFirstPiece = 1u << 31;
constexpr size_t kMostOfError = 300;  // characters of what a server says of one
constexpr size_t kSaltWords = 6;
// With fewer the words of a salt would hardly tell runs apart.
constexpr size_t kLeastWords = 8;
constexpr int kRepeats = 8;  // of a word whose tokens are counted

constexpr std::array<std::string_view, 64> kWords = {
    "time",     "year",    "people",   "way",    "day",        "man",    "thing",   "woman",
    "life",     "child",   "world",    "school", "state",      "family", "student", "group",
    "country",  "problem", "hand",     "part",   "place",      "case",   "week",    "company",
    "system",   "program", "question", "work",   "government", "number", "night",   "point",
    "home",     "water",   "room",     "mother", "area",       "money",  "story",   "fact",
    "month",    "lot",     "right",    "study",  "book",       "eye",    "job",     "word",
    "business", "issue",   "side",     "kind",   "head",       "house",  "service", "friend",
    "father",   "power",   "hour",     "game",   "line",       "end",    "member",  "law"};

absl::StatusCode CodeOf(int http_status) {
  switch (http_status) {
    case 400:
    case 413:
    case 422:
      return absl::StatusCode::kInvalidArgument;
    case 401:
      return absl::StatusCode::kUnauthenticated;
    case 403:
      return absl::StatusCode::kPermissionDenied;
    case 404:
      return absl::StatusCode::kNotFound;
    case 429:
      return absl::StatusCode::kResourceExhausted;
    case 502:
    case 503:
    case 504:
      return absl::StatusCode::kUnavailable;
    default:
      return http_status >= 500 ? absl::StatusCode::kInternal : absl::StatusCode::kUnknown;
  }
}

absl::Status HttpStatus(int status, const std::string& body) {
  std::string why = body;
  const json told = json::parse(body, nullptr, /*allow_exceptions=*/false);
  if (told.is_object() && told.contains("error")) {
    const json& error = told["error"];
    const bool says =
        error.is_object() && error.contains("message") && error["message"].is_string();
    why = says ? error["message"].get<std::string>() : error.dump();
  }
  return absl::Status(CodeOf(status), fmt::format("HTTP {}: {}", status,
                                                  std::string_view(why).substr(0, kMostOfError)));
}

void AppendWord(std::string_view word, std::string* text) {
  if (!text->empty()) *text += ' ';
  *text += word;
}

httplib::Headers HeadersOf(const OpenAiBenchClientOptions& options) {
  httplib::Headers headers;
  if (!options.api_key.empty()) headers.emplace("Authorization", "Bearer " + options.api_key);
  return headers;
}

}  // namespace

// One connection, and the thread that has it.
class OpenAiBenchClient::Connection {
 public:
  Connection(OpenAiBenchClient* client, const HttpUrl& url) : http_(url.Origin()) {
    // llama.cpp's server does not read what comes behind a stream on its connection, and closes it
    // after five seconds; others might just have closed what has been idle.
    http_.set_keep_alive(false);
    http_.set_tcp_nodelay(true);
    thread_ = std::thread([client, this] { client->Run(this); });
  }
  ~Connection() { thread_.join(); }

  void Ask(OpenAiBenchClient* client, const Job& job);
  // Any thread: ends the answer that is under way.
  void Cancel() {
    cancelled_ = true;
    http_.stop();
  }

 private:
  // Whether the stream is to be read on.
  bool OnPiece(OpenAiBenchClient* client, const Job& job, std::string_view piece);
  void OnEvent(OpenAiBenchClient* client, const Job& job, std::string_view data);
  // Throws where a field is of another kind than it should be.
  void ReadEvent(OpenAiBenchClient* client, const Job& job, const json& event);

  httplib::Client http_;
  std::atomic<bool> cancelled_ = false;
  // Of the answer under way; the thread's.
  SseParser events_;
  AnswerUsage usage_;
  absl::Status failed_;
  int status_ = 0;
  bool complete_ = false;
  std::string error_body_;
  std::thread thread_;
};

void OpenAiBenchClient::Connection::Ask(OpenAiBenchClient* client, const Job& job) {
  cancelled_ = false;
  events_ = {};
  usage_ = {};
  failed_ = absl::OkStatus();
  status_ = 0;
  complete_ = false;
  error_body_.clear();
  httplib::Request request;
  request.method = "POST";
  request.path = client->options_.url.path + "/chat/completions";
  request.headers = HeadersOf(client->options_);
  request.set_header("Content-Type", "application/json");
  request.body = job.body;
  request.response_handler = [this](const httplib::Response& response) {
    status_ = response.status;
    return true;
  };
  request.content_receiver = [&](const char* data, size_t size, uint64_t, uint64_t) {
    return OnPiece(client, job, {data, size});
  };
  // The library waits whole milliseconds, rounded down, and for each piece anew: one more, so that
  // what ends a wait lies behind the deadline.
  const absl::Duration left =
      std::max(job.deadline - absl::Now(), absl::ZeroDuration()) + absl::Milliseconds(1);
  http_.set_connection_timeout(absl::ToChronoMicroseconds(left));
  http_.set_read_timeout(absl::ToChronoMicroseconds(left));
  httplib::Response response;
  httplib::Error error = httplib::Error::Success;
  const bool sent = http_.send(request, response, error);
  absl::Status status = failed_;
  if (status.ok() && status_ != 0 && status_ != 200) status = HttpStatus(status_, error_body_);
  if (status.ok() && !complete_) {
    if (cancelled_) {
      status = Cancelled("the client stopped");
    } else if (absl::Now() >= job.deadline) {
      status = DeadlineExceeded("no whole answer in the time that is allowed");
    } else {
      status = Unavailable("the answer broke off: {}",
                           sent ? "its last event is missing" : httplib::to_string(error));
    }
  }
  job.sink->OnEnd(status, usage_);
}

bool OpenAiBenchClient::Connection::OnPiece(OpenAiBenchClient* client, const Job& job,
                                            std::string_view piece) {
  if (status_ != 200) {
    if (error_body_.size() < (1 << 16)) error_body_ += piece;
    return true;
  }
  events_.Push(piece, [&](std::string_view data) { OnEvent(client, job, data); });
  return failed_.ok() && !cancelled_ && (complete_ || absl::Now() < job.deadline);
}

void OpenAiBenchClient::Connection::OnEvent(OpenAiBenchClient* client, const Job& job,
                                            std::string_view data) {
  if (data == "[DONE]") {
    complete_ = true;
    return;
  }
  const json event = json::parse(data, nullptr, /*allow_exceptions=*/false);
  if (!event.is_object()) {
    failed_ = Internal("an event of the stream is no JSON object");
    return;
  }
  if (event.contains("error")) {
    failed_ = HttpStatus(500, event.dump());
    return;
  }
  try {
    ReadEvent(client, job, event);
  } catch (const json::exception& error) {
    failed_ = Internal("an event of the stream is none of a chat completion: {}", error.what());
  }
}

void OpenAiBenchClient::Connection::ReadEvent(OpenAiBenchClient* client, const Job& job,
                                              const json& event) {
  if (const auto usage = event.find("usage"); usage != event.end() && usage->is_object()) {
    usage_.prompt_tokens = usage->value("prompt_tokens", 0);
    usage_.output_tokens = usage->value("completion_tokens", 0);
    const auto details = usage->find("prompt_tokens_details");
    if (details != usage->end() && details->is_object()) {
      usage_.cached_tokens = details->value("cached_tokens", 0);
    }
  }
  const auto choices = event.find("choices");
  if (choices == event.end() || !choices->is_array() || choices->empty()) return;
  const json delta = choices->front().value("delta", json::object());
  for (const char* part : {"reasoning_content", "content"}) {
    const auto text = delta.find(part);
    if (text == delta.end() || !text->is_string() || text->get_ref<const std::string&>().empty()) {
      continue;
    }
    const uint32_t id = client->IdOf(text->get<std::string>());
    job.sink->OnTokens({&id, 1});
  }
}

OpenAiBenchClient::OpenAiBenchClient(OpenAiBenchClientOptions options)
    : options_(std::move(options)), model_(options_.model), words_(kWords.begin(), kWords.end()) {}

OpenAiBenchClient::~OpenAiBenchClient() {
  CancelAll();
  std::vector<std::unique_ptr<Connection>> connections;
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
    connections.swap(connections_);
  }
}

absl::StatusOr<BenchModel> OpenAiBenchClient::Describe() {
  httplib::Client http(options_.url.Origin());
  http.set_connection_timeout(std::chrono::seconds(10));
  http.set_read_timeout(std::chrono::seconds(10));
  const httplib::Result result = http.Get(options_.url.path + "/models", HeadersOf(options_));
  if (!result) {
    return Unavailable("no answer from {}: {}", options_.url.Origin(),
                       httplib::to_string(result.error()));
  }
  if (result->status != 200) return HttpStatus(result->status, result->body);
  const json models = json::parse(result->body, nullptr, /*allow_exceptions=*/false);
  if (!models.is_object() || !models.contains("data") || !models["data"].is_array()) {
    return Internal("{}/models names no models; is it the URL of an OpenAI server, with /v1?",
                    options_.url.path);
  }
  for (const json& model : models["data"]) {
    if (!model.is_object() || !model.contains("id") || !model["id"].is_string()) continue;
    const std::string id = model["id"];
    if (!options_.model.empty() && id != options_.model) continue;
    model_ = id;
    // Each count is a prompt that is computed, perhaps on a CPU and behind others.
    http.set_read_timeout(std::chrono::minutes(5));
    LearnTokens(&http);
    const auto length = model.find("max_model_len");  // as vLLM says it
    const bool told = length != model.end() && length->is_number_unsigned();
    return BenchModel{id, static_cast<uint32_t>(words_.size()), told ? length->get<uint32_t>() : 0};
  }
  return NotFound("model '{}' is not served", options_.model);
}

std::optional<int64_t> OpenAiBenchClient::CountTokens(httplib::Client* http,
                                                      const std::string& text) const {
  const json message = {{"role", "user"}, {"content", text}};
  const json body = {{"model", model_}, {"messages", json::array({message})}, {"max_tokens", 1}};
  const httplib::Result result = http->Post(options_.url.path + "/chat/completions",
                                            HeadersOf(options_), body.dump(), "application/json");
  if (!result || result->status != 200) return std::nullopt;
  const json told = json::parse(result->body, nullptr, /*allow_exceptions=*/false);
  const json::json_pointer tokens("/usage/prompt_tokens");
  if (!told.is_object() || !told.contains(tokens) || !told[tokens].is_number_integer()) {
    return std::nullopt;
  }
  return told[tokens].get<int64_t>();
}

void OpenAiBenchClient::LearnTokens(httplib::Client* http) {
  // Behind a word: without a space before it a word may be other tokens.
  const auto count = [&](std::span<const std::string_view> words, int times) {
    std::string text(kWords[0]);
    for (int i = 0; i < times; ++i) {
      for (const std::string_view word : words) AppendWord(word, &text);
    }
    return CountTokens(http, text);
  };
  const std::optional<int64_t> once = count(kWords, 1);
  const std::optional<int64_t> twice = count(kWords, 2);
  if (!once || !twice) return;
  const int64_t all_words = *twice - *once;
  template_tokens_ = static_cast<size_t>(std::max<int64_t>(*once - all_words - 1, 0));
  if (all_words == static_cast<int64_t>(kWords.size())) return;
  std::vector<std::string_view> short_ones;
  int64_t least = 0;
  for (const std::string_view& word : kWords) {
    const std::optional<int64_t> tokens = count({&word, 1}, kRepeats);
    if (!tokens) return;
    if (short_ones.empty() || *tokens < least) {
      short_ones.clear();
      least = *tokens;
    }
    if (*tokens == least) short_ones.push_back(word);
  }
  if (short_ones.size() >= kLeastWords) words_ = std::move(short_ones);
}

std::string OpenAiBenchClient::BodyOf(const BenchRequest& request) {
  std::string text;
  size_t salt = std::hash<std::string>{}(request.cache_salt);
  for (size_t i = 0; i < kSaltWords; ++i) {
    AppendWord(words_[salt % words_.size()], &text);
    salt /= words_.size();
  }
  // The first tokens, so that a conversation's next prompt begins as this one does. What is hardly
  // longer than the template stays whole.
  const size_t added = kSaltWords + template_tokens_;
  const size_t replaced = request.prompt.size() >= 2 * added ? added : 0;
  {
    absl::MutexLock lock(&mutex_);
    for (const uint32_t id : std::span(request.prompt).subspan(replaced)) {
      if (id >= kFirstPiece) {
        text += pieces_[id - kFirstPiece];
      } else {
        AppendWord(words_[id % words_.size()], &text);
      }
    }
  }
  const json message = {{"role", "user"}, {"content", text}};
  const json body = {{"model", model_},
                     {"messages", json::array({message})},
                     {"max_tokens", request.output_tokens},
                     {"temperature", options_.temperature},
                     {"ignore_eos", options_.ignore_eos},
                     {"stream", true},
                     {"stream_options", {{"include_usage", true}}}};
  // A server's text may be cut in the midst of a character.
  return body.dump(-1, ' ', false, json::error_handler_t::replace);
}

uint32_t OpenAiBenchClient::IdOf(const std::string& text) {
  absl::MutexLock lock(&mutex_);
  const auto [place, added] =
      ids_.emplace(text, kFirstPiece + static_cast<uint32_t>(pieces_.size()));
  if (added) pieces_.push_back(text);
  return place->second;
}

void OpenAiBenchClient::Start(const BenchRequest& request, std::shared_ptr<AnswerSink> sink) {
  Job job{BodyOf(request), absl::Now() + request.timeout, std::move(sink)};
  absl::MutexLock lock(&mutex_);
  jobs_.push_back(std::move(job));
  if (jobs_.size() > idle_) {
    connections_.push_back(std::make_unique<Connection>(this, options_.url));
  }
}

void OpenAiBenchClient::Run(Connection* connection) {
  while (true) {
    Job job;
    {
      absl::MutexLock lock(&mutex_);
      ++idle_;
      mutex_.Await(absl::Condition(this, &OpenAiBenchClient::HasJob));
      --idle_;
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    connection->Ask(this, job);
  }
}

void OpenAiBenchClient::CancelAll() {
  std::deque<Job> dropped;
  {
    absl::MutexLock lock(&mutex_);
    dropped.swap(jobs_);
    for (const auto& connection : connections_) connection->Cancel();
  }
  for (const Job& job : dropped) job.sink->OnEnd(Cancelled("the client stopped"), {});
}

}  // namespace tandem::cli
