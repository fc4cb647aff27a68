// A benchmark's client of any OpenAI server: chat completions, streamed as server-sent events over
// plain HTTP.
//
// Such a server takes text and has a tokenizer that is not known here, so each token of a workload
// becomes a short common word. Describe asks what the server counts of them: those that it takes as
// one token each are used, and prompts are shorter by what its chat template adds, so that they
// have the length that they should have. What the server counts is what is reported. What it
// answers goes into a conversation's next prompt as it came. Instead of a cache salt every prompt
// begins with words that stand for it.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "cli/bench/bench_client.h"
#include "cli/http_url.h"

namespace httplib {
class Client;
}

namespace tandem::cli {

struct OpenAiBenchClientOptions {
  HttpUrl url;        // of what stands before /chat/completions
  std::string model;  // "": the first that the server names
  std::string api_key;
  double temperature = 0;
  bool ignore_eos = true;  // an extension that vLLM and llama.cpp have
};

// A thread and a connection for each answer that is under way; threads are used again.
class OpenAiBenchClient final : public BenchClient {
 public:
  explicit OpenAiBenchClient(OpenAiBenchClientOptions options);
  ~OpenAiBenchClient() override;

  absl::StatusOr<BenchModel> Describe() override;
  void Start(const BenchRequest& request, std::shared_ptr<AnswerSink> sink) override;
  void CancelAll() override;

 private:
  class Connection;
  struct Job {
    std::string body;
    absl::Time deadline;
    std::shared_ptr<AnswerSink> sink;
  };

  // What the server counts as the tokens of a prompt with this text; null if it does not say.
  std::optional<int64_t> CountTokens(httplib::Client* http, const std::string& text) const;
  // Chooses the words and finds what the template adds; leaves both as they are if the server does
  // not count.
  void LearnTokens(httplib::Client* http);
  std::string BodyOf(const BenchRequest& request) ABSL_LOCKS_EXCLUDED(mutex_);
  // The id of a piece of an answer's text: it stands for it in later prompts.
  uint32_t IdOf(const std::string& text) ABSL_LOCKS_EXCLUDED(mutex_);
  void Run(Connection* connection);
  bool HasJob() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !jobs_.empty() || stopping_; }

  const OpenAiBenchClientOptions options_;
  // Constant after Describe.
  std::string model_;
  std::vector<std::string_view> words_;
  size_t template_tokens_ = 0;

  absl::Mutex mutex_;
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);
  size_t idle_ ABSL_GUARDED_BY(mutex_) = 0;  // connections
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::string> pieces_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, uint32_t> ids_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::unique_ptr<Connection>> connections_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace tandem::cli
